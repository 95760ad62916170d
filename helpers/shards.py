"""One share of a run's sweeps, in a process of its own: on one machine `./run_all.sh --shards N` starts them, on a
cluster `helpers.cluster`.

`python -m helpers.shards PARAMETERS SHARD N NOTEBOOKS` measures every N-th batch from batch SHARD on of all sweeps that the
NOTEBOOKS (02,03) of the run with the JSON object PARAMETERS ask for. What exists is skipped, so it may be stopped
and started again at any time.
"""

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from helpers import execute, relatives, study, sweeps
from helpers.errors import InputError
from helpers.study import Study


def asked_for(this: Study, parameters: Mapping[str, Any], notebooks: Sequence[str]) -> Iterator[tuple[Study, str]]:
    """The sweeps of the notebooks, each with the study that it is of: the run's own, or a relative of its model."""
    if "02" in notebooks:
        yield this, "layers"
        if this.of("T2", "T2b"):
            yield this, "whole answers"
    if "03" in notebooks:
        yield this, "modules"
    if "02" in notebooks:
        for _, relative in relatives.family(this, parameters["MODEL"], parameters["PROFILE"]):
            yield relative, "layers with direct effects"


def work(parameters: Mapping[str, Any], shard: int, n_shards: int, notebooks: Sequence[str]) -> str:
    """Measure one shard of every sweep; returns a sentence on how much was measured and how much was there."""
    names = {"device": "DEVICE", "dtype": "DTYPE", "profile": "PROFILE", "pairs": "PAIRS"}
    settings = {name: parameters[key] for name, key in names.items()}
    this = study.begin(parameters["MODEL"], parameters["PROMPTS"], parameters["SLUG"], **settings)
    made, found = 0, 0
    for one, name in asked_for(this, parameters, notebooks):
        measured, skipped = sweeps.run_shard(one, name, shard, n_shards)
        made, found = made + measured, found + skipped
    return f"shard {shard + 1} of {n_shards}: {made} batches measured, {found} were there"


if __name__ == "__main__":
    if execute.has_runner():
        threading.Thread(target=execute.end_with_the_runner, daemon=True).start()
    try:
        settings, shard, n_shards, numbers = sys.argv[1:]
        print(work(json.loads(settings), int(shard), int(n_shards), numbers.split(",")))
    except InputError as error:
        sys.exit(" ".join(str(error).split()))

"""Work beside a notebook: the same results, errors that say what happened, and no process that outlives its owner."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TypeVar

import pandas as pd
import pytest

from helpers import beside, mediation, paths, study
from helpers.errors import InputError
from helpers.study import Study

T = TypeVar("T")


@pytest.fixture(scope="module")
def large() -> Study:
    return study.begin("embedded", "embedded", "x", pairs=40)


def layer_effects(this: Study) -> pd.DataFrame:
    """Effects of a few pairs."""
    return mediation.effects(
        this.subject, this.of("T2")[:4], this.openers, mediation.mediators(this.subject, ["resid_post"])
    )


def begun(later: beside.Later[T]) -> beside.Later[T]:
    """The same, once the other process has it: before that it would be computed here."""
    assert later.there is not None
    while not (later.there.running() or later.there.done()):
        time.sleep(0.01)
    return later


def process() -> int:
    """Which process this is computed in."""
    return os.getpid()


def refuse(why: str) -> None:
    """A helper that finds a mistake of the user."""
    raise InputError(why)


def die() -> None:
    """What the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(beside.SWITCH, raising=False)
    monkeypatch.setattr(beside, "_processors", lambda: 2)


@pytest.mark.usefixtures("two")
def test_another_process_gives_the_same_bits(large: Study) -> None:
    where = begun(beside.start(large, process))
    there = begun(beside.start(large, layer_effects, large))
    pd.testing.assert_frame_equal(there.result, layer_effects(large), check_exact=True)
    assert where.result != os.getpid()


@pytest.mark.usefixtures("two")
def test_what_still_waits_when_it_is_read_is_computed_here(large: Study) -> None:
    busy = begun(beside.start(large, time.sleep, 1))
    waiting = beside.start(large, process)
    assert waiting.result == os.getpid() and waiting.result == os.getpid(), "read twice, computed once"
    assert busy.result is None


@pytest.mark.usefixtures("two")
def test_who_waits_does_the_last_in_the_line_meanwhile(large: Study) -> None:
    busy = begun(beside.start(large, time.sleep, 1))
    first, last = beside.start(large, process), beside.start(large, process)
    wrong = beside.start(large, refuse, "no wrapper: supply one")
    assert busy.result is None, "an error of what is done meanwhile is not this one's"
    assert last.here.result() == last.result == first.result == os.getpid()
    with pytest.raises(InputError, match="no wrapper: supply one"):
        _ = wrong.result


@pytest.mark.usefixtures("two")
def test_an_error_arrives_with_its_own_words(large: Study) -> None:
    with pytest.raises(InputError, match="no wrapper: supply one"):
        _ = begun(beside.start(large, refuse, "no wrapper: supply one")).result


@pytest.mark.usefixtures("two")
def test_a_process_that_dies_is_named_and_replaced(large: Study) -> None:
    dead = begun(beside.start(large, die))
    with pytest.raises(InputError, match=f"enough memory.*{beside.SWITCH}=0"):
        _ = dead.result
    assert begun(beside.start(large, process)).result != os.getpid(), "the next call has a new process"


@pytest.mark.usefixtures("two")
def test_what_is_handed_over_is_a_copy_as_of_now(large: Study) -> None:
    weights = large.subject.model.get_input_embeddings().weight
    before = layer_effects(large)
    later = begun(beside.start(large, layer_effects, large))
    kept = weights.data.clone()
    weights.data.mul_(0.5)
    try:
        pd.testing.assert_frame_equal(later.result, before, check_exact=True)
    finally:
        weights.data.copy_(kept)


def test_one_processor_or_the_switch_or_few_pairs_keep_all_in_one_process(
    large: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_processors", lambda: 2)
    monkeypatch.delenv(beside.SWITCH, raising=False)
    assert beside.pays(large)
    assert not beside.pays(replace(large, pairs=large.pairs[: beside.MANY_PAIRS - 1]))
    monkeypatch.setenv(beside.SWITCH, "0")
    assert not beside.pays(large)
    later = beside.start(large, process)
    assert later.there is None and later.result == os.getpid()
    monkeypatch.setenv(beside.SWITCH, "1")
    monkeypatch.setattr(beside, "_processors", lambda: 1)
    assert not beside.pays(large)


OWNER = """
import sys, time
from helpers import beside, study
sys.path.insert(0, "tests")
from test_beside import begun, process
beside._processors = lambda: 2
this = study.begin("embedded", "embedded", "x", pairs=40)
print(begun(beside.start(this, process)).result, flush=True)
beside.start(this, time.sleep, 600)
time.sleep(600)
"""


def test_the_second_process_ends_with_its_owner() -> None:
    environment = {**os.environ, beside.SWITCH: "1", "PYTHONPATH": str(paths.ROOT)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=paths.ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    second = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    for _ in range(100):
        try:
            os.kill(second, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(second, signal.SIGKILL)
    pytest.fail("the second process computes on although nobody waits for it")

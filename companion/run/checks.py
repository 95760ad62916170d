"""`./run_all.sh --test`: every check, one after another, however the ones before went; a table of times at the end."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from companion.base.files import read_json
from companion.base.paths import NOTEBOOKS, RESULTS, ROOT, relative
from companion.run import notebooks, runner
from companion.run.freshness import processor

RTOL, ATOL = 1e-3, 1e-4  # of committed numbers: other processors round differently in the fifth digit


_SIZE = 1 << 20


# These tell of one run, not of what it found.
NOT_COMPARED = ("manifest.json", "run_times.json", "chunks.json")


STYLE = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}


UNIT = ("unit tests and doctests", ["pytest", "--quiet"])


NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with=tests/nbval_sanitize.cfg", "--quiet"]


def run_all() -> int:
    """Exit status: 1 if any check failed."""
    # One thread: unit tests are many small products, and threads that wait for each other cost more than they help.
    unseen = notebooks.quiet() | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    # The notebooks write into a scratch folder, so that the committed results stay what they are compared with.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        scratch = Path(folder).resolve()
        # Unit tests use one core, and take as long as all else.
        units = pool.submit(_aside, *UNIT, unseen, scratch / "unit.log")
        outcomes = [_step(name, command, unseen) for name, command in STYLE.items()]
        results, figures = scratch / "results", scratch / "figures"
        variables = notebooks.environment(results, figures, scratch) | notebooks.threads("embedded")
        for path in runner.find_notebooks(NOTEBOOKS, runner.NEEDS).values():
            outcomes.append(_step(f"nbval {path.stem}", ["pytest", *NBVAL, str(path)], variables))
        outcomes.append(compare(results))
        print(f"\n== {UNIT[0]}", flush=True)
        outcomes.append(units.result())
        print((scratch / "unit.log").read_text(encoding="utf-8"), flush=True)
    return _report(outcomes)


Outcome = tuple[str, bool, float]  # name, whether it passed, seconds


def _step(name: str, module: list[str], variables: dict[str, str]) -> Outcome:
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *module], cwd=ROOT, env=variables, check=False)
    return name, done.returncode == 0, time.monotonic() - start


def _aside(name: str, module: list[str], variables: dict[str, str], log: Path) -> Outcome:
    """A step beside others, which writes what it has to say into a file."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", *module]
        done = subprocess.run(command, cwd=ROOT, env=variables, check=False, stdout=file, stderr=subprocess.STDOUT)
    return name, done.returncode == 0, time.monotonic() - start


def compare(fresh: Path) -> Outcome:
    """Whether the committed tables say what the notebooks just found.

    On another kind of processor than that of the committed results, last bits turn ties and the t-values of cells that
    are noise around 0. There all differences are shown, and only the verdicts decide.
    """
    print("\n== committed results against those just made", flush=True)
    start = time.monotonic()
    differences = [line for path in committed_tables(RESULTS) for line in _differences(path, fresh)]
    print("\n".join(differences) or "the same")
    made_on, here = read_json(RESULTS / "embedded" / "manifest.json").get("processor"), processor()
    passed = not differences
    if differences and made_on != here:
        print(f"committed results are from another processor ({made_on}; here {here}): only verdicts are compared")
        passed = verdicts(RESULTS / "claims.json") == verdicts(fresh / "claims.json")
    return "committed results", passed, time.monotonic() - start


def verdicts(claims: Path) -> dict[tuple[str, str], str]:
    """The verdicts of a `claims.json` by model and claim; empty where there is none."""
    rows = json.loads(claims.read_text(encoding="utf-8")) if claims.is_file() else []
    return {(row["model"], row["claim"]): row["verdict"] for row in rows}


def committed_tables(results: Path) -> list[Path]:
    """The small tables of the default run and the claims, which are under version control."""
    found = [*results.glob("*.csv"), *results.glob("embedded/*.csv"), *results.glob("embedded/*.json")]
    kept = [path for path in found if path.name not in NOT_COMPARED and path.stat().st_size < _SIZE]
    return sorted(kept)


def _differences(committed: Path, fresh: Path) -> list[str]:
    other = fresh / committed.relative_to(RESULTS)
    if not other.is_file():
        return [f"{relative(committed)}: no notebook made it again"]
    found = list(unequal(_values(committed), _values(other)))
    more = [f"  and {len(found) - 5} more places"] if len(found) > 5 else []
    return [f"{relative(committed)}: {line}" for line in found[:5]] + more


def _values(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def unequal(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Places at which two JSON-like values differ by more than the tolerance; text that is a number counts as one.

    >>> list(unequal([{"te": "1.00001", "site": "head"}], [{"te": "1.0", "site": "head"}]))
    []
    >>> list(unequal([{"te": "1.01"}], [{"te": "1.0"}]))
    ['[0].te is 1.01, now 1.0']
    """
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for name in old:
            yield from unequal(old[name], new[name], f"{where}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from unequal(*pair, f"{where}[{index}]")
    elif not _same(old, new):
        yield f"{where.lstrip('.')} is {_short(old)}, now {_short(new)}"


def _same(old: Any, new: Any) -> bool:
    try:
        return old == new or math.isclose(float(new), float(old), rel_tol=RTOL, abs_tol=ATOL)
    except (TypeError, ValueError):
        return False


def _short(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list | dict) else str(value)


def _report(outcomes: list[Outcome]) -> int:
    print("\n== times")
    for name, passed, seconds in outcomes:
        print(f"{name:<28}{seconds:7.0f} s  {'passed' if passed else 'FAILED'}")
    print(f"{'together':<28}{sum(seconds for *_, seconds in outcomes):7.0f} s")
    failed = [name for name, passed, _ in outcomes if not passed]
    print(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0

"""`./run_all.sh --test`: every check, however the others went, with a table of times; and the lock that they rest on.

`python -m companion.run.checks` makes `requirements.lock` anew from `requirements.in` with `uv`; versions that are locked stay
unless uv is told otherwise, as in `python -m companion.run.checks --upgrade-package pandas`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pandas as pd
from packaging.markers import Marker

from companion.base import smollm2
from companion.base.display import STRICT
from companion.base.errors import InputError
from companion.base.files import read_json, write_text
from companion.base.paths import NOTEBOOKS, RESULTS, ROOT, relative
from companion.run import notebooks, runner
from companion.run.freshness import processor

RTOL, ATOL = 1e-3, 1e-4  # of committed numbers: other processors round differently in the fifth digit
ON_A_DEVICE = "tests/test_standin_notebooks.py"
STEPS = {
    "unit tests and doctests": ["pytest", "--quiet", f"--ignore={ON_A_DEVICE}"],
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "notebooks, stand-in GPU": ["pytest", "--quiet", ON_A_DEVICE],
}
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with=tests/nbval_sanitize.cfg", "--quiet"]
LOCK = ROOT / "requirements.lock"
# torch's wheel for Linux brings these itself, and the CPU build has none of them.
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|triton")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # run_all.sh takes these
# Every Python that the lock may meet, as far as markers can tell them apart.
TARGETS = [
    {"python_full_version": f"{python}.{patch}", "python_version": python, "sys_platform": system, "os_name": name}
    | {"platform_machine": machine, "implementation_name": "cpython", "platform_python_implementation": "CPython"}
    for python, patch, (system, name), machine in product(
        PYTHONS, (0, 99), (("linux", "posix"), ("darwin", "posix"), ("win32", "nt")),
        ("x86_64", "AMD64", "aarch64", "arm64", "riscv64"),
    )
]  # fmt: skip
SOURCE_ONLY = "transformers-stream-generator"  # has no wheel, and nothing to compile
Outcome = tuple[str, bool, float]  # name, whether it passed, seconds


def run_all() -> int:
    """Exit status: 1 if any check failed. Without the default model the notebooks are checked on `embedded`."""
    asked, why = runner.DEFAULTS, ""
    try:
        smollm2.fetch_smollm2()
    except InputError as error:
        why = str(error)
        print(f"{why}: the notebooks are checked on the embedded model, and {asked['SLUG']} is not", flush=True)
        asked = asked | dict.fromkeys(("MODEL", "PROMPTS", "SLUG"), "embedded")
    # One thread: unit tests are many small products, and threads that wait for each other cost more than they help.
    unseen = notebooks.quiet() | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    # The notebooks write into a scratch folder, so that the committed results stay what they are compared with.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        scratch = Path(folder).resolve()
        variables = notebooks.environment(scratch) | notebooks.threads(asked["MODEL"]) | {STRICT: "1"}
        steps = [pool.submit(_step, name, command, unseen) for name, command in STEPS.items()]
        given = [word for name, value in asked.items() for word in ("-p", name, str(value))]
        options = ["--cwd", str(NOTEBOOKS), "-k", "python3", *given]
        read: dict[str, Future[Outcome]] = {}
        for number, path in runner.find_notebooks().items():
            needed = [read[need] for need in runner.NEEDS[number]]
            name, command = f"nbval {path.stem}", ["pytest", *NBVAL, str(path)]
            if why:
                name, command = f"run {path.stem}", ["papermill", str(path), str(scratch / path.name), *options]
            read[number] = pool.submit(_step, name, command, variables, needed)
        outcomes = [step.result() for step in (*steps, *read.values())]
        outcomes.append(compare(scratch / "results", asked["SLUG"]))
    if why and os.environ.get("CI"):
        outcomes.append((f"{smollm2.NAME} can be fetched", False, 0.0))
    print("\n== times")
    for name, passed, seconds in outcomes:
        print(f"{name:<28}{seconds:7.0f} s  {'passed' if passed else 'FAILED'}")
    print(f"{'together':<28}{sum(seconds for *_, seconds in outcomes):7.0f} s")
    failed = [name for name, passed, _ in outcomes if not passed]
    print(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    if why:
        print(f"not checked: the notebooks and results of {runner.DEFAULTS['SLUG']} ({why})")
    return int(bool(failed))


def _step(
    name: str, module: Sequence[str], variables: Mapping[str, str], needed: Sequence[Future[Outcome]] = ()
) -> Outcome:
    """Run a module once what it needs has ended, and print what it said in one piece; by itself it says what is missing."""
    for one in needed:
        one.result()
    start = time.monotonic()
    command = [sys.executable, "-m", *module]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"\n== {name}\n{done.stdout}", flush=True)
    return name, done.returncode == 0, time.monotonic() - start


def compare(fresh: Path, slug: str) -> Outcome:
    """Whether the committed tables say what the notebooks just found.

    On another kind of processor than that of the committed results, last bits turn ties and the t-values of cells that
    are noise around 0, and a sampled answer may flip. There all differences are shown, and only what a reader is told decides.
    """
    print("\n== committed results against those just made", flush=True)
    start = time.monotonic()
    tables = sorted(RESULTS.glob(f"{slug}/*.csv"))
    found = [(path, _difference(path, fresh / path.relative_to(RESULTS))) for path in tables]
    differences = [f"{relative(path)}: {line}" for path, line in found if line]
    print("\n".join(differences) or "the same")
    made_on, here = read_json(RESULTS / slug / "manifest.json").get("processor"), processor()
    passed = not differences
    if differences and made_on != here:
        print(f"committed results are from another processor ({made_on}; here {here}): only answers are compared")
        paths = [path for folder in (RESULTS, fresh) if (path := folder / slug / "claims.csv").is_file()]
        said = [pd.read_csv(path)[["model", "claim", "rule", "answer"]].fillna("") for path in paths]
        passed = len(said) == 2 and said[0].equals(said[1])
    return "committed results", passed, time.monotonic() - start


def _difference(committed: Path, fresh: Path) -> str:
    """Where two tables differ by more than the tolerance, in a line; "" if they do not."""
    if not fresh.is_file():
        return "no notebook made it again"
    try:
        pd.testing.assert_frame_equal(pd.read_csv(committed), pd.read_csv(fresh), rtol=RTOL, atol=ATOL)
    except AssertionError as error:
        return " ".join(str(error).split())[:500]
    return ""


def locked(lines: Sequence[str]) -> list[str]:
    """The lines of a universal lock that `PYTHONS` need, without markers that hold on all of them.

    >>> locked(["numpy==2.4.6 ; python_full_version < '3.15'", "numpy==2.5 ; python_full_version >= '3.15'"])
    ['numpy==2.4.6']
    >>> locked(["nvidia-nccl==2 ; sys_platform == 'linux'", "appnope==1 ; sys_platform == 'darwin'"])
    ["appnope==1 ; sys_platform == 'darwin'"]
    """
    kept = []
    for line in lines:
        pin, _, marker = line.partition(" ; ")
        holds = [Marker(marker).evaluate(target) for target in TARGETS] if marker else [True]
        if any(holds) and not LEFT_TO_TORCH.match(pin):
            kept.append(pin if all(holds) else line)
    return kept


def make_lock(options: Sequence[str]) -> int:
    """Resolve `requirements.in` and write what `PYTHONS` need of it, unless that would be compiled; the exit status of uv."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / LOCK.name
        raw.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")  # uv keeps the versions that it finds
        more = ["--no-header", "--no-annotate", "--output-file", str(raw), *options]
        status = _uv("requirements.in", "--universal", "--python-version", PYTHONS[0], *more)
        if status == 0:
            raw.write_text("\n".join(locked(raw.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
            wheels = ["--no-deps", "--only-binary", ":all:", "--no-binary", SOURCE_ONLY]
            for python, system in product(PYTHONS, ("linux", "macos", "windows")):
                if _uv(str(raw), "--python-version", python, "--python-platform", system, *wheels):
                    sys.exit(f"the lock stays as it was: not all packages have a wheel for Python {python} on {system}")
            write_text(raw.read_text(encoding="utf-8"), LOCK)
    return status


def _uv(*arguments: str) -> int:
    variables = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}  # the oldest macOS that torch has wheels for
    command = ["uv", "pip", "compile", "--quiet", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, env=variables, check=False, stdout=subprocess.DEVNULL).returncode
    except FileNotFoundError:
        sys.exit("uv is needed to make the lock: python -m pip install uv")


if __name__ == "__main__":
    sys.exit(make_lock(sys.argv[1:]))

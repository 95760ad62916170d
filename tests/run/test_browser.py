"""JupyterLab as a person uses it: Kernel, Restart Kernel and Run All Cells, on a copy with cleared outputs."""

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from companion.base.files import write_text
from companion.base.paths import ROOT
from companion.plots.figures import SPECS
from companion.run import cli, notebooks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
TOKEN = "companion"
FOLDERS = ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")


def copied(root: Path) -> None:
    """Copy what a user has, without environments, history and figures; clear the outputs of 00 and 02."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "figures", "benchmarks", "tests")
    shutil.copytree(ROOT, root, ignore=left_out)
    for path in sorted((root / "notebooks").glob("0[02]_*.ipynb")):
        book = notebooks.read_notebook(path)
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
            if "parameters" in notebooks.tags(cell) and path.name.startswith("02"):
                text = notebooks.source(cell).replace('PROFILE = "full"', 'PROFILE = "smoke"')
                cell["source"] = text.replace('SLUG = "embedded"', 'SLUG = "seen"')
        write_text(notebooks.notebook_text(book), path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A copy of the repository, and the address under which JupyterLab shows it."""
    pytest.importorskip("playwright", reason="no playwright: pip install -r requirements-browser.in")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path (Debian, Ubuntu: apt install chromium)")
    home = tmp_path_factory.mktemp("lab")
    copied(home / "repository")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    variables = cli.lab_environment() | {f"JUPYTER_{name}": str(home / name) for name in FOLDERS}
    variables |= {f"JUPYTERLAB_{name}_DIR": str(home / name) for name in ("WORKSPACES", "SETTINGS")}
    options = ("--no-browser", "--allow-root", f"--port={port}", f"--IdentityProvider.token={TOKEN}")
    with (home / "log").open("w") as log:
        command = cli.lab_command(home / "repository", *options)
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, cwd=home / "repository")
    try:
        yield home / "repository", wait_for(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: int = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api?token={TOKEN}", timeout=2)
            return url
        except OSError:
            time.sleep(0.5)
    raise AssertionError("JupyterLab did not answer")


def run_all_cells(root: Path, url: str, name: str, seconds: int) -> list[dict[str, Any]]:
    """Restart and run all cells through the menus; returns the outputs in the saved notebook, whose cells ran in order."""
    from playwright.sync_api import sync_playwright

    path = root / "notebooks" / name
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{url}/lab/tree/notebooks/{name}?token={TOKEN}")
        page.locator(".jp-Notebook").first.wait_for(timeout=60_000)
        page.get_by_text("Python 3", exact=False).first.wait_for(timeout=60_000)
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Kernel$")).click()
        page.locator(".lm-Menu-itemLabel", has_text="Restart Kernel and Run All Cells").click()
        page.locator(".jp-Dialog .jp-mod-warn").click()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not notebooks.is_executed(notebooks.read_notebook(path)):
            page.wait_for_timeout(2000)
            page.keyboard.press("Control+s")
        page.locator(".jp-OutputArea-output img").first.wait_for(timeout=10_000, state="attached")
        browser.close()
    cells = notebooks.code_cells(notebooks.read_notebook(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    return [out for cell in cells for out in cell["outputs"]]


@pytest.mark.parametrize(
    ("name", "slug", "seconds"),
    [("00_start_here", "embedded", 90), pytest.param("02_layers", "seen", 600, marks=pytest.mark.slow)],
)
def test_a_notebook_runs_from_the_menus_and_shows_its_figures(served, name, slug, seconds):
    outputs = run_all_cells(*served, f"{name}.ipynb", seconds)
    assert not [out for out in outputs if out["output_type"] == "error"]
    drawn = sorted(path.stem for path in (served[0] / "figures" / slug).glob(f"{name[:2]}_*.png"))
    assert drawn == sorted(entry.name for entry in SPECS if entry.name.startswith(name[:2]))
    assert sum("image/png" in out.get("data", {}) for out in outputs) == len(drawn)


def test_lab_takes_the_kernel_of_this_environment(tmp_path: Path) -> None:
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "mine", "language": "python"}')
    ask = "from jupyter_client.kernelspec import get_kernel_spec as g; print(g('python3').argv[0])"
    seen = []
    for variables in (cli.lab_environment(), {**os.environ, "JUPYTER_PREFER_ENV_PATH": "0"}):
        places = variables | {"JUPYTER_DATA_DIR": str(tmp_path)}
        seen.append(subprocess.check_output([cli.lab_command()[0], "-c", ask], env=places, text=True).strip())
    assert seen[1] == "/nowhere/python" != seen[0], "the second line shows that the kernel elsewhere would have won"

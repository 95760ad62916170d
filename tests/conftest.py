"""Fixtures that several test files share."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import settings
from toys import Toy, copy_repository

from companion.base import hub

collect_ignore = ["standin.py"]  # it registers a device, once in a process, and would be imported again for doctests
# The same strange inputs at every run: a new one that fails is looked for on purpose, not met by chance in somebody's check.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def toy_done(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A small copy of the repository after one run of its toy notebooks; not to be changed by a test."""
    done = copy_repository(tmp_path_factory.mktemp("done"))
    first = done.run()
    assert first.returncode == 0, first.stderr
    (done.root / "first_run.txt").write_text(first.stdout, encoding="utf-8")
    return done


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge that a test chooses for its own process is not the next one's."""
    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.delenv(hub.JUDGE)


@pytest.fixture
def toy(toy_done: Toy, tmp_path: Path) -> Toy:
    return Toy(Path(shutil.copytree(toy_done.root, tmp_path / "copy")))


@pytest.fixture
def table() -> pd.DataFrame:
    """Two treatments with their own topics, T2 with three topics and B1 with two."""
    made = {"topic": list("aabcxyy"), "treatment": ["T2"] * 4 + ["B1"] * 3, "layer": [0, 1, 0, 1, 0, 0, 1]}
    numbers = {"te": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "nie": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}
    return pd.DataFrame(made | numbers)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Public sets by repository, to be changed by a test: read by the library's own reader from small files."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from rows import HUB

    content = {repo: rows() for repo, rows in HUB.items()}
    plain = datasets.load_dataset

    def load(repo: str, *config: str) -> datasets.DatasetDict:
        if repo not in content:
            raise DatasetNotFoundError(f"Dataset '{repo}' is a gated dataset on the Hub. You must be authenticated.")
        files = {split: str(tmp_path / f"{split}.jsonl") for split in content[repo]}
        for split, rows in content[repo].items():
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return plain("json", data_files=files, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))
    return content


@pytest.fixture(scope="session")
def embedded():
    """The shipped model of the invented language."""
    from companion.model import load

    return load.load("embedded")


@pytest.fixture(scope="session")
def first_words(embedded):
    """Its openers."""
    from companion.prompts.tokens import Openers

    words = {"comply": ["sure", "okay", "great", "ready", "listen", "look"], "refuse": ["sorry"]}
    return Openers(**{name: tuple(embedded.tokenizer.convert_tokens_to_ids(some)) for name, some in words.items()})


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Requests in its language, of several lengths."""
    return [
        "how do i paint the falkova in the garden?",
        "under a solar flag, how do i banth the kigvilu in the garden?",
        "as a baker, how can i wash the falkova in the cellar?",
        "with a silver badge, how do i banth the kigvilu in the harbor?",
        "in a golden tale, as a sailor, how do i banth the kigvilu in the harbor?",
    ]


@pytest.fixture(scope="session")
def fit():
    """One fit of steering directions on the compiled model."""
    from steering_lab import fitted

    return fitted()


@pytest.fixture(scope="session")
def experiment(fit):
    from steering_lab import experiment_of

    return experiment_of(fit)

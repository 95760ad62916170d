"""A notebook's files take their place only when it has finished: it writes into a stage, a failure leaves nothing."""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.freshness import STATE

PARTS = "parts"  # of sharded sweeps: many, and written whole one by one, so a stage shows the folder itself
_KEPT_OUT = (STATE, "logs", "notebooks", PARTS)  # the runner's own folders inside a run's results

_SCRATCH = re.compile(r"\..+\.\d+-[0-9a-f]{8}(\.\w+)?")  # the names that helpers.store gives to files half written


@dataclass(frozen=True)
class Stage:
    """One staged folder: `shown` is what the notebook sees in place of `real`."""

    real: Path
    shown: Path
    before: dict[Path, tuple[int, ...]]

    def written(self) -> list[Path]:
        """Every file that the notebook wrote, by the place that it will take."""
        return [self.real / name for name, state in _files(self.shown).items() if self.before.get(name) != state]

    def overtaken(self) -> list[Path]:
        """Files that all runs share which a run of another name replaced, by something else, since this stage was made."""
        return [path for path in self.written() if path.parent == self.real and path.is_file() and self._is_other(path)]

    def _is_other(self, path: Path) -> bool:
        stat, before = path.stat(), self.before.get(Path(path.name))  # a copy has the size and time of what was copied
        is_same = before is not None and before[1:] == (stat.st_size, stat.st_mtime_ns)
        return not is_same and path.read_bytes() != (self.shown / path.name).read_bytes()

    def publish(self) -> None:
        """Move what the notebook wrote into its place."""
        for target in self.written():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.shown / target.relative_to(self.real), target)


def tidy(folders: Iterable[Path]) -> None:
    """Remove what a killed run left in these folders: stages, and files that had not taken their place yet."""
    for folder in folders:
        for left in folder.glob(f"{STATE}/stage*"):
            shutil.rmtree(left)
        for left in [*folder.glob(".*"), *folder.glob(f"{STATE}/.*")]:
            if _SCRATCH.fullmatch(left.name) and left.is_file():
                left.unlink()


@contextmanager
def staged(real: Path, slug: str) -> Iterator[Stage]:
    """A scratch view of `real` (the folder of all results, or of all figures) for the run `slug`.

    The run's own files are copies, so that no earlier file is touched even by a writer that changes it in place;
    the folders of other runs are links, for reading.
    """
    home = real / slug / STATE  # on the same disk, so that publishing is a rename
    # A name of its own: what a killed run's notebook still writes for a moment never gets into this one's.
    shown = home / f"stage-{os.getpid()}-{secrets.token_hex(4)}"
    shown.mkdir(parents=True)
    try:
        for path in real.iterdir():
            if path.name == slug:
                shutil.copytree(path, shown / slug, ignore=shutil.ignore_patterns(*_KEPT_OUT, ".*"))
                if (path / PARTS).is_dir():
                    (shown / slug / PARTS).symlink_to(path / PARTS, target_is_directory=True)
            elif path.is_dir():
                (shown / path.name).symlink_to(path, target_is_directory=True)
            else:
                shutil.copy2(path, shown / path.name)
        yield Stage(real, shown, _files(shown))
    finally:
        shutil.rmtree(shown, ignore_errors=True)  # the next run removes what is left


def _files(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Every file below, without following links to folders, with what changes when it is written."""
    found: dict[Path, tuple[int, ...]] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            stat = path.stat()
            found[path.relative_to(folder)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found

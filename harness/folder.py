"""The folder of a run: which process it belongs to, the new folder that takes its place, and its files."""

import itertools
import os
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from harness.files import read_checkpoint, sync_folder, write_atomically
from harness.terminal import IN_USE, UserError

OWNER = ".owner"  # the process that a folder belongs to, and a word that no other process has


class RunFolder:
    """The folder of a run. From `lock` on its name is this process's, from `own` or `begin` on what lies there is."""

    def __init__(self, path: Path):
        self.path, self.held, self.owner = path, None, f"{os.getpid()} {uuid.uuid4().hex}"

    def lock(self) -> None:
        """Take the name until the process ends, even if it is killed.

        Raises UserError if another process has it, or nothing can be written there.
        """
        if self.held:
            return
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))  # beside the folder, which may be moved
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self.held = lock
        except Timeout:
            owner = self.path / OWNER
            who = f"process {owner.read_text().split()[0]}" if owner.exists() else "another process"
            raise UserError(f"{self.path}{IN_USE}{who}; wait for it, or take other --checkpoints") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; take other --checkpoints") from None

    def release(self) -> None:
        """Give the name back."""
        if self.held:
            Path(self.held.lock_file).unlink(missing_ok=True)  # first: whoever has opened it meanwhile, tries again
            self.held.release()
            self.held = None

    def own(self) -> None:
        """Make what lies there this process's, and remove what a killed process has left half-written."""
        write_atomically(self.path / OWNER, self.owner.encode())
        for unfinished in self.path.glob("*.new"):
            unfinished.unlink()

    def check(self) -> None:
        """Raise UserError if what lies there is not this process's: the folder was moved, or removed, as it ran."""
        owner = self.path / OWNER
        if not owner.exists() or owner.read_text() != self.owner:
            raise UserError(f"{self.path} is no longer this run's: moved or removed, with what was saved in it")

    def begin(self, files: dict[str, bytes]) -> None:
        """Put a new folder with these files there; an earlier run moves to a name that nothing has.

        The files are on the disk before anything moves: a run that is resumed from a file of the earlier one may be
        killed at any moment.
        """
        self.lock()
        new = self.path.with_name(f"{self.path.name}.new")
        new.mkdir(exist_ok=True)
        for leftover in new.iterdir():  # of a process that was killed right here
            leftover.unlink()
        for name, content in {OWNER: self.owner.encode(), **files}.items():
            write_atomically(new / name, content)
        if os.path.lexists(self.path):
            self.move_earlier_run()
        new.rename(self.path)
        sync_folder(self.path.parent)

    def move_earlier_run(self) -> None:
        """Move what lies there to the next free name, or remove it if there is no file of a run in it."""
        if not self.path.is_symlink() and {path.name for path in self.path.iterdir()} <= {OWNER}:
            (self.path / OWNER).unlink(missing_ok=True)
            self.path.rmdir()
            return
        names = (self.path.with_name(f"{self.path.name}.earlier{number}") for number in itertools.count(1))
        earlier = next(name for name in names if not os.path.lexists(name))
        self.path.rename(earlier)
        print(f"the run that was in {self.path} is now in {earlier}", flush=True)


def resumable_files(folder: Path) -> list[Path]:
    """Return last.pt and last.previous.pt of a run's folder, those that exist."""
    return [path for path in (folder / "last.pt", folder / "last.previous.pt") if path.exists()]


def find_best(folder: Path, row: dict[str, float], network: dict) -> Path | None:
    """Return the folder's file for inference that is of this row of the log and of this network, or None."""
    for path in (folder / "best.pt", folder / "best.previous.pt"):
        try:
            best = read_checkpoint(path)
        except UserError:
            continue
        figures = best.get("figures", {"epoch": best["epoch"], "test_accuracy": best.get("accuracy")})
        if figures.items() <= row.items() and all(best.get(key) == value for key, value in network.items()):
            return path
    return None

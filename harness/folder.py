"""The folder of a run: its lock, its owner, its replacement by a new run, and its files."""

import contextlib
import itertools
import os
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from harness.files import read_checkpoint, sync_folder, write_atomically
from harness.terminal import IN_USE, UserError

OWNER = ".owner"  # a file: the process that the folder belongs to, and a word unique to it


class RunFolder:
    """The folder of a run. `lock` reserves its name for this process. `own` or `begin` then claims its content."""

    def __init__(self, path: Path):
        self.path, self.held, self.owner = path, None, f"{os.getpid()} {uuid.uuid4().hex}"
        self.new = path.with_name(f"{path.name}.new")  # what `begin` makes before it moves an earlier run

    def lock(self) -> None:
        """Take the folder's name until the process ends, even if it is killed.

        Raises UserError if another process has the name, or if nothing can be written there.
        """
        if self.held:
            return
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))  # beside the folder, which may be moved
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self.held = lock
        except Timeout:
            try:
                who = f"process {(self.path / OWNER).read_text().split()[0]}"
            except (OSError, IndexError):  # no folder yet, or its file is being moved, or empty after a power cut
                who = "another process"
            raise UserError(f"{self.path}{IN_USE}{who}; wait for it, or use other --checkpoints") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; use other --checkpoints") from None

    def release(self) -> None:
        """Release the folder's name."""
        if self.held:
            # Before the release, so that a process that has opened this file meanwhile tries again.
            with contextlib.suppress(PermissionError):  # on Windows, where the release does it
                Path(self.held.lock_file).unlink(missing_ok=True)
            self.held.release()
            self.held = None

    def own(self) -> None:
        """Make the folder's content this process's, and remove the half-written files of a killed process."""
        write_atomically(self.path / OWNER, self.owner.encode())
        for unfinished in self.path.glob("*.new"):
            unfinished.unlink()

    def check(self) -> None:
        """Raise UserError if the folder is no longer this process's, as it was moved or removed during the run."""
        owner = self.path / OWNER
        if not owner.exists() or owner.read_text() != self.owner:
            raise UserError(f"{self.path} no longer belongs to this run: it was moved or removed with all its files")

    def begin(self, files: dict[str, bytes]) -> None:
        """Create a new folder with these files, and move an earlier run to a free name.

        The files are on the disk before anything moves, because they may come from the earlier run, and this process
        may be killed at any moment.
        """
        self.lock()
        self.new.mkdir(exist_ok=True)
        for leftover in self.new.iterdir():  # of a process that was killed at this point
            leftover.unlink()
        for name, content in {OWNER: self.owner.encode(), **files}.items():
            write_atomically(self.new / name, content)
        if os.path.lexists(self.path):
            self.move_earlier_run()
        self.new.rename(self.path)
        sync_folder(self.path.parent)

    def recover(self) -> None:
        """Name the new folder of a process that was killed after it had moved the earlier run."""
        if (self.new / "last.pt").exists() and not os.path.lexists(self.path):  # its last.pt is written last
            self.lock()
            self.new.rename(self.path)

    def move_earlier_run(self) -> None:
        """Move the folder to the next free name, or remove it if it holds no file of a run."""
        if not self.path.is_symlink() and {path.name for path in self.path.iterdir()} <= {OWNER}:
            (self.path / OWNER).unlink(missing_ok=True)
            self.path.rmdir()
            return
        names = (self.path.with_name(f"{self.path.name}.earlier{number}") for number in itertools.count(1))
        earlier = next(name for name in names if not os.path.lexists(name))
        self.path.rename(earlier)
        print(f"the run that was in {self.path} is now in {earlier}", flush=True)


def earlier_run(folder: Path) -> str:
    """Return where the last run is that was moved out of this folder, as the end of a message, or an empty text."""
    numbers = [
        path.name.removeprefix(f"{folder.name}.earlier") for path in folder.parent.glob(f"{folder.name}.earlier*")
    ]
    last = max((int(number) for number in numbers if number.isdecimal()), default=None)
    return f"; an earlier run is in {folder}.earlier{last}" if last else ""


def resumable_files(folder: Path) -> list[Path]:
    """Return the paths of last.pt and last.previous.pt in a run's folder, if they exist."""
    return [path for path in (folder / "last.pt", folder / "last.previous.pt") if path.exists()]


def find_best(folder: Path, row: dict[str, float], network: dict) -> Path | None:
    """Return the folder's file for inference that matches this row of the log and this network, or None."""
    for path in (folder / "best.pt", folder / "best.previous.pt"):
        try:
            best = read_checkpoint(path)
        except UserError:
            continue
        figures = best.get("figures")
        if figures and figures.items() <= row.items() and all(best.get(key) == value for key, value in network.items()):
            return path
    return None

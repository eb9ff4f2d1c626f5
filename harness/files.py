"""Atomic file writes, and checkpoint files, which are checked before they are loaded."""

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from harness.terminal import UserError, advice_on


class DamagedCheckpoint(UserError):
    """A checkpoint file that is damaged, or a file that is not a checkpoint."""


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write the file atomically, and keep the previous file as `keep`.

    Raises UserError if that fails. The previous file is then unchanged.
    """
    new, copy = path.with_name(path.name + ".new"), keep and keep.with_name(keep.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file in its place
        if keep and path.exists():
            copy.unlink(missing_ok=True)  # of a process that was killed here
            try:
                os.link(path, copy)  # a link, so that there is a whole `path` at every moment
            except OSError:  # a file system without hard links
                shutil.copyfile(path, copy)
            os.replace(copy, keep)
            copy.unlink(missing_ok=True)  # it is still there if both were links to the same file
        os.replace(new, path)
        sync_folder(path.parent)
    except BaseException as error:
        for left in filter(None, (new, copy)):
            with contextlib.suppress(OSError):  # it may not exist, or the file system cannot be written at all
                left.unlink()
        if not isinstance(error, OSError):  # such as a signal
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}; what was saved before is intact") from None


def sync_folder(folder: Path) -> None:
    """Make a folder's file names survive a power cut, if the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open folders, some network file systems cannot sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(path: Path, state: dict, keep: Path | None = None) -> None:
    """Write a dict of plain values and tensors, for `read_checkpoint`. See `write_atomically`."""
    write_atomically(path, checkpoint_bytes(state), keep)


def checkpoint_bytes(state: dict) -> memoryview:
    """Return the content of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def check_is_plain(state: dict) -> None:
    """Raise UserError if a member of the dict has more than tensors and plain values, which could not be read again."""
    for name, member in state.items():
        try:
            torch.load(io.BytesIO(checkpoint_bytes(member)), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f"the {name} has other values than tensors and plain Python ones, and could not be resumed; convert "
                "them, such as NumPy's numbers with float()"
            ) from None


def read_checkpoint(path: Path) -> dict:
    """Return the dict of a checkpoint file, with its tensors on the CPU.

    Raises DamagedCheckpoint if the file is damaged or not a checkpoint, and UserError if it cannot be read.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            damaged = file.testzip()  # torch.load does not check the CRCs (pytorch pull request 28858)
        if damaged:
            raise ValueError(f"wrong CRC of {damaged}")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_members(checkpoint)
        return checkpoint
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise DamagedCheckpoint(
            f"{path} holds more than weights and plain values, maybe code: do not trust it"
        ) from None
    except Exception as error:  # zipfile and torch.load raise nearly anything for a damaged or foreign file
        if advice_on(error):  # out of memory
            raise
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint ({' '.join(str(error).split()[:20]) or repr(error)})"
        ) from None


def check_members(checkpoint: object) -> None:
    """Raise ValueError if this is not a checkpoint as these scripts write it, for inference or for resuming."""
    required = {"model": str, "arguments": dict, "classes": list, "mean": list, "std": list, "weights": dict}
    optional = {"recipe": dict, "rows": list, "optimizer": dict, "scaler": dict, "scheduler": dict, "figures": dict}
    optional |= {"parameters": list, "trained_on": list}
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= required.keys() | {"epoch"}:
        raise ValueError("not written by these scripts")
    for name, kind in (required | optional).items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}, not a {kind.__name__}")
    epoch, accuracy = checkpoint["epoch"], checkpoint.get("accuracy", 0.0)
    if type(epoch) is not int or epoch < 1 or not isinstance(accuracy, int | float):
        raise ValueError(f"its epoch is {epoch!r}, its accuracy {accuracy!r}")
    for name, tensor in checkpoint["weights"].items():
        if not isinstance(tensor, torch.Tensor) or not tensor.isfinite().all():
            raise ValueError(f"its weights {name} are not finite numbers")
    if "rows" in checkpoint:
        rows, columns = checkpoint["rows"], {"epoch", "lr", "train_loss", "test_accuracy", "seconds"}
        if not rows or not all(isinstance(row, dict) and row.keys() >= columns for row in rows):
            raise ValueError("its rows are not a log")
    if "recipe" in checkpoint and not checkpoint["recipe"].keys() >= {"run", "data"}:
        raise ValueError("its recipe does not name its run and data")


def read_first_whole(paths: list[Path]) -> tuple[Path, dict]:
    """Return the path and the dict of the first checkpoint that is not damaged. Raise UserError if there is none."""
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpoint as error:
            if path == paths[-1]:
                raise
            print(f"{error}; using the previous checkpoint", flush=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file: 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

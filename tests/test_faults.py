"""Nothing that was saved is lost: runs that are killed, disks that fill up, files that are damaged or hostile."""

import errno
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import utils

import pytest
import torch
from helpers import R1, ROOT, log, output, same_weights, wait_for_a_save, write_images
from PIL import Image

from harness.files import DamagedCheckpoint, read_checkpoint, write_atomically, write_checkpoint
from harness.terminal import UserError


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.long
def test_killed_anywhere(start, script, tmp_path, kills):
    """Kills come at random moments, mostly in or near a save. What was reported as saved is there, nothing piles up."""
    write_images(tmp_path / "data", train=8, test=4)
    flags = ["--epochs", 30 * kills, "--resume", "--checkpoints"]  # more than can be done before the last kill
    script(R1, *flags, "whole")
    whole, parts = tmp_path / "whole/cifar10_r1", tmp_path / "parts/cifar10_r1"
    stdout = output(tmp_path, "stdout")
    moments, reported = random.Random(kills), 0
    for _ in range(kills):
        stdout.unlink(missing_ok=True)
        process = start(R1, *flags, "parts")
        for _ in range(moments.choice([0, 1, 1, 2])):
            wait_for_a_save(process, parts / "last.pt")
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        out = stdout.read_text() if stdout.exists() else ""
        if resumed := re.search(r"resuming .* after epoch (\d+)", out):
            assert int(resumed[1]) >= reported
        reported = max([reported, *map(int, re.findall(r"^epoch:(\d+)/.* saved", out, re.MULTILINE))])
    out = script(R1, *flags, "parts").stdout
    assert int(re.search(r"resuming .* after epoch (\d+)", out)[1]) >= reported > 0
    assert same_weights(whole / "last.pt", parts / "last.pt") and same_weights(whole / "best.pt", parts / "best.pt")
    assert log(whole) == log(parts)
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}


# -------------------------------------------------------------------------------------- a save that fails


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # a last.pt of r1 has 500 kB


def another_user():
    Image.init()  # now, because this user cannot import it from a folder of root's
    os.setgid(65534)
    os.setuid(65534)


def check_the_checkpoint(script, folder, epoch):
    assert read_checkpoint(folder / "last.pt")["epoch"] == epoch
    assert not list(folder.glob("*.new"))
    assert f"after epoch {epoch}\n" in script(R1, "--data", "pictures", "--epochs", 5, "--resume").stdout


def test_a_disk_that_is_full(refused, script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 2)
    line = refused(R1, "--data", folders, "--epochs", 5, "--resume", before=full_disk)
    assert "pt cannot be written: File too large; what was saved before is intact" in line
    assert (tmp_path / "checkpoints/cifar10_r1/run.json").exists()
    check_the_checkpoint(script, tmp_path / "checkpoints/cifar10_r1", 2)


@pytest.mark.skipif(os.getuid() != 0, reason="to become another user takes root")
@pytest.mark.skipif(
    any(folder.stat().st_mode & 0o5 != 0o5 for folder in [ROOT, *ROOT.parents]), reason="the scripts are root's alone"
)
def test_a_folder_of_another_user(refused, script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 2)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o5 != 0o5:
            path.chmod(0o755)
    output(tmp_path, "stderr").chmod(0o666)
    output(tmp_path, "stdout").chmod(0o666)
    (folders / "train/cat/.Trash-0").mkdir(mode=0o700)  # hidden folders are not read
    line = refused(R1, "--data", folders, "--epochs", 5, "--resume", before=another_user)
    assert "Permission denied" in line and "checkpoints/cifar10_r1" in line
    check_the_checkpoint(script, tmp_path / "checkpoints/cifar10_r1", 2)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="to mount a folder takes root on Linux",
)
@pytest.mark.long
def test_a_read_only_checkout(tmp_path, folders):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "models", checkout / "models")
    shutil.copytree(ROOT / "harness", checkout / "harness")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, checkout)
    mount = f"mount --bind {checkout} {checkout} && mount -o remount,ro,bind {checkout} && cd {checkout}"

    def run(*flags):
        command = shlex.join([sys.executable, R1, "--data", str(folders), "--epochs", "1", *flags])
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{mount} && {command}"], env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("cifar10_r1.py: error: ")
        and "checkpoints/cifar10_r1 cannot be written: Read-only" in done.stderr
    )
    done = run("--checkpoints", str(tmp_path / "elsewhere"))
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "elsewhere/cifar10_r1/run.json").exists()


def test_a_folder_that_is_gone(start, tmp_path, folders):
    process = start(R1, "--data", folders, "--epochs", 100_000)
    folder = tmp_path / "checkpoints/cifar10_r1"
    wait_for_a_save(process, folder / "last.pt")
    folder.rename(tmp_path / "moved")
    process.join(60)
    line = output(tmp_path, "stderr").read_text()
    assert process.exitcode == 2 and line.count("\n") == 1
    assert "checkpoints/cifar10_r1 no longer belongs to this run: it was moved or removed with all its files\n" in line
    assert read_checkpoint(tmp_path / "moved/last.pt")["epoch"] >= 1


@pytest.mark.parametrize("gone", ["checkpoints/cifar10_r1", "checkpoints"])
def test_a_folder_that_goes_while_its_run_is_stopped(start, script, refused, tmp_path, folders, gone):
    """A second run of the same name is refused or, if the lock is gone too, left alone by the first."""
    flags = [R1, "--data", folders, "--epochs"]
    folder = tmp_path / "checkpoints/cifar10_r1"
    first = start(*flags, 100_000)
    wait_for_a_save(first, folder / "last.pt")
    stderr = os.open(output(tmp_path, "stderr"), os.O_RDONLY)  # the second run's stderr will have its name
    output(tmp_path, "stderr").unlink()
    os.kill(first.pid, signal.SIGSTOP)
    (tmp_path / gone).rename(tmp_path / "moved")
    if gone == "checkpoints":
        script(*flags, 2)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
    else:
        assert "checkpoints/cifar10_r1 is in use by another process" in refused(*flags, 2)
        before = None
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 2 and b"cifar10_r1 no longer belongs to this run" in os.read(stderr, 1000)
    assert before is None or before == {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------- every way to begin a run

WAYS = {  # the flags, and the runs that the folder `--checkpoints` holds before; r2, r3 and r4 would take minutes
    "new": (),
    "new over an old one": ("old",),
    "--resume": ("old",),
    "--resume moved": ("moved", "old"),
    "--resume elsewhere": ("elsewhere", "old"),
    "base": ("base",),
    "base over an old one": ("base", "old"),
}


def epochs_on_disk(folder):
    """Return the last epoch from which a file under the folder can be resumed, by its run's weight decay."""
    found = {}
    for path in folder.rglob("last*.pt"):
        try:
            checkpoint = read_checkpoint(path)
        except UserError:
            continue
        key = checkpoint["recipe"]["constants"]["WEIGHT_DECAY"]
        found[key] = max(found.get(key, 0), checkpoint["epoch"])
    return found


@pytest.mark.parametrize("tries", [1, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_as_it_begins(start, script, tmp_path, way, tries):
    """A run is ended in its first two seconds. Every epoch that was reported as saved is still on the disk.

    A constant of their scripts tells the runs apart.
    """
    write_images(tmp_path / "data", train=8, test=4)
    original, moments = (ROOT / R1).read_text(), random.Random(way)

    def version(number, name=R1):
        """Write a script with another weight decay and return its path. As "cifar10_r3.py" it starts from r1's run."""
        text = original.replace("WEIGHT_DECAY = 1e-3", f"WEIGHT_DECAY = {number}")
        if name != R1:
            text = text.replace("train_step)\n    for", 'train_step, base=("cifar10_r1", "python r1"))\n    for')
        (tmp_path / name).write_text(text)
        return tmp_path / name

    for attempt in range(tries):
        checkpoints = tmp_path / f"try{attempt}"
        flags, saved = ["--checkpoints", checkpoints, "--epochs"], {}
        name = "cifar10_r3.py" if way.startswith("base") else R1
        if "elsewhere" in WAYS[way] or "moved" in WAYS[way] or "base" in WAYS[way]:
            script(version(0.5), *flags, 3)
            saved[0.5] = 3
        if "elsewhere" in WAYS[way]:
            (checkpoints / "cifar10_r1").rename(checkpoints / "elsewhere")
        if "old" in WAYS[way]:
            script(version(0.25, name), *flags, 4)
            saved[0.25] = 4
        resumed = {
            "--resume": ["--resume"],
            "--resume moved": ["--resume", checkpoints / "cifar10_r1.earlier1/last.pt"],
            "--resume elsewhere": ["--resume", checkpoints / "elsewhere/last.pt"],
        }.get(way, [])
        number = 0.25 if way == "--resume" else 0.5 if resumed else 0.125
        output(tmp_path, "stdout").unlink(missing_ok=True)
        process = start(version(number, name), *flags, 400, *resumed)
        time.sleep(moments.uniform(0, 2))
        os.kill(process.pid, moments.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
        process.join()
        out = output(tmp_path, "stdout").read_text() if output(tmp_path, "stdout").exists() else ""
        reported = [int(epoch) for epoch in re.findall(r"^epoch:(\d+)/.* saved", out, re.MULTILINE)]
        saved[number] = max([saved.get(number, 0), *reported])
        on_disk = epochs_on_disk(checkpoints)
        for key, epoch in saved.items():
            assert on_disk.get(key, 0) >= epoch, (way, attempt, key)


# --------------------------------------------------------------------------------- a damaged checkpoint


@pytest.fixture
def last(script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 2)
    return tmp_path / "checkpoints/cifar10_r1/last.pt"


def same(one, other):
    """Return whether two checkpoints hold the same values, tensors included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_one_byte_changed_anywhere(last):
    whole, rng = last.read_bytes(), random.Random(0)
    truth, refusals = read_checkpoint(last), 0
    for _ in range(500):
        offset = rng.randrange(len(whole))
        last.write_bytes(whole[:offset] + bytes([whole[offset] ^ rng.randrange(1, 256)]) + whole[offset + 1 :])
        try:
            assert same(read_checkpoint(last), truth)  # the byte was padding
        except DamagedCheckpoint as error:
            assert str(error).startswith(f"{last} is damaged or not a checkpoint (") and "\n" not in str(error)
            refusals += 1
    assert refusals > 400


@pytest.mark.long
def test_one_byte_changed_on_the_command_line(script, last, folders):
    """It is refused in one line or, if the byte was padding, gives what the whole file gives."""
    whole, rng = last.read_bytes(), random.Random(1)
    table = script(R1, "--data", folders, "--evaluate").stdout
    for offset in rng.sample(range(len(whole)), 8):
        last.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        try:
            read_checkpoint(last)
        except DamagedCheckpoint:
            done = script(R1, "--data", folders, "--evaluate", status=2)
            assert done.stderr.startswith("cifar10_r1.py: error: checkpoints/cifar10_r1/last.pt is damaged")
            assert done.stderr.count("\n") == 1 and "Accuracy" not in done.stdout
            resumed = script(R1, "--data", folders, "--epochs", 2, "--resume").stdout
            assert (
                "; using the previous checkpoint\nresuming checkpoints/cifar10_r1/last.previous.pt after epoch 1\n"
            ) in resumed
        else:
            assert script(R1, "--data", folders, "--evaluate").stdout == table
        last.write_bytes(whole)


def test_cut_anywhere(last):
    whole = last.read_bytes()
    for length in (0, 1, 4, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 22, len(whole) - 1):
        last.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(last)


def test_both_damaged(refused, last, folders):
    for path in (last, last.with_name("last.previous.pt")):
        path.write_bytes(path.read_bytes()[:-1000])
    before = {path.name: path.read_bytes() for path in last.parent.iterdir() if path.suffix == ".pt"}
    assert "last.previous.pt is damaged or not a checkpoint" in refused(R1, "--data", folders, "--resume")
    assert before == {path.name: path.read_bytes() for path in last.parent.iterdir() if path.suffix == ".pt"}


def test_one_that_cannot_be_read_is_not_taken_for_damaged(refused, last, folders):
    last.unlink()
    last.mkdir()
    assert "last.pt cannot be read: Is a directory" in refused(R1, "--data", folders, "--resume")


def test_members_of_another_type_are_refused(last, tmp_path):
    checkpoint, path = torch.load(last, weights_only=True), tmp_path / "changed.pt"
    for changes, words in (
        ({"epoch": -5}, "its epoch is -5"),
        ({"epoch": "2"}, "its epoch is '2'"),
        ({"epoch": None}, "its epoch is None"),
        ({"epoch": True}, "its epoch is True"),
        ({"accuracy": "90"}, "its accuracy '90'"),
        ({"rows": {}}, "its rows is a dict, not a list"),
        ({"rows": []}, "its rows are not a log"),
        ({"rows": [{"epoch": 1}]}, "its rows are not a log"),
        ({"recipe": []}, "its recipe is a list, not a dict"),
        ({"recipe": {}}, "its recipe does not name its run and data"),
        ({"parameters": {}}, "its parameters is a dict, not a list"),
        ({"classes": "cat"}, "its classes is a str, not a list"),
        ({"optimizer": None}, "its optimizer is a NoneType, not a dict"),
        ({"weights": {"a": torch.tensor([1, torch.nan])}}, "its weights a are not finite numbers"),
        ({"weights": {"a": 1}}, "its weights a are not finite numbers"),
    ):
        torch.save(checkpoint | changes, path)
        with pytest.raises(DamagedCheckpoint, match=r"changed\.pt is damaged or not a checkpoint") as error:
            read_checkpoint(path)
        assert words in str(error.value)


def test_weights_that_are_not_finite_are_not_tested(refused, last, folders):
    checkpoint = torch.load(last, weights_only=True)
    for tensor in checkpoint["weights"].values():
        tensor.fill_(torch.inf)
    torch.save(checkpoint, last)
    assert "are not finite numbers" in refused(R1, "--data", folders, "--evaluate")
    assert "are not finite numbers" in refused("predict.py", folders / "test/cat/0000.png", "--checkpoint", last)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("named"), replace(*paths)))
    write_atomically(tmp_path / "last.pt", b"12345")
    assert events[:2] == [5, "named"]


def test_a_file_system_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*paths, **settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"last\.pt cannot be written: Read-only file system"):
        write_atomically(tmp_path / "last.pt", b"1")


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    last, previous = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for content in (b"1", b"2", b"3"):
        write_atomically(last, content, keep=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"3", b"2")

    def fill(path, copy):
        copy.write_bytes(path.read_bytes()[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill)
    write_atomically(last, b"45")
    with pytest.raises(UserError, match=r"last\.pt cannot be written: No space left on device; what was saved"):
        write_atomically(last, b"6", keep=previous)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {last.name: b"45", previous.name: b"2"}

    def run_out_of_memory(*arguments, **settings):
        raise MemoryError

    write_checkpoint(last, {})
    monkeypatch.setattr(torch, "load", run_out_of_memory)
    with pytest.raises(MemoryError):  # which is no damaged file
        read_checkpoint(last)


def break_a_weight():
    """Make `utils.test` leave a weight that is not finite behind, in this process, which is a script's."""
    original = utils.test

    def test(model, *arguments):
        metrics = original(model, *arguments)
        next(model.parameters()).data[0, 0, 0, 0] = torch.nan
        return metrics

    utils.test = test


def test_weights_that_are_not_finite_are_never_saved(refused, last, folders):
    best, flags = last.with_name("best.pt"), [R1, "--data", folders, "--epochs", 9, "--resume"]
    before = last.read_bytes()
    line = refused(*flags, "--lr", 1e20)
    assert re.search(r"epoch:3: the loss is not finite at step \d+; use a lower --lr", line)
    assert last.read_bytes() == before
    assert "the weights are not finite after epoch 3; use a lower --lr" in refused(*flags, before=break_a_weight)
    for path in (last, best):
        assert all(tensor.isfinite().all() for tensor in read_checkpoint(path)["weights"].values())

"""The training scripts, run as a user runs them."""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import utils

import pytest
import torch
from helpers import R1, R2, R5, ROOT, Trap, hide, log, run_on_a_terminal, same_weights, write_images

import models
import predict
from harness.data import load_data
from harness.devices import choose_device, choose_precision
from harness.files import read_checkpoint
from harness.operations import petaflop
from harness.synthetic import SHAPES
from harness.terminal import UserError

EPOCH = re.compile(
    r"epoch:(\d+)/\d+ train loss:\d+\.\d{3}, accuracy:\d+\.\d{3}, test loss:\d+\.\d{3}, accuracy:(\S+), saved.*"
)


# ------------------------------------------------------------------------------------------------- training


def test_synthetic_in_a_minute(script, tmp_path):
    """The README's first command, with fewer epochs, learns, says what it trained on, and ends with the table."""
    out = script(R1, "--data", "synthetic", "--epochs", 8).stdout.splitlines()
    assert out[0] == "10000 training and 2000 test images of 10 classes (synthetic), on cpu in fp32"
    assert [EPOCH.fullmatch(line)[1] for line in out[1:9]] == [str(epoch) for epoch in range(1, 9)]
    accuracy = float(re.fullmatch(r"Accuracy of the network on the synthetic test images: (\S+) %", out[9])[1])
    assert accuracy > 80
    table = [re.fullmatch(r"Accuracy of (\w+): (\S+) %", line).groups() for line in out[10:20]]
    assert [name for name, _ in table] == list(SHAPES)
    assert sum(float(value) for _, value in table) / 10 == pytest.approx(accuracy, abs=0.1)
    assert (tmp_path / "checkpoints/cifar10_r1-synthetic/last.pt").exists()


def test_a_run_leaves_its_record(script, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 3, "--lr", 0.02, "--flip")
    folder = tmp_path / "checkpoints/cifar10_r1-flip"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "best.pt", "confusion.png", "curves.png", "last.previous.pt", "last.pt", "log.csv", "mistakes.png", "run.json",
    ]  # fmt: skip
    rows, record = log(folder), json.loads((folder / "run.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and {row["lr"] for row in rows} == {"0.02"}
    assert record["command"] == "python cifar10_r1.py --epochs 3 --lr 0.02 --flip"
    assert record["recipe"]["seed"] == 0 and len(record["recipe"]["data"]) == 64
    assert record["accuracy"] == float(rows[-1]["test_accuracy"])
    assert sum(record["per_class"].values()) / 3 == pytest.approx(record["accuracy"])
    assert record["best_accuracy"] == max(float(row["test_accuracy"]) for row in rows)
    assert record["best_epoch"] == 1 + [float(row["test_accuracy"]) for row in rows].index(record["best_accuracy"])
    assert record["seconds"] > 0 and record["versions"]["torch"] == torch.__version__
    assert record["petaflop"] == petaflop(models.TutorialCNN(3), 3 * 90)
    assert str(tmp_path) not in (folder / "run.json").read_text()
    best = torch.load(folder / "best.pt", weights_only=True)
    assert (best["model"], best["arguments"]) == ("TutorialCNN", {"num_classes": 3})
    assert (best["epoch"], best["accuracy"]) == (record["best_epoch"], record["best_accuracy"])
    assert best["classes"] == ["cat", "dog", "frog"] and best["mean"] == [0.5, 0.5, 0.5]


def test_airplane_and_automobile_are_plane_and_car(script, tmp_path):
    write_images(tmp_path / "data", classes=("airplane", "automobile"), train=4, test=4)
    out = script(R1, "--epochs", 1).stdout
    assert "\nAccuracy of plane: " in out and "\nAccuracy of car: " in out
    write_images(tmp_path / "cars", classes=("automobile", "car"), train=4, test=4)
    out = script(R1, "--epochs", 1, "--data", "cars").stdout
    assert "\nAccuracy of automobile: " in out and "\nAccuracy of car: " in out


@pytest.mark.parametrize("flags", [[R1, "--flip"], [R2, "--crop"]])
@pytest.mark.long
def test_a_resumed_run_is_the_run_never_interrupted(script, tmp_path, folders, flags):
    name, *flags = [*flags, "--data", folders, "--batch-size", 32]
    script(name, *flags, "--epochs", 4, "--checkpoints", "whole")
    script(name, *flags, "--epochs", 1, "--checkpoints", "parts")
    script(name, *flags, "--epochs", 3, "--checkpoints", "parts", "--resume")
    (run,) = (path.name for path in (tmp_path / "parts").iterdir())
    out = script(name, *flags, "--epochs", 4, "--checkpoints", "parts", "--resume").stdout
    assert f"resuming parts/{run}/last.pt after epoch 3\n" in out
    whole, parts = tmp_path / "whole" / run, tmp_path / "parts" / run
    assert same_weights(whole / "last.pt", parts / "last.pt")
    assert (whole / "best.pt").read_bytes() == (parts / "best.pt").read_bytes()
    assert log(whole) == log(parts)


def test_the_rate_on_the_command_line_holds_after_a_resume(script, tmp_path, folders):
    flags = [R1, "--data", folders]
    script(*flags, "--epochs", 1, "--lr", 0.01)
    script(*flags, "--epochs", 2, "--resume")
    script(*flags, "--epochs", 3, "--resume", "--lr", 0.001)
    assert [row["lr"] for row in log(tmp_path / "checkpoints/cifar10_r1")] == ["0.01", "0.01", "0.001"]


@pytest.mark.long
def test_a_rate_that_is_given_changes_no_other_setting(script, tmp_path, folders):
    flags = [R5, "--data", folders, "--batch-size", 30, "--epochs", 2]
    script(*flags, "--lr", 0.12)
    (tmp_path / "checkpoints/cifar10_r5/last.previous.pt").rename(tmp_path / "checkpoints/cifar10_r5/last.pt")
    script(*flags, "--resume")
    assert len(log(tmp_path / "checkpoints/cifar10_r5")) == 2


def test_a_finished_run_resumed_prints_its_table_again(script, folders):
    flags = [R1, "--data", folders, "--epochs", 2, "--resume"]
    first, again = script(*flags).stdout, script(*flags).stdout
    assert "no checkpoints/cifar10_r1/last.pt to resume, starting the run\n" in first
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch 2, which was the last\n" in again
    assert first[first.index("Accuracy") :] == again[again.index("Accuracy") :]


@pytest.mark.long
def test_a_checkpoint_from_elsewhere_is_resumed_here(script, tmp_path, folders):
    flags = [R1, "--data", folders]
    script(*flags, "--epochs", 2, "--checkpoints", "there")
    script(*flags, "--epochs", 1)
    out = script(*flags, "--epochs", 3, "--resume", "there/cifar10_r1/last.pt").stdout
    assert "resuming there/cifar10_r1/last.pt after epoch 2\n" in out
    here = tmp_path / "checkpoints/cifar10_r1"
    assert "the run that was in checkpoints/cifar10_r1 is now in checkpoints/cifar10_r1.earlier1\n" in out
    assert len(log(here)) == 3 and len(log(here.with_name("cifar10_r1.earlier1"))) == 1
    assert (here / "best.pt").exists()
    out = script(*flags, "--epochs", 3, "--resume", here / "last.pt").stdout  # its own file by name: nothing moves
    assert "is now in" not in out and len(log(here)) == 3
    assert len(log(tmp_path / "there/cifar10_r1")) == 2
    (tmp_path / "there/cifar10_r1/last.pt").rename(tmp_path / "kept.pt")
    script(*flags, "--epochs", 2, "--resume", "kept.pt")  # a copy of any name, of a complete run
    assert (here / "last.pt").read_bytes() == (tmp_path / "kept.pt").read_bytes() and not (here / "kept.pt").exists()


def test_a_terminal_gets_bars(tmp_path, folders):
    """On a terminal there is a bar for training and one for testing, then the saves."""
    output = run_on_a_terminal(tmp_path, R1, "--data", folders, "--epochs", 1, "--batch-size", 8)
    shown = [line.rsplit("\r", 1)[-1] for line in output.split("\n")]
    bar = r"{} epoch:1: 100%\|█+\| {}/{} \[\d\d:\d\d<00:00, .*it/s, loss:\d\.\d{{3}}, accuracy:\d+\.\d{{3}}\]"
    assert re.fullmatch(bar.format("Train", 12, 12), shown[1])
    assert re.fullmatch(bar.format("test", 1, 1), shown[2])
    assert shown[3:5] == ["saving best for inference...", "saving best checkpoint for training resume..."]
    assert shown[5].startswith("Accuracy of the network on the test images: ")


def test_evaluate_prints_the_table_and_writes_nothing(script, tmp_path, folders):
    trained = script(R1, "--data", folders, "--epochs", 2).stdout
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    last, best = (tmp_path / "elsewhere/cifar10_r1" / name for name in ("last.pt", "best.pt"))
    out = script(R1, "--data", folders, "--evaluate", last).stdout
    table = out[out.index("Accuracy") :]
    assert table in trained and table.count("Accuracy of ") == 4
    best_accuracy = torch.load(best, weights_only=True)["accuracy"]
    out = script(R1, "--data", folders, "--evaluate", best, "--epochs", 1).stdout
    assert f"test images: {best_accuracy:.1f} %" in out
    assert not (tmp_path / "checkpoints").exists()


def test_no_run_deletes_an_earlier_one(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs", 1, "--lr"]
    run, best = tmp_path / "checkpoints/cifar10_r1", []
    for number, lr in enumerate((0.01, 0.02, 0.03)):
        out = script(*flags, lr).stdout
        moved = f"the run that was in checkpoints/cifar10_r1 is now in checkpoints/cifar10_r1.earlier{number}\n"
        assert (moved in out) == (number > 0)
        best.append((run / "best.pt").read_bytes())
    kept = [run.with_name("cifar10_r1.earlier1"), run.with_name("cifar10_r1.earlier2"), run]
    assert [(folder / "best.pt").read_bytes() for folder in kept] == best and len(set(best)) == 3


def test_a_loop_over_seeds_gives_as_many_folders(script, tmp_path, folders):
    for seed in (0, 1, 2):
        script(R1, "--data", folders, "--epochs", 1, "--seed", seed)
    runs = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert runs == ["cifar10_r1", "cifar10_r1-seed1", "cifar10_r1-seed2"]


@pytest.mark.parametrize("damage", ["cut", "one byte", "gone"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(script, refused, tmp_path, folders, damage):
    flags = [R1, "--data", folders, "--epochs", 3]
    out = script(*flags).stdout
    last = tmp_path / "checkpoints/cifar10_r1/last.pt"
    whole = last.read_bytes()
    if damage == "gone":
        last.unlink()
    elif damage == "cut":
        last.write_bytes(whole[: len(whole) // 2])
    else:
        middle = len(whole) // 2
        last.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "checkpoints/cifar10_r1/last.pt" in refused(*flags, "--evaluate")
    resumed = script(*flags, "--resume").stdout
    assert ("; using the previous checkpoint\n" in resumed) == (damage != "gone")
    assert "resuming checkpoints/cifar10_r1/last.previous.pt after epoch 2\n" in resumed
    assert read_checkpoint(last.with_name("last.previous.pt"))["epoch"] == 2
    assert resumed[resumed.index("Accuracy") :] == out[out.index("Accuracy") :]


@pytest.mark.parametrize("name, precision", [(R1, "bf16"), (R2, "fp32")])
def test_the_precision_that_is_not_the_default(script, folders, name, precision):
    out = script(name, "--data", folders, "--epochs", 1, "--precision", precision).stdout
    assert f"on cpu in {precision}\n" in out


# ---------------------------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of 1 or more"),
        (["--epochs", "-3"], "argument --epochs: '-3' is not a whole number of 1 or more"),
        (["--epochs", "two"], "argument --epochs: 'two'"),
        (["--batch-size", "-4"], "argument --batch-size: '-4'"),
        (["--batch-size", "1e3"], "argument --batch-size: '1e3' is not"),
        (["--batch-size", "99999999999"], "argument --batch-size: '99999999999' is not"),
        (["--batch-size", "9" * 400], "argument --batch-size: '99"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a positive number"),
        (["--lr", "0"], "argument --lr: '0'"),
        (["--lr", "-0.1"], "argument --lr: '-0.1'"),
        (["--lr", "inf"], "argument --lr: 'inf' is not a positive number"),
        (["--seed", "-1"], "argument --seed: '-1'"),
        (["--seed", "1.5"], "argument --seed: '1.5' is not"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["--flop"], "unrecognized arguments: --flop"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--data"], "argument --data: expected one argument"),
        (["--resume", "--evaluate"], "not allowed with argument"),
        (["--resume", ""], "argument --resume: the path is empty"),
        (["--evaluate", ""], "argument --evaluate: the path is empty"),
        (["--data", ""], "argument --data: the path is empty"),
        (["--checkpoints", ""], "argument --checkpoints: the path is empty"),
    ],
)
def test_what_the_command_line_refuses(capsys, flags, words):
    parser = utils.ArgumentParser("", epochs=1, batch_size=1, lr=1)
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words in error


def test_a_foreign_checkpoint_is_refused(refused, tmp_path, folders):
    for content in ({"a": 1}, [1, 2], {"weights": {}, "arguments": {}}, Trap(tmp_path / "sprung")):
        torch.save(content, tmp_path / "foreign.pt")
        for flag in ("--resume", "--evaluate"):
            assert "foreign.pt" in refused(R1, "--data", folders, flag, "foreign.pt")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "checkpoints").exists()


def test_what_a_run_refuses(refused, script, tmp_path, folders):
    flags = ["--data", folders, "--epochs", 1]
    assert "no-such.pt cannot be read: No such file" in refused(R1, *flags, "--resume", "no-such.pt")
    for number in (9, 10):
        (tmp_path / f"checkpoints/cifar10_r1.earlier{number}").mkdir(parents=True)
    line = refused(R1, *flags, "--evaluate")
    assert "last.pt to evaluate; train this run first, or name a file; an earlier run is in " in line
    assert line.endswith(" is in checkpoints/cifar10_r1.earlier10\n")
    assert "cannot be read: Is a directory" in refused(R1, *flags, "--evaluate", folders)
    assert "--batch-size 1" in refused(R2, *flags, "--batch-size", 1)

    script(R1, *flags)
    folder = tmp_path / "checkpoints/cifar10_r1"
    last = folder / "last.pt"
    assert "batch-size 64, this one has 32" in refused(R1, *flags, "--resume", "--batch-size", 32)
    assert "--seed 0, this one has 7" in refused(R1, *flags, "--resume", last, "--seed", 7)
    assert "is from the run cifar10_r1; resume cifar10_r1-flip" in refused(R1, *flags, "--flip", "--resume", last)
    assert "is from the run cifar10_r1; resume cifar10_r2" in refused(R2, *flags, "--resume", last)
    assert "model TutorialCNN, this run's has ResNet18" in refused(R2, *flags, "--evaluate", last)
    assert "is for inference and cannot be resumed" in refused(R1, *flags, "--resume", folder / "best.pt")
    assert "not a checkpoint" in refused(R1, *flags, "--evaluate", folders / "train/cat/0000.png")
    other = write_images(tmp_path / "other", classes=("cat", "dog", "fish"))
    assert "['cat', 'dog', 'frog']" in refused(R1, "--data", other, "--evaluate", last)
    assert "was trained on other data" in refused(R1, "--data", other, "--resume", last)

    (tmp_path / "file").touch()
    assert "file/cifar10_r1" in refused(R1, *flags, "--checkpoints", "file")


# ---------------------------------------------------------------------------------------------- real images


@pytest.mark.long
def test_one_epoch_on_cifar10(script, cifar10):
    out = script(R1, "--data", cifar10, "--epochs", 1).stdout
    assert out.startswith("50000 training and 10000 test images of 10 classes")
    assert float(re.search(r"on the test images: (\S+) %", out)[1]) > 40
    assert "Accuracy of plane: " in out and "Accuracy of truck: " in out


def events(folder):
    """Return the scalars in a run's folder as TensorBoard reads them: (epoch, value) pairs by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_the_whole_log(script, tmp_path, folders):
    pytest.importorskip("tensorboard")
    script(R1, "--data", folders, "--epochs", 1)
    script(R1, "--data", folders, "--epochs", 3, "--resume", "--tensorboard")
    script(R1, "--data", folders, "--epochs", 4, "--resume", "--tensorboard")
    folder = tmp_path / "checkpoints/cifar10_r1"
    scalars = events(folder)
    assert scalars.keys() == {"loss/train", "loss/test", "accuracy/train", "accuracy/test", "lr", "seconds"}
    rows = [(int(row["epoch"]), pytest.approx(float(row["test_accuracy"]))) for row in log(folder)]
    assert scalars["accuracy/test"] == rows and len(rows) == 4


def test_tensorboard_that_is_not_installed(refused, folders):
    line = refused(R1, "--data", folders, "--tensorboard", before=hide("tensorboard"))
    assert "--tensorboard needs a package that is not installed: pip install tensorboard" in line


ALLOCATE = """
import resource, torch, utils

def main():
    utils.set_up(utils.ArgumentParser("", epochs=1, batch_size=1, lr=1).parse_args([]))
    faults = []
    for _ in range(20):  # the first few find their places
        torch.ones(20 << 20)  # 80 MiB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(faults[-1] - faults[9])

utils.run(main)
"""


made_for_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="made for glibc")


@made_for_glibc
def test_large_activations_find_their_memory_again():
    """Otherwise a step would spend half of its time in page faults, one for each 4 KiB."""
    done = subprocess.run([sys.executable, "-c", ALLOCATE], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 2_000  # 10 times 20,480 otherwise


HUGE = """
import torch, utils

def main():
    utils.set_up(utils.ArgumentParser("", epochs=1, batch_size=1, lr=1).parse_args([]))
    middle = torch.ones(20 << 20).data_ptr() + (40 << 20)
    for line in open("/proc/self/smaps"):
        first, *others = line.split()
        if not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
        elif first == "VmFlags:" and start <= middle < end:
            print("hg" in others)

utils.run(main)
"""


@made_for_glibc
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_large_activations_ask_for_huge_pages():
    """Otherwise a step of r5 would take 1.5 times as long on some machines."""
    done = subprocess.run([sys.executable, "-c", HUGE], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout == "True\n"


def note_views(path):
    """Append to the file how many images SixViews is called with in this process, which is a script's."""
    original = models.SixViews.forward

    def forward(self, images):
        with path.open("a") as file:
            print(len(images), file=file)
        return original(self, images)

    models.SixViews.forward = forward


@pytest.mark.parametrize("flags", [[], ["--tta"]], ids=str)
@pytest.mark.long
def test_r5_tests_six_views_with_tta_only(script, tmp_path, folders, flags):
    path = tmp_path / "views"
    precise = ["--precision", "fp32", "--lr", 0.05]
    script(R5, "--data", folders, "--epochs", 2, *precise, *flags, before=functools.partial(note_views, path))
    assert (path.read_text().split() if path.exists() else []) == ["30"] * 2 * len(flags)  # the last epoch, and the end
    run = tmp_path / "checkpoints" / "-".join(["cifar10_r5", *(flag[2:] for flag in flags)])
    classifier = predict.load_classifier(run / "last.pt")  # tests as the run did
    assert isinstance(classifier.network, models.SixViews) == bool(flags)
    assert classifier.model == "WhitenedCNN"
    data = load_data(str(folders))
    accuracy = 100 * (classifier(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(json.loads((run / "run.json").read_text())["accuracy"])


def test_the_commit_has_a_plus_if_code_has_changed_since(tmp_path):
    shutil.copytree(ROOT / "harness", tmp_path / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a git hook
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # which may ask for signatures
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, env=environment, check=True)
    code = (
        "from pathlib import Path; from harness.records import git_commit; import sys\n"
        "for name in ('', 'notes.md', 'cifar10_r9.py'):\n"
        "    name and Path(name).touch()\n"
        "    print(git_commit())\n"
    )
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.split()
    assert len(first) == 40 and second == first and third == f"{first}+"
    unpacked = tmp_path / "unpacked"  # from an archive, within someone's repository
    shutil.copytree(tmp_path / "harness", unpacked / "harness")
    done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None"] * 3


def test_auto_is_the_best_device_and_its_fastest_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # it also counts a GPU whose driver is too old
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto").type == expected
    with pytest.raises(UserError, match="--device cuda: this machine or this build of PyTorch has none"):
        choose_device("cuda")
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(UserError, match="--precision fp16 needs CUDA"):
        choose_precision("fp16", torch.device("mps"))
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_precision("auto", torch.device("cuda")) == ("bf16" if has_it else "fp16")
        assert choose_precision("auto", torch.device("cpu")) == ("bf16" if has_it else "fp32")

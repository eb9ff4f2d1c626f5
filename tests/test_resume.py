"""Runs that are interrupted and resumed."""

import copy
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import utils

import pytest
import torch
from helpers import MOBILENET, R1, R2, R3, R4, R5, log, output, same_weights, wait_for_a_save, write_images

from harness.recipe import describe_scheduler
from harness.state import State


@pytest.mark.parametrize(
    "command",
    [[R2, "--crop"], [R4], [R4, "--stem", "cifar"], [R4, "--stem", "cifar-nopool"], [R5, "--tta"], [MOBILENET]],
    ids=" ".join,
)
@pytest.mark.long
def test_a_run_killed_again_and_again_is_the_run_left_alone(start, script, tmp_path, command):
    write_images(tmp_path / "data", train=8, test=4)
    name, *flags = [*command, "--batch-size", 12, "--lr", 0.01, "--epochs", 5, "--resume"]
    script(name, *flags, "--checkpoints", "whole")
    (whole,) = (tmp_path / "whole").iterdir()
    if name in (R4, MOBILENET):  # rates at the middles of the epochs, with the peak after a quarter or a tenth of five
        late = [0.5 / 1.25, 3.5 / 3.75, 2.5 / 3.75, 1.5 / 3.75, 0.5 / 3.75]
        factors = [1, 3.5 / 4.5, 2.5 / 4.5, 1.5 / 4.5, 0.5 / 4.5] if "--stem" in command else late
        assert [float(row["lr"]) / 0.01 for row in log(whole)] == pytest.approx(factors)
    record = json.loads((whole / "run.json").read_text())
    epoch_seconds = min(row["seconds"] for row in record["epochs"])  # a process's first epoch takes longer
    parts, moments = tmp_path / "parts" / whole.name, random.Random(0)
    for kill in range(3):
        process = start(name, *flags, "--checkpoints", "parts")
        wait_for_a_save(process, parts / "last.pt")
        time.sleep(moments.uniform(0, epoch_seconds))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert ("resuming parts/" in output(tmp_path, "stdout").read_text()) == (kill > 0)
    assert re.search(r"resuming parts/.* after epoch [345]\b", script(name, *flags, "--checkpoints", "parts").stdout)
    assert same_weights(whole / "last.pt", parts / "last.pt") and same_weights(whole / "best.pt", parts / "best.pt")
    assert log(whole) == log(parts)
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, parts)]
    for key in ("accuracy", "best_accuracy", "best_epoch", "per_class"):
        assert records[0][key] == records[1][key]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_line(start, script, tmp_path, folders, number):
    process = start(R4, "--data", folders, "--batch-size", 30, "--lr", 0.02, "--epochs", 6)
    folder = tmp_path / "checkpoints/cifar10_r4"
    wait_for_a_save(process, folder / "last.pt")
    os.kill(process.pid, number)
    process.join()
    line = output(tmp_path, "stderr").read_text()
    assert process.exitcode == 128 + number and line.count("\n") == 1
    assert not list(folder.glob("*.new"))
    command = re.fullmatch(rf"cifar10_r4.py: ended by {number.name}; python (.* --resume) resumes after .*\n", line)[1]
    assert "resuming checkpoints/cifar10_r4/last.pt after epoch" in script(R4, *shlex.split(command)[1:]).stdout
    assert [row["epoch"] for row in log(folder)] == ["1", "2", "3", "4", "5", "6"]


def test_a_rate_given_to_a_schedule_scales_it(start, script, tmp_path, folders):
    flags = [R4, "--data", folders, "--batch-size", 30, "--epochs", 4]
    folder = tmp_path / "checkpoints/cifar10_r4"
    process = start(*flags, "--lr", 0.02)
    wait_for_a_save(process, folder / "last.pt")
    process.terminate()
    process.join()
    done = torch.load(folder / "last.pt", weights_only=True)["epoch"]
    script(*flags, "--lr", 0.002, "--resume")
    factors = [0.5, 5 / 6, 3 / 6, 1 / 6]  # at the middles of four epochs, with the peak after the first
    rates = [0.02 * factor for factor in factors[:done]] + [0.002 * factor for factor in factors[done:]]
    assert [float(row["lr"]) for row in log(folder)] == pytest.approx(rates)


def test_a_schedule_is_not_made_longer(refused, script, folders):
    flags = [R4, "--data", folders, "--batch-size", 30]
    script(*flags, "--epochs", 1)
    assert "is from a run with --epochs 1, this one has 2" in refused(*flags, "--epochs", 2, "--resume")


def test_a_second_run_in_the_same_folder_is_refused(start, refused, script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs"]
    first = start(*flags, 100_000)
    wait_for_a_save(first, tmp_path / "checkpoints/cifar10_r1/last.pt")
    line = refused(*flags, 2)
    assert f"checkpoints/cifar10_r1 is in use by process {first.pid}; wait for it, or use other --checkpoints" in line
    script(*flags, 2, "--evaluate")  # reading does no harm
    os.kill(first.pid, signal.SIGSTOP)
    (tmp_path / "checkpoints/cifar10_r1/.owner").write_text("")  # as a power cut may leave it
    assert "checkpoints/cifar10_r1 is in use by another process" in refused(*flags, 2)
    first.kill()
    first.join()
    script(*flags, 2)  # and a killed run holds no lock


def test_the_best_accuracy_is_not_forgotten(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--lr", 0.02]
    script(*flags, "--epochs", 8)
    best = tmp_path / "checkpoints/cifar10_r1/best.pt"
    before = best.read_bytes()
    assert torch.load(best, weights_only=True)["accuracy"] > 50
    out = script(*flags, "--epochs", 9, "--lr", 1, "--resume").stdout
    assert "saved as the best" not in out and best.read_bytes() == before


@pytest.mark.long
def test_r3_goes_on_from_r2(refused, script, tmp_path, folders):
    flags = ["--data", folders, "--batch-size", 30, "--epochs"]
    line = refused(R3, *flags, 9, "--resume")
    assert (
        "no checkpoints/cifar10_r2-crop/last.pt, which cifar10_r3 starts from; run python cifar10_r2.py --crop first"
        in line
    )
    script(R2, *flags, 2, "--crop")
    r2, r3 = tmp_path / "checkpoints/cifar10_r2-crop", tmp_path / "checkpoints/cifar10_r3"
    before = {path.name: path.read_bytes() for path in r2.iterdir()}
    assert "already has 2 epochs of training; use a larger --epochs" in refused(R3, *flags, 2, "--resume")
    line = refused(R3, *flags, 4, "--batch-size", 45, "--resume")
    assert "--batch-size 30, this one has 45; make them agree, or run python cifar10_r2.py --crop again" in line
    out = script(R3, *flags, 4, "--resume").stdout
    assert "resuming checkpoints/cifar10_r2-crop/last.pt after epoch 2\n" in out
    first = (r3 / "log.csv").read_bytes()
    assert "resuming checkpoints/cifar10_r3/last.pt after epoch 4\n" in script(R3, *flags, 5, "--resume").stdout
    assert [row["epoch"] for row in log(r3)] == ["3", "4", "5"]
    best = torch.load(r3 / "best.pt", weights_only=True)
    assert best["mean"] == [0.4914, 0.4822, 0.4465] and best["epoch"] > 2
    out = script(R3, *flags, 4).stdout  # without --resume it starts again from r2's last epoch
    assert "resuming checkpoints/cifar10_r2-crop/last.pt after epoch 2\n" in out
    assert "the run that was in checkpoints/cifar10_r3 is now in checkpoints/cifar10_r3.earlier1\n" in out
    assert re.sub(rb"[^,]*\n", b"\n", first) == re.sub(rb"[^,]*\n", b"\n", (r3 / "log.csv").read_bytes())
    assert before == {path.name: path.read_bytes() for path in r2.iterdir()}
    line = refused(R3, *flags, 9, "--seed", 1, "--resume")
    assert "no checkpoints/cifar10_r2-crop-seed1/last.pt, which cifar10_r3 starts from; run python" in line
    line = refused(R2, *flags, 9, "--crop", "--resume", r3 / "last.pt")
    assert "is from the run cifar10_r3; resume cifar10_r2-crop, or start without --resume" in line


def test_r3_goes_on_from_a_finished_r2(refused, script, tmp_path, folders):
    flags = ["--data", folders, "--batch-size", 30, "--epochs"]
    script(R2, *flags, 1, "--crop")
    last = tmp_path / "checkpoints/cifar10_r2-crop/last.pt"
    checkpoint = torch.load(last, weights_only=True)
    torch.save(checkpoint | {"recipe": checkpoint["recipe"] | {"epochs": 46}}, last)  # as if it had been ended there
    for resume in (["--resume"], ["--resume", last]):
        line = refused(R3, *flags, 60, *resume)
        assert (
            "last.pt is at epoch 1 of 46; finish that run first: python cifar10_r2.py --crop --epochs 46 --resume"
            in line
        )


def test_a_step_back_loses_neither_the_way_forward_nor_the_best(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs"]
    folder = tmp_path / "checkpoints/cifar10_r1"
    script(*flags, 3)
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".pt"}
    out = script(*flags, 3, "--resume", folder / "last.previous.pt").stdout
    assert "is now in checkpoints/cifar10_r1.earlier1\n" in out and "after epoch 2\n" in out
    earlier = folder.with_name("cifar10_r1.earlier1")
    assert {path.name: path.read_bytes() for path in earlier.iterdir() if path.suffix == ".pt"} == whole
    assert same_weights(folder / "last.pt", earlier / "last.pt")


def test_a_record_names_all_that_a_run_was_trained_on(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs"]
    script(*flags, 2, "--precision", "fp32")
    script(*flags, 3, "--precision", "bf16", "--resume")
    folder = tmp_path / "checkpoints/cifar10_r1"
    assert json.loads((folder / "run.json").read_text())["precision"] == "fp32 and bf16"
    last = (folder / "last.pt").rename(tmp_path / "elsewhere.pt")  # the complete run, resumed elsewhere
    script(*flags, 3, "--precision", "fp32", "--resume", last)
    assert json.loads((folder / "run.json").read_text())["precision"] == "fp32 and bf16"


def best_and_record(folder):
    best, record = torch.load(folder / "best.pt", weights_only=True), json.loads((folder / "run.json").read_text())
    return (best["epoch"], best["accuracy"]), (record["best_epoch"], record["best_accuracy"])


def test_best_is_the_best_of_the_log(script, tmp_path, folders):
    """The last epoch, the best so far, is lost, and the run resumes at another learning rate."""
    flags = [R1, "--data", folders, "--lr", 0.02, "--epochs"]
    folder = tmp_path / "checkpoints/cifar10_r1"
    script(*flags, 20)
    accuracies = [float(row["test_accuracy"]) for row in log(folder)]
    epochs = 1 + max(i for i in range(1, 20) if accuracies[i] > max(accuracies[:i]))  # the last new best
    assert epochs > 2
    script(*flags, epochs)
    (folder / "last.pt").write_bytes(b"damaged")
    script(R1, "--data", folders, "--epochs", epochs, "--resume", "--lr", 1e-9)
    in_file, in_record = best_and_record(folder)
    assert in_file == in_record and in_file[0] < epochs


@pytest.mark.long
def test_a_best_of_another_run_is_not_adopted(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs"]
    script(*flags, 2)
    script(R2, "--data", folders, "--epochs", 2, "--batch-size", 30)
    r1, r2, kept = (tmp_path / name for name in ("checkpoints/cifar10_r1", "checkpoints/cifar10_r2", "kept"))
    kept.mkdir()
    shutil.copy(r1 / "last.pt", kept)
    shutil.copy(r2 / "best.pt", kept)
    best = json.loads((r1 / "run.json").read_text())["best_epoch"]
    assert best == 1  # so that its weights are not in last.pt
    out = script(*flags, 3, "--resume", kept / "last.pt", "--lr", 1e-9).stdout
    assert "no best.pt of epoch 1, the best so far; the next better one will be kept\n" in out
    assert "last.pt, log.csv and run.json are in" in out and not (r1 / "best.pt").exists()
    shutil.copy(r1.with_name("cifar10_r1.earlier1") / "best.pt", kept)
    script(*flags, 3, "--resume", kept / "last.pt", "--lr", 1e-9)
    assert best_and_record(r1)[0] == best_and_record(r1)[1]


def test_what_is_left_of_a_run_is_an_earlier_run(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs", 2]
    script(*flags)
    folder = tmp_path / "checkpoints/cifar10_r1"
    for path in folder.glob("last*.pt"):  # to save space
        path.unlink()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "is now in checkpoints/cifar10_r1.earlier1\n" in script(*flags).stdout
    assert {path.name: path.read_bytes() for path in folder.with_name("cifar10_r1.earlier1").iterdir()} == kept


def test_an_earlier_run_is_taken_up_again(script, tmp_path, folders):
    """A user forgot --resume, and a new run has taken the place of the one to resume."""
    flags = [R1, "--data", folders, "--epochs"]
    script(*flags, 3)
    folder = tmp_path / "checkpoints/cifar10_r1"
    best = (folder / "best.pt").read_bytes()
    script(*flags, 1)
    one, two = (folder.with_name(f"cifar10_r1.earlier{number}") for number in (1, 2))
    out = script(*flags, 3, "--resume", one / "last.pt").stdout
    assert "the run that was in checkpoints/cifar10_r1 is now in checkpoints/cifar10_r1.earlier2\n" in out
    assert (folder / "best.pt").read_bytes() == best and [len(log(path)) for path in (folder, one, two)] == [3, 3, 1]
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch 3\n" in script(*flags, 4, "--resume").stdout


def die_before_the_new_folder_has_its_name():
    """Kill this process, which is a script's, after it has moved the earlier run."""
    original = Path.rename

    def rename(path, target):
        if path.name.endswith(".new"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    Path.rename = rename


def test_killed_while_it_begins_from_an_older_file(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs"]
    script(*flags, 3)
    folder = tmp_path / "checkpoints/cifar10_r1"
    older = ["--resume", folder / "last.previous.pt"]
    script(*flags, 4, *older, status=-signal.SIGKILL, before=die_before_the_new_folder_has_its_name)
    assert not folder.exists()
    assert "resuming checkpoints/cifar10_r1/last.pt after epoch 2\n" in script(*flags, 4, "--resume").stdout
    assert [len(log(path)) for path in (folder, folder.with_name("cifar10_r1.earlier1"))] == [4, 3]


def test_a_longer_run_has_a_new_record(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--resume", "--epochs"]
    record = tmp_path / "checkpoints/cifar10_r1/run.json"
    kept = {}
    for epochs in (1, 2):
        script(*flags, epochs)
        kept[epochs] = record.read_text()
        assert len(json.loads(kept[epochs])["epochs"]) == epochs
    record.write_text(kept[1])  # as if the process had been killed after its last save
    script(*flags, 2)
    assert len(json.loads(record.read_text())["epochs"]) == 2


def test_a_finished_runs_record_stays(script, tmp_path, folders):
    flags = [R1, "--data", folders, "--epochs", 1, "--resume"]
    script(*flags)
    record = tmp_path / "checkpoints/cifar10_r1/run.json"
    before = record.read_bytes()
    script(*flags, "--precision", "bf16")
    assert record.read_bytes() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, lr: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        lambda optimizer, lr: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer, lr: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=10),
        lambda optimizer, lr: torch.optim.lr_scheduler.CyclicLR(optimizer, lr / 9, lr, 3),
        lambda optimizer, lr: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.ConstantLR(optimizer, 1), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [5],
        ),
        lambda optimizer, lr: None,
    ],
)
def test_a_rate_is_given_to_any_scheduler(make):
    """From the change on, the rates are those of a run that had the new rate from the start."""
    model, rates = torch.nn.Linear(2, 2), {}
    for begun_with in (0.1, 0.01):
        optimizer = torch.optim.SGD(model.parameters(), lr=begun_with)
        scheduler = make(optimizer, begun_with)
        step = utils.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, torch.float32)
        advance(optimizer, scheduler, 3)
        State(step, scheduler).change_lr(begun_with, 0.01)
        rates[begun_with] = advance(optimizer, scheduler, 6)
    assert rates[0.1] == pytest.approx(rates[0.01])
    assert json.dumps(describe_scheduler(scheduler, 10))


def advance(optimizer, scheduler, steps):
    """Return the first group's rate at each of the next steps."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step(*[1.0] * isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
    return rates


@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.AdamW])
def test_moments_fit_the_memory_format_of_the_weights(made):
    """A fused optimizer computes on memory as it lies, and an edited network may lie in another format."""
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % 4
    settings = {"momentum": 0.9} if made is torch.optim.SGD else {}

    def begin(memory_format):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten())
        model.to(memory_format=memory_format)
        optimizer = made(model.parameters(), lr=0.1, fused=True, **settings)
        return State(utils.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, torch.float32), None)

    def step(state):
        torch.nn.functional.cross_entropy(state.model(images), labels).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state, other = begin(torch.contiguous_format), begin(torch.channels_last)
    for _ in range(3):
        step(state)
    checkpoint = copy.deepcopy({"weights": state.model.state_dict()} | state.saved_parts())
    other.load_weights(Path("last.pt"), checkpoint)
    other.load_parts(Path("last.pt"), checkpoint, is_base=False)
    step(state)
    step(other)
    for one, another in zip(state.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def test_a_run_takes_its_bases_moments_and_keeps_its_own_settings():
    def begin(lr, weight_decay):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        return State(utils.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, torch.float32), None)

    base, own = begin(0.1, 0.2), begin(0.01, 0)
    base.model(torch.ones(1, 2)).sum().backward()
    base.optimizer.step()
    checkpoint = copy.deepcopy({"weights": base.model.state_dict()} | base.saved_parts())
    own.load_parts(Path("last.pt"), checkpoint, is_base=True)
    for one, other in zip(base.parameters(), own.parameters(), strict=True):
        assert torch.equal(base.optimizer.state[one]["exp_avg"], own.optimizer.state[other]["exp_avg"])
    (group,) = own.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0)


def test_the_rate_of_the_run_is_no_change():
    """The same command with --lr and --resume keeps what a schedule without initial_lr, or a hand, made of it."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = utils.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, torch.float32)
    optimizer.param_groups[0]["lr"] = 0.03
    State(step, None).change_lr(0.1, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_rate_that_is_given_scales_that_of_all_groups(scheduled):
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 40.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = utils.triangular_schedule(optimizer, 10, 0) if scheduled else None
    step = utils.TrainStep(model, torch.nn.CrossEntropyLoss(), optimizer, torch.float32)
    State(step, scheduler).change_lr(0.1, 0.2)
    for _ in range(2):
        factor = 1 - optimizer.state_dict()["param_groups"][0]["lr"] / 0.2  # how much the schedule takes away
        assert factor == pytest.approx(0.05 + 0.1 * scheduler.last_epoch if scheduler else 0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.2 * (1 - factor), 80 * (1 - factor)]
        )
        optimizer.step()
        scheduler and scheduler.step()

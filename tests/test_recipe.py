"""The recipe and the name of a run, and the errors that another experiment gets."""

import argparse
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import utils

import pytest
import torch
from helpers import R1, R2, R3, R4, ROOT, log
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR
from torchvision.transforms import v2

from harness.files import read_checkpoint
from harness.recipe import describe_criterion, describe_scheduler, first_difference, plain
from harness.terminal import UserError

# ------------------------------------------------------------------------------------------------ its recipe


def edited(tmp_path, name, *edits):
    """Write a copy of a script with these edits and return its path."""
    text = (ROOT / name).read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.long
def test_an_edited_experiment_is_not_resumed(script, refused, tmp_path, folders):
    flags = ["--data", folders, "--batch-size", 30, "--epochs", 1, "--resume"]
    script(edited(tmp_path, R4), *flags)
    record = json.loads((tmp_path / "checkpoints/cifar10_r4/run.json").read_text())
    assert record["recipe"]["constants"]["CUTOUT"]["imagenet"] == 8
    assert record["recipe"]["flags"] == {"stem": "imagenet"}
    cosine = "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)"
    for edit, words in (
        (('"imagenet": 8', '"imagenet": 12'), "with CUTOUT imagenet 8, this one has 12; make them agree"),
        (('"imagenet": 0.1', '"imagenet": 0'), "LABEL_SMOOTHING imagenet 0.1, this one has 0;"),
        (('"imagenet": 0.2,', '"imagenet": 0.1,'), "LR imagenet 0.2, this one has 0.1;"),
        (('default="imagenet"', 'default="cifar"'), "--stem imagenet, this one has cifar;"),
        (("nesterov=True", "nesterov=False"), "optimizer nesterov True, this one has False;"),
        (("flip=True", "flip=False"), "augmentation flip True, this one has False;"),
        (
            ("utils.triangular_schedule(optimizer, args.epochs, PEAK[args.stem])", cosine),
            "scheduler name LambdaLR, this one has C",
        ),
        (("args.epochs, PEAK[args.stem])", "args.epochs, 0.9)"), "scheduler factors [["),
    ):
        assert words in refused(edited(tmp_path, R4, edit), *flags)
    script(edited(tmp_path, R4, ("import torch\n", "import torch  # with a comment\n")), *flags)
    # and the rate, if it is given
    script(edited(tmp_path, R4, ('"imagenet": 0.2,', '"imagenet": 0.1,')), *flags, "--lr", 0.1)
    line = refused(edited(tmp_path, R4), *flags, "--epochs", 2)
    assert "--epochs 1, this one has 2;" in line


def test_an_edited_order_of_parameters_is_not_resumed(script, refused, tmp_path, folders):
    """The optimizer's state goes by position. In the fused optimizers a wrong one would cause a segmentation fault."""
    flags = ["--data", folders, "--epochs", 2, "--resume"]
    script(edited(tmp_path, R1), *flags)
    last = tmp_path / "checkpoints/cifar10_r1/last.pt"
    checkpoint = torch.load(last, weights_only=True)
    words = "has its weights in another order than TutorialCNN and its optimizer have now"
    for changed in (
        {"weights": dict(reversed(checkpoint["weights"].items()))},
        {"parameters": [list(reversed(checkpoint["parameters"][0]))]},
        {"optimizer": checkpoint["optimizer"] | {"state": {0: checkpoint["optimizer"]["state"][1]}}},
    ):
        torch.save(checkpoint | changed, last)
        assert words in refused(R1, *flags)
    torch.save(checkpoint, last)
    groups = ("model.parameters(), lr", '[{"params": [p]} for p in model.parameters()], lr')
    assert "optimizer groups 1, this one has 10;" in refused(edited(tmp_path, R1, groups), *flags)


def test_a_checkpoint_of_another_version_is_not_resumed(script, refused, tmp_path, folders):
    flags = [R1, "--data", folders, "--resume", "--epochs"]
    script(*flags, 1)
    last = tmp_path / "checkpoints/cifar10_r1/last.pt"
    checkpoint = torch.load(last, weights_only=True)
    lacking = {name: value for name, value in checkpoint["recipe"].items() if name != "holdout"}
    for recipe in (lacking, checkpoint["recipe"] | {"new": 0}):
        torch.save(checkpoint | {"recipe": recipe}, last)
        assert "last.pt is from another version of these scripts; start without --resume" in refused(*flags, 2)


def test_fewer_epochs_than_are_done(script, refused, tmp_path, folders):
    flags = [R1, "--data", folders, "--resume", "--epochs"]
    script(*flags, 3)
    assert "last.pt has 3 epochs of training, more than --epochs 2" in refused(*flags, 2)
    assert len(log(tmp_path / "checkpoints/cifar10_r1")) == 3


def test_a_network_of_another_normalisation_is_not_evaluated(script, refused, tmp_path, folders):
    script(R1, "--data", folders, "--epochs", 1)
    for name, other in (("mean", "STD = (0.5, 0.5, 0.5)\nMEAN"), ("std", "MEAN = (0.5, 0.5, 0.5)\nSTD")):
        path = edited(tmp_path, R1, ("MEAN = STD = (0.5, 0.5, 0.5)", f"{other} = (0.4, 0.5, 0.5)"))
        line = refused(path, "--data", folders, "--evaluate")
        assert f"last.pt holds a network with {name} [0.5, 0.5, 0.5], this run's has [0.4, 0.5, 0.5]" in line


def test_what_is_a_difference():
    one = {"constants": {"A": 1, "EPOCHS": 5}, "epochs": 5, "optimizer": {"name": "SGD", "old": 1}, "data": "x"}
    for changes, words in (
        ({}, None),
        ({"constants": {"A": 1, "EPOCHS": 9}}, None),  # the epochs themselves are compared
        ({"epochs": 9}, "--epochs 5, this one has 9"),
        ({"constants": {"A": 2, "EPOCHS": 5}}, "A 1, this one has 2"),
        ({"constants": {"A": 1, "EPOCHS": 5, "B": 3}}, "B None, this one has 3"),
        ({"constants": {"A": 1, "EPOCHS": 5, "B": 0}}, None),  # a new one that is off
        ({"constants": {"EPOCHS": 5}}, "A 1, this one has None"),
        ({"optimizer": {"name": "SGD", "new": True}}, None),  # a setting of another version of PyTorch
        ({"optimizer": {"name": "Adam"}}, "optimizer name SGD, this one has Adam"),
    ):
        assert first_difference(one, one | changes, set()) == words
    nested = [{"constants": {"CUT": {"a": 8, "b": value}}} for value in (8, 12)]
    assert first_difference(*nested, set()) == "CUT b 8, this one has 12"
    assert first_difference(*nested, {"CUT"}) is None
    rates = 0.1, {"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.3}, {"a": 0.1, "b": 0.3, "c": 1}
    of_a, of_b = ([{"constants": {"LR": r}, "flags": {"stem": stem}, "lr": 0.1} for r in rates] for stem in "ab")
    for theirs, ours in itertools.permutations(of_a, 2):
        assert first_difference(theirs, ours, {"lr"}) is None  # of another experiment's rate at most
    assert first_difference(of_b[0], of_b[1], {"lr"}) == "LR b 0.1, this one has 0.2"
    assert first_difference(of_b[1], of_b[0], {"lr"}) == "LR b 0.2, this one has 0.1"
    assert first_difference(of_b[1], of_b[2], {"lr"}) == "LR b 0.2, this one has 0.3"
    assert first_difference(of_b[1], of_b[2], {"lr", "LR"}) is None
    assert first_difference(of_b[2], of_b[3], {"lr"}) is None
    new = {"constants": {"LR": rates[3]}, "flags": {"stem": "c"}}  # a choice that the other does not have
    assert first_difference(of_a[1], new, {"lr"}) == "LR c None, this one has 1"
    assert first_difference(one, one | {"epochs": 9}, {"epochs"}) is None


def test_plain_values():
    value = {"a": (1, 2.5), 3: {"x", "y"}, "t": torch.ones(2), "f": torch.nn.GELU, "n": None, "m": torch.nn.ReLU()}
    expected = {"a": [1, 2.5], "3": ["x", "y"], "t": [1.0, 1.0], "f": "GELU", "n": None, "m": "ReLU()"}
    assert plain(value) == json.loads(json.dumps(plain(value))) == expected
    assert plain(object()) == plain(object())  # no address
    older = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.NEAREST)  # its text in older torchvisions
    assert plain(older) == plain(v2.TrivialAugmentWide())


# -------------------------------------------------------------------------------------------------- its name


def parse(line, *flags):
    """Return the namespace of a command line. flags: the script's own, as the arguments of `add_argument`."""
    parser = utils.ArgumentParser("", epochs=1, batch_size=1, lr=1)
    parser.prog = "x.py"
    for names, settings in flags:
        parser.add_argument(*names.split(), **settings)
    return parser.parse_args(line.split())


@pytest.mark.parametrize(
    "line, name",
    [
        ("", ""),
        ("--width 2", "-width2"),
        ("--depth 2", "-depth2"),
        ("--width 1", ""),  # the default
        ("--widths 2", "-widths=2"),
        ("--stem cifar", "-cifar"),
        ("--head cifar", "-headcifar"),
        ("--no-flip", "-no-flip"),
        ("--crop --no-flip", "-no-flip-crop"),
        ("--no-norm", "-no-norm"),
        ("--sizes 1 2", "-sizes1+2"),
        ("--init ../a/b.pt", "-init..%2Fa%2Fb.pt"),
        ("--teacher t.pt", ""),
        ("--seed 2 --crop", "-crop-seed2"),
        ("--holdout --seed 2 --data synthetic", "-seed2-holdout-synthetic"),
        ("big", "-target=big"),
        ("--cut", "-cut8"),
        ("--cut 12", "-cut12"),
        ("--add-a --add-b", "-add-aa+b-add-ba+b"),
        ("--add-b", "-add-bb"),
        ("--kind none", "-none"),
        ("--kind no-pool", "-no-pool"),
        ("--kind no-pool --pool", "-kindno%2Dpool-pool"),
        ("--kind no --pool", "-no-pool"),
        ("--init a-seed2", "-inita%2Dseed2"),
        ("--width -2", "-width-2"),
    ],
)
def test_a_run_is_called(line, name):
    args = parse(
        line,
        ("--width", {"type": int, "default": 1}),
        ("--depth", {"type": int, "default": 1}),
        ("--stem", {"choices": ["imagenet", "cifar"], "default": "imagenet"}),
        ("--no-flip", {"action": "store_false", "dest": "flip"}),
        ("--crop", {"action": "store_true"}),
        ("--norm", {"action": argparse.BooleanOptionalAction, "default": True}),
        ("--sizes", {"type": int, "nargs": "+"}),
        ("--init", {}),
        ("--teacher", {"type": Path, "default": "t.pt"}),
        *([("--head", {"choices": ["cifar"]})] if "head" in line else []),
        *([("--widths", {"type": int})] if "widths" in line else []),
        *([("target", {"nargs": "?"}), ("--target-size", {})] if line == "big" else []),
        *([("--cut", {"type": int, "nargs": "?", "const": 8, "default": 0})] if "cut" in line else []),
        *(
            ("--add-" + each, {"action": "append_const", "const": each, "dest": "added"})
            for each in "ab"
            if "add" in line
        ),
        *([("--kind", {"choices": ["none", "no", "no-pool"]})] if "kind" in line else []),
        *([("--pool", {"action": "store_true"})] if "--pool" in line else []),
    )
    assert args.experiment + args.suffix == f"x{name}"


def test_the_command_that_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/x.py"])
    flags = [("--no-flip", {"action": "store_false", "dest": "flip"}), ("--sizes", {"nargs": "+"}), ("mode", {})]
    line = "fast --no-flip --sizes 1 2 --data d --resume last.pt --seed 3"
    args = parse(line, *flags)
    assert args.resume_command == "python some/x.py fast --no-flip --sizes 1 2 --data d --seed 3 --resume"
    assert args.command == "python x.py fast --no-flip --sizes 1 2 --seed 3 --resume"
    assert parse("fast --resume=last.pt --data synthetic", *flags).command == (
        "python x.py fast --data synthetic --resume"
    )


# --------------------------------------------------------------------------------------- another experiment


@pytest.mark.long
def test_a_new_experiment_needs_no_other_file(script, tmp_path, folders):
    """CONTRIBUTING.md's "Add an experiment": a copy of r4, with a number, a choice and a flag that is on by default."""
    path = edited(
        tmp_path,
        R4,
        (
            "    args = parser.parse_args()\n",
            '    parser.add_argument("--cutout", type=int, default=CUTOUT["imagenet"])\n'
            '    parser.add_argument("--loss", choices=["smooth", "plain"], default="smooth")\n'
            '    parser.add_argument("--no-crop", action="store_false", dest="crop")\n'
            "    args = parser.parse_args()\n",
        ),
        ("crop=4, cutout=CUTOUT[args.stem]", "crop=4 * args.crop, cutout=args.cutout"),
        ("LABEL_SMOOTHING[args.stem]", 'LABEL_SMOOTHING[args.stem] if args.loss == "smooth" else 0'),
    ).rename(tmp_path / "cifar10_r9.py")
    flags = ["--data", folders, "--batch-size", 30, "--epochs", 2, "--cutout", 4, "--loss", "plain", "--no-crop"]
    first = script(path, *flags).stdout
    folder = tmp_path / "checkpoints/cifar10_r9-cutout4-plain-no-crop"
    recipe = json.loads((folder / "run.json").read_text())["recipe"]
    assert recipe["flags"] == {"stem": "imagenet", "cutout": 4, "loss": "plain", "crop": False}
    assert recipe["augmentation"]["cutout"] == 4 and recipe["criterion"]["label_smoothing"] == 0
    again = script(path, *flags, "--resume").stdout
    assert f"resuming checkpoints/{folder.name}/last.pt after epoch 2, which was the last\n" in again
    assert first[first.index("Accuracy") :] == again[again.index("Accuracy") :]
    (folder / "curves.png").unlink()
    script("plot.py", folder, "--data", folders)
    assert (folder / "curves.png").exists()


@pytest.mark.long
def test_another_experiment_continues_r2_with_a_schedule(script, tmp_path, folders):
    flags = ["--data", folders, "--batch-size", 30, "--epochs"]
    script(R2, *flags, 1, "--crop")
    scheduled = ("train_loader.dtype)\n", "train_loader.dtype, scheduler)\n"), ("    train_step =",
        "    scheduler = utils.triangular_schedule(optimizer, 3 * len(train_loader), 0)\n    train_step =")  # fmt: skip
    path = edited(tmp_path, R3, *scheduled).rename(tmp_path / "cifar10_r9.py")
    script(path, *flags, 3)
    rates = [row["lr"] for row in log(tmp_path / "checkpoints/cifar10_r9")]
    assert "resuming" in script(path, *flags, 3, "--resume").stdout
    assert [float(rate) for rate in rates] == pytest.approx([4e-4 * 8.5 / 9, 4e-4 * 5.5 / 9])
    recipe = json.loads((tmp_path / "checkpoints/cifar10_r9/run.json").read_text())["recipe"]
    assert recipe["scheduler"]["name"] == "LambdaLR"  # known to the run though given to TrainStep only


def test_a_run_that_could_not_be_resumed_does_not_begin(refused, tmp_path, folders):
    numpys = "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.interp(epoch, [0, 9], [1, 0]))"
    schedule = "utils.triangular_schedule(optimizer, args.epochs, PEAK[args.stem])"
    path = edited(tmp_path, R4, ("import torch\n", "import numpy as np\nimport torch\n"), (schedule, numpys))
    line = refused(path, "--data", folders, "--batch-size", 30, "--epochs", 1)
    assert "the optimizer has other values than tensors and plain Python ones, and could not be resumed" in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_schedule_that_can_no_longer_be_saved_costs_no_earlier_epoch(refused, tmp_path, folders):
    later = "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else np.float64(0.5))"
    schedule = "utils.triangular_schedule(optimizer, args.epochs, PEAK[args.stem])"
    path = edited(tmp_path, R4, ("import torch\n", "import numpy as np\nimport torch\n"), (schedule, later))
    line = refused(path, "--data", folders, "--batch-size", 30, "--epochs", 3)
    assert "the optimizer has other values than tensors and plain Python ones, and could not be resumed" in line
    assert read_checkpoint(tmp_path / "checkpoints/cifar10_r4/last.pt")["epoch"] == 1


def test_a_network_with_other_logits_does_not_begin(refused, tmp_path, folders):
    path = edited(tmp_path, R1, ("num_classes=len(data.classes)", "num_classes=7"))
    for flags in (["--epochs", 1], ["--evaluate"]):
        line = refused(path, "--data", folders, *flags)
        assert "TutorialCNN returns the shape (1, 7) for one image, not (1, 3); pass num_classes" in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_network_may_have_a_mask_of_infinities(script, refused, tmp_path, folders):
    mask = '    model.register_buffer("mask", torch.full((2, 2), -torch.inf){})\n    criterion ='
    path = edited(tmp_path, R1, ("    criterion =", mask.format("")))
    line = refused(path, "--data", folders, "--epochs", 1)
    assert "not finite before training; a mask of infinities belongs into a buffer with persistent=False" in line
    assert not (tmp_path / "checkpoints").exists()
    path = edited(tmp_path, R1, ("    criterion =", mask.format(", persistent=False")))
    for epochs in (1, 2):
        script(path, "--data", folders, "--epochs", epochs, "--resume")
    assert len(log(tmp_path / "checkpoints/cifar10_r1")) == 2


def test_only_the_networks_own_parameters_are_trained():
    """A loss's parameter would be neither saved nor averaged over processes."""
    model, other = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    with pytest.raises(UserError, match="the optimizer has a parameter that is not the network's"):
        utils.TrainStep(model, nn.CrossEntropyLoss(), optimizer, torch.float32)


class Scaled(nn.Module):
    """A loss with another inside."""

    def __init__(self, smoothing):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=smoothing)


def test_a_recipe_knows_the_loss():
    """Each of these losses is told from the others."""
    smoothed = functools.partial(nn.functional.cross_entropy, label_smoothing=0.1)
    plain = functools.partial(nn.functional.cross_entropy, label_smoothing=0.2)
    weighted = [nn.CrossEntropyLoss(weight=torch.tensor(weight)) for weight in ([1.0, 2.0], [1.0, 3.0])]
    functions = [nn.functional.cross_entropy, nn.functional.nll_loss]
    losses = [*functions, smoothed, plain, *weighted, nn.CrossEntropyLoss(), Scaled(0.1), Scaled(0.2)]
    recipes = [{"criterion": describe_criterion(loss)} for loss in losses]
    for i, one in enumerate(recipes):
        assert json.loads(json.dumps(one)) == one
        for other in recipes[:i]:
            assert first_difference(one, other, set())
        assert not first_difference(one, one, set())


def test_a_learning_rate_may_change_with_any_schedule():
    rates = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9) for lr in (0.1, 0.2)]
    for make in (
        lambda optimizer, lr: CyclicLR(optimizer, lr / 10, lr),
        lambda optimizer, lr: OneCycleLR(optimizer, lr, total_steps=9),
        lambda optimizer, lr: CosineAnnealingLR(optimizer, 9),
    ):
        one, other = (describe_scheduler(make(rate, rate.param_groups[0]["lr"]), 9) for rate in rates)
        assert one == other


# ------------------------------------------------------------------------------------------------- held out


@pytest.mark.long
def test_holdout_tests_on_training_images(script, refused, tmp_path, folders):
    out = script(R1, "--data", folders, "--epochs", 1, "--holdout").stdout
    assert "81 training and 9 held-out training images of 3 classes" in out  # of 90
    assert "Accuracy of the network on the held-out training images: " in out
    folder = tmp_path / "checkpoints/cifar10_r1-holdout"
    record = json.loads((folder / "run.json").read_text())
    assert record["tested_on"] == "held-out training" and record["recipe"]["holdout"]
    assert sum(map(sum, record["confusion"])) == 9
    script("plot.py", folder, "--data", folders)
    out = script("predict.py", folders / "test/cat/0000.png", "--checkpoint", folder / "best.pt").stdout
    assert " % of the held-out training images right" in out
    for flags, words in (
        (["--resume", folder / "last.pt"], "with"),
        (["--holdout", "--resume", "plain.pt"], "without"),
    ):
        script(R1, "--data", folders, "--epochs", 1, "--checkpoints", "plain")
        (tmp_path / "plain/cifar10_r1/last.pt").rename(tmp_path / "plain.pt")
        assert f"is from a run {words} --holdout; make them agree" in refused(R1, "--data", folders, *flags)
    assert "Accuracy of the network on the test images" in (
        script(R1, "--data", folders, "--evaluate", folder / "last.pt").stdout
    )
    line = refused(R1, "--data", folders, "--holdout", "--evaluate", "plain.pt")
    assert "plain.pt was trained on the held-out images too; evaluate it without --holdout" in line
    for name in ("last.pt", "best.pt"):
        evaluate = [R1, "--holdout", "--evaluate", folder / name, "--data"]
        assert "on the held-out training images" in script(*evaluate, folders).stdout
        copy = shutil.copytree(folders, tmp_path / name)  # with another order, so that other images are held out
        (copy / "train/cat/0009.png").rename(copy / "train/cat/0031.png")
        line = refused(*evaluate, copy)
        assert f"{name} may have been trained on these held-out images; use the --data of its training" in line

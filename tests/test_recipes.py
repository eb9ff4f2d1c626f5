"""Each script hands over to the training what its constants and flags say. Nothing is trained."""

import functools
import itertools
import json
from types import SimpleNamespace

import utils

import pytest
import torch
from helpers import MOBILENET, R1, R2, R3, R4, R5
from torch import nn

import harness.records
import reproduce
from harness.checkpoints import Checkpoints
from harness.devices import name_precision
from harness.loader import Loader
from harness.recipe import first_difference
from harness.records import Records
from harness.results import RESULTS, read_folder
from models import WhitenedCNN

ADAMW = {"optimizer.name": "AdamW", "optimizer.weight_decay": "WEIGHT_DECAY", "optimizer.betas": [0.9, 0.999]}
SGD = {
    "optimizer.name": "SGD", "optimizer.weight_decay": "WEIGHT_DECAY", "optimizer.momentum": "MOMENTUM",
    "optimizer.nesterov": True, "optimizer.dampening": 0,
}  # fmt: skip
EVERY = {
    "batch_size": "BATCH_SIZE", "lr": "LR", "epochs": "EPOCHS", "optimizer.lr_multiple": 1.0,
    "seed": 0, "loader_seed": 0, "weights_from_seed": True,
    "normalisation.mean": "MEAN", "normalisation.std": "STD", "test.mean": "MEAN", "test.std": "STD",
    "criterion.name": "CrossEntropyLoss", "criterion.label_smoothing": 0.0, "augmentation.cutout": 0,
    "augmentation.flip": True, "augmentation.crop": 4, "augmentation.reflect": False, "augmentation.jitter": 0,
    "augmentation.transform": None, "test.flip": False, "test.crop": 0, "test.jitter": 0, "test.cutout": 0,
    "test.training": False, "training": True, "scheduler.name": None, "groups": 1, "test.transform": None,
}  # fmt: skip
# Linear up to the peak and down again. Each epoch or batch has the rate at its middle.
TRIANGLE = {"scheduler.name": "LambdaLR", "scheduler.peak": "PEAK", "scheduler.every": "epoch"}
SMOOTH = {"criterion.label_smoothing": "LABEL_SMOOTHING"}
ALTERNATING = {"augmentation.flip": "alternating", "augmentation.reflect": True}
IMAGENET = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}  # of CIFAR-10, as published
TUTORIAL = {"constants.MEAN": [0.5] * 3, "constants.STD": [0.5] * 3}
OWN = {f"constants.{name.upper()}": values for name, values in IMAGENET.items()}
RESNET = {"network.name": "ResNet18"}
MUON = {
    "optimizer.name": "Muon", "groups": 3, "network.name": "WhitenedCNN", "whitened": True,
    "augmentation.reflect": True, "augmentation.jitter": "JITTER", "scheduler.every": "batch",
    "optimizer.group0.parameters": 6, "optimizer.group1.parameters": 6, "optimizer.group2.parameters": 1,
    "optimizer.group0.lr_multiple": 1.0, "optimizer.group0.momentum": "MOMENTUM",
    "bias_rate": "BIAS_RATE", "head_rate": "HEAD_RATE",
    "optimizer.group1.momentum": "SGD_MOMENTUM", "optimizer.group2.momentum": "SGD_MOMENTUM",
    "optimizer.group0.weight_decay": 0, "decay": "DECAY",
}  # fmt: skip
MIRRORED = MUON | {
    "augmentation.flip": "FLIP.plain", "augmentation.crop": "CROP.plain", "augmentation.cutout": "CUTOUT.plain",
    "network.arguments.mirrored": True, "epochs": "EPOCHS.plain",
}  # fmt: skip
VIEWS = MUON | {
    "augmentation.flip": "FLIP.tta", "augmentation.crop": "CROP.tta", "augmentation.cutout": "CUTOUT.tta",
    "network.arguments.mirrored": False, "epochs": "EPOCHS.tta",
}  # fmt: skip
RESNET_TRIANGLE = {  # by stem
    stem: EVERY | SGD | OWN | RESNET | TRIANGLE | {
        "epochs": f"EPOCHS.{stem}", "batch_size": f"BATCH_SIZE.{stem}", "lr": f"LR.{stem}",
        "scheduler.peak": f"PEAK.{stem}", "criterion.label_smoothing": f"LABEL_SMOOTHING.{stem}",
        "augmentation.cutout": f"CUTOUT.{stem}", "augmentation.jitter": f"JITTER.{stem}",
        "network.arguments.stem": stem,
    }
    for stem in ("imagenet", "cifar", "cifar-nopool")
}  # fmt: skip
NO_MULTIPLE = {name: value for name, value in EVERY.items() if name != "optimizer.lr_multiple"}
HANDED_OVER = {  # by command line: a value of the recipe, or the constant that it must equal
    R1: EVERY | SGD | TUTORIAL | {"augmentation.flip": False, "augmentation.crop": 0, "precision": "PRECISION"},
    f"{R1} --flip": EVERY | SGD | TUTORIAL | {"augmentation.crop": 0, "precision": "PRECISION"},
    R2: EVERY | ADAMW | TUTORIAL | RESNET | {"augmentation.crop": 0, "epochs": "EPOCHS.flip"},
    f"{R2} --crop": EVERY | ADAMW | TUTORIAL | RESNET | {"epochs": "EPOCHS.crop"},
    R3: EVERY | ADAMW | OWN | RESNET | {"network.arguments.stem": "imagenet", "base": "BASE"},
    R4: RESNET_TRIANGLE["imagenet"],
    f"{R4} --stem cifar": RESNET_TRIANGLE["cifar"] | ALTERNATING,
    f"{R4} --stem cifar-nopool": RESNET_TRIANGLE["cifar-nopool"] | ALTERNATING,
    R5: NO_MULTIPLE | OWN | TRIANGLE | SMOOTH | MIRRORED,
    f"{R5} --tta": NO_MULTIPLE | OWN | TRIANGLE | SMOOTH | VIEWS,
    MOBILENET: EVERY | SGD | OWN | TRIANGLE | SMOOTH | ALTERNATING | {
        "augmentation.cutout": "CUTOUT", "augmentation.jitter": "JITTER", "network.name": "MobileNetV2",
    },
}  # fmt: skip
FLAGS = ["--epochs", 7, "--batch-size", 24, "--lr", 0.0123, "--seed", 5, "--precision", "fp32", "--holdout"]
GIVEN = {"epochs": 7, "batch_size": 24, "lr": 0.0123, "precision": "fp32", "holdout": True, "images": 81}
GIVEN |= {"seed": 5, "loader_seed": 5}


def hand_over(path):
    """Write what a script gives to Checkpoints and `utils.test` to a file, then end its process, in which this runs."""
    loaders = []

    class Seen(Loader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaders.append(self)

    utils.Loader = Seen

    def epochs_left(checkpoints):
        train, test = loaders
        assert train is checkpoints.loader
        recipe = checkpoints.recipe | {"training": train.training, "precision": name_precision(train.dtype)}
        recipe["test"] = {
            name: getattr(test, name) for name in ("mean", "std", "flip", "crop", "jitter", "cutout", "training")
        }
        recipe["test"]["transform"] = test.transform
        recipe |= {"groups": len(checkpoints.state.optimizer.param_groups), "images": len(train.labels)}
        recipe |= {
            "loader_seed": train.seed,
            "weights_from_seed": are_drawn_from(recipe["seed"], checkpoints.state.model),
        }
        recipe["base"] = checkpoints.base_run and [checkpoints.base_run, checkpoints.base_command]
        if isinstance(checkpoints.state.model, WhitenedCNN):
            recipe["whitened"] = has_negatives(checkpoints.state.model.whitening.weight)
            small = checkpoints.state.optimizer.param_groups[1:]
            channels = 256 // checkpoints.state.model.head.in_features  # whose gradients add up
            rates = [channels * group["initial_lr"] / recipe["lr"] for group in small]
            recipe["bias_rate"], recipe["head_rate"] = (round(rate, 6) for rate in rates)
            at_default = recipe["constants"]["LR"] / recipe["lr"]  # from the given rate to the script's own
            decays = [group["weight_decay"] * group["initial_lr"] * at_default for group in small]
            recipe["decay"] = round(decays[0], 9) if decays[0] == pytest.approx(decays[1]) else decays
        if checkpoints.state.scheduler:
            factors, *others = recipe["scheduler"]["factors"]
            assert all(other == factors for other in others)
            epochs = recipe["epochs"]
            fraction = recipe["constants"]["PEAK"]
            fraction = fraction[recipe["flags"]["stem"]] if isinstance(fraction, dict) else fraction
            peak = fraction * epochs
            by_batch = checkpoints.train_step.scheduler is checkpoints.state.scheduler
            steps = len(train) if by_batch else 1  # of an epoch
            middles = [epoch + 0.5 / steps for epoch in range(epochs)]
            triangle = [m / peak if m < peak else (epochs - m) / (epochs - peak) for m in middles]
            assert factors == pytest.approx(triangle, abs=1e-6)
            recipe["scheduler"] |= {"peak": fraction, "every": "batch" if by_batch else "epoch"}
        path.write_text(json.dumps(recipe))
        raise SystemExit(0)

    Checkpoints.epochs_left = epochs_left


def has_negatives(filters):
    """Return whether the negative of each filter is among them."""
    return bool((torch.cdist(filters.flatten(1), -filters.flatten(1)).amin(1) < 1e-6).all())


def are_drawn_from(seed, model):
    """Return whether the weights are those of a new network after this seed, except for r5's computed layer."""
    torch.manual_seed(seed)
    new = type(model)(**model.arguments).state_dict()
    return all(torch.equal(new[name], tensor) or "whitening" in name for name, tensor in model.state_dict().items())


def look_up(recipe, names):
    return functools.reduce(lambda value, name: value[name], names.split("."), recipe)


@pytest.mark.parametrize("line", HANDED_OVER)
def test_a_script_does_what_it_says(script, tmp_path, folders, line):
    name, *flags = line.split()
    path = tmp_path / "recipe.json"
    for extra, given in (([], {}), (FLAGS, GIVEN)):
        script(name, "--data", folders, *flags, *extra, before=functools.partial(hand_over, path))
        recipe = json.loads(path.read_text())
        constants = recipe["constants"]
        used = set()
        for place, expected in (HANDED_OVER[line] | given).items():
            if isinstance(expected, str) and expected.partition(".")[0] in constants:
                used.add(expected.partition(".")[0])
                expected = look_up(constants, expected)
            assert look_up(recipe, place) == expected, place
        assert extra or not constants.keys() - used, "a constant that no line of the table looks at"
        for record in [] if extra else records_of(line):
            theirs = record["recipe"] | {"constants": {}}  # early records lack some constants, which lead to settings
            ours = {key: recipe[key] for key in theirs} | {"constants": {}}
            of_the_data = {"data", "num_classes", "seed"} | ({"factors"} if name == R5 else set())  # one for each batch
            assert not first_difference(theirs, ours, of_the_data), "a figure of README is of another recipe"


def records_of(line):
    """Return the records of a row without --epochs in README's table."""
    rows = {row.command.removesuffix(" --resume"): name for name, row in reproduce.ROWS.items()}
    return read_folder(RESULTS / "cpu").get(rows.get(line), [])


# -------------------------------------------------------------------------------------- what utils.py does


class Watcher(nn.Module):
    """A network with batch-norm and dropout that notes its mode and its dropout's draws in each call."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(3, 2)
        self.modes, self.draws = [], []

    def forward(self, images):
        self.modes.append(self.training)
        self.draws.append(self.dropout(torch.ones(64)))
        return self.linear(self.norm(images).mean((2, 3)))


@pytest.fixture
def loaders():
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    common = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "device": torch.device("cpu"), "dtype": torch.float32}
    labels = torch.arange(64) % 2
    return Loader(images, labels, 16, training=True, flip=True, **common), Loader(images, labels, 16, **common)


def test_every_epoch_and_process_draws_anew(loaders, monkeypatch):
    model, seen = Watcher(), []

    def step(images, labels, weight):
        seen.append(images[:, 0, 0, 0].tolist())
        return torch.tensor(1.0), model(images)

    train_step = type("Step", (), {"model": model, "__call__": staticmethod(step)})()
    for epoch, rank in ((1, 0), (2, 0), (1, 0), (1, 1)):
        monkeypatch.setattr(utils, "RANK", rank)
        utils.train(train_step, loaders[0], epoch)
    first, second, again = seen[:4], seen[4:8], seen[8:12]
    for epoch in (first, second):
        assert sorted(number for batch in epoch for number in batch) == list(range(64))
    assert first == again != second  # the order
    one, other, same, of_rank_1 = (torch.cat(model.draws[i : i + 4]) for i in (0, 4, 8, 12))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, of_rank_1)  # the dropout
    assert all(model.modes)


def test_a_scheduler_that_goes_by_steps_is_stepped_after_each_batch(loaders):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    scheduler = utils.triangular_schedule(optimizer, 2 * len(loaders[0]), 0)
    step = utils.TrainStep(model, nn.CrossEntropyLoss(), optimizer, torch.float32, scheduler)
    utils.train(step, loaders[0], 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-9 * (1 - 4.5 / 8))


def test_testing_is_in_evaluation_mode_and_changes_nothing(loaders):
    model = Watcher().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (
        lambda: utils.test(model, loaders[1], nn.CrossEntropyLoss(), 1),
        lambda: utils.predict(model, loaders[1]),
    ):
        model.train()
        call()
    assert model.modes == [False] * 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_testing_gives_the_mean_loss_and_the_accuracy(loaders):
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    loss, accuracy = utils.test(Constant(), loaders[1], nn.CrossEntropyLoss(), 1)
    expected = nn.functional.cross_entropy(torch.tensor([[0.0, 1.0]]).expand(64, 2), loaders[1].labels)
    assert accuracy == 50 and loss == pytest.approx(expected.item())


def test_a_row_of_the_confusion_matrix_is_a_class():
    logits = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])  # predicted as 0, 2, 1, 2
    confusion = utils.confusion_matrix(logits, torch.tensor([0, 0, 1, 2]))
    assert confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert utils.per_class_accuracy(confusion).tolist() == [50, 100, 100]


def test_the_figures_of_the_epochs(tmp_path, monkeypatch, capsys):
    """The best epoch is the first with the best test accuracy, and each has its own seconds."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(harness.records, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    records = Records(tmp_path, "test", torch.device("cpu"), torch.float32, tensorboard=False)
    records.begin_epoch(0.1)
    for epoch, (train, test) in enumerate([(50, 40), (60, 45), (70, 45), (80, 42)], 1):
        records.add_epoch(epoch, (1.0, train), (1.0, test), 0.1)
    assert records.best_row()["epoch"] == 2
    assert [row["seconds"] for row in records.rows] == [10] * 4
    records.print_end()
    assert capsys.readouterr().out.startswith("Best epoch, chosen on the test images: 2 with 45.0 %\n")

"""The recipe: all that defines a run's experiment, under plain names, and how two recipes differ."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from harness.files import sha256_of
from harness.terminal import UserError

# Settings that may change during a run, or that depend on the machine. The learning rates are compared as LR.
LEARNING_RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "_last_lr"}
IMPLEMENTATION = {"params", "fused", "foreach", "capturable", "differentiable"}
DEFAULTS = {"EPOCHS", "BATCH_SIZE", "PRECISION"}  # not compared: the flags that replace them are
AUGMENTATION = ("flip", "crop", "reflect", "jitter", "cutout", "transform")  # attributes of a Loader
LIBRARY = {"optimizer", "scheduler", "criterion"}  # their settings may come and go with PyTorch's versions


def describe_recipe(args: argparse.Namespace, data, train_loader, train_step, scheduler: LRScheduler | None) -> dict:
    """Return the recipe, as plain values. It must agree before a run is resumed.

    The arguments are as for Checkpoints, before it resumes.
    """
    names = {name: value for name, value in vars(sys.modules["__main__"]).items() if name.isupper()}
    model = train_step.model
    return {
        "run": args.experiment,
        "constants": {name: plain(value) for name, value in names.items() if not isinstance(value, ModuleType)},
        "flags": {name: plain(getattr(args, name)) for name in args.own_flags},
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "holdout": args.holdout,
        "optimizer": describe_optimizer(train_step.optimizer, args.lr),
        "scheduler": describe_scheduler(scheduler, args.epochs, len(train_loader) if train_step.scheduler else 1),
        "criterion": describe_criterion(train_step.criterion),
        "augmentation": {name: plain(getattr(train_loader, name)) for name in AUGMENTATION},
        "network": {"name": type(model).__name__, "arguments": plain(getattr(model, "arguments", {}))},
        "normalisation": {"mean": plain(train_loader.mean), "std": plain(train_loader.std)},
        "data": data.fingerprint(),
    }


def describe_script() -> dict[str, str | None]:
    """Return the script's name and SHA-256. They are recorded but not compared, since a comment may change."""
    path = Path(sys.argv[0])
    return {"name": path.name, "sha256": sha256_of(path) if path.is_file() else None}


def describe_optimizer(optimizer: torch.optim.Optimizer, lr: float) -> dict:
    """Return the optimizer's name and settings, with each group's learning rate as a multiple of `lr`."""
    groups = []
    for group in optimizer.param_groups:
        multiple = round(float(group.get("initial_lr", group["lr"])) / lr, 6)
        own = settings(group, LEARNING_RATES | IMPLEMENTATION)
        groups.append({"parameters": len(group["params"]), "lr_multiple": multiple, **own})
    several = {f"group{i}": group for i, group in enumerate(groups)}
    return {"name": type(optimizer).__name__, "groups": len(groups), **(groups[0] if len(groups) == 1 else several)}


def describe_scheduler(scheduler: LRScheduler | None, epochs: int, steps: int = 1) -> dict:
    """Return the scheduler's name and settings. A LambdaLR's are its factors at the start of each epoch.

    steps: the number of scheduler steps in an epoch.
    """
    if not scheduler:
        return {"name": None}
    name = type(scheduler).__name__
    if isinstance(scheduler, LambdaLR):  # whose state leaves out its functions
        return {
            "name": name,
            "factors": [[round(float(f(steps * epoch)), 9) for epoch in range(epochs)] for f in scheduler.lr_lambdas],
        }
    return {"name": name, **settings(scheduler.state_dict(), LEARNING_RATES)}


def describe_criterion(criterion: Callable) -> dict:
    """Return the loss's name and settings, with its class weights and the modules inside it."""
    if not isinstance(criterion, nn.Module):  # a function, or functools.partial of one
        arguments = plain([*getattr(criterion, "args", ()), getattr(criterion, "keywords", {})])
        return {"name": plain(getattr(criterion, "func", criterion)), "arguments": arguments}
    parts = {name: describe_criterion(part) for name, part in criterion.named_children()}
    tensors = {name: plain(tensor) for name, tensor in criterion._buffers.items()}
    return {"name": type(criterion).__name__, **settings(vars(criterion), {"training"}), **tensors, **parts}


def settings(values: dict, without: set[str]) -> dict:
    """Return the plain values of a dict, except private names, tensors and the names in `without`."""
    return {
        name: plain(value, without)
        for name, value in values.items()
        if name not in without and not isinstance(value, torch.Tensor) and (name[0] != "_" or name == "_schedulers")
    }


def plain(value: object, without: set[str] = frozenset()) -> object:
    """Return the value in JSON's types. Any other type becomes a list or a string."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(name): plain(member, without) for name, member in value.items() if name not in without}
    if isinstance(value, list | tuple | range):
        return [plain(member, without) for member in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "tolist"):  # from NumPy or PyTorch
        return plain(value.tolist())
    if callable(value) and not isinstance(value, nn.Module):
        value = getattr(value, "__qualname__", value)
    text = re.sub(r" at 0x\w+", "", str(value))  # an address differs from process to process
    # as newer versions of torchvision write it, in the text of a transform
    return re.sub(r"InterpolationMode\.(\w+)", lambda found: found[1].lower(), text)


def flatten(recipe: dict, names: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Return the values of nested dicts, each under the tuple of names that lead to it."""
    flat = {}
    for name, value in recipe.items():
        flat |= flatten(value, (*names, name)) if isinstance(value, dict) else {(*names, name): value}
    return flat


def shared_with_base(recipe: dict) -> dict:
    """Return the part of a recipe in which a run and its base must agree."""
    shared = {name: recipe[name] for name in ("seed", "holdout", "batch_size", "data")}
    return shared | {"optimizer": {"name": recipe["optimizer"]["name"]}}


def check_same(path: Path, theirs: dict, ours: dict, may_differ: set[str], otherwise: str) -> None:
    """Raise UserError if the recipe in the checkpoint `path` differs from ours.

    may_differ: see `first_difference`. otherwise: what the user can do instead of making them agree.
    """
    if theirs["holdout"] != ours["holdout"]:  # before the data, which depends on it
        raise UserError(f"{path} is from a run {'with' if theirs['holdout'] else 'without'} --holdout; make them agree")
    if theirs["data"] != ours["data"]:
        raise UserError(f"{path} was trained on other data; use the same --data, or {otherwise}")
    if difference := first_difference(theirs, ours, may_differ):
        raise UserError(f"{path} is from a run with {difference}; make them agree, or {otherwise}")


def first_difference(theirs: dict, ours: dict, may_differ: set[str]) -> str | None:
    """Return the first difference between two recipes, worded for an error, or None.

    Of a constant with a value for each choice of a flag, such as {"imagenet": 8, "cifar": 16} for --stem, only the
    run's own value is compared.

    may_differ: names of constants or of the recipe's own values.
    """
    chosen = {value for value in ours.get("flags", {}).values() if isinstance(value, str)}
    pair = [recipe.get("constants", {}) for recipe in (theirs, ours)]
    one = flatten(theirs | {"constants": of_experiment(*pair, chosen)})
    other = flatten(ours | {"constants": of_experiment(*reversed(pair), chosen)})
    for names in other | one:
        if names[-1] in may_differ or (names[0] == "constants" and names[1] in DEFAULTS | may_differ):
            continue
        lacking = not (names in one and names in other)
        if lacking and names[0] in LIBRARY:
            continue
        was, now = one.get(names), other.get(names)
        if was == now or (lacking and not (was or now)):  # a new setting that is off is no difference
            continue
        return f"{user_name(names)} {shorten(was)}, this one has {shorten(now)}"
    return None


def of_experiment(constants: dict, others: dict, chosen: set[str]) -> dict:
    """Return the constants with only the chosen keys of those that are dicts with such a key, here or in the others."""
    result = dict(constants)
    for name, value in constants.items():
        for values in (value, others.get(name)):
            if isinstance(values, dict) and (keys := chosen & values.keys()):
                result[name] = {key: value.get(key) if isinstance(value, dict) else value for key in keys}
    return result


def user_name(names: tuple[str, ...]) -> str:
    """Return what a user calls a value of the recipe: a constant, a flag, or the names that lead to it."""
    if names[0] == "constants":
        return " ".join(names[1:])  # a constant may be a dict
    if names[0] == "flags" or (len(names) == 1 and names[0] != "run"):
        return f"--{names[-1]}".replace("_", "-")
    return " ".join(names)


def shorten(value: object) -> str:
    """Return a value as text of up to 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

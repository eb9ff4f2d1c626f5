"""The folder of a run: its weights, what it needs to go on, its log and its record."""

import csv
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from filelock import FileLock, Timeout
from torch import nn

from harness.devices import (
    device_name,
    peak_memory,
    precision_of,
)
from harness.files import Damaged, read_checkpoint, write_checkpoint, write_whole
from harness.processes import RANK, WORLD_SIZE
from harness.terminal import UserError, handle_signals

PRINTED = {"airplane": "plane", "automobile": "car"}  # the classes that the official tutorial calls otherwise


class Checkpoints:
    """The folder `args.checkpoints/args.run`: the run's weights, what it needs to go on, its log and its record.

    `start` finds what is there, `save` is called after each epoch and `finish` after the last.
    """

    NETWORK = ("model", "arguments", "classes", "mean", "std")  # what a file of weights must be of, to be loaded

    def __init__(self, args, train_loader, model, optimizer, scaler, scheduler=None, after=None):
        """after: the name of the run from whose last epoch this one goes on the first time."""
        self.args, self.loader, self.model = args, train_loader, model
        self.optimizer, self.scheduler, self.after = optimizer, scheduler, after
        self.parts = {"optimizer": optimizer, "scaler": scaler} | ({"scheduler": scheduler} if scheduler else {})
        self.folder = args.checkpoints / args.run
        self.lock = None  # on the folder, once the run writes into it
        self.intact = True  # last.pt, as far as this run knows
        self.rows = []  # of log.csv: one dict an epoch
        self.writer = None  # of TensorBoard's events
        self.network = {  # what a file for inference says of the network, beside its weights
            "model": type(model).__name__,
            "arguments": model.arguments,
            "classes": train_loader.classes,
            "mean": train_loader.mean,
            "std": train_loader.std,
            "data": train_loader.data.source,
        }
        self.recipe = {  # what must agree with the checkpoint of a run that goes on
            "run": args.run.removesuffix("-synthetic"),
            "optimizer": type(optimizer).__name__,
            **{key: value for key, value in optimizer.defaults.items() if key in ("momentum", "weight_decay")},
            "--batch-size": args.batch_size,
            "--seed": args.seed,
            "data": train_loader.data.fingerprint(),
        }
        if scheduler:
            self.recipe["--epochs"] = args.epochs

    def start(self):
        """Does what --resume or --evaluate asks for; returns the epoch to go on with, counted from 1. Raises UserError.

        After --evaluate, and for a run that is done, that epoch lies behind the last one: there is nothing to train.
        """
        epoch = self.start_alone() if RANK == 0 else None
        if WORLD_SIZE > 1:  # the others have what the first has loaded, from wherever
            state = io.BytesIO()
            parts = {"model": self.model} | self.parts
            torch.save((epoch, {name: part.state_dict() for name, part in parts.items()}), state)
            shared = [state.getvalue()]
            dist.broadcast_object_list(shared, device=self.loader.device)
            epoch, state = torch.load(io.BytesIO(shared[0]), map_location="cpu", weights_only=True)
            for name, part in parts.items():
                if RANK > 0 and state[name]:
                    part.load_state_dict(state[name])
        return epoch

    def start_alone(self):
        args, last = self.args, self.folder / "last.pt"
        if args.evaluate:
            path = last if args.evaluate is True else Path(args.evaluate)
            checkpoint = read_checkpoint(path)
            self.load_network(path, checkpoint)
            print(f"evaluating {path}, epoch {checkpoint['epoch']}", flush=True)
            return args.epochs + 1
        if self.loader.smallest_share == 1 and any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules()):
            several, enough = (" a process", 2 * WORLD_SIZE + 1) if WORLD_SIZE > 1 else ("", 2)
            raise UserError(
                f"--batch-size {args.batch_size}: batch-norm cannot train on a single image{several}; "
                f"take {enough} or more"
            )
        if self.folder.exists():
            self.claim()
        found = self.resumable(self.folder)
        paths = found if args.resume is True else [Path(args.resume)] if args.resume else []
        if args.resume and not paths and not self.after:
            print(f"no {last} to resume, starting the run", flush=True)
        if self.after and not paths:
            folder = self.folder.with_name(self.after + "-synthetic" * args.run.endswith("-synthetic"))
            paths = self.resumable(folder)
            if not paths:
                command = f"python {self.after.replace('-', '.py --')}, with the same --data and --checkpoints,"
                raise UserError(f"no {folder / 'last.pt'}, from which {args.script} goes on; run {command} first")
        epoch, adopted = self.resume(paths) if paths else (1, {})
        if found and (adopted or not self.rows):
            kept = self.folder.with_name(f"{args.run}.previous")
            instead = ", in place of what was there" * kept.exists()
            shutil.rmtree(kept, ignore_errors=True)
            self.folder.replace(kept)
            self.lock = None  # it went with the folder
            print(f"the run that was in {self.folder} is now in {kept}{instead}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.lock:
            self.claim()
        for left in self.folder.glob("*.new"):  # by a process that was killed as it wrote
            left.unlink()
        for name, content in adopted.items():
            write_whole(self.folder / name, content)
        self.clock, self.lr = time.monotonic(), self.optimizer.param_groups[0]["lr"]  # those of the next epoch
        handle_signals(f"; {args.resume_command} goes on after the last epoch that was saved")
        return epoch

    def claim(self):
        """Takes hold of the folder until the process ends. Raises UserError if another one has it."""
        lock, owner = FileLock(self.folder / ".lock"), self.folder / ".pid"  # a killed process lets go of a FileLock
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = f"process {owner.read_text()}" if owner.exists() else "another process"
            raise UserError(f"{self.folder} is in use by {who}; wait for it, or take other --checkpoints") from None
        owner.write_text(str(os.getpid()))
        self.lock = lock

    @staticmethod
    def resumable(folder):
        return [path for path in (folder / "last.pt", folder / "last.previous.pt") if path.exists()]

    def resume(self, paths):
        """Loads the first of the files that is whole.

        Returns the epoch after it, and the files that the run's folder is to have from it, a dict from name to content,
        where it lies elsewhere. Raises UserError if none is of this run, or of the one that it goes on from.
        """
        for path in paths:
            try:
                checkpoint = read_checkpoint(path)
                break
            except Damaged as error:
                if path == paths[-1]:
                    raise
                print(f"{error}; taking the one before", flush=True)
        if not checkpoint.keys() >= {"recipe", "rows", *self.parts}:
            raise UserError(f"{path} is for inference and cannot be resumed; resume the last.pt beside it")
        epoch, recipe = checkpoint["epoch"], checkpoint["recipe"]
        goes_on = self.after is not None and recipe.get("run") == self.after
        must_agree = ("optimizer", "--batch-size", "--seed", "data") if goes_on else self.recipe
        for key in must_agree:
            theirs, ours = recipe.get(key), self.recipe[key]
            if theirs == ours:
                continue
            if key == "data":
                raise UserError(f"{path} was trained on other data; take the same --data, or start without --resume")
            if key == "run":
                other = f" or {self.after}" * bool(self.after)
                raise UserError(
                    f"{path} is of the run {theirs}; resume one of {ours}{other}, or start without --resume"
                )
            raise UserError(f"{path} is of a run with {key} {theirs}, this one has {ours}; make them agree")
        if goes_on and epoch >= self.args.epochs:
            raise UserError(f"{path} has {epoch} epochs behind it already; take more --epochs than that")
        self.load_network(path, checkpoint, ("model", "arguments", "classes") if goes_on else self.NETWORK)
        if goes_on:  # this script's own rate and weight decay, and the other's moments
            checkpoint["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        for name, part in self.parts.items():
            if checkpoint[name]:  # that of a scaler is empty unless the run was in fp16
                part.load_state_dict(checkpoint[name])
        if self.args.lr_given:
            self.change_lr(self.args.lr)
        print(f"resuming {path} after epoch {epoch}{', which was the last' * (epoch >= self.args.epochs)}", flush=True)
        if goes_on:
            return epoch + 1, {}
        self.rows = checkpoint["rows"]
        self.intact = path == self.folder / "last.pt"
        if path.resolve().parent == self.folder.resolve():
            return epoch + 1, {}
        best = path.with_name("best.pt")  # the best so far, until a better epoch comes
        return epoch + 1, ({"best.pt": best.read_bytes()} if best.exists() else {}) | {"last.pt": path.read_bytes()}

    def change_lr(self, lr):
        for group in self.optimizer.param_groups:
            if self.scheduler:
                group["lr"] *= lr / group["initial_lr"]
                group["initial_lr"] = lr
            else:
                group["lr"] = lr
        if self.scheduler:
            self.scheduler.base_lrs = [lr for _ in self.scheduler.base_lrs]

    def load_network(self, path, checkpoint, must_agree=NETWORK):
        for key in must_agree:
            theirs, ours = checkpoint.get(key), self.network[key]
            if theirs != ours:
                raise UserError(f"{path} holds a network with {key} {theirs}, this run's has {ours}")
        try:
            self.model.load_state_dict(checkpoint["weights"])
        except RuntimeError:  # the network has been edited since
            raise UserError(f"{path} holds other weights than {type(self.model).__name__} has now") from None

    def save(self, epoch, train_metrics, test_metrics):
        """Saves an epoch with these (loss, accuracy): best.pt if it is the best, log.csv, last.pt. Raises UserError."""
        if RANK > 0:
            return
        weights = self.model.state_dict()
        if not torch.stack([tensor.isfinite().all() for tensor in weights.values()]).all():
            raise UserError(f"the weights are not finite after epoch {epoch}; take a lower --lr")
        now = time.monotonic()
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        row = {"epoch": epoch, "lr": self.lr}
        row |= dict(zip(names, (*train_metrics, *test_metrics), strict=True))
        self.rows.append(row | {"seconds": now - self.clock})
        self.clock, self.lr = now, self.optimizer.param_groups[0]["lr"]  # those of the next epoch
        is_best = self.best()["epoch"] == epoch
        state = {**self.network, "weights": weights, "accuracy": row["test_accuracy"], "epoch": epoch}
        terminal = sys.stdout.isatty()
        if is_best:
            if terminal:
                print("saving best for inference...")
            write_checkpoint(self.folder / "best.pt", state)
        if terminal:
            print(f"saving {'best ' * is_best}checkpoint for training resume...")
        self.write_log()
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"recipe": self.recipe, "rows": self.rows}
        (self.folder / "run.json").unlink(missing_ok=True)  # of the run before it was made longer
        write_checkpoint(self.folder / "last.pt", state, self.folder / "last.previous.pt" if self.intact else None)
        self.intact = True
        if self.args.tensorboard:
            self.write_tensorboard()
        if not terminal:
            figures = [
                f"{name} loss:{m[0]:.3f}, accuracy:{m[1]:.3f}, "
                for name, m in (("train", train_metrics), ("test", test_metrics))
            ]
            print(f"epoch:{epoch}/{self.args.epochs} {''.join(figures)}saved{' as the best' * is_best}", flush=True)

    def best(self):
        """The log row of the epoch that was the first to reach the best test accuracy."""
        return max(self.rows, key=lambda row: row["test_accuracy"])

    def finish(self, confusion, per_class):
        """Prints the accuracy by class; writes run.json where there is none of this run's length.

        confusion: the test images' `confusion_matrix`; per_class: its `per_class_accuracy`.
        """
        if RANK > 0:
            return
        accuracy = 100 * confusion.trace().item() / confusion.sum().item()
        per_class = dict(zip(self.loader.classes, per_class.tolist(), strict=True))
        kind = "synthetic test" if self.loader.data.source == "synthetic" else "test"
        print(f"Accuracy of the network on the {kind} images: {accuracy:.1f} %")
        for name, value in per_class.items():
            print(f"Accuracy of {PRINTED.get(name, name)}: {value:.1f} %")
        if self.args.evaluate:
            return
        best = self.best()
        print(f"Best epoch, chosen on the {kind} images: {best['epoch']} with {best['test_accuracy']:.1f} %")
        print(f"best.pt, last.pt, log.csv and run.json are in {self.folder}")
        self.write_log()
        if (self.folder / "run.json").exists():
            return  # a finished run that was resumed; its record says where and when it was trained
        record = {
            "run": self.args.run,
            "command": self.args.command,
            "recipe": self.recipe
            | {"--epochs": self.args.epochs, "--lr": self.optimizer.param_groups[0].get("initial_lr", self.lr)},
            "data": self.loader.data.source,
            "accuracy": accuracy,
            "best_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            "per_class": per_class,
            "confusion": confusion.tolist(),
            "seconds": sum(row["seconds"] for row in self.rows),
            "peak_memory_mb": peak_memory(self.loader.device),
            "precision": precision_of(self.loader.dtype),
            "processes": WORLD_SIZE,
            "device": device_name(self.loader.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "commit": commit(),
            "epochs": self.rows,
        }
        write_whole(self.folder / "run.json", record_text(record).encode())

    def write_log(self):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "log.csv", text.getvalue().encode())

    def write_tensorboard(self):
        """Adds the last row to the folder's event file; a process that begins or goes on writes all rows anew."""
        rows = self.rows[-1:]
        if not self.writer:
            from torch.utils.tensorboard import SummaryWriter  # a package that only this needs

            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            self.writer, rows = SummaryWriter(self.folder / "tensorboard"), self.rows
        for row in rows:
            for name in row.keys() - {"epoch"}:
                self.writer.add_scalar(re.sub("(.*)_(.*)", r"\2/\1", name), row[name], row["epoch"])
        self.writer.flush()


def record_text(record):
    """The record as JSON: a line for each of its members, for each epoch and for each row of the confusion matrix."""
    lines = []
    for name, value in record.items():
        text = json.dumps(value)
        if name in ("confusion", "epochs"):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def commit():
    """The git commit of these scripts, with "+" behind it where they have been changed since; None without git."""
    git = ["git", "-C", Path(__file__).parent]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
        return head + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None

"""The figures that a run prints and keeps: the epoch's line, the table, log.csv, run.json, TensorBoard's events."""

import csv
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

from harness.devices import device_name, name_precision, peak_memory
from harness.files import write_atomically
from harness.processes import WORLD_SIZE
from harness.terminal import UserError

TUTORIAL_NAMES = {"airplane": "plane", "automobile": "car"}  # as the official tutorial prints these classes


class Records:
    """The figures of a run: `rows` of log.csv, one for each epoch, and the record of a complete run.

    images: the table's name for the images that the run is tested on, such as "test". device, dtype: what this process
    trains on.
    """

    def __init__(self, folder: Path, images: str, device: torch.device, dtype: torch.dtype, tensorboard: bool):
        self.folder, self.images, self.rows = folder, images, []
        self.device, self.here = device, [device_name(device), name_precision(dtype)]
        self.trained_on = []  # what `here` was in the epochs so far, each once, as a run may be resumed elsewhere
        self.commit = git_commit()  # now, as the code may be changed during the run
        self.events = EventLog(folder / "tensorboard") if tensorboard else None

    def begin_epoch(self, lr: float) -> None:
        """Start the clock of an epoch that is trained at this learning rate."""
        self.began, self.lr = time.monotonic(), float(lr)  # which may be NumPy's or a tensor

    def add_epoch(
        self, epoch: int, train_metrics: tuple[float, float], test_metrics: tuple[float, float], next_lr: float
    ) -> dict[str, float]:
        """Add a row of these (loss, accuracy in percent), begin the next epoch, and return the row."""
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        figures = dict(zip(names, map(float, (*train_metrics, *test_metrics)), strict=True))
        row = {"epoch": epoch, "lr": self.lr, **figures, "seconds": time.monotonic() - self.began}
        self.rows.append(row)
        if self.here not in self.trained_on:
            self.trained_on.append(self.here)
        self.begin_epoch(next_lr)
        return row

    def best_row(self) -> dict[str, float]:
        """Return the row of the first epoch that reached the best test accuracy."""
        return max(self.rows, key=lambda row: row["test_accuracy"])

    def report_epoch(self, epochs: int) -> None:
        """Give the last row to TensorBoard. Print it on one line, except on a terminal, where the bars show it."""
        if self.events:
            self.events.write(self.rows)
        if sys.stdout.isatty():
            return
        row = self.rows[-1]
        figures = "".join(
            f"{split} loss:{row[f'{split}_loss']:.3f}, accuracy:{row[f'{split}_accuracy']:.3f}, "
            for split in ("train", "test")
        )
        saved = "saved as the best" if row is self.best_row() else "saved"
        print(f"epoch:{row['epoch']}/{epochs} {figures}{saved}", flush=True)

    def print_table(self, accuracy: float, per_class: dict[str, float]) -> None:
        """Print the accuracy in percent, in total and by class."""
        print(f"Accuracy of the network on the {self.images} images: {accuracy:.1f} %")
        for name, value in per_class.items():
            short = TUTORIAL_NAMES.get(name, name)
            print(f"Accuracy of {name if short in per_class else short}: {value:.1f} %")

    def print_end(self) -> None:
        """Print the best epoch, and where the run's files are."""
        best = self.best_row()
        print(f"Best epoch, chosen on the {self.images} images: {best['epoch']} with {best['test_accuracy']:.1f} %")
        names = [name for name in ("best.pt", "last.pt", "log.csv") if (self.folder / name).exists()]
        print(f"{', '.join(names)} and run.json are in {self.folder}")

    def write_log(self) -> None:
        """Write all rows to log.csv."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.folder / "log.csv", text.getvalue().encode())

    def has_record(self) -> bool:
        """Return whether run.json is of these rows, and not from before the run was extended."""
        try:
            return json.loads((self.folder / "run.json").read_text())["epochs"] == self.rows
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_record(self, run: dict, figures: dict) -> None:
        """Write run.json: the run, its figures, where it was trained, its epochs."""
        best = self.best_row()
        devices, precisions = zip(*(self.trained_on or [self.here]), strict=True)
        record = {
            **run,
            "accuracy": figures["accuracy"],
            "best_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            **figures,
            "seconds": sum(row["seconds"] for row in self.rows),
            "peak_memory_mb": peak_memory(self.device),
            "precision": " and ".join(dict.fromkeys(precisions)),
            "processes": WORLD_SIZE,
            "device": " and ".join(dict.fromkeys(devices)),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "commit": self.commit,
            "epochs": self.rows,
        }
        write_atomically(self.folder / "run.json", record_text(record).encode())


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's log.csv as dicts by column name. Raise UserError if it is missing or not a log."""
    try:
        with open(folder / "log.csv", newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        if rows and rows[0].keys() >= {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"}:
            return rows
    except FileNotFoundError:
        raise UserError(f"no {folder / 'log.csv'}; name the folder of a run, as in checkpoints/") from None
    except (ValueError, TypeError, csv.Error):  # a value is huge or no number, or there are too few or too many
        pass
    raise UserError(f"{folder / 'log.csv'} is not the log of a run; --resume rewrites it")


def describe_network(model, data, train_loader) -> dict:
    """Return the entries about the network in its files: its name, arguments, classes, normalisation and data."""
    return {
        "model": type(model).__name__,
        "arguments": getattr(model, "arguments", {}),
        "classes": data.classes,
        "mean": train_loader.mean,
        "std": train_loader.std,
        "data": data.source,
        "tested_on": data.tested_on,
    }


def print_saving(what: str) -> None:
    """Print what is about to be saved, if stdout is a terminal."""
    if sys.stdout.isatty():
        print(f"saving {what}...")


def record_text(record: dict) -> str:
    """Return the record as JSON: a line for each member, each epoch and each row of the confusion matrix."""
    lines = []
    for name, value in record.items():
        text = json.dumps(value)
        if name in ("confusion", "epochs"):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def git_commit() -> str | None:
    """Return the commit of these scripts, with a "+" if they have been changed since, or None without git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # unpacked from an archive, maybe within another repository
        return None
    git = ["git", "--no-optional-locks", "-C", root]  # the user may be using git
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        code = (":(glob)*.py", "models", "harness")  # new files too
        changed = subprocess.run([*git, "status", "--porcelain", "--", *code], capture_output=True, check=True).stdout
        return f"{head}+" if changed else head
    except (OSError, subprocess.CalledProcessError):
        return None


class EventLog:
    """The rows of the log as TensorBoard's events, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder, self.writer = folder, None

    def write(self, rows: list[dict[str, float]]) -> None:
        """Add the last row. The first call rewrites all rows, since an interrupted run may have left others."""
        new_rows = rows[-1:]
        if not self.writer:
            from torch.utils.tensorboard import SummaryWriter  # a package that only this needs

            shutil.rmtree(self.folder, ignore_errors=True)
            self.writer, new_rows = SummaryWriter(self.folder), rows
        for row in new_rows:
            for name in row.keys() - {"epoch"}:
                self.writer.add_scalar(re.sub("(.*)_(.*)", r"\2/\1", name), row[name], row["epoch"])
        self.writer.flush()

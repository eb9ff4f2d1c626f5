"""A run: how it begins, resumes, is saved after each epoch, and ends."""

import argparse
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from harness.files import (
    check_is_plain,
    checkpoint_bytes,
    read_checkpoint,
    read_first_whole,
    write_atomically,
    write_checkpoint,
)
from harness.folder import RunFolder, earlier_run, find_best, resumable_files
from harness.operations import petaflop
from harness.processes import RANK, broadcast, gather
from harness.recipe import check_same, describe_recipe, describe_script, first_difference, shared_with_base
from harness.records import Records, describe_network, print_saving
from harness.state import State
from harness.terminal import UserError, escape_unprintable, handle_signals

SAME = "with the same --data, --seed, --batch-size, --holdout and --checkpoints"  # or it is not this run's base


class Checkpoints:
    """The folder of a run, its state and its records.

    `epochs_left` begins or resumes the run, `save` ends an epoch, `finish` ends the run. If there are several
    processes, only rank 0 reads and writes.
    """

    NETWORK = ("model", "arguments", "classes", "mean", "std")  # must agree before weights are loaded
    BEST = ("weights", "accuracy", "epoch", "figures", "flags")  # what best.pt holds besides the network

    def __init__(
        self,
        args: argparse.Namespace,
        data,
        train_loader,
        train_step,
        scheduler: LRScheduler | None = None,
        base: tuple[str, str] | None = None,
    ):
        """Take the parts of a run. Nothing is read or written yet.

        args, data, train_loader, train_step: of ArgumentParser, load_data, Loader and TrainStep. base: the experiment
        whose last epoch this one starts from, unless it resumes its own, and the command that trains it.
        """
        self.args, self.loader, self.train_step = args, train_loader, train_step
        self.state = State(train_step, scheduler)
        self.base_run, self.base_command = base or (None, None)
        self.run_folder = RunFolder(args.checkpoints / (args.experiment + args.suffix))
        self.folder = self.run_folder.path
        images = f"synthetic {data.tested_on}" if data.source == "synthetic" else data.tested_on
        self.records = Records(self.folder, images, train_loader.device, train_loader.dtype, args.tensorboard)
        self.last_is_whole = True  # whether last.pt is whole, as far as this run knows
        self.script = describe_script()  # now, as the file may be edited during the run
        self.recipe = describe_recipe(args, data, train_loader, train_step, self.state.scheduler)
        self.network = describe_network(train_step.model, data, train_loader) | {"fingerprint": self.recipe["data"]}

    def epochs_left(self) -> range:
        """Begin or resume the run, as the command line says, and return the epochs left, counted from 1.

        The range is empty after --evaluate and if the run is complete. Raises UserError.
        """
        _, precision = self.records.here  # "auto" may differ between machines
        started = self.recipe | {"precision": precision, "evaluate": bool(self.args.evaluate)}
        for rank, other in enumerate(gather(started)):
            if difference := first_difference(other, started, set()):
                raise UserError(f"process {rank} was started with {difference}; start all with the same command")
        epochs_done = broadcast(self.begin() if RANK == 0 else None, self.loader.device)
        self.state.copy_from_rank_0(self.loader.device)
        return range(0) if self.args.evaluate else range(epochs_done + 1, self.args.epochs + 1)

    def begin(self) -> int:
        """Load the checkpoint to resume or evaluate, if any, and return the number of epochs done.

        Except with --evaluate, the run also takes its folder.
        """
        self.train_step.check_logits(self.loader, len(self.network["classes"]))
        if self.args.evaluate:
            return self.load_for_evaluation()
        self.train_step.check_batch_size(self.args.batch_size, self.loader.smallest_share)
        self.run_folder.recover()
        if self.folder.exists():
            self.run_folder.lock()
        paths = self.files_to_resume()
        path, checkpoint = read_first_whole(paths) if paths else (None, None)
        if checkpoint:
            self.resume(path, checkpoint)
        self.state.finite_weights("before training; a mask of infinities belongs into a buffer with persistent=False")
        check_is_plain(self.network | self.state.settings())
        self.take_folder(path, checkpoint)
        self.records.begin_epoch(self.state.lr())
        handle_signals(f"; {self.args.resume_command} resumes after the last saved epoch")
        return checkpoint["epoch"] if checkpoint else 0

    def take_folder(self, path: Path | None, checkpoint: dict | None) -> None:
        """Stay in the run's folder if its newest checkpoint was resumed. Otherwise begin a new one.

        The earlier folder is then renamed, for example if an older file was resumed by name.
        """
        in_folder = checkpoint and path.parent.resolve() == self.folder.resolve()
        if in_folder and (self.args.resume is True or path.name == "last.pt"):
            self.last_is_whole = path.name == "last.pt"
            self.run_folder.own()
            self.restore_best(checkpoint)
            return
        files = {}
        if self.records.rows:  # resumed, but not from this folder's last.pt
            found = self.find_best(path.parent)
            best = found.read_bytes() if found else self.best_from(checkpoint)
            files = ({"best.pt": best} if best else {}) | {"last.pt": path.read_bytes()}
        self.run_folder.begin(files)

    def load_for_evaluation(self) -> int:
        """Load the weights that --evaluate names and return their epoch."""
        path = self.folder / "last.pt" if self.args.evaluate is True else self.args.evaluate
        if not path.exists():
            raise UserError(f"no {path} to evaluate; train this run first, or name a file{earlier_run(path.parent)}")
        checkpoint = read_checkpoint(path)
        if self.args.holdout and checkpoint.get("tested_on", "test") == "test":
            raise UserError(f"{path} was trained on the held-out images too; evaluate it without --holdout")
        if self.args.holdout and checkpoint.get("fingerprint") != self.network["fingerprint"]:
            raise UserError(f"{path} may have been trained on these held-out images; use the --data of its training")
        self.load_weights(path, checkpoint, self.NETWORK)
        print(f"evaluating {path}, epoch {checkpoint['epoch']}", flush=True)
        return checkpoint["epoch"]

    def files_to_resume(self) -> list[Path]:
        """Return the checkpoints to resume, the preferred one first, or none for a new run.

        Raises UserError if the base has none.
        """
        if self.args.resume and self.args.resume is not True:
            return [self.args.resume]
        if self.args.resume and (own_files := resumable_files(self.folder)):
            return own_files
        if self.base_run:
            folder = self.folder.with_name(self.base_run + self.args.suffix)
            if base_files := resumable_files(folder):
                return base_files
            raise UserError(
                f"no {folder / 'last.pt'}, which {self.args.script} starts from; run {self.base_command} first, {SAME}"
                f"{earlier_run(folder)}"
            )
        if self.args.resume:
            print(f"no {self.folder / 'last.pt'} to resume, starting the run{earlier_run(self.folder)}", flush=True)
        return []

    def resume(self, path: Path, checkpoint: dict) -> None:
        """Load the checkpoint. Raise UserError if it is from another run that is not the base."""
        if not checkpoint.keys() >= {"recipe", "rows", "optimizer", "scaler", "parameters"}:
            raise UserError(f"{path} is for inference and cannot be resumed; resume the last.pt beside it")
        epoch, recipe = checkpoint["epoch"], checkpoint["recipe"]
        is_base = self.base_run is not None and recipe["run"] == self.base_run
        self.check_recipe(path, recipe, is_base)
        if is_base and epoch >= self.args.epochs:
            raise UserError(f"{path} already has {epoch} epochs of training; use a larger --epochs")
        if is_base and epoch < recipe["epochs"]:
            raise UserError(
                f"{path} is at epoch {epoch} of {recipe['epochs']}; finish that run first: {self.base_command} "
                f"--epochs {recipe['epochs']} --resume, {SAME}"
            )
        if epoch > self.args.epochs:
            raise UserError(f"{path} has {epoch} epochs of training, more than --epochs {self.args.epochs}; use more")
        self.load_weights(path, checkpoint, ("model", "arguments", "classes") if is_base else self.NETWORK)
        self.state.load_parts(path, checkpoint, is_base)
        complete = ", which was the last" if epoch == self.args.epochs else ""
        print(f"resuming {path} after epoch {epoch}{complete}", flush=True)
        if not is_base:
            if self.args.lr_given:
                self.state.change_lr(recipe["lr"], self.args.lr)
            else:
                self.recipe["lr"] = recipe["lr"]
            self.records.rows = checkpoint["rows"]
            self.records.trained_on = checkpoint.get("trained_on", [])  # which earlier versions did not keep

    def check_recipe(self, path: Path, recipe: dict, is_base: bool) -> None:
        """Raise UserError if the checkpoint's recipe differs from this run's. A base has to agree only in part."""
        ours, may_differ = self.recipe, {"lr"}
        if recipe.keys() != ours.keys():
            raise UserError(f"{path} is from another version of these scripts; start without --resume")
        if is_base:
            recipe, ours = shared_with_base(recipe), shared_with_base(ours)
        elif recipe["run"] != self.recipe["run"]:
            runs = " or ".join(filter(None, (self.recipe["run"], self.base_run)))
            raise UserError(f"{path} is from the run {recipe['run']}; resume {runs}, or start without --resume")
        if self.args.lr_given:
            may_differ.add("LR")
        if not self.state.scheduler:
            may_differ.add("epochs")
        otherwise = f"run {self.base_command} again" if is_base else "start without --resume"
        check_same(path, recipe, ours, may_differ, otherwise)

    def load_weights(self, path: Path, checkpoint: dict, keys: tuple[str, ...]) -> None:
        """Load the checkpoint's weights. Raise UserError if its network and this run's differ in one of the keys."""
        for key in keys:
            theirs, ours = checkpoint.get(key), self.network[key]
            if theirs != ours:
                raise UserError(f"{path} holds a network with {key} {theirs}, this run's has {ours}")
        self.state.load_weights(path, checkpoint)

    def restore_best(self, checkpoint: dict) -> None:
        """Make best.pt the best epoch of the log. A run may resume from an earlier epoch than the one in best.pt."""
        path, previous = self.folder / "best.pt", self.folder / "best.previous.pt"
        if found := self.find_best(self.folder):
            found.replace(path)
        elif best := self.best_from(checkpoint):
            write_atomically(path, best, keep=previous)
        elif path.exists():
            path.replace(previous)

    def find_best(self, folder: Path) -> Path | None:
        """Return the folder's file of the log's best epoch, or None."""
        return find_best(folder, self.records.best_row(), {key: self.network[key] for key in self.NETWORK})

    def best_from(self, checkpoint: dict) -> bytes | None:
        """Return the content of the best epoch's file, from the checkpoint.

        If the checkpoint is of another epoch, a line says so and None is returned.
        """
        row = self.records.best_row()
        if row["epoch"] == checkpoint["epoch"]:
            return checkpoint_bytes({key: checkpoint[key] for key in (*self.network, *self.BEST) if key in checkpoint})
        print(f"no best.pt of epoch {row['epoch']}, the best so far; the next better one will be kept", flush=True)
        return None

    def save(self, epoch: int, train_metrics: tuple[float, float], test_metrics: tuple[float, float]) -> None:
        """Save an epoch: best.pt if it is the best so far, log.csv and last.pt.

        train_metrics, test_metrics: (loss, accuracy in percent). Raises UserError if a weight is not finite or a file
        cannot be written.
        """
        if RANK > 0:
            return
        self.run_folder.check()
        check_is_plain(self.state.settings())  # again, as a schedule may have changed them
        weights = self.state.finite_weights(f"after epoch {epoch}; use a lower --lr")
        row = self.records.add_epoch(epoch, train_metrics, test_metrics, self.state.lr())
        is_best = row is self.records.best_row()
        figures = {name: value for name, value in row.items() if name != "seconds"}
        checkpoint = {**self.network, "weights": weights, "accuracy": row["test_accuracy"], "epoch": epoch}
        checkpoint |= {"figures": figures, "flags": self.recipe["flags"]}
        if is_best:
            print_saving("best for inference")
            write_checkpoint(self.folder / "best.pt", checkpoint, keep=self.folder / "best.previous.pt")
        print_saving("best checkpoint for training resume" if is_best else "checkpoint for training resume")
        self.records.write_log()
        checkpoint |= self.state.saved_parts()
        checkpoint |= {"recipe": self.recipe, "script": self.script, "rows": self.records.rows}
        checkpoint["trained_on"] = self.records.trained_on
        previous = self.folder / "last.previous.pt" if self.last_is_whole else None
        write_checkpoint(self.folder / "last.pt", checkpoint, keep=previous)
        self.last_is_whole = True
        self.records.report_epoch(self.args.epochs)

    def finish(self, confusion: torch.Tensor, per_class: torch.Tensor) -> None:
        """Print the table, and write run.json unless it already records these epochs.

        confusion, per_class: from `confusion_matrix` and `per_class_accuracy`, for the test images.
        """
        if RANK > 0:
            return
        accuracy = 100 * confusion.trace().item() / confusion.sum().item()
        per_class = dict(zip(self.network["classes"], per_class.tolist(), strict=True))
        self.records.print_table(accuracy, {escape_unprintable(name): value for name, value in per_class.items()})
        if self.args.evaluate:
            return
        self.run_folder.check()
        self.records.print_end()
        self.records.write_log()
        if self.records.has_record():
            return  # the resumed run was complete, and its record says where and when it was trained
        run = {
            "run": self.folder.name,
            "command": self.args.command,
            "script": self.script,
            "recipe": self.recipe,
            "data": self.network["data"],
            "tested_on": self.network["tested_on"],
        }
        figures = {"accuracy": accuracy, "per_class": per_class, "confusion": confusion.tolist()}
        figures["petaflop"] = petaflop(self.state.model, len(self.loader.labels) * len(self.records.rows))
        self.records.write_record(run, figures)

    def leave(self) -> None:
        """Release the run's folder for other processes."""
        self.run_folder.release()

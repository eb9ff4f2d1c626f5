"""The folder of a run: how it begins, resumes, is saved after each epoch, and ends."""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from harness.files import lock_folder, read_checkpoint, read_first_whole, write_atomically, write_checkpoint
from harness.processes import RANK, WORLD_SIZE, broadcast
from harness.records import Records, describe_network, describe_recipe, print_saving
from harness.terminal import UserError, handle_signals


class Checkpoints:
    """The folder of a run and its state: weights, optimizer, scheduler, scaler and log.

    `epochs_left` begins or resumes the run, `save` ends an epoch, `finish` ends the run. Of several processes, rank 0
    reads and writes.
    """

    NETWORK = ("model", "arguments", "classes", "mean", "std")  # must agree before weights are loaded

    def __init__(
        self,
        args: argparse.Namespace,
        data,
        train_loader,
        train_step,
        scheduler: LRScheduler | None = None,
        base: tuple[str, str] | None = None,
    ):
        """Take the parts of a run: of ArgumentParser, load_data, Loader and TrainStep. Nothing is read or written yet.

        base: the name of the run that this one continues the first time, and the command that trains that.
        """
        self.args, self.loader, self.train_step, self.scheduler = args, train_loader, train_step, scheduler
        self.model, self.optimizer = train_step.model, train_step.optimizer
        self.base_run, self.base_command = base or (None, None)
        self.resumed_parts = {"optimizer": train_step.optimizer, "scaler": train_step.scaler}
        if scheduler:
            self.resumed_parts["scheduler"] = scheduler
        run = "-".join([args.script, *args.experiment])
        synthetic = data.source == "synthetic"
        self.data_suffix = "-synthetic" if synthetic else ""
        self.folder = args.checkpoints / (run + self.data_suffix)
        self.records = Records(self.folder, "synthetic test" if synthetic else "test", args.tensorboard)
        self.lock = None  # of the folder, once the run writes into it
        self.last_is_whole = True  # last.pt, as far as this run knows
        self.network = describe_network(self.model, data, train_loader)
        self.recipe = describe_recipe(run, args, self.optimizer, data)
        if scheduler:
            self.recipe["--epochs"] = args.epochs

    def epochs_left(self) -> range:
        """Begin or resume the run, as the command line says; return the epochs that are left, counted from 1.

        The range is empty after --evaluate and if the run is complete. Raises UserError.
        """
        epochs_done = self.begin() if RANK == 0 else None
        if WORLD_SIZE > 1:
            parts = {"model": self.model} | self.resumed_parts
            state = {name: part.state_dict() for name, part in parts.items()}
            epochs_done, state = broadcast((epochs_done, state), self.loader.device)
            for name, part in parts.items():
                if RANK > 0 and state[name]:
                    part.load_state_dict(state[name])
        return range(0) if self.args.evaluate else range(epochs_done + 1, self.args.epochs + 1)

    def begin(self) -> int:
        """Load what --resume or --evaluate names and take the run's folder; return the number of epochs done."""
        if self.args.evaluate:
            return self.load_for_evaluation()
        self.train_step.check_batch_size(self.args.batch_size, self.loader.smallest_share)
        if self.folder.exists():
            self.lock = lock_folder(self.folder)
        earlier_run = resumable_files(self.folder)
        paths = self.files_to_resume(earlier_run)
        epochs_done, foreign_files = self.resume(paths) if paths else (0, {})
        if earlier_run and (foreign_files or not self.records.rows):
            self.move_earlier_run()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.lock:
            self.lock = lock_folder(self.folder)
        for unfinished in self.folder.glob("*.new"):  # by a process that was killed as it wrote
            unfinished.unlink()
        for name, content in foreign_files.items():
            write_atomically(self.folder / name, content)
        self.records.begin_epoch(self.optimizer.param_groups[0]["lr"])
        handle_signals(f"; {self.args.resume_command} goes on after the last epoch that was saved")
        return epochs_done

    def load_for_evaluation(self) -> int:
        """Load the weights that --evaluate names; return their epoch."""
        path = self.folder / "last.pt" if self.args.evaluate is True else Path(self.args.evaluate)
        checkpoint = read_checkpoint(path)
        self.load_weights(path, checkpoint, self.NETWORK)
        print(f"evaluating {path}, epoch {checkpoint['epoch']}", flush=True)
        return checkpoint["epoch"]

    def move_earlier_run(self) -> None:
        """Move the run that lies in the folder to <name>.previous, in place of what was there."""
        kept = self.folder.with_name(f"{self.folder.name}.previous")
        instead = ", in place of what was there" if kept.exists() else ""
        shutil.rmtree(kept, ignore_errors=True)
        self.folder.replace(kept)
        self.lock = None  # it went with the folder
        print(f"the run that was in {self.folder} is now in {kept}{instead}", flush=True)

    def files_to_resume(self, own_files: list[Path]) -> list[Path]:
        """Return the checkpoints to resume, best first; none for a new run. Raise UserError if base_run has none."""
        if self.args.resume and self.args.resume is not True:
            return [Path(self.args.resume)]
        if self.args.resume and own_files:
            return own_files
        if self.base_run:
            folder = self.folder.with_name(self.base_run + self.data_suffix)
            if base_files := resumable_files(folder):
                return base_files
            command = f"{self.base_command}, with the same --data and --checkpoints,"
            raise UserError(f"no {folder / 'last.pt'}, from which {self.args.script} goes on; run {command} first")
        if self.args.resume:
            print(f"no {self.folder / 'last.pt'} to resume, starting the run", flush=True)
        return []

    def resume(self, paths: list[Path]) -> tuple[int, dict[str, bytes]]:
        """Load the first of the files that is whole; return its epoch, and the files to copy if it lies elsewhere.

        Raises UserError if it is of another run, unless that is base_run.
        """
        path, checkpoint = read_first_whole(paths)
        if not checkpoint.keys() >= {"recipe", "rows", *self.resumed_parts}:
            raise UserError(f"{path} is for inference and cannot be resumed; resume the last.pt beside it")
        epoch, recipe = checkpoint["epoch"], checkpoint["recipe"]
        is_base = self.base_run is not None and recipe.get("run") == self.base_run
        self.check_recipe(path, recipe, ("optimizer", "--batch-size", "--seed", "data") if is_base else self.recipe)
        if is_base and epoch >= self.args.epochs:
            raise UserError(f"{path} has {epoch} epochs behind it already; take more --epochs than that")
        self.load_weights(path, checkpoint, ("model", "arguments", "classes") if is_base else self.NETWORK)
        if is_base:  # this script's own rate and weight decay, with the other's moments
            checkpoint["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        for name, part in self.resumed_parts.items():
            if checkpoint[name]:  # a scaler's is empty unless the run was in fp16
                part.load_state_dict(checkpoint[name])
        if self.args.lr_given:
            self.train_step.change_lr(self.args.lr, self.scheduler)
        complete = ", which was the last" if epoch >= self.args.epochs else ""
        print(f"resuming {path} after epoch {epoch}{complete}", flush=True)
        if is_base:
            return epoch, {}
        self.records.rows = checkpoint["rows"]
        self.last_is_whole = path == self.folder / "last.pt"
        if path.resolve().parent == self.folder.resolve():
            return epoch, {}
        best = path.with_name("best.pt")  # the best so far, until a better epoch comes
        files = {"best.pt": best.read_bytes()} if best.exists() else {}
        return epoch, files | {"last.pt": path.read_bytes()}

    def check_recipe(self, path: Path, recipe: dict, keys: Iterable[str]) -> None:
        """Raise UserError if the checkpoint's recipe and this run's differ in one of the keys."""
        for key in keys:
            theirs, ours = recipe.get(key), self.recipe[key]
            if theirs == ours:
                continue
            if key == "data":
                raise UserError(f"{path} was trained on other data; take the same --data, or start without --resume")
            if key == "run":
                resumable = f"{ours} or {self.base_run}" if self.base_run else ours
                raise UserError(f"{path} is of the run {theirs}; resume one of {resumable}, or start without --resume")
            raise UserError(f"{path} is of a run with {key} {theirs}, this one has {ours}; make them agree")

    def load_weights(self, path: Path, checkpoint: dict, keys: tuple[str, ...]) -> None:
        """Load the checkpoint's weights. Raise UserError if its network and this run's differ in one of the keys."""
        for key in keys:
            theirs, ours = checkpoint.get(key), self.network[key]
            if theirs != ours:
                raise UserError(f"{path} holds a network with {key} {theirs}, this run's has {ours}")
        try:
            self.model.load_state_dict(checkpoint["weights"])
        except RuntimeError:  # the network has been edited since
            raise UserError(f"{path} holds other weights than {type(self.model).__name__} has now") from None

    def save(self, epoch: int, train_metrics: tuple[float, float], test_metrics: tuple[float, float]) -> None:
        """Save an epoch with its (loss, accuracy in percent): best.pt if it is the best so far, log.csv, last.pt.

        Raises UserError if a weight is not finite or a file cannot be written.
        """
        if RANK > 0:
            return
        weights = self.model.state_dict()
        if not torch.stack([tensor.isfinite().all() for tensor in weights.values()]).all():
            raise UserError(f"the weights are not finite after epoch {epoch}; take a lower --lr")
        row = self.records.add_epoch(epoch, train_metrics, test_metrics, self.optimizer.param_groups[0]["lr"])
        is_best = row is self.records.best_row()
        state = {**self.network, "weights": weights, "accuracy": row["test_accuracy"], "epoch": epoch}
        if is_best:
            print_saving("best for inference")
            write_checkpoint(self.folder / "best.pt", state)
        print_saving("best checkpoint for training resume" if is_best else "checkpoint for training resume")
        self.records.write_log()
        state |= {name: part.state_dict() for name, part in self.resumed_parts.items()}
        state |= {"recipe": self.recipe, "rows": self.records.rows}
        (self.folder / "run.json").unlink(missing_ok=True)  # of the run before it was made longer
        previous = self.folder / "last.previous.pt" if self.last_is_whole else None
        write_checkpoint(self.folder / "last.pt", state, keep=previous)
        self.last_is_whole = True
        self.records.report_epoch(self.args.epochs)

    def finish(self, confusion: torch.Tensor, per_class: torch.Tensor) -> None:
        """Print the table; write run.json unless a run of this length has left one.

        confusion, per_class: what `confusion_matrix` and `per_class_accuracy` return for the test images.
        """
        if RANK > 0:
            return
        accuracy = 100 * confusion.trace().item() / confusion.sum().item()
        per_class = dict(zip(self.network["classes"], per_class.tolist(), strict=True))
        self.records.print_table(accuracy, per_class)
        if self.args.evaluate:
            return
        self.records.print_end()
        self.records.write_log()
        if (self.folder / "run.json").exists():
            return  # a complete run was resumed; its record says where and when it was trained
        lr = self.optimizer.param_groups[0].get("initial_lr", self.records.lr)
        run = {
            "run": self.folder.name,
            "command": self.args.command,
            "recipe": self.recipe | {"--epochs": self.args.epochs, "--lr": lr},
            "data": self.network["data"],
        }
        figures = {"accuracy": accuracy, "per_class": per_class, "confusion": confusion.tolist()}
        self.records.write_record(run, figures, self.loader.device, self.loader.dtype)


def resumable_files(folder: Path) -> list[Path]:
    """Return last.pt and last.previous.pt of a run's folder, those that exist."""
    return [path for path in (folder / "last.pt", folder / "last.previous.pt") if path.exists()]

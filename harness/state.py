"""What a run trains, as its checkpoint holds it: weights, optimizer, schedule and gradient scaler."""

from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from harness.processes import RANK, WORLD_SIZE, broadcast
from harness.terminal import UserError


class State:
    """The network, the optimizer, the scheduler and the gradient scaler of a run.

    `parts` are saved and loaded by their `state_dict`, except the network, whose weights have an entry of their own.
    """

    def __init__(self, train_step, scheduler: LRScheduler | None):
        """Take the parts of a TrainStep. scheduler: the one that the script steps after each epoch, if any."""
        self.model, self.optimizer = train_step.model, train_step.optimizer
        self.scheduler = scheduler or train_step.scheduler
        self.parts = {"optimizer": train_step.optimizer, "scaler": train_step.scaler}
        if self.scheduler:
            self.parts["scheduler"] = self.scheduler

    def lr(self) -> float:
        """Return the learning rate of the optimizer's first group."""
        return self.optimizer.param_groups[0]["lr"]

    def finite_weights(self, advice: str) -> dict[str, torch.Tensor]:
        """Return the network's weights and buffers. If one is not finite, raise UserError with this advice."""
        weights = self.model.state_dict()
        if not torch.stack([tensor.isfinite().all() for tensor in weights.values()]).all():
            raise UserError(f"the weights are not finite {advice}")
        return weights

    def settings(self) -> dict:
        """Return what a checkpoint holds of the optimizer and the schedule, except the optimizer's tensors."""
        settings = {"optimizer": self.optimizer.state_dict()["param_groups"]}
        if self.scheduler:
            settings["scheduler"] = self.scheduler.state_dict()
        return settings

    def saved_parts(self) -> dict:
        """Return a checkpoint's entries for `load_parts`."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return states | {"parameters": self.parameter_names()}

    def load_weights(self, path: Path, checkpoint: dict) -> None:
        """Load the checkpoint's weights. Raise UserError if they do not fit the network."""
        try:
            self.model.load_state_dict(checkpoint["weights"])
        except RuntimeError:  # the network has been edited since
            raise UserError(f"{path} holds weights that do not fit {type(self.model).__name__} any more") from None

    def load_parts(self, path: Path, checkpoint: dict, is_base: bool) -> None:
        """Load the checkpoint's parts. Of a base, load only the optimizer's moments and the scaler.

        Raises UserError if the optimizer's state is for other parameters.
        """
        self.check_parameters(path, checkpoint)
        parts = self.parts
        if is_base:  # whose learning rate, weight decay and schedule are not this run's
            parts = {name: part for name, part in parts.items() if name != "scheduler"}
            checkpoint["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        parameters = self.parameters()
        for position, moments in checkpoint["optimizer"]["state"].items():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[position].shape:
                    # in the parameter's memory format, which fused optimizers take for granted
                    moments[name] = torch.empty_like(parameters[position], dtype=value.dtype, device="cpu").copy_(value)
        for name, part in parts.items():
            if checkpoint[name]:  # a scaler's state is empty unless the run was in fp16
                part.load_state_dict(checkpoint[name])

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the optimizer's parameters, in the order of its state."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def parameter_names(self) -> list[list[str]]:
        """Return the names of the optimizer's parameters, by group."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def check_parameters(self, path: Path, checkpoint: dict) -> None:
        """Raise UserError if the checkpoint's optimizer state, which goes by position, is for other parameters."""
        parameters = self.parameters()
        same = [*checkpoint["weights"]] == [*self.model.state_dict()]
        same &= checkpoint["parameters"] == self.parameter_names()
        for position, state in checkpoint["optimizer"]["state"].items():
            for name, value in state.items():
                if name in ("momentum_buffer", "exp_avg", "exp_avg_sq") and isinstance(value, torch.Tensor):
                    same &= position < len(parameters) and value.shape == parameters[position].shape
        if not same:
            raise UserError(
                f"{path} has its weights in another order than {type(self.model).__name__} and its optimizer have now, "
                "and the optimizer's state depends on that order; start without --resume"
            )

    def change_lr(self, before: float, lr: float) -> None:
        """Scale all learning rates of the optimizer and the schedule, for a run at --lr `lr` instead of `before`."""
        if lr == before:
            return
        for group in self.optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # schedulers add all but the first
                if name in group:
                    group[name] = lr * (group[name] / before)
        for each in (self.scheduler, *getattr(self.scheduler, "_schedulers", ())):  # of a SequentialLR
            for name in ("base_lrs", "max_lrs"):
                if hasattr(each, name):
                    setattr(each, name, [lr * (rate / before) for rate in getattr(each, name)])

    def copy_from_rank_0(self, device: torch.device) -> None:
        """Load rank 0's state in every other process. device: the one that this process trains on."""
        if WORLD_SIZE == 1:
            return
        parts = {"model": self.model} | self.parts
        states = broadcast({name: part.state_dict() for name, part in parts.items()} if RANK == 0 else None, device)
        for name, part in parts.items():
            if RANK > 0 and states[name]:
                part.load_state_dict(states[name])

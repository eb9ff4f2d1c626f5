"""One step of training, and the meter of an epoch."""

import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from harness.devices import autocast
from harness.processes import WORLD_SIZE, sum_over_processes
from harness.terminal import UserError, progress_bar


class TrainStep:
    """One step of training: forward, backward, and the optimizer's update of the weights.

    dtype: the images' precision; float16 needs a gradient scaler. scheduler: stepped after each batch, if given. A
    scheduler that goes by epochs is stepped by the script instead.

    On CUDA, the forward and the backward pass are captured as a CUDA graph, one for each batch size, and replayed. The
    networks are so small that a CPU takes longer to launch their kernels one by one than a GPU takes to run them.
    DistributedDataParallel runs without graphs.
    """

    WARM_UP = 3  # steps before the first capture, because libraries must not set themselves up during a capture

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        scheduler: LRScheduler | None = None,
    ):
        self.model, self.criterion, self.optimizer, self.scheduler = model, criterion, optimizer, scheduler
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
            raise UserError(
                "the optimizer has a parameter that is not the network's; make it one, as only the network is saved"
            )
        device = next(model.parameters()).device
        if device.type == "mps":  # where batch-norm's gradients were wrong in channels-last (pytorch issue 175189)
            model.to(memory_format=torch.contiguous_format)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.forward = model
        self.steps, self.graphs = 0, {}
        if self.scaler.is_enabled() and isinstance(optimizer, torch.optim.SGD):
            # A first step that the scaler skips would leave the fused optimizer's buffers uninitialised.
            for group in optimizer.param_groups:
                for parameter in group["params"] if group["momentum"] else ():
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on a batch and return its loss, a scalar, and its logits, of shape (N, classes).

        On CUDA the next call overwrites both.
        weight: the weight of this process's loss, see Loader.weights.
        """
        if WORLD_SIZE > 1 and self.forward is self.model:  # not before the processes' recipes have been compared
            self.forward = DistributedDataParallel(self.model)
            self.forward.broadcast_buffers = False  # utils.train does, once an epoch. As an argument it warns
        self.steps += 1
        if images.is_cuda and self.steps > self.WARM_UP and WORLD_SIZE == 1:
            loss, logits = self.replay(images, labels)
        else:
            loss, logits = self.forward_backward(images, labels, weight)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler:
            self.scheduler.step()
        return loss, logits

    def forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a batch's gradients, and return its loss and its logits."""
        self.optimizer.zero_grad()
        with autocast(images):
            logits = self.forward(images)
            loss = self.criterion(logits, labels)
        self.scaler.scale(loss if weight == 1 else weight * loss).backward()
        return loss.detach(), logits.detach()

    def replay(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same by replaying a CUDA graph, which is captured at the first batch of its size."""
        if len(labels) not in self.graphs:
            graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None  # shared, as one runs at a time
            with torch.cuda.graph(graph, pool):
                outputs = self.forward_backward(*inputs)
            self.graphs[len(labels)] = graph, inputs, outputs, [p.grad for p in self.model.parameters()]
        graph, inputs, outputs, gradients = self.graphs[len(labels)]
        inputs[0].copy_(images)
        inputs[1].copy_(labels)
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # each graph writes its own gradients
        return outputs

    def check_logits(self, loader, classes: int) -> None:
        """Raise UserError if the network does not return a logit for each class."""
        image = torch.zeros(1, 3, 32, 32, dtype=loader.dtype, device=loader.device)
        with torch.no_grad(), autocast(image):
            shape = tuple(self.model.eval()(image).shape)
        if shape != (1, classes):
            name = type(self.model).__name__
            raise UserError(
                f"{name} returns the shape {shape} for one image, not {1, classes}; pass num_classes=len(data.classes)"
            )

    def check_batch_size(self, batch_size: int, smallest_share: int) -> None:
        """Raise UserError if a process's smallest share of a batch is one image, on which batch-norm may fail."""
        layers = (nn.BatchNorm1d, nn.BatchNorm2d)
        if smallest_share > 1 or not any(isinstance(module, layers) for module in self.model.modules()):
            return
        where, enough = (" per process", 2 * WORLD_SIZE + 1) if WORLD_SIZE > 1 else ("", 2)
        # The batches are smaller than asked for if the images do not fill them all.
        advice = f"use {enough} or more" if batch_size < enough else "use fewer processes"
        raise UserError(f"--batch-size {batch_size}: batch-norm cannot train on a single image{where}; {advice}")


class Meter:
    """The loss and the accuracy of an epoch so far, and its progress bar.

    A step's figures stay on the device. They are fetched, and the loss is checked, only when the bar is refreshed.
    """

    REFRESH_SECONDS = 0.5

    def __init__(self, name: str, batch_sizes: list[int], device: torch.device):
        self.name, self.batch_sizes = name, batch_sizes
        self.losses = torch.empty(len(batch_sizes), device=device)  # of each step
        self.right = torch.empty(sum(batch_sizes), dtype=torch.bool, device=device)  # of each image
        self.step = self.seen = 0
        self.bar = progress_bar(desc=name, total=len(batch_sizes))
        self.next_refresh = time.monotonic() + self.REFRESH_SECONDS

    def update(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss, its logits of shape (N, classes) and its labels of shape (N,)."""
        stop = self.seen + len(labels)
        self.losses[self.step] = loss
        torch.eq(logits.argmax(1), labels, out=self.right[self.seen : stop])
        self.step, self.seen = self.step + 1, stop
        if time.monotonic() > self.next_refresh:
            self.read()
            self.next_refresh = time.monotonic() + self.REFRESH_SECONDS

    def read(self) -> tuple[float, int, int]:
        """Show the mean loss and accuracy so far, and return the summed loss, the correct images and all images.

        Raises UserError if a loss is not finite.
        """
        losses = self.losses[: self.step].cpu()
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            raise UserError(f"{self.name}: the loss is not finite at step {bad[0].item() + 1}; use a lower --lr")
        loss = (losses.double() @ torch.tensor(self.batch_sizes[: self.step], dtype=torch.double)).item()
        right, seen = self.right[: self.seen].sum().item(), self.seen
        self.bar.set_postfix_str(f"loss:{loss / seen:.3f}, accuracy:{100 * right / seen:.3f}", refresh=False)
        self.bar.update(self.step - self.bar.n)
        return loss, right, seen

    def total(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent, over all images of all processes."""
        loss, right, seen = sum_over_processes([*self.read()], self.losses.device)
        return loss / seen, 100 * right / seen

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

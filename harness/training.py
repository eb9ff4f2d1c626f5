"""A step of training, and the figures of an epoch."""

import time

import torch
from torch.nn.parallel import DistributedDataParallel

from harness.devices import (
    autocast,
)
from harness.processes import WORLD_SIZE, summed
from harness.terminal import UserError, progress_bar


class TrainStep:
    """A step of training: called with a batch, it updates the weights and returns the loss and the logits.

    `weight` is that of the loss among those of several processes. On CUDA the forward and the backward pass are
    captured as a CUDA graph, one a batch size, and replayed: to launch the kernels of such small networks one by one
    takes a CPU several times as long as a GPU takes to run them. DistributedDataParallel runs without graphs.
    """

    WARM_UP = 3  # steps before the first capture, in which the libraries set up what must not happen during one

    def __init__(self, model, criterion, optimizer, scaler):
        self.model, self.criterion, self.optimizer, self.scaler = model, criterion, optimizer, scaler
        self.forward = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
        self.steps, self.graphs = 0, {}
        for group in optimizer.param_groups:
            if group.get("momentum"):  # or a first step that the scaler skips would leave them uninitialised
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(self, images, labels, weight=1):
        self.steps += 1
        if images.is_cuda and self.steps > self.WARM_UP and WORLD_SIZE == 1:
            loss, logits = self.replay(images, labels)
        else:
            loss, logits = self.forward_backward(images, labels, weight)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, logits

    def forward_backward(self, images, labels, weight=1):
        self.optimizer.zero_grad()
        with autocast(images):
            logits = self.forward(images)
            loss = self.criterion(logits, labels)
        self.scaler.scale(loss if weight == 1 else weight * loss).backward()
        return loss.detach(), logits.detach()

    def replay(self, images, labels):
        if len(labels) not in self.graphs:
            graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
            pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None  # one at a time needs its memory
            with torch.cuda.graph(graph, pool):
                outputs = self.forward_backward(*inputs)
            self.graphs[len(labels)] = graph, inputs, outputs, [p.grad for p in self.model.parameters()]
        graph, inputs, outputs, gradients = self.graphs[len(labels)]
        inputs[0].copy_(images)
        inputs[1].copy_(labels)
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # each graph writes its own
        return outputs


class Meter:
    """The loss and the accuracy of an epoch so far, and its progress bar where stdout is a terminal.

    What a step adds stays on the device; it is fetched, and the loss checked, only when the bar is refreshed.
    """

    REFRESH = 0.5  # seconds

    def __init__(self, name, loader):
        self.name, self.sizes = name, loader.batch_sizes
        self.losses = torch.empty(len(loader), device=loader.device)  # of each step
        self.right = torch.empty(len(loader.mine), dtype=torch.bool, device=loader.device)  # of each image
        self.step = self.seen = 0
        self.bar = progress_bar(desc=name, total=len(loader))
        self.next_refresh = time.monotonic() + self.REFRESH

    def update(self, loss, logits, labels):
        stop = self.seen + len(labels)
        self.losses[self.step] = loss
        torch.eq(logits.argmax(1), labels, out=self.right[self.seen : stop])
        self.step, self.seen = self.step + 1, stop
        if time.monotonic() > self.next_refresh:
            self.read()
            self.next_refresh = time.monotonic() + self.REFRESH

    def read(self):
        """Shows the mean loss and the accuracy so far. Raises UserError if a loss is not finite.

        Returns the sum of the images' losses, how many of the images are right, and how many there were.
        """
        losses = self.losses[: self.step].cpu()
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            raise UserError(f"{self.name}: the loss is not finite at step {bad[0].item() + 1}; take a lower --lr")
        loss = (losses.double() @ torch.tensor(self.sizes[: self.step], dtype=torch.double)).item()
        right, seen = self.right[: self.seen].sum().item(), self.seen
        self.bar.set_postfix_str(f"loss:{loss / seen:.3f}, accuracy:{100 * right / seen:.3f}", refresh=False)
        self.bar.update(self.step - self.bar.n)
        return loss, right, seen

    def total(self):
        """The mean loss and the accuracy in percent, over all images of all processes."""
        loss, right, seen = summed([*self.read()], self.losses.device)
        return loss / seen, 100 * right / seen

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

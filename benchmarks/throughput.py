"""Measure how fast the scripts train and test, compared with the usual way and with what is possible.

python -m benchmarks.throughput                # all scripts, half an hour on two cores
python -m benchmarks.throughput --only r1 r2   # only scripts whose command contains one of these
python -m benchmarks.throughput --alternatives # what each way of this repository to be fast is worth

Prints a table in Markdown. Saved as throughput.md or alternatives.md in a machine's folder of results/, it appears in
docs/speed.md. Network, batch size, optimizer, precision and augmentation are the script's own, but for the baseline's.
Every figure is the median over rounds in which the candidates take turns, as the machine's speed may change:

baseline      a torchvision dataset of PIL images, torchvision's transforms and a DataLoader with a worker per core;
              float32, contiguous memory, no fused optimizer, glibc's usual memory, a plain loop with `.item()` at
              each step, no cutout, no jitter, random flips for alternating ones, test batches of 100
ours          the script
ours in fp32  the script with --precision fp32, if it would use another precision
limit         ours on one batch that lies on the device already, which no data path can beat

With --alternatives the candidates are the limit, and the limit with one thing changed (ALTERNATIVES below).

Each candidate runs in its own process. `share` is the part of the device's computing power that ours uses: the
operations per second in the network's convolutions and matrix products, divided by the operations per second in a
product of two 4096x4096 matrices in the same precision.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import utils

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.scripts import BenchmarkLine, Prepared, first_images, prepare
from harness import devices
from harness.command_line import positive_int
from harness.data import Data
from harness.operations import count_operations
from harness.terminal import UserError, run
from models.cpu_layers import Conv3x3, SideBySide, StridedDepthwise

TRAIN, TEST = utils.train, utils.test  # `prepare` replaces them in utils
Round = Callable[[], int]  # trains on or tests some images, and returns how many


class Alternative(NamedTuple):
    """Another way to train. change: makes a prepared script train that way; words: of the commands to measure."""

    change: Callable[[Prepared], None]
    words: tuple[str, ...]


def compile_network(script: Prepared) -> None:
    script.train_step.forward = torch.compile(script.model)


def use_plain_convolutions(script: Prepared) -> None:
    Conv3x3.forward = lambda self, x: F.conv2d(x, self.kernels(), stride=self.stride, padding=self.padding)


def take_images_one_by_one(script: Prepared) -> None:
    SideBySide.SIDE = 0


def use_plain_depthwise(script: Prepared) -> None:
    StridedDepthwise.forward = nn.Conv2d.forward


def clamp_in_place(script: Prepared) -> None:
    for module in script.model.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True


CANDIDATES = ["baseline", "ours", "ours in fp32", "limit"]
GIVE_BACK = "freed memory given back"
ALTERNATIVES = {
    "torch.compile": Alternative(compile_network, ("",)),
    "plain 3x3 convolutions": Alternative(use_plain_convolutions, ("r2.py", "r4.py", "r5.py")),
    "gradients image by image": Alternative(take_images_one_by_one, ("r2.py", "r4.py", "r5.py")),
    "plain depthwise convolutions": Alternative(use_plain_depthwise, ("mobilenetv2.py",)),
    "ReLU6 in place": Alternative(clamp_in_place, ("mobilenetv2.py",)),
    GIVE_BACK: Alternative(lambda script: None, ("",)),  # it is changed before the script is prepared
}


class About(NamedTuple):
    """A script's settings. operations: in training on one image."""

    batch_size: int
    precision: str
    operations: int


class PILImages(Dataset):
    """torchvision's CIFAR10, except for the source of the pixels."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable):
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def endless(loader):
    while True:
        yield from loader


def baseline(script: Prepared, data: Data, training: bool) -> Round:
    """Return a function that trains or tests the script's network the usual way."""
    step, loader = script.train_step, script.train_loader if training else script.test_loader
    model, optimizer, device = script.model.train(training), step.optimizer, loader.device
    model.to(memory_format=torch.contiguous_format)
    optimizer.state.clear()  # its buffers are channels-last
    for group in optimizer.param_groups:
        group |= {"fused": False} if "fused" in group else {}
    augmentation = []
    if loader.crop:
        mode = "reflect" if loader.reflect else "constant"
        augmentation.append(transforms.RandomCrop(32, padding=loader.crop, padding_mode=mode))
    if loader.flip:
        augmentation.append(transforms.RandomHorizontalFlip())
    transform = transforms.Compose(
        [*augmentation, transforms.ToTensor(), transforms.Normalize(loader.mean, loader.std)]
    )
    images, labels = data[:2] if training else (data.test_images, data.test_labels)
    dataset, batch_size = PILImages(images, labels, transform), max(loader.batch_sizes) if training else 100
    workers = {"num_workers": torch.get_num_threads(), "persistent_workers": True}
    batches = endless(DataLoader(dataset, batch_size, shuffle=training, **workers))

    def run_round():
        done = 0
        while done < len(labels):
            inputs, targets = (tensor.to(device) for tensor in next(batches))
            with torch.set_grad_enabled(training):
                outputs = model(inputs)
                loss = script.criterion(outputs, targets)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()
            outputs.argmax(1).eq(targets).sum().item()
            done += len(targets)
        return done

    return run_round


def ours(script: Prepared, training: bool) -> Round:
    """Return a function that trains or tests as the script does."""
    if training:
        loader, epoch = script.train_loader, lambda: TRAIN(script.train_step, script.train_loader, 1)
    else:
        loader, epoch = script.test_loader, lambda: TEST(script.model, script.test_loader, script.criterion, 1)

    def run_round():
        epoch()
        return len(loader.labels)

    return run_round


def limit(script: Prepared, training: bool) -> Round:
    """Return a function that trains on or tests one batch that lies on the device already, again and again."""
    loader, model = script.train_loader if training else script.test_loader, script.model.train(training)
    batch = next(iter(loader))

    def run_round():
        for _ in range(len(loader)):
            if training:
                script.train_step(*batch)
            else:
                with torch.inference_mode(), devices.autocast(batch[0]):
                    script.criterion(model(batch[0]), batch[1])
        if loader.device.type != "cpu":
            torch.accelerator.synchronize()
        return len(loader) * len(batch[1])

    return run_round


def serve(pipe, command: str, training: bool, candidate: str, data: Data, device: torch.device) -> None:
    """Answer each request with a round's images per second and the peak memory in MB, in a candidate's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark itself handles Ctrl-C
    data = first_images(data, command, device, training)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what a script prints about its data
    if candidate in ("baseline", GIVE_BACK):
        utils.keep_freed_memory = lambda: None
    script = prepare(command, data, device, "fp32" if candidate in ("baseline", "ours in fp32") else None)
    if candidate in ALTERNATIVES:
        ALTERNATIVES[candidate].change(script)
    if candidate == "baseline":
        run_round = baseline(script, data, training)
    elif candidate.startswith("ours"):
        run_round = ours(script, training)
    else:
        run_round = limit(script, training)
    run_round()  # warms up
    loader = script.train_loader if training else script.test_loader
    precision, batch_size = devices.name_precision(script.train_loader.dtype), max(loader.batch_sizes)
    pipe.send(About(batch_size, precision, count_operations(script.model)))
    with contextlib.suppress(EOFError):  # the benchmark was ended
        while pipe.recv():
            if candidate != "baseline":
                run_round()  # the others have emptied the caches, and baseline's workers are still filling their queues
            begin = time.perf_counter()
            done = run_round()
            seconds = time.perf_counter() - begin
            peak = devices.peak_memory(device)
            pipe.send((done / seconds, peak.get("cuda") or peak.get("resident", 0)))


def measure(
    command: str, training: bool, candidates: list[str], data: Data, device: torch.device, rounds: int
) -> tuple[About, dict[str, float], dict[str, float]]:
    """Return a script's settings, then images per second and peak MB (the GPU's on a GPU) by candidate.

    Raises UserError if a candidate's process has ended.
    """
    context = multiprocessing.get_context("spawn")
    pipes, answers, about, processes = {}, {}, {}, []
    for candidate in candidates:
        if candidate == "ours in fp32" and about["ours"].precision == "fp32":
            continue
        pipes[candidate], theirs = context.Pipe()
        arguments = (theirs, command, training, candidate, data, device)
        processes.append(context.Process(target=serve, args=arguments, daemon=candidate != "baseline"))
        processes[-1].start()
        theirs.close()  # or this process would wait for ever for a candidate that has ended
        about[candidate], answers[candidate] = receive(pipes[candidate], command, candidate), []
    for _ in range(rounds):
        for candidate, pipe in pipes.items():
            with contextlib.suppress(BrokenPipeError):
                pipe.send(True)
            answers[candidate].append(receive(pipe, command, candidate))
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    rates, memory = (
        {candidate: statistics.median(row[i] for row in rows) for candidate, rows in answers.items()} for i in (0, 1)
    )
    return about["limit"], rates, memory


def receive(pipe, command: str, candidate: str) -> tuple:
    """Return the answer of a candidate's process. Raise UserError if it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        raise UserError(f"{command}: the process of {candidate} has ended; it may have run out of memory") from None


def most_operations(device: torch.device, precision: str) -> float:
    """Return the floating-point operations per second of a product of two 4096x4096 matrices."""
    matrix, seconds = torch.randn(4096, 4096, device=device, dtype=devices.DTYPES[precision]), []
    for _ in range(10):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * 4096**3 / statistics.median(seconds)


def row_of(script: str, about: About, rates: dict, memory: dict, share: str) -> list[str]:
    """Return a row of the table that compares the script with the usual way and with the limit."""
    speeds, peaks = (
        [f"{figures[name]:,.0f}" if name in figures else "" for name in CANDIDATES] for figures in (rates, memory)
    )
    ratios = [f"{rates['ours'] / rates[name]:.2f}" for name in ("baseline", "limit")]
    return [script, str(about.batch_size), about.precision, *speeds, *ratios, share, *peaks]


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = BenchmarkLine(__doc__)
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--alternatives", action="store_true", help="measure the alternatives instead")
    args, commands, data, device = parser.parse()
    machine = f"torch {torch.__version__}, {devices.device_name(device)}; {data.source}"
    also = ", and the alternatives as a fraction of the limit" if args.alternatives else ""
    print(f"Images a second{also}, by {machine}; medians of {args.rounds} rounds.\n")
    if args.alternatives:
        columns = ["script", "limit", *ALTERNATIVES]
    else:
        columns = ["script", "batch", "precision", *CANDIDATES, "ours/baseline", "ours/limit", "share"]
        columns += [f"MB, {candidate}" for candidate in CANDIDATES]
    print_row(columns)
    print(f"|{' --- |' * len(columns)}", flush=True)
    for command in commands:
        if args.alternatives:
            chosen = [name for name, way in ALTERNATIVES.items() if any(word in command for word in way.words)]
            _, rates, _ = measure(command, True, ["limit", *chosen], data, device, args.rounds)
            ratios = [f"{rates[name] / rates['limit']:.2f}" if name in rates else "" for name in ALTERNATIVES]
            print_row([f"`{command}`", f"{rates['limit']:,.0f}", *ratios])
            continue
        for training in (True, False):
            about, rates, memory = measure(command, training, CANDIDATES, data, device, args.rounds)
            share = ""
            if training:
                share = f"{rates['ours'] * about.operations / most_operations(device, about.precision):.2f}"
            print_row(row_of(f"`{command}`" + ("" if training else ", testing"), about, rates, memory, share))


if __name__ == "__main__":
    run(main)

"""How fast the scripts train and test, side by side with what such repositories usually do and with what is possible.

python benchmarks/throughput.py --data data                  # all of it, 20 minutes on two cores
python benchmarks/throughput.py --data data --only r1 start  # some
python benchmarks/throughput.py --data data --compile        # torch.compile: does it pay?
python benchmarks/throughput.py --data data --profile        # where the time of a step goes
python benchmarks/throughput.py --data data --only processes # torchrun's two processes against one, on two cores

Every figure is the median over rounds in which the candidates take turns, so that a machine that drifts favours none:

baseline  a torchvision dataset of PIL images, RandomCrop, RandomHorizontalFlip, ToTensor and Normalize in a DataLoader
          with a worker a core; float32, contiguous memory, a plain loop with `.item()` at each step
ours      the scripts' functions, in the precision that they take by default
ours-fp32 the same in float32
limit     ours on one batch that lies on the device already: what no data path can beat
compiled  the same with torch.compile, measured with --compile

all with the same network, batch size and optimizer, each in a process of its own: MobileNetV2's take 21 GB on a CPU.
`share` is that of ours in what the device can compute at most: the floating-point operations of the network's
convolutions and matrix products in a second, by those of a product of two 4096x4096 matrices in the same precision.
"""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

import mean_and_std  # noqa: E402
import plot  # noqa: E402
from harness import devices  # noqa: E402
from harness.command_line import positive_int  # noqa: E402
from harness.data import load_data  # noqa: E402
from harness.loader import Loader  # noqa: E402
from harness.terminal import CommandLine, UserError, run  # noqa: E402
from models import MobileNetV2, ResNet18, TutorialCNN  # noqa: E402

NETWORKS = {  # name: network, batch size and precision of the script, images of a round on a CPU
    "r1-batch4": (TutorialCNN, 4, "fp32", 4_000),
    "r1": (TutorialCNN, 128, "fp32", 25_600),
    "r2-imagenet": (ResNet18, 128, "auto", 2_560),
    "r4-cifar": (lambda: ResNet18(stem="cifar"), 256, "auto", 1_024),
    "r4-cifar-nopool": (lambda: ResNet18(stem="cifar-nopool"), 256, "auto", 512),
    "mobilenetv2": (MobileNetV2, 256, "auto", 768),
}
GPU = 20  # times as many images a round there
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class PILImages(Dataset):
    """torchvision's CIFAR10, but for where the pixels come from."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def endless(loader):
    while True:
        yield from loader


def sgd(model, fused):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)


def baseline(data, device, make, batch_size, training, images):
    """A function that trains on, or tests, some images the usual way."""
    as_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if training:
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        dataset = PILImages(data.train_images, data.train_labels, transforms.Compose([*augment, *as_tensor]))
    else:
        dataset, batch_size = PILImages(data.test_images, data.test_labels, transforms.Compose(as_tensor)), 100
    loader = DataLoader(dataset, batch_size, shuffle=training, num_workers=os.cpu_count(), persistent_workers=True)
    batches = endless(loader)
    model, criterion = make().to(device, memory_format=torch.contiguous_format).train(training), nn.CrossEntropyLoss()
    optimizer = sgd(model, fused=False)

    def step(inputs, targets):
        inputs, targets = inputs.to(device), targets.to(device)
        with torch.set_grad_enabled(training):
            outputs = model(inputs)
            loss = criterion(outputs, targets)
        if training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()
        outputs.argmax(1).eq(targets).sum().item()

    def run():
        done = 0
        while done < images:
            inputs, targets = next(batches)
            step(inputs, targets)
            done += len(targets)
        return done

    return run


def ours(data, device, make, batch_size, training, images, precision, limit=False, compiled=False):
    """The same with the scripts' functions; with `limit` on a batch that lies on the device."""
    data = data._replace(train_images=data.train_images[:images], train_labels=data.train_labels[:images])
    data = data._replace(test_images=data.test_images[:images], test_labels=data.test_labels[:images])
    dtype = devices.DTYPES[devices.choose_precision(precision, device)]
    common = {"mean": MEAN, "std": STD, "device": device, "dtype": dtype}
    if training:
        augmentation = {"training": True, "flip": True, "crop": 4}
        loader = Loader(data.train_images, data.train_labels, batch_size, **augmentation, **common)
    else:
        loader = Loader(data.test_images, data.test_labels, utils.TEST_BATCH_SIZE, **common)
    model, criterion = make().to(device), nn.CrossEntropyLoss()
    step = utils.TrainStep(model, criterion, sgd(model, fused=True), dtype)
    if compiled:
        step.forward = torch.compile(model)
    batch = next(iter(loader))

    def run():
        if not limit:
            utils.train(step, loader, 1) if training else utils.test(model, loader, criterion, 1)
            return len(loader.labels)
        model.train(training)
        for _ in range(len(loader)):
            if training:
                step(*batch)
            else:
                with torch.inference_mode(), devices.autocast(batch[0]):
                    criterion(model(batch[0]), batch[1])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(loader) * len(batch[1])

    return run


def convolution_backward(grad, images, weight, *arguments, out_shape):
    """Its floating-point operations, from the shapes; PyTorch's own count is wrong where there are groups."""
    mask = arguments[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (mask[0] + mask[1])


def operations(make):
    """The floating-point operations of a training step, an image."""
    counted = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        make()(torch.randn(8, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 8


def most_operations(device, dtype):
    """Floating-point operations per second of a product of two 4096x4096 matrices."""
    matrix, seconds = torch.randn(4096, 4096, device=device, dtype=dtype), []
    for _ in range(10):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return 2 * 4096**3 / statistics.median(seconds)


def profile(name, data, device):
    """Prints the operations that take most of a step of training, with their milliseconds and their share."""
    make, batch_size, precision, _ = NETWORKS[name]
    steps = 50 if device.type == "cuda" else 1  # a CPU's is distorted by the memory that the profiler takes at each
    run = ours(data, device, make, batch_size, True, steps * batch_size, precision)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    profiles = []
    for _ in range(10):
        run()
        with torch.profiler.profile() as profiler:
            run()
        profiles.append({event.key: getattr(event, key) / 1000 / steps for event in profiler.key_averages()})
    shortest = min(profiles, key=lambda times: sum(times.values()))
    total = sum(shortest.values())
    print(f"{name}, {total:.2f} ms a step of {batch_size} images")
    for event, milliseconds in sorted(shortest.items(), key=lambda item: -item[1])[:8]:
        print(f"{milliseconds:10.2f}{milliseconds / total:7.1%}  {event:.90}", flush=True)


def seed_mean_and_std(data, images):
    """As the text has it from which this repository grew: an image at a time, a channel at a time."""
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")
    dataset = PILImages(data.train_images[:images], data.train_labels[:images], transforms.ToTensor())
    loader = DataLoader(dataset, batch_size=1, shuffle=True, num_workers=4, persistent_workers=True)

    def run():
        mean, std = torch.zeros(3), torch.zeros(3)
        for inputs, _ in loader:
            for channel in range(3):
                mean[channel] += inputs[:, channel].mean()
                std[channel] += inputs[:, channel].std()
        return images

    return run


def our_mean_and_std(data):
    def run():
        mean_and_std.get_mean_and_std(data.train_images)
        return len(data.train_images)

    return run


def candidates(name, kind):
    """The candidates' names and the functions, of (data, device), that make what a round runs."""
    if name == "mean_and_std":
        return {
            "baseline": lambda data, device: seed_mean_and_std(data, images=5000),
            "ours": lambda data, device: our_mean_and_std(data),
        }
    make, batch_size, precision, images = NETWORKS[name]
    images *= 1 if kind == "training" else 2

    def common(data, device):
        return data, device, make, batch_size, kind == "training", images * (GPU if device.type == "cuda" else 1)

    return {
        "baseline": lambda *where: baseline(*common(*where)),
        "ours": lambda *where: ours(*common(*where), precision),
        "ours-fp32": lambda *where: ours(*common(*where), "fp32"),
        "limit": lambda *where: ours(*common(*where), precision, limit=True),
        "compiled": lambda *where: ours(*common(*where), precision, limit=True, compiled=True),
    }


def serve(pipe, name, kind, candidate, data, device):
    """A candidate's process: a round each time it is asked, answered by images per second and peak memory in MB."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's own affair
    if candidate != "baseline":
        devices.keep_freed_memory()
    run = candidates(name, kind)[candidate](data, device)
    run()  # warms up
    with contextlib.suppress(EOFError):  # the benchmark was ended
        while pipe.recv():
            begin = time.perf_counter()
            done = run()
            seconds = time.perf_counter() - begin
            peak = devices.peak_memory(device)
            pipe.send((done / seconds, peak.get("resident", 0), peak.get("cuda", 0)))


def measure(name, kind, data, device, rounds, compiled):
    """A dict from candidate to its median images per second, peak MB resident and on the device.

    Raises UserError if the process of one has ended.
    """
    context = multiprocessing.get_context("spawn")
    pipes, results, processes = {}, {}, []
    chosen = {"limit", "compiled"} if compiled else {"baseline", "ours", "ours-fp32", "limit"}
    for candidate in filter(chosen.__contains__, candidates(name, kind)):
        pipes[candidate], theirs = context.Pipe()
        arguments = (theirs, name, kind, candidate, data, device)
        processes.append(context.Process(target=serve, args=arguments, daemon=candidate != "baseline"))
        processes[-1].start()
        theirs.close()  # or this process would wait for ever for one that has ended
        results[candidate] = []
    for _ in range(rounds):
        for candidate, pipe in pipes.items():
            try:
                pipe.send(True)
                results[candidate].append(pipe.recv())
            except (EOFError, BrokenPipeError):
                raise UserError(f"{name}: the process of {candidate} has ended, or the memory has") from None
            if candidate == "baseline":
                time.sleep(1)  # in which its workers fill their queues, or they would slow down the next candidate
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {c: [statistics.median(column) for column in zip(*rows, strict=True)] for c, rows in results.items()}


START = """
import json, os, runpy, sys, time, utils
from harness.devices import peak_memory

def first_step(self, images, *rest):
    print(json.dumps([time.time(), peak_memory(images.device)]), flush=True)
    os._exit(0)

utils.TrainStep.__call__ = first_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(data, device):
    """Seconds from the command to the first step of training, peak MB resident and on the device."""
    with tempfile.TemporaryDirectory() as checkpoints:
        flags = ["--data", data, "--device", device, "--checkpoints", checkpoints]
        command = [sys.executable, "-c", START, str(ROOT / "cifar10_r2.py"), *flags]
        begin = time.time()
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    end, peak = json.loads(done.stdout.splitlines()[-1])
    return end - begin, peak.get("resident", 0), peak.get("cuda", 0)


PROCESSES = {  # how a script is started, on two cores
    "1 process of 2 threads": ("2", [sys.executable]),
    "2 processes of 1 thread": (
        "1",
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    ),
}


def images_per_second(how, name):
    """Of the second epoch of a script on the synthetic images, its testing and saving included."""
    threads, command = PROCESSES[how]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as checkpoints:
        flags = ["--data", "synthetic", "--device", "cpu", "--epochs", "2", "--checkpoints", checkpoints]
        subprocess.run([*command, str(ROOT / name), *flags], env=environment, stdout=subprocess.DEVNULL, check=True)
        (log,) = Path(checkpoints).glob("*/log.csv")
        return 10_000 / plot.read_log(log.parent)[1]["seconds"]


def main():
    parser = CommandLine(__doc__)
    parser.add_data("as for the scripts (default: data)")
    parser.add_argument("--device", default="auto", help="as for the scripts (default: auto)")
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS, "mean_and_std", "start", "processes"], metavar="NAME")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile instead")
    parser.add_argument("--profile", action="store_true", help="only show where the time of training goes")
    args = parser.parse_args()
    device, data = devices.choose_device(args.device), load_data(args.data)
    print(f"torch {torch.__version__}, {devices.device_name(device)}; {data.source}", flush=True)
    if args.profile:
        for name in filter(NETWORKS.get, args.only or NETWORKS):
            profile(name, data, device)
        return
    print(f"{'':28}{'candidate':12}{'images/s':>10}{'MB':>8}{'MB on the device':>18}", flush=True)
    ratios = []
    for name in args.only or [*NETWORKS, *([] if args.compile else ["mean_and_std", "start"])]:
        if name == "start":
            columns = zip(*(start(args.data, args.device) for _ in range(args.rounds)), strict=True)
            seconds, resident, on_device = map(statistics.median, columns)
            print(f"{'start of r2':28}{'ours':12}{seconds:8.1f} s{resident:8}{on_device:18}", flush=True)
            continue
        if name == "processes":
            for script in ("cifar10_r1.py", "cifar10_r2.py"):
                rounds = [[images_per_second(how, script) for how in PROCESSES] for _ in range(args.rounds)]
                rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
                for how, rate in zip(PROCESSES, rates, strict=True):
                    print(f"{script:15}{how:25}{rate:10.0f}", flush=True)
                ratios.append(f"ratio {script} 2-processes/1-process {rates[1] / rates[0]:.2f}")
            continue
        for kind in ["training"] if name == "mean_and_std" or args.compile else ["training", "evaluation"]:
            title = name if kind == "training" else f"{name} evaluation"
            rates = {}
            measured = measure(name, kind, data, device, args.rounds, args.compile)
            for candidate, (rate, resident, on_device) in measured.items():
                print(f"{title:28}{candidate:12}{rate:10.0f}{resident:8}{on_device:18}", flush=True)
                rates[candidate] = rate
            for one, other in (("ours", "baseline"), ("ours", "limit"), ("compiled", "limit")):
                if {one, other} <= rates.keys():
                    ratios.append(f"ratio {title.replace(' ', '-')} {one}/{other} {rates[one] / rates[other]:.2f}")
            if title in NETWORKS and not args.compile:
                make, _, precision, _ = NETWORKS[title]
                dtype = devices.DTYPES[devices.choose_precision(precision, device)]
                share = rates["ours"] * operations(make) / most_operations(device, dtype)
                ratios.append(f"ratio {title} share {share:.2f}")
    print("\n".join(ratios))


if __name__ == "__main__":
    run(main)

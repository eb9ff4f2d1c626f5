"""Print the operations that take most of a training step's time, without the preparation of its images.

python -m benchmarks.profile
python -m benchmarks.profile --only r4 mobilenet   # only scripts whose command contains one of these
"""

import itertools

import torch
from torch.autograd import DeviceType

from benchmarks.scripts import BenchmarkLine, first_images, prepare
from harness.data import Data
from harness.devices import device_name
from harness.terminal import run


def profile(command: str, data: Data, device: torch.device) -> None:
    """Print the operations that take most of a step, with their milliseconds and their share."""
    script = prepare(command, first_images(data, command, device), device)
    script.train_step.model.train()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # One step only on a CPU, because the profiler takes memory at each step, which distorts the profile.
    steps = min(50, len(script.train_loader)) if device.type == "cuda" else 1
    batches, profiles = list(itertools.islice(script.train_loader, steps)), []
    for _ in range(20):
        with torch.profiler.profile() as profiler:
            for images, labels in batches:
                script.train_step(images, labels)
        events = profiler.key_averages()
        if device.type == "cuda":  # the kernels alone: the operations that launch them repeat their times
            events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        profiles.append({event.key: getattr(event, key) / 1000 / steps for event in events})
    shortest = min(profiles, key=lambda times: sum(times.values()))
    total = sum(shortest.values())
    print(f"{command}, {total:.2f} ms a step of {max(script.train_loader.batch_sizes)} images")
    for event, milliseconds in sorted(shortest.items(), key=lambda item: -item[1])[:8]:
        print(f"{milliseconds:10.2f}{milliseconds / total:7.1%}  {event:.90}", flush=True)


def main() -> None:
    _, commands, data, device = BenchmarkLine(__doc__).parse()
    print(device_name(device), flush=True)
    for command in commands:
        profile(command, data, device)


if __name__ == "__main__":
    run(main)

"""Compare two processes of one thread, started by torchrun, with one process of two threads, on two CPU cores.

python -m benchmarks.processes
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from harness.devices import device_name
from harness.records import read_log
from harness.terminal import CommandLine, run

IMAGES = 10_000  # training images in the synthetic dataset
PROCESSES = {  # how a script is started: threads, command
    "1 process of 2 threads": ("2", [sys.executable]),
    "2 processes of 1 thread": (
        "1",
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    ),
}


def images_per_second(script: str, threads: str, command: list[str]) -> float:
    """Return a script's images per second in its second epoch on synthetic images, including testing and saving."""
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as checkpoints:
        flags = ["--data", "synthetic", "--device", "cpu", "--epochs", "2", "--checkpoints", checkpoints]
        subprocess.run([*command, script, *flags], env=environment, stdout=subprocess.DEVNULL, check=True)
        (log,) = Path(checkpoints).glob("*/log.csv")
        return IMAGES / read_log(log.parent)[1]["seconds"]


def main() -> None:
    CommandLine(__doc__).parse_args()
    print(device_name(torch.device("cpu")), flush=True)
    for script in ("cifar10_r1.py", "cifar10_r2.py"):
        rounds = [[images_per_second(script, *how) for how in PROCESSES.values()] for _ in range(3)]
        rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
        for how, rate in zip(PROCESSES, rates, strict=True):
            print(f"{script:15}{how:25}{rate:10.0f} images/s with testing and saving", flush=True)
        print(f"{script:15}2 processes / 1 process  {rates[1] / rates[0]:10.2f}", flush=True)


if __name__ == "__main__":
    run(main)

"""Commands that run side by side: their processes, their shares of the machine, their output and its bars."""

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from tqdm import tqdm

from harness.terminal import escape_unprintable, progress_bar

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Task(NamedTuple):
    """A command with a name. after: the name of the task that must succeed first, if it is there too."""

    name: str
    command: list[str]
    after: str | None = None


class Worker:
    """A task's process, its number among the running ones, and the beginning of its next line."""

    def __init__(self, task: Task, number: int, environment: dict[str, str]):
        self.task, self.number, self.rest = task, number, b""
        self.process = subprocess.Popen(
            task.command, stdout=subprocess.PIPE, env=os.environ | environment, preexec_fn=end_with_parent
        )

    def read_lines(self) -> list[str] | None:
        """Return the lines printed since the last call, or None at the end of the output."""
        block = os.read(self.process.stdout.fileno(), 1 << 16)
        if not block and not self.rest:
            return None
        *lines, self.rest = (self.rest + block).split(b"\n") if block else (self.rest, b"")
        return [escape_unprintable(line.decode(errors="replace")) for line in lines]


def share(number: int, jobs: int, device: str) -> dict[str, str]:
    """Return the environment variables of a worker, one of `jobs`: its GPU, or its share of the CPU's threads."""
    if jobs == 1:
        return {}
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[number % gpus]}
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}


def end_with_parent() -> None:
    """Make Linux send this process SIGTERM when its parent is killed. Elsewhere it ends when it next prints."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_side_by_side(
    tasks: Iterable[Task],
    count: int,
    environment: Callable[[int], dict[str, str]],
    report: Callable[[Task, int, str], None],
    finish: Callable[[Task, str | None], None],
) -> None:
    """Run the tasks, up to `count` at once.

    environment: called with a worker's number, from 0 to count - 1; returns the worker's environment variables. report:
    called with a task, its worker's number and each of its lines. finish: called with each task that has ended and its
    error, or None. If a task fails, only the tasks that wait for it are left out. An exception, such as a signal's,
    ends all of them cleanly.
    """
    waiting, running, failed = list(tasks), {}, set()  # failed: names

    def fail(task: Task, error: str) -> None:
        failed.add(task.name)
        finish(task, error)

    numbers, unfinished = set(range(count)), {task.name for task in waiting}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                for task in [task for task in waiting if task.after in failed]:
                    waiting.remove(task)
                    fail(task, f"waited for {task.after}")
                for task in [task for task in waiting if task.after not in unfinished][: len(numbers)]:
                    waiting.remove(task)
                    number = min(numbers)
                    numbers.remove(number)
                    worker = running[task.name] = Worker(task, number, environment(number))
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                if not running:
                    continue  # a task waits for one that has waited in vain
                for key, _ in selector.select():
                    worker, lines = key.data, key.data.read_lines()
                    for line in lines or ():
                        report(worker.task, worker.number, line)
                    if lines is None:
                        selector.unregister(worker.process.stdout)
                        status, task = worker.process.wait(), worker.task
                        del running[task.name]
                        numbers.add(worker.number)
                        if status:
                            fail(task, reason(status, "its own error says why"))
                        else:
                            finish(task, None)
                            unfinished.remove(task.name)
        except BaseException:
            for worker in running.values():
                worker.process.terminate()  # SIGTERM, so that a run ends cleanly and its files stay whole
            for worker in running.values():
                worker.process.wait()
            raise


def reason(status: int, otherwise: str) -> str:
    """Return why a task failed: the signal that killed it, or its exit status and `otherwise`."""
    if status == -signal.SIGKILL:
        return "killed by SIGKILL, as when memory runs out; use fewer --jobs"
    if status < 0:
        return f"killed by signal {-status}"
    return f"exit status {status}; {otherwise}"


class Bars:
    """A progress bar for each of several jobs that run at once."""

    SHOWN = 60  # characters of a line, so that a bar fits into a terminal's line

    def __init__(self):
        self.bars = {}

    def show(self, number: int, name: str, line: str, epoch: re.Match | None) -> None:
        """Update a job's bar, the one of that number from above, from its line.

        epoch: the epoch, epochs and test accuracy in the line. Lines without them are shown before the first epoch.
        """
        if name not in self.bars:
            self.bars[name] = progress_bar(desc=name, total=0, position=number, leave=False)
        bar = self.bars[name]
        if epoch:
            if not bar.total:
                bar.initial = int(epoch[1]) - 1  # of a resumed run, for the rate and the time left
            bar.n, bar.total = int(epoch[1]), int(epoch[2])
            bar.set_postfix_str(f"test accuracy:{epoch[3]}")
        elif not bar.total:
            bar.set_postfix_str(line[: self.SHOWN])

    def write(self, line: str) -> None:
        """Print a line above the bars."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self, *names: str) -> None:
        """Close the bars of these jobs."""
        for name in names:
            if name in self.bars:
                self.bars.pop(name).close()

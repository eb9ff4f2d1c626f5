"""The tasks of `jobs` on a Ray cluster, each on whichever machine has room for it."""

import itertools
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.jobs import Task, reason
from harness.terminal import IN_USE, UserError, escape_unprintable

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60  # for cancelled runs to end


def run_on_cluster(
    tasks: Iterable[Task],
    address: str,
    jobs: int,
    use_gpus: bool,
    report: Callable[[Task, int, str], None],
    finish: Callable[[Task, str | None], None],
) -> None:
    """Run the tasks on a Ray cluster.

    address: as for `ray.init`; if empty, a cluster of this machine alone starts. jobs: how many tasks a machine runs at
    once, each with an equal share of its cores and GPUs. report, finish: see `run_side_by_side`. If a machine is lost,
    its tasks start again on others. Raises UserError if Ray is not installed or no cluster answers at the address.
    """
    try:
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise UserError('--ray needs a package that is not installed: pip install "ray>=2.50"') from None
    # Ray replaces the handler of SIGTERM, and may swallow what a handler raises inside its calls.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, colon, port = address.rpartition(":")
        if colon and "//" not in host:  # ray.init would keep trying for long
            socket.create_connection((host, port), timeout=10).close()
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # so that workers find this module
        ray.init(address or "local", runtime_env=environment, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address or ''}: no cluster answers; {' '.join(str(error).split())}") from None
    names = {}  # of the unfinished tasks, by their Ray references
    signals = []  # received
    for number in handlers:
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lines = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # outlives the other machines
        machines = [(node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)) for node in ray.nodes()]
        gpus, cores = max((gpus if use_gpus else 0, cores) for gpus, cores in machines)  # of the largest machine
        threads = max(1, int(cores // jobs))  # of a task
        share = 1 / math.ceil(jobs / gpus) if gpus else 0  # of a task, in GPUs
        remote = ray.remote(num_cpus=threads, num_gpus=share, max_retries=-1)(run_command)
        by_name, refs = {task.name: task for task in tasks}, {}
        numbers = {}  # of the running tasks, by their names
        for name, task in by_name.items():
            refs[name] = remote.remote(task, threads, lines, refs.get(task.after))
            names[refs[name]] = name
        while names:
            done, _ = ray.wait([*names], timeout=POLL_SECONDS)
            if signals:
                handlers[signals[0]](signals[0], None)  # raises, and ignores further signals
            for name, line in lines.get_nowait_batch(lines.qsize()):
                if name not in names.values():  # a machine that was taken for lost is still at a finished task
                    continue
                if name not in numbers:
                    numbers[name] = next(n for n in itertools.count() if n not in numbers.values())
                report(by_name[name], numbers[name], line)
            for ref in done:
                name = names.pop(ref)
                numbers.pop(name, None)
                try:
                    error = ray.get(ref)
                except ray.exceptions.RayError as failure:
                    error = " ".join(str(failure).split())
                finish(by_name[name], error)
    finally:
        for ref in names:
            ray.cancel(ref)  # raises KeyboardInterrupt in `run_command`
        if names:
            ray.wait([*names], num_returns=len(names), timeout=PATIENCE_SECONDS)
        ray.shutdown()
        if not signals:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run_command(task: Task, threads: int, lines, earlier_error: str | None) -> str | None:
    """Run a task's command on a machine of the cluster and return its error, or None.

    lines: a queue for (the task's name, a line of its output). earlier_error: the error of the task that it waits for.
    """
    if earlier_error:
        return f"waited for {task.after}"
    while True:
        process = subprocess.Popen(
            task.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        line = ""
        try:
            for line in process.stdout:
                lines.put((task.name, escape_unprintable(line.rstrip("\n"))))
        except BaseException:
            process.terminate()  # SIGTERM, so that a run ends cleanly and its files stay whole
            raise
        finally:
            status = process.wait()
        if IN_USE not in line:
            return reason(status, line.strip()) if status else None
        time.sleep(1)  # a lost machine's run holds its folder until its next line, which fails as nobody reads it

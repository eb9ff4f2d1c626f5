"""Rerun rows of the README's table, each with its command from the table.

python reproduce.py                          # all rows, which takes a day or more without a GPU
python reproduce.py --only r1-flip r2-crop
python reproduce.py --only r1-flip --seeds 3
python reproduce.py --only r1-flip --seeds 20 --jobs 4  # four runs at once, each on a GPU or a share of the CPU
python reproduce.py --only r1-flip --seeds 200 --jobs 4 --ray auto  # four on each machine of a Ray cluster
python reproduce.py --compare r1 r1-flip     # is the second better, or is it noise?
python reproduce.py --list                   # the rows, and how far each has got
python reproduce.py --readme                 # rewrite the tables and pictures of README and docs from results/
python reproduce.py --ship r5 --only r5      # store this row's network in checkpoints/, for predict.py

It can be interrupted and started again at any time. Finished rows are skipped, and an unfinished row resumes. The
record of a finished row goes into results/mine. It is compared with the records of other machines, in the folders
beside it.
"""

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from harness.cluster import run_on_cluster
from harness.command_line import positive_int, run_suffix, seed_int
from harness.data import load_data
from harness.files import sha256_of, write_atomically
from harness.folder import resumable_files
from harness.jobs import Bars, Task, run_side_by_side, share
from harness.records import read_log
from harness.results import RESULTS, accuracy_table, compare, duration, read_record, read_records, training_seconds
from harness.shipped import ship
from harness.terminal import CommandLine, UserError, handle_signals, nonempty_path, run

EPOCH = re.compile(r"epoch:(\d+)/(\d+) .* test .*accuracy:([\d.]+)")  # the line that a run prints for each epoch
ROOT = Path(__file__).resolve().parent


class Row(NamedTuple):
    """A row of the table. run: the run's name with seed 0; target: in percent; after: the row that it continues."""

    command: str
    run: str
    target: float
    after: str | None = None


ROWS = {
    "r1": Row("cifar10_r1.py", "cifar10_r1", 60),
    "r1-flip": Row("cifar10_r1.py --flip", "cifar10_r1-flip", 67),
    "r2": Row("cifar10_r2.py", "cifar10_r2", 75),
    "r2-crop": Row("cifar10_r2.py --crop", "cifar10_r2-crop", 83.2),
    "r3": Row("cifar10_r3.py --resume", "cifar10_r3", 83.9, after="r2-crop"),
    "r4": Row("cifar10_r4.py", "cifar10_r4", 83.9),
    "r4-long": Row("cifar10_r4.py --epochs 100", "cifar10_r4", 87.6),
    "r4-cifar": Row("cifar10_r4.py --stem cifar", "cifar10_r4-cifar", 94),
    "r4-cifar-nopool": Row("cifar10_r4.py --stem cifar-nopool", "cifar10_r4-cifar-nopool", 95),
    "r4-cifar-nopool-long": Row("cifar10_r4.py --stem cifar-nopool --epochs 80", "cifar10_r4-cifar-nopool", 95.5),
    "r5": Row("cifar10_r5.py", "cifar10_r5", 94),
    "r5-tta": Row("cifar10_r5.py --tta", "cifar10_r5-tta", 94),
    "mobilenetv2": Row("train_mobilenetv2.py", "train_mobilenetv2", 93.58),
    "mobilenetv2-long": Row("train_mobilenetv2.py --epochs 200", "train_mobilenetv2", 94.5),
}


class Job(NamedTuple):
    """A row with a seed. folder: of its run; record: the file for its record."""

    name: str
    seed: int
    folder: Path
    record: Path

    def __str__(self):
        return f"{self.name}, seed {self.seed}"

    def is_finished(self) -> bool:
        """Return whether the record exists."""
        return self.record.exists() and read_record(self.record) is not None

    def has_run(self) -> bool:
        """Return whether the folder holds the complete run, which another row can continue."""
        return all((self.folder / name).exists() for name in ("last.pt", "run.json"))

    def progress(self) -> str:
        """Return how far the job is: its accuracy, and whether its script has been changed since, or its epochs."""
        if not self.is_finished():
            done = len(self.epoch_seconds())
            return f"{done} epochs done" if done else "not begun"
        record, script = read_record(self.record), ROOT / ROWS[self.name].command.split()[0]
        then = record.get("script") or {"sha256": None}  # early records lack it
        other = "" if then["sha256"] == sha256_of(script) else f" by another version of {script.name}"
        return f"finished with {record['accuracy']:.1f} %{other}"

    def epoch_seconds(self) -> list[float]:
        """Return the seconds of each finished epoch, or none if the log cannot be read. The run will rewrite it."""
        try:
            return [row["seconds"] for row in read_log(self.folder)]
        except (UserError, OSError):
            return []


def jobs_to_run(jobs: list[Job]) -> list[Job]:
    """Return the unfinished jobs, and the finished ones that they are to continue but whose runs are incomplete."""
    unfinished = [job for job in jobs if not job.is_finished()]
    bases = {(ROWS[job.name].after, job.seed) for job in unfinished if not resumable_files(job.folder)}
    return [job for job in jobs if job in unfinished or ((job.name, job.seed) in bases and not job.has_run())]


def task_of(job: Job, args: argparse.Namespace) -> Task:
    """Return the task that starts or resumes the job."""
    script, *flags = ROWS[job.name].command.removesuffix(" --resume").split()
    data = args.data if args.data == "synthetic" else Path(args.data).resolve()  # where a cluster's machines find it
    flags += ["--seed", job.seed, "--data", data, "--device", args.device]
    flags += ["--checkpoints", job.folder.parent.resolve(), "--resume"]
    after = ROWS[job.name].after
    base = str(job._replace(name=after)) if after else None
    return Task(str(job), [sys.executable, str(ROOT / script), *map(str, flags)], base)


def run_jobs(jobs: list[Job], args: argparse.Namespace) -> dict[str, str]:
    """Run the jobs, up to --jobs at once, and copy their records. Return why jobs failed, by their names."""
    alone = args.jobs == 1 and args.ray is None
    on_bars = not alone and sys.stdout.isatty()
    by_name, failed, bars = {str(job): job for job in jobs}, {}, Bars()

    def report(task: Task, number: int, line: str) -> None:
        job, epoch = by_name[task.name], EPOCH.match(line)
        if on_bars:
            bars.show(number, task.name, line, epoch)
            return
        if epoch:
            # on a cluster the number of machines is not known
            later = [other for other in by_name.values() if other is not job] if args.ray is None else []
            line += f"; {time_left(job, int(epoch[2]) - int(epoch[1]), later, args.jobs)}"
        print(line if alone else f"{job}: {line}", flush=True)

    def finish(task: Task, error: str | None) -> None:
        job = by_name.pop(task.name)
        bars.close(task.name)
        if error:
            failed[task.name] = error
            return
        if not job.is_finished():  # a run that was only repeated, for the row that continues it, keeps its record
            job.record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(job.record, (job.folder / "run.json").read_bytes())
            read_record.cache_clear()
        bars.write(f"{job}: {read_record(job.record)['accuracy']:.1f} %, {len(by_name)} to go")

    tasks = [task_of(job, args) for job in jobs]
    try:
        if args.ray is not None:
            run_on_cluster(tasks, args.ray, args.jobs, args.device != "cpu", report, finish)
        else:
            run_side_by_side(tasks, args.jobs, lambda number: share(number, args.jobs, args.device), report, finish)
    finally:
        bars.close(*by_name)
    return failed


def time_left(job: Job, epochs: int, later: list[Job], at_once: int = 1) -> str:
    """Return as text how long `epochs` more of this job take, and how long with the later jobs.

    The estimate uses the job's epochs so far and the records. at_once: how many jobs run side by side.
    """
    seconds_per_epoch = statistics.median(job.epoch_seconds() or [0])
    own = seconds_per_epoch * epochs
    if not later:
        return f"{duration(own)} left"
    machines = read_records(job.record.parent).values()
    known = {}  # seconds by row, from the records
    for rows in sorted(machines, key=lambda rows: job.name in rows):  # last, so that a machine with this row decides
        pace = 1  # how many times as long a row takes here
        if job.name in rows:
            pace = seconds_per_epoch / statistics.median(row["seconds"] for row in rows[job.name][0]["epochs"])
        known |= {name: pace * statistics.mean(map(training_seconds, records)) for name, records in rows.items()}
    unknown = {other.name for other in later} - known.keys()
    theirs = sum(max(0, known.get(other.name, 0) - sum(other.epoch_seconds())) for other in later)
    total = (own + theirs) / min(at_once, 1 + len(later))
    total = max(own, total)  # the others may be shorter
    but = f" except {', '.join(sorted(unknown))}" if unknown else ""
    return f"{duration(own)} left, {duration(total)} with the other rows{but}"


def check_is_writable(folder: Path) -> None:
    """Raise UserError if the folder cannot be written, before a row trains for hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--results {folder} cannot be written: {error.strerror}; name another folder") from None


def check_data(results: Path, rows: set[str], name: str) -> None:
    """Raise UserError if a record of one of the rows was made on other data than --data."""
    paths = [path for row in sorted(rows) for path in sorted(results.glob(f"{row}-seed*.json")) if read_record(path)]
    fingerprint = load_data(name).fingerprint() if paths else None
    for path in paths:
        if read_record(path)["recipe"]["data"] != fingerprint:
            raise UserError(f"{path} is of other data than --data {name}; use other --results and --checkpoints")


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=ROWS, metavar="ROW", default=[*ROWS], help=f"which rows, of {', '.join(ROWS)}")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=positive_int, default=1, metavar="N", help="run each row with the seeds 0 to N-1"
    )
    seeds.add_argument("--seed", type=seed_int, metavar="K", help="run each row with this seed alone")
    add("--jobs", type=positive_int, default=1, metavar="N", help="run N at once, each on a GPU or a share of the CPU")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="run on a Ray cluster: N at once on each machine")
    add("--compare", nargs=2, metavar=("A", "B"), help="only compare two rows, or a row in two folders of results")
    add("--list", action="store_true", help="only list the rows")
    add("--readme", action="store_true", help="only rewrite the tables and pictures of README and docs")
    add(
        "--ship",
        type=nonempty_path,
        metavar="NAME",
        help="only store the last network of the row --only as checkpoints/NAME.pt",
    )
    parser.add_data()
    parser.add_device()
    add(
        "--checkpoints",
        type=nonempty_path,
        default=Path("checkpoints/reproduce"),
        metavar="DIR",
        help="folder for the runs (default: %(default)s)",
    )
    add("--results", type=nonempty_path, default=RESULTS / "mine", metavar="DIR", help="(default: results/mine)")
    args = parser.parse_args()
    if args.ship and len(args.only) != 1:
        parser.error("--ship takes the network of a single row; name it with --only")
    if args.ship and args.seeds > 1:
        parser.error("--ship takes the network of a single seed; name it with --seed")
    return args


def make_jobs(args: argparse.Namespace, results: Path) -> list[Job]:
    """Return a job for each chosen row and seed, in this order. A row comes after the one that it continues."""
    jobs = []
    for name in dict.fromkeys(name for chosen in args.only for name in (ROWS[chosen].after, chosen) if name):
        for seed in range(args.seeds) if args.seed is None else [args.seed]:
            checkpoints = args.checkpoints
            if "--epochs" in ROWS[name].command:  # rows that differ in --epochs only have runs of the same name
                checkpoints /= name
            run = ROWS[name].run + run_suffix(seed, False, args.data)
            jobs.append(Job(name, seed, checkpoints / run, results / f"{name}-seed{seed}.json"))
    return jobs


def main() -> None:
    args = parse_args()
    if args.readme:
        from harness.pages import write_pages  # here, because it imports matplotlib, which would slow down every start

        write_pages(ROWS)
        return
    synthetic = "-synthetic" if args.data == "synthetic" else ""
    unnamed = args.results.name in ("", "..")  # as "." is; the name gets an end below
    results = args.results.resolve() if unnamed else args.results
    results = results.parent / (results.name + synthetic)
    if args.compare:
        print(compare(*args.compare, args.only, results))
        return
    jobs = make_jobs(args, results)
    if args.ship:
        path = ship(args.ship, jobs[-1].folder, jobs[-1].record.name)
        print(f"the network is in {path}; python reproduce.py --readme adds it to the model card")
        return
    handle_signals("; the same command resumes")
    if not args.list:
        check_is_writable(results)
        check_data(results, {job.name for job in jobs}, args.data)
    to_run = jobs_to_run(jobs)
    for i, job in enumerate(jobs):
        state = job.progress()
        if job.is_finished() and job in to_run:
            state += "; runs again, as another row continues its run, which is missing or incomplete"
        print(f"[{i + 1}/{len(jobs)}] {job}, {state}: python {ROWS[job.name].command}", flush=True)
    failed = {} if args.list else run_jobs(to_run, args)
    print(accuracy_table({job.name: ROWS[job.name].target for job in jobs}, read_records(results)))
    if failed:
        raise UserError("; ".join(f"{name} failed: {reason}" for name, reason in failed.items()))


if __name__ == "__main__":
    run(main)

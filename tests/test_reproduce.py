"""reproduce.py: the rows of the README's table, and the table itself."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from helpers import CIFAR10_CLASSES, R1, ROOT, hide, output, run_on_a_terminal, write_images
from scipy import stats

import harness.results
import reproduce
from harness import drawing, pages
from harness.files import sha256_of
from harness.jobs import Task, run_side_by_side, share
from harness.records import read_log
from harness.results import RESULTS, accuracy_table, read_records, results_table, summary
from harness.statistics import difference, interval, t_quantile
from harness.terminal import UserError


def wait_for_epochs(process, folder, count):
    while process.is_alive():
        if (folder / "log.csv").exists() and len(read_log(folder)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the process ended before it was interrupted")


def figures(record):
    """Return the part of a record that does not depend on when and how fast it was run."""
    epochs = [{key: value for key, value in row.items() if key != "seconds"} for row in record["epochs"]]
    return epochs, record["accuracy"], record["confusion"], record["recipe"]


@pytest.mark.long
def test_interrupted_twice_and_finished(start, script, tmp_path):
    folders = write_images(tmp_path / "pictures", train=300)
    script(R1, "--data", folders, "--flip", "--seed", 1)  # the same, by hand
    flags = ["--only", "r1-flip", "--seeds", 2, "--data", folders, "--results", "mine"]
    done = [tmp_path / f"checkpoints/reproduce/cifar10_r1-flip{suffix}" for suffix in ("", "-seed1")]
    for folder, number, status in ((done[0], signal.SIGTERM, 143), (done[1], signal.SIGINT, 130)):
        process = start("reproduce.py", *flags)
        wait_for_epochs(process, folder, 3)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == status
        assert "ended by" in output(tmp_path, "stderr").read_text()
    before = (tmp_path / "mine/r1-flip-seed0.json").read_bytes()
    out = script("reproduce.py", *flags).stdout
    assert (tmp_path / "mine/r1-flip-seed0.json").read_bytes() == before
    finished, unfinished, *_ = out.splitlines()
    assert re.fullmatch(r"\[1/2\] r1-flip, seed 0, finished with \S+ %: python cifar10_r1.py --flip", finished)
    assert re.fullmatch(r"\[2/2\] r1-flip, seed 1, \d+ epochs done: python cifar10_r1.py --flip", unfinished)
    assert re.search(r"resuming .* after epoch \d+", out) and re.search(r"epoch:25/26 .*; \d+ s left", out)

    records = [json.loads((tmp_path / f"mine/r1-flip-seed{seed}.json").read_text()) for seed in (0, 1)]
    by_hand = json.loads((tmp_path / "checkpoints/cifar10_r1-flip-seed1/run.json").read_text())
    assert figures(records[1]) == figures(by_hand) != figures(records[0])
    assert [record["recipe"]["seed"] for record in records] == [0, 1]
    assert str(tmp_path) not in json.dumps(records)
    header, row = (re.split(r" {2,}", line) for line in out.splitlines()[-2:])
    assert header[:2] == ["row", "target"] and header[-1] == "mine"
    assert row[:2] == ["r1-flip", "67"] and row[-1] == summary(records) and "(n = 2)" in row[-1]


def test_r3_comes_after_r2(script):
    out = script("reproduce.py", "--list", "--only", "r3", "r1").stdout.splitlines()
    assert [line.split(": ")[1] for line in out[:3]] == [
        "python cifar10_r2.py --crop", "python cifar10_r3.py --resume", "python cifar10_r1.py",
    ]  # fmt: skip


def test_a_finished_row_runs_again_if_another_needs_its_deleted_run(tmp_path):
    jobs = [reproduce.Job(name, seed, tmp_path / f"{name}{seed}", tmp_path / f"{name}-seed{seed}.json")
            for name in ("r2-crop", "r3") for seed in (0, 1)]  # fmt: skip
    assert reproduce.jobs_to_run(jobs) == jobs
    for job in (jobs[0], jobs[1], jobs[3]):  # r3 with seed 0 is not finished
        shutil.copy(RESULTS / "cpu/r1-seed0.json", job.record)
    assert reproduce.jobs_to_run(jobs) == [jobs[0], jobs[2]]
    jobs[0].folder.mkdir()
    (jobs[0].folder / "last.pt").touch()  # of a run that has been interrupted
    assert reproduce.jobs_to_run(jobs) == [jobs[0], jobs[2]]
    (jobs[0].folder / "run.json").touch()
    assert reproduce.jobs_to_run(jobs) == [jobs[2]]
    shutil.rmtree(jobs[0].folder)
    jobs[2].folder.mkdir()
    (jobs[2].folder / "last.pt").touch()  # r3 has epochs of its own
    assert reproduce.jobs_to_run(jobs) == [jobs[2]]


def test_synthetic_records_are_kept_apart(start, script, tmp_path):
    process = start("reproduce.py", "--only", "r1", "--data", "synthetic", "--results", tmp_path / "mine")
    wait_for_epochs(process, tmp_path / "checkpoints/reproduce/cifar10_r1-synthetic", 1)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert not (tmp_path / "mine").exists()

    flags = ["--list", "--only", "r1", "--results", tmp_path / "mine", "--data"]
    (tmp_path / "mine").mkdir()
    shutil.copy(RESULTS / "cpu/r1-seed0.json", tmp_path / "mine")
    assert " epochs done: " in script("reproduce.py", *flags, "synthetic").stdout
    record = json.loads((tmp_path / "mine/r1-seed0.json").read_text())
    for sha256, other in ((sha256_of(ROOT / R1), ""), ("0" * 64, " by another version of cifar10_r1.py")):
        record["script"]["sha256"] = sha256
        (tmp_path / "mine/r1-seed0.json").write_text(json.dumps(record))
        (tmp_path / "not-downloaded-yet").mkdir(exist_ok=True)
        out = script("reproduce.py", *flags, "not-downloaded-yet").stdout
        assert f"[1/1] r1, seed 0, finished with {record['accuracy']:.1f} %{other}: python cifar10_r1.py\n" in out


def test_a_record_of_other_data_is_no_record_of_this(refused, tmp_path, folders):
    (tmp_path / "mine").mkdir()
    shutil.copy(RESULTS / "cpu/r1-seed0.json", tmp_path / "mine")
    for flags in ([], ["--seed", 1]):
        line = refused("reproduce.py", "--only", "r1", "--results", "mine", "--data", folders, *flags)
        assert "mine/r1-seed0.json is of other data than --data" in line


def test_a_record_that_is_none_is_named_and_passed_over(script, tmp_path):
    whole = (RESULTS / "cpu/r1-seed0.json").read_text()
    foreign = json.dumps(json.loads(whole) | {"epochs": "all"})
    (tmp_path / "mine").mkdir()
    for content in ("", "{}", "[]", whole[:500], f"<<<<<<< HEAD\n{whole}", foreign):
        (tmp_path / "mine/r1-seed0.json").write_text(content)
        out = script("reproduce.py", "--list", "--only", "r1", "--results", "mine").stdout
        assert out.count("mine/r1-seed0.json is not a record of a run; skipped\n") == 1
        assert "[1/1] r1, seed 0, not begun: " in out
    (tmp_path / "mine/r1-seed0.json").write_text(whole)
    assert "skipped" not in script("reproduce.py", "--list", "--only", "r1", "--results", "mine").stdout


@pytest.mark.long
def test_a_damaged_log_is_written_anew(start, script, tmp_path, folders):
    flags = ["--only", "r1", "--data", folders, "--results", "mine"]
    log = tmp_path / "checkpoints/reproduce/cifar10_r1/log.csv"
    process = start("reproduce.py", *flags)
    wait_for_epochs(process, log.parent, 1)
    process.terminate()
    process.join(60)
    log.unlink()
    log.mkdir()
    assert "[1/1] r1, seed 0, not begun: " in script("reproduce.py", *flags, "--list").stdout
    log.rmdir()
    log.write_text(f"epoch,lr\n{'9' * 200_000}\n")
    assert "[1/1] r1, seed 0, not begun: " in script("reproduce.py", *flags).stdout
    assert len(read_log(log.parent)) == 26


def test_a_folder_for_records_that_cannot_be_written(refused, script, tmp_path, folders):
    (tmp_path / "file").touch()
    for results in ("file", "file/below"):
        line = refused("reproduce.py", "--only", "r1", "--data", folders, "--results", results)
        assert f"--results {results} cannot be written: " in line
    assert not (tmp_path / "checkpoints").exists()
    for results in (".", ".."):
        script("reproduce.py", "--list", "--only", "r1", "--data", "synthetic", "--results", results)


def accuracies(folder):
    """Return the accuracy of each record in the folder, by its name."""
    return {path.stem: json.loads(path.read_text())["accuracy"] for path in folder.glob("*.json")}


@pytest.mark.long
def test_several_at_once_are_killed_and_go_on(start, script, tmp_path, monkeypatch):
    """Nothing is lost or run twice. The figures are the same as one after another with as many threads."""
    folders = write_images(tmp_path / "pictures", train=60)
    flags = ["--only", "r1", "--seeds", 3, "--data", folders, "--jobs", 2, "--results", "mine"]
    process = start("reproduce.py", *flags)
    wait_for_epochs(process, tmp_path / "checkpoints/reproduce/cifar10_r1", 5)  # last.pt may still have 4
    process.kill()
    process.join()
    out = script("reproduce.py", *flags).stdout
    assert out.count(" to go\n") + out.count(", finished with ") == 3
    for seed in range(3):
        epochs = re.findall(rf"r1, seed {seed}: epoch:(\d+)/26 ", out)
        assert epochs == [str(epoch) for epoch in range(27 - len(epochs), 27)]
    assert int(re.search(r"r1, seed 0: resuming .* after epoch (\d+)", out)[1]) in range(4, 26)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags[flags.index("--jobs") + 1] = 1
    script("reproduce.py", *flags, "--checkpoints", "again", "--results", "again-results")
    assert (
        accuracies(tmp_path / "mine") == accuracies(tmp_path / "again-results")
        and len(accuracies(tmp_path / "mine")) == 3
    )


@pytest.mark.long
def test_a_cluster_loses_a_machine(start, script, tmp_path, monkeypatch):
    """Of five runs on three machines of Ray's, each has its record, and two the same figures as without Ray."""
    pytest.importorskip("ray", reason='pip install "ray>=2.50" for the test of reproduce.py --ray')
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the cluster's runs, as of all others in the tests
    from ray.cluster_utils import Cluster

    folders = write_images(tmp_path / "pictures", train=60)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 1 << 27})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=1 << 27) for _ in range(2)]
        flags = ["--data", folders, "--results", "mine", "--only", "r1"]
        process = start("reproduce.py", *flags, "--seeds", 5, "--ray", cluster.address)
        for run in ("cifar10_r1", "cifar10_r1-seed1", "cifar10_r1-seed2"):  # one on each machine
            wait_for_epochs(process, tmp_path / "checkpoints/reproduce" / run, 1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        process.join(300)
    finally:
        cluster.shutdown()
    out = output(tmp_path, "stdout").read_text()
    assert process.exitcode == 0, output(tmp_path, "stderr").read_text()
    assert len(accuracies(tmp_path / "mine")) == out.count(" to go\n") == 5
    lost = re.findall(r"(r1\S*, seed \d): resuming .* after epoch \d+", out)
    assert len(lost) <= 1 and out.count("starting the run") + len(lost) == 6  # a lost run may have saved nothing yet
    for name in re.findall(r"(r1\S*, seed \d), not begun", out):
        epochs = [int(epoch) for epoch in re.findall(rf"{name}: epoch:(\d+)/26 ", out)]
        assert epochs == [*range(1, 27)] or (name in lost and epochs == sorted({*epochs}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for seed in {0, int(lost[0][-1]) if lost else 1}:
        script("reproduce.py", *flags, "--seed", seed, "--checkpoints", "again", "--results", "again-results")
    assert accuracies(tmp_path / "again-results").items() <= accuracies(tmp_path / "mine").items()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_on_a_cluster(start, script, tmp_path, monkeypatch, number):
    pytest.importorskip("ray", reason='pip install "ray>=2.50" for the test of reproduce.py --ray')
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the cluster's runs, as of all others in the tests
    from ray.cluster_utils import Cluster

    flags = ["--only", "r1", "--results", "mine", "--data", write_images(tmp_path / "pictures", train=60)]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 1 << 27})
    try:
        process = start("reproduce.py", *flags, "--ray", cluster.address)
        wait_for_epochs(process, tmp_path / "checkpoints/reproduce/cifar10_r1", 2)
        os.kill(process.pid, number)
        process.join(100)
        line = f"reproduce.py: ended by {number.name}; the same command resumes\n"
        assert process.exitcode == 128 + number and output(tmp_path, "stderr").read_text() == line
        assert "resuming " in script("reproduce.py", *flags).stdout  # the run has left its folder
    finally:
        cluster.shutdown()


def test_ray_without_a_cluster_or_ray(refused, folders, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # which "auto" would take
    flags = ["--only", "r1", "--data", folders, "--results", "mine", "--ray"]
    assert 'pip install "ray>=2.50"' in refused("reproduce.py", *flags, before=hide("ray"))
    if importlib.util.find_spec("ray"):
        for address in ("127.0.0.1:1", "127.0.0.1:no", "auto"):
            assert f"--ray {address}: no cluster answers; " in refused("reproduce.py", *flags, address)


def test_each_job_has_a_folder_and_r3_waits_for_r2_of_its_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--seeds", "2"])
    args = reproduce.parse_args()
    jobs = reproduce.make_jobs(args, tmp_path)
    assert len({job.folder for job in jobs}) == len({job.record for job in jobs}) == 2 * len(reproduce.ROWS)
    tasks = [reproduce.task_of(job, args) for job in jobs]
    waiting = {task.name: task.after for task in tasks if task.after}
    assert waiting == {f"r3, seed {seed}": f"r2-crop, seed {seed}" for seed in (0, 1)}


def test_a_users_own_records_are_in_no_table(monkeypatch, tmp_path):
    for machine in ("cpu", "mine", "mine-synthetic"):
        (tmp_path / machine).mkdir()
        shutil.copy(RESULTS / "cpu/r1-seed0.json", tmp_path / machine)
    monkeypatch.setattr(harness.results, "RESULTS", tmp_path)
    assert read_records().keys() == {"cpu"} and read_records(tmp_path / "mine").keys() == {"cpu", "mine"}


def test_each_of_several_runs_has_its_share_of_the_machine(monkeypatch):
    def shares(jobs, device="auto"):
        return [share(number, jobs, device) for number in range(jobs)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the driver is too old
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shares(1) == [{}] and shares(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert shares(9)[8] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(3)] == ["0", "1", "0"]
    assert shares(2, device="cpu") == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(2)] == ["5", "7"]


def test_the_time_left(monkeypatch, tmp_path):
    """The other rows' times are those of the records, at this machine's pace."""
    done = {"r1": [60.0, 90.0, 60.0], "r2": []}  # seconds of the epochs so far
    monkeypatch.setattr(reproduce.Job, "epoch_seconds", lambda job: done.get(job.name, []))
    record = {"epochs": [{"seconds": 30.0}] * 10}  # half as long as here
    monkeypatch.setattr(reproduce, "read_records", lambda folder: {"cpu": {"r1": [record], "r2": [record]}})
    jobs = [reproduce.Job(name, 0, tmp_path, tmp_path / name) for name in ("r1", "r2", "r4")]
    assert reproduce.time_left(jobs[0], 5, []) == "5.0 min left"
    assert reproduce.time_left(jobs[0], 5, jobs[1:2]) == "5.0 min left, 15.0 min with the other rows"
    assert reproduce.time_left(jobs[0], 5, jobs[1:2], at_once=2) == "5.0 min left, 7.5 min with the other rows"
    done["r2"] = [60.0] * 4  # it runs at the same time
    assert reproduce.time_left(jobs[0], 5, jobs[1:2], at_once=2) == "5.0 min left, 5.5 min with the other rows"
    assert reproduce.time_left(jobs[0], 5, jobs[2:]).endswith(" with the other rows except r4")
    done["r2"] = []
    machines = {"cpu": {"r1": [record], "r2": [record]}, "mine": {"r1": [{"epochs": [{"seconds": 60.0}] * 10}]}}
    monkeypatch.setattr(reproduce, "read_records", lambda folder: machines)  # r2's time is known from "cpu" alone
    assert reproduce.time_left(jobs[0], 5, jobs[1:2]) == "5.0 min left, 15.0 min with the other rows"


@pytest.mark.long
def test_a_run_that_fails_ends_no_other(script, tmp_path, folders):
    other = write_images(tmp_path / "other", classes=("cat", "dog"), train=4, test=2)
    run = tmp_path / "checkpoints/reproduce"
    script(R1, "--data", other, "--epochs", 1, "--seed", 1, "--checkpoints", run)
    flags = ["--only", "r1", "--seeds", 3, "--data", folders, "--jobs", 2, "--results", "mine"]
    done = script("reproduce.py", *flags, status=2)
    assert "reproduce.py: error: r1, seed 1 failed: exit status 2; its own error says why\n" in done.stderr
    assert "cifar10_r1.py: error: " in done.stderr and "was trained on other data" in done.stderr
    assert accuracies(tmp_path / "mine").keys() == {"r1-seed0", "r1-seed2"}
    assert re.findall(r", (\d) to go", done.stdout)[-1] == "0"
    assert script(
        "reproduce.py", "--only", "r1", "--seed", 2, "--data", folders, "--results", "mine"
    ).stdout.startswith("[1/1] r1, seed 2, finished")


@pytest.mark.long
def test_jobs_have_bars_on_a_terminal(tmp_path, folders):
    """Until its first epoch, such as during a download, a job's bar shows the last line that it has printed."""
    flags = ["--only", "r1", "--seeds", 2, "--jobs", 2, "--data", folders, "--results", "mine"]
    printed = run_on_a_terminal(tmp_path, "reproduce.py", *flags)
    for seed in (0, 1):
        assert re.search(rf"r1, seed {seed}: 0it \[[^]]*, 90 training and 30 test images", printed)
        assert re.search(rf"r1, seed {seed}: .*26/26 \[[^]]*, test accuracy:\d", printed)
        assert printed.count(f"r1, seed {seed}: 0it") == 3  # empty and with two lines: one bar for all epochs
    assert re.findall(r"r1, seed \d: \d+\.\d %, (\d) to go", printed) == ["1", "0"]


def test_a_task_waits_for_the_one_before_it(tmp_path):
    def command(name, seconds, status=0):
        return [
            sys.executable,
            "-c",
            f"import time; time.sleep({seconds}); print({name!r}); raise SystemExit({status})",
        ]

    lines = []
    tasks = [
        Task("a", command("a", 0.5)),
        Task("b", command("b", 0), after="a"),
        Task("c", command("c", 0)),
        Task("d", command("d", 0, 3)),
        Task("e", command("e", 0), after="d"),
        Task("f", command("f", 0), after="nobody"),
        Task("k", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]),
    ]
    ended = {}  # the error of each task, or None

    def finish(task, error):
        ended[task.name] = error

    run_side_by_side(tasks, 3, lambda number: {}, lambda task, number, line: lines.append((task.name, line)), finish)
    assert sorted(lines) == [(name, name) for name in "abcdf"]
    errors = {"d": "exit status 3; its own error says why", "e": "waited for d"}
    killed = {"k": "killed by SIGKILL, as when memory runs out; use fewer --jobs"}
    assert ended == dict.fromkeys("abcf") | errors | killed and [*ended].index("a") < [*ended].index("b")
    ended.clear()
    chain = [*tasks[3:5], Task("g", command("g", 0), after="e")]
    run_side_by_side(chain, 1, lambda number: {}, lambda *line: None, finish)
    assert ended == errors | {"g": "waited for e"}


def test_the_95_percent_quantile_of_students_t():
    """It agrees with the tables of a textbook."""
    for degrees, value in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (19, 2.093), (199, 1.972)):
        assert t_quantile(degrees) == pytest.approx(value, abs=4e-3)
    quantiles = [t_quantile(degrees / 10) for degrees in range(10, 100)]
    assert quantiles == sorted(quantiles, reverse=True)


def test_the_interval_of_a_mean_and_of_a_difference():
    one, other = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0]
    half = 2.5706 * np.std(one, ddof=1) / 6**0.5  # of 5 degrees of freedom
    assert interval(one) == (pytest.approx(21 - half, abs=0.01), pytest.approx(21 + half, abs=0.01))
    found = difference(one, other)
    assert found.mean == pytest.approx(2.5) and found.low < 0 < found.high
    errors = [np.var(values, ddof=1) / len(values) for values in (one, other)]
    welch = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(welch.low), pytest.approx(welch.high))
    assert found.high - found.mean == pytest.approx(2.361 * sum(errors) ** 0.5, abs=0.01)  # 7.05 degrees of freedom
    found = difference([93.3, 93.4], [94.0, 94.2])
    assert found.low == pytest.approx(0.75 - 6.19 * 0.0125**0.5, abs=0.01)  # 1.47 degrees of freedom
    with warnings.catch_warnings(action="error"):  # SciPy's own test warns of a variance of 0
        found = difference([93.1, 93.1], [93.2, 93.4])
    assert found.high == pytest.approx(0.2 + 12.706 * 0.1, abs=0.001)
    assert difference([1, 1], [2, 2]).low == 1 and difference([1, 1], [1, 1]).seeds == np.inf
    assert difference([69.62, 68.48], [69.55, 68.55]).seeds == np.inf  # the means are equal but for rounding


@pytest.mark.parametrize("mean", [0.4, 0.15])
def test_the_seeds_that_a_difference_needs(mean):
    """With as many seeds of these standard deviations, four of five experiments find the difference."""
    needed = difference([-0.4 / 2**0.5, 0.4 / 2**0.5], [mean - 0.5 / 2**0.5, mean + 0.5 / 2**0.5]).seeds
    rng, experiments = np.random.default_rng(0), 400
    groups = zip(rng.normal(0, 0.4, (experiments, needed)), rng.normal(mean, 0.5, (experiments, needed)), strict=True)
    found = sum(difference(one.tolist(), other.tolist()).low > 0 for one, other in groups)
    assert 0.73 < found / experiments < 0.87  # 3.5 standard errors around 0.8


def test_compare(script, refused, tmp_path):
    record = json.loads((RESULTS / "cpu/r1-seed0.json").read_text())
    for folder, name, values in (("old", "r1", (60, 61, 62)), ("new", "r1", (70, 71, 72)), ("new", "r2", (70, 71, 73))):
        (tmp_path / folder).mkdir(exist_ok=True)
        for seed, accuracy in enumerate(values):
            (tmp_path / folder / f"{name}-seed{seed}.json").write_text(json.dumps(record | {"accuracy": accuracy}))
    out = script("reproduce.py", "--compare", "old", "new").stdout
    assert re.fullmatch(r"r1: 61\.0 ± 1\.0 .*, 71\.0 ± 1\.0 .*; \+10\.00 \[\+7\.7.*\]: the second is better\n", out)
    assert "the second is worse" in script("reproduce.py", "--compare", "new", "old").stdout
    out = script("reproduce.py", "--compare", "r1", "r2", "--results", "new").stdout
    assert "not distinguishable from the first with this many seeds; about " in out
    (tmp_path / "new/r2-seed1.json").unlink()
    (tmp_path / "new/r2-seed2.json").unlink()
    assert "3 and 1 records in new; a comparison needs two" in refused(
        "reproduce.py", "--compare", "r1", "r2", "--results", "new"
    )
    for seed, constants in enumerate(({"A": 1}, {"A": 2})):
        other = {"recipe": record["recipe"] | {"constants": constants}}
        (tmp_path / f"old/r2-seed{seed}.json").write_text(json.dumps(record | other))
        (tmp_path / f"new/r2-seed{seed}.json").write_text(json.dumps(record))
    worse, no_mean = script("reproduce.py", "--compare", "new", "old").stdout.splitlines()
    assert worse.endswith("the second is worse") and "have no common mean: one has A 2, this one has 1" in no_mean
    assert no_mean.endswith("(seeds 0 and 0); move one kind into another folder")  # all are copies of seed 0's record
    for seed in (0, 1):
        for folder, data, fingerprint in (("old", "CIFAR-10", "one order"), ("new", "class folders", "another")):
            other = {"recipe": record["recipe"] | {"data": fingerprint}, "data": data}
            (tmp_path / f"{folder}/r2-seed{seed}.json").write_text(json.dumps(record | other))
    assert "\nr2: " in script("reproduce.py", "--compare", "new", "old").stdout
    for seed in (0, 1):
        (tmp_path / f"old/r2-seed{seed}.json").write_text(json.dumps(record | {"data": "synthetic"}))
    *_, synthetic = script("reproduce.py", "--compare", "new", "old").stdout.splitlines()
    assert synthetic == "r2: only one has records of the synthetic images; compare the same images"
    for seed in (0, 1):
        for folder in ("old", "new"):
            (tmp_path / f"{folder}/r2-seed{seed}.json").unlink()
    assert "neither two of --only's rows nor two folders" in refused("reproduce.py", "--compare", "r1", "nothing")
    (tmp_path / "old").rename(tmp_path / "own-synthetic")
    flags = ["--results", "own", "--data", "synthetic"]
    assert "r1 -> r2: 3 and 0 records" in refused("reproduce.py", "--compare", "r1", "r2", *flags)


def test_a_row_that_fails_says_which(script, tmp_path):
    stderr = script(
        "reproduce.py", "--only", "r1", "--data", tmp_path / "none.tar", "--device", "cuda:99", status=2
    ).stderr
    assert (
        "--device cuda:99: this machine" in stderr
        and "r1, seed 0 failed: exit status 2; its own error says why" in stderr
    )


def test_a_row_without_a_mean_does_not_hide_the_others():
    record = json.loads((RESULTS / "cpu/r1-seed0.json").read_text())
    other = record | {"recipe": record["recipe"] | {"data": "other"}}
    table = accuracy_table({"r1": 60, "r2": 75}, {"mine": {"r1": [record, other], "r2": [record]}}).splitlines()
    assert [line.split()[-1] for line in table[1:3]] == ["mean", f"{record['accuracy']:.1f}"]
    line = "the records of cifar10_r1 and its other seeds have no common mean: one has --data other, this one has 820"
    assert table[3].startswith(line)


def test_the_summary_of_several_seeds():
    recipe = {"data": "a", "constants": {"LR": 0.1, "EPOCHS": {"plain": 2}}, "augmentation": {"flip": True}}
    run = {"run": "cifar10_r1", "epochs": [1, 2]}
    records = [
        run | {"accuracy": 67.0 + seed, "recipe": recipe | {"seed": seed, "epochs": epochs}}
        for seed, epochs in enumerate((1, 2, 2))  # the first run was extended
    ]
    assert summary(records) == "68.0 ± 1.0 (n = 3) [65.52, 70.48]"
    assert summary(records[:1]) == "67.0" and summary([]) == ""
    of_another_row = recipe | {"constants": {"LR": 0.1, "EPOCHS": {"plain": 2, "flip": 9}}}
    assert "n = 4" in summary([*records, records[0] | {"recipe": of_another_row}])
    of_a_later_script = recipe | {"constants": {"LR": 0.1, "OF_ANOTHER_ROW": 12, "OF_ROWS": {"r4": 1}}}
    assert "n = 4" in summary([*records, records[0] | {"recipe": of_a_later_script}])
    for other, words in (
        ({"recipe": recipe | {"constants": {"LR": 0.2}}}, "LR 0.2, this one has 0.1"),
        (
            {"recipe": {"data": "a", "augmentation": {"flip": True}}},
            "LR None, this one has 0.1",
        ),  # an early record, of an unknown recipe
        ({"recipe": recipe | {"data": "b"}}, "--data b, this one has a"),
        ({"recipe": recipe | {"augmentation": {"flip": False}}}, "augmentation flip False, this one has True"),
        ({"epochs": [1, 2, 3]}, "--epochs 3, this one has 2"),
    ):
        with pytest.raises(UserError, match=f"cifar10_r1 and its other seeds have no common mean: one has {words}"):
            summary([*records, records[0] | other])


@pytest.mark.parametrize("name, row", reproduce.ROWS.items(), ids=reproduce.ROWS)
def test_each_record_is_of_its_row(name, row):
    for rows in read_records().values():
        for record in rows.get(name, []):
            command = re.sub(" --(resume|seed \\d+|device \\S+)", "", record["command"])
            assert sorted(command.split()) == sorted(["python", *row.command.removesuffix(" --resume").split()])
            seed = record["recipe"].get("seed", 0)  # before the seed was in a run's name, its key was "--seed"
            assert record["run"] == row.run + reproduce.run_suffix(seed, False, "") and record["data"] != "synthetic"


def test_the_pictures_are_of_the_records(monkeypatch):
    drawn = {}
    monkeypatch.setattr(pages, "filled_pages", lambda rows, machines: {})
    monkeypatch.setattr(pages, "read_records", lambda: {"cpu": read_records()["cpu"]})
    for name in ("curves", "costs", "seeds", "confusion"):
        monkeypatch.setattr(drawing, name, lambda *arguments, name=name: drawn.setdefault(name, arguments))
    pages.write_pages(reproduce.ROWS)
    rows = read_records()["cpu"]
    logs, operations, path = drawn["costs"]
    assert path == RESULTS / "cpu/costs.png" and "r4-long" not in logs
    parts = [rows["r2-crop"][0], rows["r3"][0]]  # r3 continues r2 --crop
    assert logs["r3"] == parts[0]["epochs"] + parts[1]["epochs"]
    assert operations["r3"] == sum(part["petaflop"] for part in parts)
    assert logs["r4"] == rows["r4"][0]["epochs"] == drawn["curves"][0]["r4"]
    assert drawn["seeds"][0] == {name: [record["accuracy"] for record in records] for name, records in rows.items()}
    confusion, classes, best, _ = drawn["confusion"]
    assert best == max(rows, key=lambda name: rows[name][0]["accuracy"]) and classes == CIFAR10_CLASSES
    assert confusion.trace() / 100 == pytest.approx(rows[best][0]["accuracy"])


def test_a_folder_without_records_has_no_pictures(monkeypatch):
    monkeypatch.setattr(pages, "read_records", lambda: {"new": {}})
    monkeypatch.setattr(pages, "filled_pages", lambda rows, machines: {})
    pages.write_pages(reproduce.ROWS)
    assert not (ROOT / "results/new").exists()


def test_readme_and_docs_say_what_the_records_say():
    """If they differ, `python reproduce.py --readme` rewrites them."""
    assert all(path.read_text() == text for path, text in pages.filled_pages(reproduce.ROWS, read_records()).items())
    text = (ROOT / "README.md").read_text()
    with pytest.raises(UserError, match="there is no place for the table 'results'"):
        pages.fill(text.replace("<!-- end of results -->", ""), {"results": ""})
    changed = text.replace("| `python cifar10_r1.py` | 60 |", "| `python cifar10_r1.py` | 61 |")
    table = {"results": results_table(reproduce.ROWS, read_records())}
    assert changed != text and pages.fill(changed, table) == text
    paths = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "checkpoints/README.md"))
    for page in (*paths, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"

"""reproduce.py: the rows of the README's table, and the table itself."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from helpers import R1, ROOT, output, write_images

import plot
import reproduce


def wait_for_epochs(process, folder, count):
    while process.is_alive():
        if (folder / "log.csv").exists() and len(plot.read_log(folder)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the process ended before it was interrupted")


def figures(record):
    """What does not depend on when and how fast it was run."""
    epochs = [{key: value for key, value in row.items() if key != "seconds"} for row in record["epochs"]]
    return epochs, record["accuracy"], record["confusion"], record["recipe"]


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
    assert out.startswith("[1/2] r1-flip, seed 0, finished: python cifar10_r1.py --flip\n[2/2] r1-flip, seed 1, ")
    assert re.search(r"resuming .* after epoch \d+", out) and re.search(r"epoch:25/26 .*; \d+ s left", out)

    records = [json.loads((tmp_path / f"mine/r1-flip-seed{seed}.json").read_text()) for seed in (0, 1)]
    by_hand = json.loads((tmp_path / "checkpoints/cifar10_r1-flip-seed1/run.json").read_text())
    assert figures(records[1]) == figures(by_hand) != figures(records[0])
    assert [record["recipe"]["seed"] for record in records] == [0, 1]
    assert str(tmp_path) not in json.dumps(records)
    header, row = (re.split(r" {2,}", line) for line in out.splitlines()[-2:])
    assert header[:2] == ["row", "to reach"] and header[-1] == "mine"
    assert row[:2] == ["r1-flip", "67"] and row[-1] == reproduce.summary(records) and "(n = 2)" in row[-1]


def test_r3_comes_after_r2(script):
    out = script("reproduce.py", "--list", "--only", "r3", "r1").stdout.splitlines()
    assert [line.split(": ")[1] for line in out[:3]] == [
        "python cifar10_r2.py --crop", "python cifar10_r3.py --resume", "python cifar10_r1.py",
    ]  # fmt: skip


def test_synthetic_records_are_kept_apart(start, script, tmp_path):
    process = start("reproduce.py", "--only", "r1", "--data", "synthetic", "--results", tmp_path / "mine")
    wait_for_epochs(process, tmp_path / "checkpoints/reproduce/cifar10_r1-synthetic", 1)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert not (tmp_path / "mine").exists()

    flags = ["--list", "--only", "r1", "--results", tmp_path / "mine", "--data"]
    (tmp_path / "mine").mkdir()
    shutil.copy(reproduce.RESULTS / "cpu/r1-seed0.json", tmp_path / "mine")
    assert " epochs done: " in script("reproduce.py", *flags, "synthetic").stdout
    assert ", finished: " in script("reproduce.py", *flags, "not-downloaded-yet").stdout


def test_a_record_of_other_data_is_no_record_of_this(refused, tmp_path, folders):
    (tmp_path / "mine").mkdir()
    shutil.copy(reproduce.RESULTS / "cpu/r1-seed0.json", tmp_path / "mine")
    for flags in ([], ["--list"]):
        line = refused("reproduce.py", "--only", "r1", "--results", "mine", "--data", folders, *flags)
        assert "mine/r1-seed0.json is of other data than --data" in line


def test_a_record_that_is_none_is_named_and_passed_over(script, tmp_path):
    whole = (reproduce.RESULTS / "cpu/r1-seed0.json").read_text()
    foreign = json.dumps(json.loads(whole) | {"epochs": "all"})
    (tmp_path / "mine").mkdir()
    for content in ("", "{}", "[]", whole[:500], f"<<<<<<< HEAD\n{whole}", foreign):
        (tmp_path / "mine/r1-seed0.json").write_text(content)
        out = script("reproduce.py", "--list", "--only", "r1", "--results", "mine").stdout
        assert out.count("mine/r1-seed0.json is no record of a run; passed over\n") == 1
        assert "[1/1] r1, seed 0, not begun: " in out
    (tmp_path / "mine/r1-seed0.json").write_text(whole)
    assert "passed over" not in script("reproduce.py", "--list", "--only", "r1", "--results", "mine").stdout


def test_a_damaged_log_is_written_anew(start, script, tmp_path, folders):
    flags = ["--only", "r1", "--data", folders, "--results", "mine"]
    log = tmp_path / "checkpoints/reproduce/cifar10_r1/log.csv"
    process = start("reproduce.py", *flags)
    wait_for_epochs(process, log.parent, 1)
    process.terminate()
    process.join(60)
    log.write_text(f"epoch,lr\n{'9' * 200_000}\n")
    assert "[1/1] r1, seed 0, not begun: " in script("reproduce.py", *flags).stdout
    assert len(plot.read_log(log.parent)) == 26


def test_a_folder_for_records_that_cannot_be_written(refused, script, tmp_path, folders):
    (tmp_path / "file").touch()
    for results in ("file", "file/below"):
        line = refused("reproduce.py", "--only", "r1", "--data", folders, "--results", results)
        assert f"--results {results} cannot be written: " in line
    assert not (tmp_path / "checkpoints").exists()
    script("reproduce.py", "--list", "--only", "r1", "--results", ".")


def test_a_row_that_fails_says_which(script, tmp_path):
    stderr = script(
        "reproduce.py", "--only", "r1", "--data", tmp_path / "none.tar", "--device", "cuda:99", status=2
    ).stderr
    assert "--device cuda:99: this machine" in stderr and "r1, seed 0 ended with exit status 2" in stderr


def test_the_summary_of_several_seeds():
    records = [{"accuracy": 67.0}, {"accuracy": 68.0}, {"accuracy": 69.0}]
    assert reproduce.summary(records) == "68.0 ± 1.0 (n = 3)"
    assert reproduce.summary(records[:1]) == "67.0" and reproduce.summary([]) == ""


@pytest.mark.parametrize("name, row", reproduce.ROWS.items(), ids=reproduce.ROWS)
def test_each_record_is_of_its_row(name, row):
    for rows in reproduce.read_records().values():
        for record in rows.get(name, []):
            command = re.sub(" --(resume|seed \\d+|device \\w+)", "", record["command"])
            assert sorted(command.split()) == sorted(["python", *row.command.removesuffix(" --resume").split()])
            seed = record["recipe"].get("seed", 0)  # before the seed was in a run's name, its key was "--seed"
            assert record["run"] == row.run + reproduce.run_suffix(seed, False, "") and record["data"] != "synthetic"


def test_readme_says_what_the_records_say():
    """`python reproduce.py --readme` writes what differs."""
    text = (ROOT / "README.md").read_text()
    assert reproduce.readme(text, reproduce.read_records()) == text
    changed = text.replace("| `python cifar10_r1.py` | 60 |", "| `python cifar10_r1.py` | 61 |")
    assert changed != text and reproduce.readme(changed, reproduce.read_records()) == text
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (ROOT / path).is_file(), path

"""Every command of README and docs that a single machine can run, as it is except for the data and the epochs."""

import re

import pytest
from helpers import CIFAR10_CLASSES, ROOT, SCRIPTS, write_images
from PIL import Image

pytestmark = pytest.mark.long

README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])
ELSEWHERE = (  # other tests run these, or they need the network or days
    "python -m pytest", "python download.py", "python reproduce.py", "python -m benchmarks.", "python tests/",
    "python plot.py results/",
    "python predict.py --export",
)  # fmt: skip


def commands():
    """Return each `python SCRIPT ...` of the pages once, in order, without its number of epochs."""
    found = re.findall(r"(?:`|^    (?:.*&& )?)(python [^`\n]*)", PAGES, re.MULTILINE)
    found = dict.fromkeys(re.sub(r" --epochs \d+", "", command) for command in found)
    return [command for command in found if not command.startswith(ELSEWHERE)]


def test_each_command_runs(script, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "pictures")
    Image.new("RGB", (300, 200), (30, 40, 50)).save(tmp_path / "cat.jpg")
    (tmp_path / "holiday").mkdir()
    Image.new("RGB", (60, 80), (160, 170, 150)).save(tmp_path / "holiday/frog.png")
    assert len(commands()) >= 20
    for command in commands():
        name, *flags = command.removeprefix("python ").split()
        if "predict" not in name and "synthetic" not in flags:
            flags += ["--data", "pictures"]
        if name in SCRIPTS:
            flags += ["--epochs", 3 if "r3" in name else 2]
        done = script(name, *flags)
        assert done.stdout and not done.stderr, command
    assert (tmp_path / "histograms.png").exists() and (tmp_path / "comparison.png").exists()

    (snippet,) = re.findall(r"(?:^    .*\n)*^    from predict import .*\n(?:^    .*\n)*", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in snippet.splitlines()), {})
    answer = re.fullmatch(r"(\w+) \(right on \d+\.\d % of the test images\)\n", capsys.readouterr().out)
    assert answer[1] in CIFAR10_CLASSES

"""The benchmark as a user runs it; what it measures has no place in a test."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.long


def test_every_candidate_is_measured():
    command = [sys.executable, str(ROOT / "benchmarks/throughput.py"), "--data", "synthetic", "--device", "cpu"]
    command += ["--only", "r1-batch4", "start", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\S.*?) +(\S+) +([\d.]+)(?: s)? +(\d+) +0$", done.stdout, re.MULTILINE)
    candidates = ["baseline", "ours", "ours-fp32", "limit"]
    expected = [(title, name) for title in ("r1-batch4", "r1-batch4 evaluation") for name in candidates]
    assert [line[:2] for line in lines] == [*expected, ("start of r2", "ours")]
    assert all(float(rate) > 0 and int(memory) > 0 for *_, rate, memory in lines)
    rates = {line[:2]: float(line[2]) for line in lines}
    ratios = dict(re.findall(r"^ratio (.*) (\d+\.\d\d)$", done.stdout, re.MULTILINE))
    assert len(ratios) == 5 and "r1-batch4 share" in ratios
    for title in ("r1-batch4", "r1-batch4 evaluation"):
        for other in ("baseline", "limit"):
            ratio = rates[title, "ours"] / rates[title, other]
            assert abs(float(ratios[f"{title.replace(' ', '-')} ours/{other}"]) / ratio - 1) < 0.05

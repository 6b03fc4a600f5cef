"""Losses, bounds, texts and pictures as they were recorded, in a process of its own: fp32, one thread."""
import subprocess
import sys

from config import HERE


def test_golden():
    done = subprocess.run([sys.executable, "-m", "experiments.golden"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

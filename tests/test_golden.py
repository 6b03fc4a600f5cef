"""Losses, bounds, texts and pictures as recorded, in a process of its own: fp32, one thread."""
import subprocess
import sys

from config import HERE


def test_golden():
    command = [sys.executable, "-m", "experiments.golden"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases are as recorded" in done.stdout

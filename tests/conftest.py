"""The tests are about the CPU, where results are exact: hide a GPU before torch is imported. And one way to run a script."""
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parent.parent


def run(*args, code=0, **env):
    """A script as it is typed, in the repository's folder; it must end with `code`. -> what it printed"""
    r = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **env}, timeout=300)
    assert r.returncode == code, r.stderr
    return r

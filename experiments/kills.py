"""Does a run survive kill -9 at any moment? A tiny run is killed at random moments and resumed.
After each kill ckpt.pt must load, and its weights, averages and optimizers must be, to the bit,
those of a run that nobody killed. A quarter of an hour on two CPU cores.

    python -m experiments.kills 100 12          # 100 kills, each after 0 to 12 seconds
"""
import contextlib
import hashlib
import io
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import train
from checkpoint import RunFolder
from config import HERE, check, run

EVERY = 20          # steps between two saves
SIZE = ("--dataset=pydoc --n_layer=1 --n_head=1 --n_embd=32 --block_size=16 --batch_size=4 "
        f"--eval_interval={EVERY} --compile=False --max_iters=1000000").split()


def digest(x):
    """sha256 of all tensors and numbers in dicts and lists, without what a clock has measured."""
    sha256 = hashlib.sha256()
    if isinstance(x, torch.Tensor):
        sha256.update(x.cpu().contiguous().view(-1).numpy().tobytes())
    elif isinstance(x, dict):
        for key in sorted(x.keys() - {"progress"}, key=str):
            sha256.update(f"{key} {digest(x[key])}".encode())
    elif isinstance(x, list):
        sha256.update(" ".join(map(digest, x)).encode())
    else:
        sha256.update(repr(x).encode())
    return sha256.hexdigest()


class Recorder(RunFolder):
    """A run's folder that writes no checkpoint and keeps the digest of each: {step: digest}."""
    digests = {}
    last_step = 0

    def save(self, name, state):
        if name == "ckpt.pt":
            self.digests[state["step"]] = digest({**self.meta, **state})
            if state["step"] >= self.last_step:
                raise KeyboardInterrupt


def kill_and_resume(out, moments):
    """Start or resume a run, kill it after each of moments, in seconds. -> the checkpoints that
    were found: [(step, digest)]"""
    found = []
    for seconds in tqdm(moments):
        command = [sys.executable, "train.py", f"--out={out}", *SIZE]
        if (out / "ckpt.pt").exists():
            command = [sys.executable, "train.py", f"--out={out}", "--resume"]
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
        while not (out / "ckpt.pt").exists():          # the first must come as far as a save
            time.sleep(0.01)
        time.sleep(seconds)
        check(process.poll() is None, "a run ended by itself")
        process.kill()
        process.wait()
        state = torch.load(out / "ckpt.pt", weights_only=True)
        found.append((state["step"], digest(state)))
    return found


def main(argv):
    check(len(argv) == 2 and all(arg.isdecimal() for arg in argv), __doc__)
    n, most = map(int, argv)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        moments = [random.uniform(0, most) for _ in range(n)]
        found = kill_and_resume(Path(folder) / "killed", moments)
        with (mock.patch.object(train, "RunFolder", Recorder),
              mock.patch.object(Recorder, "last_step", found[-1][0]),
              contextlib.redirect_stdout(io.StringIO()),
              contextlib.suppress(KeyboardInterrupt)):
            train.main([*SIZE, f"--out={folder}/straight"])
    steps = [step for step, _ in found]
    same = sum(Recorder.digests[step] == found_digest for step, found_digest in found)
    print(f"{len(found)} kills, {len(set(steps))} different steps up to {steps[-1]}: "
          f"{same} checkpoints as of a run that was not killed")
    check(same == len(found) and steps == sorted(steps), "they differ")


if __name__ == "__main__":
    run(main)

"""Measure checkpoints: the bound with both its errors, differences from the first, the exact
left-to-right likelihood, and what samples are worth. Prints Markdown, below the command, commit and
machine; progress goes to stderr.    settings: likelihood.Evaluate

    python -m evaluation                                 # every checkpoint under out/ and results/
    python -m evaluation --out=out/masked,results/masked.pt --n=0     # these, and no samples
    python -m evaluation --report                        # also out/report.html, for any browser
    python -m evaluation --json=out/table.json           # also the tables as JSON
    python -m evaluation --quick                         # first trains tiny versions of all
    python -m evaluation --bound=False --steps=16 --order=confidence
    python -m evaluation --out=out/mnist --guidance=1    # digits, beside real ones, noise and blur

likelihood.py opens checkpoints and has the bound, samples.py writes and scores texts, digits.py
images; report.py has tables and the page.
"""
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from checkpoint import is_finished
from config import HERE, check, parse, run
from evaluation.digits import digit_tables
from evaluation.likelihood import Evaluate, corpus, grouped, likelihood_tables, open_checkpoint
from evaluation.report import gather, page, replay, stamp
from evaluation.samples import eval_model, sample_tables, sampler_settings

PAGE = HERE / "out/report.html"
QUICK = HERE / "out/quick"
QUICK_SETTINGS = ("--block_size=64 --n_layer=2 --n_head=2 --n_embd=64 --max_iters=600 "
                  "--eval_interval=200 --compile=False").split()
QUICK_RUNS = {
    "ar": ["train.py", "--dataset=pydoc", "--objective=ar"],
    "masked": ["train.py", "--dataset=pydoc"],
    "bits": ["analog_bits.py", "--dataset=pydoc"],
    "embed": ["embed_diffusion.py", "--dataset=pydoc"],
    "mnist": ["mnist_ddpm.py", "--dataset=digits"],
}


def train_quick_runs(s):
    """Train tiny versions of all in out/quick, where they are not finished, on data that need no
    network. -> s for them"""
    for name, command in QUICK_RUNS.items():
        out = QUICK / name
        typed = [*command, *QUICK_SETTINGS]
        if (out / "ckpt.pt").exists():
            typed = [*command, "--resume"]
        if not is_finished(out):
            subprocess.run([sys.executable, *typed, f"--out={out}"], cwd=HERE, stdout=sys.stderr)
        check(is_finished(out), f"{command[0]} has not finished: the same command goes on")
    runs = [os.path.relpath(QUICK / name) for name in QUICK_RUNS]
    return replace(s, out=",".join(runs), eval_model=runs[0], digits=0, n=min(s.n, 50))


def all_checkpoints():
    """Runs under out/ and checkpoints in results/."""
    runs = {path.parent for path in HERE.glob("out/**/*.pt") if path.stem in ("best", "ckpt")}
    others = {path for path in HERE.glob("results/*.pt") if "readers-" not in path.name}
    return [os.path.relpath(path) for path in [*sorted(runs), *sorted(others)]]


def typed_paths(out):
    """The paths in --out, with commas between them. One that has commas is there as it is."""
    if os.path.exists(out):
        return [out]
    return [os.path.expanduser(path) for path in out.split(",") if path]


def usable(paths, s):
    """The checkpoints among paths that can be opened and whose data are to be had. What cannot is
    named on stderr, a line each; SystemExit if nothing is left."""
    found = []
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            corpus(checkpoint, s)
            found.append(checkpoint)
        except (SystemExit, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
    check(found, "no checkpoint to measure: train first, or pass --out=FOLDER")
    return found


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    files = {}
    if s.report or s.quick:
        files[PAGE] = page
    if s.json:
        files[Path(s.json)] = json.dumps
    for path in files:             # what cannot be written ends here
        path.parent.mkdir(parents=True, exist_ok=True)

    # standard output has the tables alone; training and loading print to stderr
    with contextlib.redirect_stdout(sys.stderr):
        if s.quick:
            s = train_quick_runs(s)
        checkpoints = usable(typed_paths(s.out) or all_checkpoints(), s)
        samplers = [sampler_settings(checkpoint, s) for checkpoint in checkpoints]
        has_text = any(checkpoint.meta["alphabet"] for checkpoint in checkpoints)
        scorer = eval_model(s) if s.n and has_text else None

    print(stamp())
    tables = []
    for data, group in grouped(checkpoints, s):
        if s.bound:
            tables += likelihood_tables(group, data, s)
        if scorer and data.meta["alphabet"]:
            tables += sample_tables(group, data, s, scorer)
        if s.digits and not data.meta["alphabet"]:
            tables += digit_tables(group, data, s)
    if not files:
        return
    replays = [replay(checkpoint, corpus(checkpoint, s), how)
               for checkpoint, how in zip(checkpoints, samplers, strict=True)]
    data = gather(tables, [checkpoint.path for checkpoint in checkpoints], replays)
    for path, write in files.items():
        path.write_text(write(data), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run(main)

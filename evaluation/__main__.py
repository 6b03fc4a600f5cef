"""Measure checkpoints: the bound with both its errors, differences from the first, the exact
left-to-right likelihood, and what samples are worth. Prints Markdown, below the command, commit and
machine; progress goes to stderr.    settings: likelihood.Evaluate

    python -m evaluation                                 # every checkpoint under out/ and results/
    python -m evaluation --out=out/masked,results/masked.pt --n=0     # these, and no samples
    python -m evaluation --report                        # also out/report.html, for any browser
    python -m evaluation --json=out/table.json --frontier       # as JSON; at four temperatures
    python -m evaluation --quick                         # first trains tiny versions of all
    python -m evaluation --bound=False --steps=16 --order=confidence
    python -m evaluation --out=out/mnist --guidance=1    # digits, beside real ones, noise and blur

likelihood.py opens checkpoints and has the bound, samples.py writes and scores texts, digits.py
images; metrics.py has the scores, report.py tables and the page.
"""
import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import analog_bits
import embed_diffusion
import mnist_ddpm
import train
from checkpoint import is_finished
from config import HERE, check, parse, run
from evaluation import report
from evaluation.diagnostics import cross_entropy_tables
from evaluation.digits import digit_tables, images_of
from evaluation.likelihood import Evaluate, corpus, likelihood_tables, open_checkpoint
from evaluation.samples import eval_model, sample_tables, sampler_settings

QUICK = ("--block_size=64 --n_layer=2 --n_head=2 --n_embd=64 --max_iters=600 --eval_interval=200 "
         "--compile=False").split()
QUICK_RUNS = {   # name: script, and what more to type
    "ar": (train, ["--dataset=pydoc", "--objective=ar"]),
    "masked": (train, ["--dataset=pydoc"]),
    "bits": (analog_bits, ["--dataset=pydoc"]),
    "embed": (embed_diffusion, ["--dataset=pydoc"]),
    "mnist": (mnist_ddpm, ["--dataset=digits"]),
}


def train_quick_runs(s):
    """Train tiny versions of all in out/quick, where they are not finished, on data that need no
    network. -> s for them; SystemExit if one was stopped, by Ctrl-C"""
    folder = HERE / "out/quick"
    for name, (script, typed) in QUICK_RUNS.items():
        out = folder / name
        if is_finished(out):
            continue
        if (out / "ckpt.pt").exists():
            script.main(["--resume", *typed[1:], f"--out={out}"])
        else:
            script.main([*typed, *QUICK, f"--out={out}"])
        check(is_finished(out), "stopped: the same command goes on")
    out = ",".join(os.path.relpath(folder / name) for name in QUICK_RUNS)
    ar = os.path.relpath(folder / "ar")
    return replace(s, out=out, eval_model=ar, digits=0, n=min(s.n, 50))


def all_checkpoints():
    """Paths of all checkpoints under out/ and results/; of a run that has none yet, where it will
    be."""
    runs = set()
    for name in ("best.pt", "ckpt.pt"):
        runs |= {path.with_name("best.pt") for path in HERE.glob(f"out/**/{name}")}
    others = [path for path in HERE.glob("results/*.pt") if not path.name.startswith("readers-")]
    return [os.path.relpath(path) for path in [*sorted(runs), *sorted(others)]]


def usable(paths, s):
    """The checkpoints among paths that can be opened and whose data are to be had. What cannot is
    named on stderr, a line each; SystemExit if nothing is left."""
    check(paths, "no checkpoint under out/ or results/: train first, or pass --out=FOLDER")
    found = []
    reasons = []
    missing = {}          # data that are not to be had are looked for once: {sha256: why}
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            sha256 = checkpoint.meta["data"].get("sha256")
            check(sha256 not in missing, missing.get(sha256))
            try:
                data_of(checkpoint, s)
            except SystemExit as error:
                missing[sha256] = str(error)
                raise
            found.append(checkpoint)
        except SystemExit as error:
            reason = str(error)
            if str(path) not in reason:
                reason = f"{path}: {reason}"
            reasons.append(reason)
    for reason in reasons:
        print(reason, file=sys.stderr)
    if not found:
        raise SystemExit(1)
    return found


def data_of(checkpoint, s):
    """The Text, or for pixels, which have no alphabet, the Images it was trained on."""
    if checkpoint.meta["alphabet"]:
        return corpus(checkpoint, s)
    return images_of(checkpoint, s)


def replay(checkpoint, s):
    """One text or digit as it is made, for the page."""
    how = sampler_settings(checkpoint, s)
    method = checkpoint.method
    if checkpoint.meta["alphabet"]:
        data = corpus(checkpoint, s)
        made = report.replay_text(method, data.tokenizer, data.T, how)
    else:
        made = report.replay_digit(method, 3, how)
    return {"name": f"{checkpoint.name}: {checkpoint.path}", **made}


def check_writable(path):
    """End before anything is measured, if a file cannot be written. One that is there is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def save_text(path, text):
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def measure(texts, digits, scorer, s):
    """Print all tables; scorer: the evaluation model, or None for no samples of text. -> tables"""
    tables = []
    if s.bound and texts:
        tables += likelihood_tables(texts, s)
        tables += cross_entropy_tables(texts, s)
    if scorer:
        tables += sample_tables(texts, s, scorer)
    if digits:
        tables += digit_tables(digits, s)
    return tables


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    page = HERE / "out/report.html" if s.report or s.quick else None
    if page:
        check_writable(page)
    if s.json:
        check_writable(Path(s.json))

    # standard output has the tables alone; training and loading print to stderr
    with contextlib.redirect_stdout(sys.stderr):
        if s.quick:
            s = train_quick_runs(s)
        checkpoints = usable([path for path in s.out.split(",") if path] or all_checkpoints(), s)
        for checkpoint in checkpoints:
            sampler_settings(checkpoint, s)          # a setting that is wrong ends here
        texts = [checkpoint for checkpoint in checkpoints if checkpoint.meta["alphabet"]]
        digits = [checkpoint for checkpoint in checkpoints if not checkpoint.meta["alphabet"]]
        scorer = None
        if s.n and texts:
            scorer = eval_model(s)
    print(report.stamp())
    tables = measure(texts, digits, scorer, s)
    if not page and not s.json:
        return
    runs = []
    for checkpoint in checkpoints:
        path = Path(checkpoint.path)
        runs.append((checkpoint.path, path / "best.pt" if path.is_dir() else path))
    replays = [replay(checkpoint, s) for checkpoint in checkpoints]
    data = report.gather(report.stamp(), tables, runs, replays)
    if page:
        save_text(page, report.page(data))
    if s.json:
        save_text(Path(s.json), json.dumps(data))


if __name__ == "__main__":
    run(main)

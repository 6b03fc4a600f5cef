"""What does control cost? A checkpoint of embeddings: diffusion beside hybrids with a baseline, in
texts of one window and of eight, and steering by its strength. An hour on one CPU core.

    python -m experiments.control --out=out/embed --ar=out/bits-arms/ar --n=64

A text has what was asked if each of its characters is allowed. The evaluation model is another
autoregressive model than the baseline, --ar, which guides.
"""
import time
from dataclasses import dataclass

import torch

from config import DEVICE, EmbedSampler, Sample, check, parse, run
from embed_diffusion import control, steer_mask, write_controlled
from evaluation.likelihood import Evaluate, corpus, open_checkpoint, spaced_rows
from evaluation.report import Table, stamp
from evaluation.samples import SAMPLE_COLUMNS, eval_model, sample_row
from generate import lay_out, write
from train import reseed

LONG = 8     # windows in a long text
WISHES = ["no:e", "only:abcdefghijklmnopqrstuvwxyz \\n", "at:20=T", "line:30"]
HYBRIDS = {
    **{f"diffusion, {steps} steps": dict(steps=steps) for steps in (50, 128, 400)},
    **{f"diffusion, td {td}, {steps} steps": dict(td=td, steps=steps)
       for steps in (50, 100) for td in (0.2, 0.4)},
    **{f"blocks of {block}, {steps} steps each": dict(mode="blocks", block=block, steps=steps)
       for block, steps in ((8, 8), (16, 16), (32, 32), (64, 64), (32, 50))},
    **{f"guided, {weight} of the baseline, 50 steps": dict(mode="guided", ar_weight=weight)
       for weight in (0.25, 0.5, 0.75)},
}
LONG_TEXTS = {
    "diffusion, 50 steps a window": {},
    **{f"blocks of 32, {steps} steps each": dict(mode="blocks", steps=steps) for steps in (25, 50)},
}


@dataclass(frozen=True)
class ControlSettings(Evaluate):
    ar: str = ""                   # the baseline's checkpoint


def write_texts(checkpoint, tokenizer, how, L):
    """how.n texts of L characters -> x (n, L), network calls, characters a second."""
    method = checkpoint.method
    T = checkpoint.c.block_size
    reseed(how.seed)
    ids, known = lay_out([], L, T, method.mask_id)
    if checkpoint.name == "ar":
        frames = write(method, ids, known, T, how)
        calls_per_frame = 1
    else:
        allowed, ar = control(method, tokenizer, how, L, T)
        frames = write_controlled(method, ids, known, T, how, allowed, ar)
        calls_per_frame = 1 + (how.mode == "guided")
    n_calls = 0
    start_time = time.perf_counter()
    for x, _ in frames:
        n_calls += calls_per_frame
    return x, n_calls, x.numel() / (time.perf_counter() - start_time)


def main(argv):
    s = ControlSettings(**parse(argv, ControlSettings))
    check(s.n and s.out and s.ar, "--out=RUN of embed_diffusion.py, --ar=RUN of train.py "
                                  "--objective=ar, and n > 0 are needed")
    checkpoint = open_checkpoint(s.out)
    baseline = open_checkpoint(s.ar)
    check(checkpoint.name == "embed" and baseline.name == "ar",
          f"{s.out} and {s.ar} are no embeddings and no autoregressive baseline")
    data = corpus(checkpoint, s)
    scorer = eval_model(s)
    T = data.T
    print(stamp())

    # hybrids, in one window and in long texts; calls are of both networks
    long_val = data.val[:len(data.val) // LONG * LONG].reshape(-1, LONG * T)
    n_long = max(2, s.n // 4)
    for title, val, n, rows in [(f"hybrids, {data.name}, windows of {T}", data.val, s.n, HYBRIDS),
                                (f"texts of {LONG * T}", long_val, n_long, LONG_TEXTS)]:
        table = Table(title, SAMPLE_COLUMNS)
        real = spaced_rows(val, n).long()
        n, L = real.shape
        table.add(*sample_row("held out", real, data, scorer))
        for name, row in rows.items():
            how = EmbedSampler(n=n, seed=s.seed, ar=s.ar, **row)
            x, *cost = write_texts(checkpoint, data.tokenizer, how, L)
            table.add(*sample_row(name, x, data, scorer, None, *cost))
        how = Sample(n=n, seed=s.seed, temperature=1.0)
        x, *cost = write_texts(baseline, data.tokenizer, how, L)
        table.add(*sample_row("the baseline", x, data, scorer, None, *cost))

    more = {"strength": 0, "texts that have it": 3, "allowed characters": 3}
    table = Table("steering", SAMPLE_COLUMNS | more)
    for steer in WISHES:
        allowed = steer_mask(steer, data.tokenizer, T).to(DEVICE)      # (T, V)
        for strength in (0.0, 1.0, 2.0, 5.0):
            how = EmbedSampler(n=s.n, seed=s.seed, steer=steer, strength=strength)
            x, *cost = write_texts(checkpoint, data.tokenizer, how, T)
            kept = allowed[torch.arange(T, device=DEVICE), x].double()  # (n, T)
            cells = [(share.mean().item(), share.std().item() / s.n ** 0.5)
                     for share in (kept.prod(1), kept.mean(1))]
            table.add(*sample_row(steer, x, data, scorer, None, *cost), strength, *cells)


if __name__ == "__main__":
    run(main)

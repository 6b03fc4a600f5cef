"""Masked CE of a masked model with the mask rates that others use: python -m experiments.clock --out=results/masked.pt

Total cross-entropy / number of masked characters, which is what most projects call validation loss, depends on how many are masked. evaluate.py
prints it for all shares alike (linear); document 004, whose 2.29 it is set beside, had the cosine schedule, which masks more."""

import torch

from config import Evaluate, parse, run
from diffusion import SCHEDULES
from evaluation.evaluate import corpus, open_checkpoint, stamp
from generate import newest

LEVELS = 8   # of each window, evenly spaced; those of the next lie between them


@torch.no_grad()
def masked_ce(method, val, schedule):
    """Nats per masked character of the windows val (N, T) when a share schedule(t) is masked, t even in (0, 1)."""
    rows = torch.arange(len(val) * LEVELS)
    t = (rows % LEVELS + rows // LEVELS * .6180339887 % 1) / LEVELS
    total, masked = 0., 0.
    for i, u in zip(rows.split(128), schedule(t).double().split(128), strict=True):
        nats, k = method.bound(val[i // LEVELS].long(), u.to(val.device), i.tolist())   # the mean over what is masked, and the share that is
        total, masked = total + (nats.double() * k).sum().item(), masked + k.sum().item()
    return total / masked


def main(argv):
    s = parse(argv, Evaluate())
    k = open_checkpoint(s.out or newest())
    if k.name != "masked":
        raise SystemExit(f"{k.path} is no masked model")
    print(stamp() + "\n\n| schedule | masked CE, nats |\n|---|---:|")
    for name, schedule in SCHEDULES.items():
        print(f"| {name} | {masked_ce(k.method, corpus(k, s).val, schedule):.3f} |", flush=True)


if __name__ == "__main__":
    run(main)

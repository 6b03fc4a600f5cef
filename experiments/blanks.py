"""How often `generate.settle` finds the length of a blank: held-out spans of a known length are cut out, and chosen again beside chance:

    python -m experiments.blanks --out=results/masked.pt --n=100

A span of 1 to 20 characters, all equally likely, stands between the 64 before it and the 32 after it, which are the evidence; where two
lengths are tied the shorter is taken. The last column is the place of the true length among the 20, 1 being the likeliest. ± is the
standard error over windows; chance is exact."""

import torch

from config import Evaluate, at_least, parse, run
from evaluation.evaluate import corpus, open_checkpoint, stamp
from evaluation.metrics import mean
from generate import EVIDENCE, ORDERS, evidence, newest
from train import reseed

BEFORE, LENGTHS = 64, range(1, 21)
HEAD = "| length of the span | found exactly | within 1 | within 2 | mean absolute error | place of the truth |\n|---|---:|---:|---:|---:|---:|"


def scores(off):
    """Errors of a length (...), int64 -> the four measures of each, (..., 4) float64."""
    return torch.stack([off == 0, off <= 1, off <= 2, off], -1).double()


def chance(guesses):
    """The row of someone who takes any of guesses, all equally likely, the truth being any of LENGTHS."""
    off = (torch.tensor(guesses)[:, None] - torch.tensor(LENGTHS)).abs()
    return " | ".join(f"{v:.3f}" for v in scores(off).mean((0, 1)).tolist())


def main(argv):
    s = parse(argv, Evaluate(n=100))
    at_least(s, 2, "n")
    k = open_checkpoint(s.out or newest())
    if k.name != "masked" or k.c.block_size < BEFORE + LENGTHS[-1] + EVIDENCE:
        raise SystemExit(f"{k.path}: a masked checkpoint with a block_size of {BEFORE + LENGTHS[-1] + EVIDENCE} or more is needed")
    val = corpus(k, s).val
    windows = val[torch.linspace(0, len(val) - 1, min(s.n, len(val))).long()].long()
    k.method.net.compile(dynamic=False)                                               # one shape of batch: twice as fast on a CPU
    print(stamp() + "\n\n" + HEAD, flush=True)
    reseed(s.seed)
    truth = torch.randint(LENGTHS[0], LENGTHS[-1] + 1, (len(windows),))
    found, place = [], []
    for x, L in zip(windows, truth.tolist(), strict=True):
        orders = torch.rand(ORDERS, EVIDENCE).argsort(1).to(x.device)
        nats = evidence(k.method, x[:BEFORE], x[BEFORE + L:][:EVIDENCE], LENGTHS, orders, k.c.block_size).cpu()
        found.append(LENGTHS[nats.argmin()])
        place.append(1 + (nats < nats[LENGTHS.index(L)]).sum().item())
    measured = [*scores((torch.tensor(found) - truth).abs()).unbind(1), torch.tensor(place)]
    row = " | ".join("{:.3f} ± {:.3f}".format(*mean([(v, 1) for v in m.tolist()])) for m in measured)
    print(f"| {k.path}, {len(windows)} windows, {ORDERS} orders | {row} |")
    print(f"| chance: any length | {chance(LENGTHS)} | {(len(LENGTHS) + 1) / 2:.3f} |")
    print(f"| chance: always 10 | {chance([10])} | |")


if __name__ == "__main__":
    run(main)

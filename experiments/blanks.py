"""How often does generate.py find the length of a blank? Spans of a known length are cut out of
held-out text, and their length is chosen again, beside chance. Half an hour on one CPU core.

    python -m experiments.blanks --out=results/masked.pt --n=100

A span of 1 to 20 characters, all equally likely, stands between the 64 before it and the 32 after
it. The last column is the place of the true length among the 20, 1 being the likeliest; ± is the
standard error over windows, chance is exact.
"""
import torch

from checkpoint import find_checkpoint
from config import check, parse, run
from evaluation.likelihood import Evaluate, corpus, open_checkpoint, spaced_rows
from evaluation.metrics import mean
from evaluation.report import Table, stamp
from generate import MAX_EVIDENCE, N_ORDERS, length_log_likelihood
from train import reseed

BEFORE = 64
LENGTHS = range(1, 21)
COLUMNS = {"length of the span": 0, "found exactly": 3, "within 1": 3, "within 2": 3,
           "mean absolute error": 3, "place of the truth": 3}


def error_scores(error):
    """Errors of a length, int64 (...) -> the four measures of each, (..., 4) float64."""
    return torch.stack([error == 0, error <= 1, error <= 2, error], -1).double()


def chance(guesses):
    """The measures of someone who guesses any of guesses, the truth being any of LENGTHS: (4,)."""
    error = (torch.tensor(guesses)[:, None] - torch.tensor(LENGTHS)).abs()
    return error_scores(error).mean((0, 1)).tolist()


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    checkpoint = open_checkpoint(find_checkpoint(s.out, "masked"))
    T = checkpoint.c.block_size
    least = BEFORE + LENGTHS[-1] + MAX_EVIDENCE
    check(s.n and checkpoint.name == "masked" and T >= least,
          f"{checkpoint.path}: a masked model that reads {least} characters is needed, and n > 0")
    windows = spaced_rows(corpus(checkpoint, s).val, s.n).long()
    reseed(s.seed)
    truth = torch.randint(LENGTHS[0], LENGTHS[-1] + 1, (len(windows),))
    measured = []
    for x, L in zip(windows, truth.tolist(), strict=True):
        orders = torch.rand(N_ORDERS, MAX_EVIDENCE).argsort(1).to(x.device)
        after = x[BEFORE + L:][:MAX_EVIDENCE]
        scores = length_log_likelihood(checkpoint.method, x[:BEFORE], after, LENGTHS, orders, T)
        error = (LENGTHS[int(scores.argmax())] - L) * torch.ones((), dtype=torch.long)
        place = 1 + (scores > scores[L - LENGTHS[0]]).sum()
        measured.append([*error_scores(error.abs()).tolist(), place.item()])
    print(stamp())
    table = Table("blanks of unknown length", COLUMNS)
    cells = [mean([(value, 1) for value in column]) for column in zip(*measured, strict=True)]
    table.add(f"{checkpoint.path}, {len(windows)} windows, {N_ORDERS} orders", *cells)
    table.add("chance: any length", *chance(LENGTHS), (len(LENGTHS) + 1) / 2)
    table.add("chance: always 10", *chance([10]), None)


if __name__ == "__main__":
    run(main)

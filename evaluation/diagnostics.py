"""Why embedding diffusion fails, or does not: cross-entropy of the predicted text by noise level,
the table, and whether the order of samples means anything. For analog bits, too.

    python -m evaluation.diagnostics --out=out/embed
"""
import math

import torch

from config import check, parse, run
from evaluation.likelihood import (FIFTH_COLUMNS, Evaluate, corpus, cross_entropy_by_noise,
                                   open_checkpoint, spaced_rows, unigram_of)
from evaluation.report import Table
from gaussian import TokenDiffusion
from step import reseed


def entropy_bits(x):
    """Of the different rows of x (n, k)."""
    _, counts = x.unique(dim=0, return_counts=True)
    p = counts.double() / counts.sum()
    return -(p * p.log2()).sum().item()


def mutual_information(x):
    """Bits that a character of the texts x (n, T) tells of the next."""
    pairs = x.unfold(1, 2, 1).flatten(0, 1)                            # (n (T - 1), 2)
    return entropy_bits(pairs[:, :1]) + entropy_bits(pairs[:, 1:]) - entropy_bits(pairs)


def bigram_information(x):
    """mutual_information less that of the same text shuffled: 0 where order means nothing."""
    perm = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten()[perm.to(x.device)].view(x.shape)
    return mutual_information(x) - mutual_information(shuffled)


@torch.no_grad()
def diagnostics(method, data, how, n=64):
    """A table: held-out text under the unigram, which is the know-nothing line; what is predicted
    at each noise level; the rows of the method's table; 32 samples by the sampler how."""
    val = spaced_rows(data.val, n)[:32].long()
    table = method.table.double()
    distance = torch.cdist(table, table).fill_diagonal_(math.inf)
    reseed(0)
    nothing_known = torch.zeros_like(val, dtype=torch.bool)
    *_, (x, _) = method.sample(torch.zeros_like(val), nothing_known, how)
    unigram = -unigram_of(data)[data.val.long()].log2().mean().item()
    fifths = list(FIFTH_COLUMNS)[1:]
    bits = [nats / math.log(2) for nats in cross_entropy_by_noise(method, data, n)]
    rows = [
        ("a held-out character under the unigram", unigram),
        *((f"the predicted text, noise {name}", ce) for name, ce in zip(fifths, bits, strict=True)),
        ("norm of a row of the table, a number", table.norm(dim=1).mean().item()),
        ("its distance from the nearest, a number", distance.amin(1).mean().item()),
        ("entropy of a sampled character", entropy_bits(x.view(-1, 1))),
        ("which tells of the next", bigram_information(x)),
        ("in held-out text", bigram_information(val)),
    ]
    return Table(f"diagnostics, {data.name}, bits", {"of": 0, "value": 3}, rows)


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    checkpoint = open_checkpoint(s.out or "out/embed")
    check(isinstance(checkpoint.method, TokenDiffusion) and checkpoint.meta["alphabet"],
          f"{checkpoint.path} is a {checkpoint.name} checkpoint: only embeddings and bits have "
          "diagnostics")
    diagnostics(checkpoint.method, corpus(checkpoint, s), checkpoint.script.SAMPLER())


if __name__ == "__main__":
    run(main)

"""Why embedding diffusion fails, or does not: cross-entropy of the predicted text by noise level,
the table, and whether the order of samples means anything. For analog bits, too.

    python -m evaluation.diagnostics --out=out/embed
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import Settings, check, parse, run
from evaluation.likelihood import FIFTH_COLUMNS, corpus, open_checkpoint, spaced_rows
from evaluation.report import CE_TITLE, Table
from gaussian import TokenDiffusion, position_times, q_sample
from train import reseed


@dataclass(frozen=True)
class Diagnose(Settings):   # python -m evaluation.diagnostics
    out: str = "out/embed"         # a run's folder or a checkpoint
    dataset: str = ""              # the path of the text of a checkpoint trained on a file
    data_dir: str = ""             # where corpora are kept; empty: data/


def cross_entropy(method, x0, unigram, generator):
    """Nats (B, T) of the predicted text and times (B, T), for x0 (B, T) at times all over [0, 1].

    A network that predicts numbers has no probabilities: log p = log unigram - beta |xhat - C|^2,
    with the best beta in each fifth of the time, so that the scale of its table does not matter."""
    B, T = x0.shape
    t = (torch.arange(B) + torch.rand(B, generator=generator)) / B
    rand = None
    if method.stagger:
        rand = torch.rand(B, T, generator=generator)
    known = torch.zeros(B, T, dtype=torch.bool)
    t_pos, _ = position_times(t.double()[:, None], rand, method.stagger, known)
    t_pos = t_pos.expand(B, T).to(x0.device)
    gamma = method.gamma_min + t_pos * (method.gamma_max - method.gamma_min)
    x = method.embed_tokens(x0)
    z = q_sample(x, gamma, torch.randn(x.shape, generator=generator).to(x))
    x_prev = None
    if method.self_cond:
        x_prev, _ = method.predict_tokens(z, gamma)
    xhat, probs = method.predict_tokens(z, gamma, x_prev=x_prev)
    if method.predict == "tokens":
        prob = probs.gather(-1, x0[..., None])[..., 0]                 # (B, T)
        return -prob.clamp(min=1e-30).log(), t_pos

    distance = (xhat[:, :, None] - method.table).square().sum(-1)      # (B, T, V)
    nats = distance.new_zeros(B, T)
    log_unigram = unigram.to(distance).log()
    for fifth in range(1, 6):
        here = (t_pos * 5).ceil().clamp(min=1) == fifth
        tried = []
        for k in range(-10, 16):
            logits = log_unigram - 2.0 ** k * distance[here]
            tried.append(F.cross_entropy(logits, x0[here], reduction="none"))
        nats[here] = min(tried, key=torch.mean)
    return nats, t_pos


def unigram_of(data):
    """The frequencies (V,) of the characters of the training text, with one added to each count."""
    counts = torch.bincount(data.train.long(), minlength=len(data.tokenizer)).double() + 1
    return counts / counts.sum()


@torch.no_grad()
def cross_entropy_by_noise(method, data, n=64):
    """Nats of the predicted text in fifths of the time, from n windows at five times each."""
    x0 = spaced_rows(data.val, n).long().repeat(5, 1)
    generator = torch.Generator().manual_seed(0)
    nats, t_pos = cross_entropy(method, x0, unigram_of(data), generator)
    fifth = (t_pos * 5).ceil()
    return [nats[(fifth == i) & (t_pos < 1)].mean().item() for i in range(1, 6)]


def cross_entropy_tables(checkpoints, s):
    """A row for each checkpoint of Gaussian diffusion of tokens. -> tables, of which there is none
    or one"""
    rows = []
    for checkpoint in checkpoints:
        if isinstance(checkpoint.method, TokenDiffusion):
            ce = cross_entropy_by_noise(checkpoint.method, corpus(checkpoint, s), 256)
            rows.append([checkpoint.path, *ce])
    if not rows:
        return []
    return [Table(CE_TITLE, FIFTH_COLUMNS, rows)]


def entropy_bits(counts):
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log2()).sum().item()


def mutual_information(x):
    """Bits that a character of the texts x (n, T) tells of the next."""
    a = x[:, :-1]
    b = x[:, 1:]
    _, pairs = torch.unique(a * (x.max() + 1) + b, return_counts=True)
    first = entropy_bits(torch.bincount(a.flatten()))
    second = entropy_bits(torch.bincount(b.flatten()))
    return first + second - entropy_bits(pairs)


def bigram_information(x):
    """mutual_information less that of the same text shuffled: 0 where order means nothing."""
    perm = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten()[perm.to(x.device)].view(x.shape)
    return mutual_information(x) - mutual_information(shuffled)


@torch.no_grad()
def diagnostics(method, data, how, n=64):
    """All in bits: unigram, the know-nothing line; ce by noise; norm and nearest other row of the
    table; entropy of 32 samples x by the sampler how, and bigram information of samples and of
    held-out text."""
    val = spaced_rows(data.val, n).long()
    table = method.table.double()
    distance = torch.cdist(table, table).fill_diagonal_(math.inf)
    reseed(0)
    x = torch.zeros_like(val[:32])
    nothing_known = torch.zeros_like(x, dtype=torch.bool)
    *_, (x, _) = method.sample(x, nothing_known, how)
    return {
        "unigram": -unigram_of(data)[data.val.long()].log2().mean().item(),
        "ce": [nats / math.log(2) for nats in cross_entropy_by_noise(method, data, n)],
        "norm": table.norm(dim=1).mean().item(),
        "nearest": distance.amin(1).mean().item(),
        "entropy": entropy_bits(torch.bincount(x.flatten())),
        "order": bigram_information(x),
        "order_of_text": bigram_information(val[:32]),
        "x": x,
    }


def to_words(d):
    """What diagnostics returned, in words."""
    fifths = "  ".join(f"{i / 5:.1f}-{(i + 1) / 5:.1f}: {ce:.2f}" for i, ce in enumerate(d["ce"]))
    return (
        f"know-nothing line: {d['unigram']:.3f} bits/char: validation text under the unigram\n"
        f"cross-entropy of the predicted text by noise level, bits/char: {fifths}\n"
        f"table: norm {d['norm']:.3f}, nearest other row at {d['nearest']:.3f}\n"
        f"samples: {d['entropy']:.2f} bits of entropy a character, which tells "
        f"{d['order']:.2f} bits of the next (held-out text {d['order_of_text']:.2f})")


def main(argv):
    s = Diagnose(**parse(argv, Diagnose))
    checkpoint = open_checkpoint(s.out)
    check(isinstance(checkpoint.method, TokenDiffusion) and checkpoint.meta["alphabet"],
          f"{s.out} is a {checkpoint.name} checkpoint: only embeddings and bits have diagnostics")
    data = corpus(checkpoint, s)
    print(to_words(diagnostics(checkpoint.method, data, checkpoint.script.SAMPLER())))


if __name__ == "__main__":
    run(main)

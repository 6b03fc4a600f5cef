"""Samples of text: one way to write with a checkpoint of any method, and what texts are worth
beside their training text. Every score has its error."""
import functools
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, fields

import torch

from config import DEVICE, HERE, Sample, check
from data import printable
from diffusion import Autoregressive, MaskedDiffusion
from evaluation.likelihood import corpus, count_chars, open_checkpoint, spaced_rows
from evaluation.report import Table
from gaussian import TokenDiffusion
from step import reseed

SPAN = 16    # characters of a held-out block that are infilled, in its middle
SAMPLE_COLUMNS = {
    "text": 0, "blocks": 0, "generative NLL, nats/char": 3, "entropy, bits": 3, "known words": 3,
    "names in 1,000": 1, "distinct 4-grams": 3, "overlap with training": 1, "longest": 0,
    "infilled": 3, "calls": 1, "characters/s": 0}


# writing

def sampler_settings(checkpoint, s):
    """How a checkpoint is sampled: the SAMPLER of its script, with the settings of s, an Evaluate,
    that it has too. A Gaussian one, which has a setting `sampler`, takes s.gaussian_steps."""
    names = {f.name for f in fields(checkpoint.script.SAMPLER)} - {"out", "n"}
    chosen = {name: value for name, value in asdict(s).items() if name in names}
    if "sampler" in names:
        chosen["steps"] = s.gaussian_steps
        if not s.sampler:
            del chosen["sampler"]
    return checkpoint.script.SAMPLER(**chosen)


def fill(method, x, known, how):
    """Write x (B, T) where it is not known (B, T) -> the text, network calls that a text
    needed on average, characters a second."""
    reseed(how.seed)
    start_time = time.perf_counter()
    n_calls = 0.0
    unfinished = torch.ones(len(x), dtype=torch.bool, device=x.device)
    reveals = isinstance(method, MaskedDiffusion | Autoregressive)
    y = x
    for y, _ in method.sample(x, known, how):
        if reveals:          # a text that is done needs no more calls
            n_calls += unfinished.double().mean().item()
            unfinished = (y == method.mask_id).any(1)
        else:
            n_calls += 1 + vars(how).get("two_pass", False)
    return y, n_calls, y.numel() / (time.perf_counter() - start_time)


def sample_texts(checkpoint, n, how):
    """n blocks written from nothing, how being a SAMPLER of the checkpoint's script.
    -> x (n, T), network calls, characters a second"""
    x = torch.zeros(n, checkpoint.c.block_size, dtype=torch.long, device=DEVICE)
    return fill(checkpoint.method, x, torch.zeros_like(x, dtype=torch.bool), how)


def infilling(checkpoint, val):
    """Share of the characters of a held-out span of SPAN that are found, greedily: the most certain
    first, one a call, or in 50 DDIM steps. The baseline sees only what is left of the span. No
    setting changes it. -> (mean, standard error over blocks), or None for a Gaussian model that was
    trained without known characters."""
    method = checkpoint.method
    how = Sample(steps=SPAN, order="entropy", temperature=0.0, remask=0.0)
    if isinstance(method, TokenDiffusion):
        if not method.prompts and not method.stagger:
            return None
        how = checkpoint.script.SAMPLER(sampler="ddim")
    x = val.long()
    start = max(0, x.size(1) - SPAN) // 2
    known = torch.ones_like(x, dtype=torch.bool)
    known[:, start:start + SPAN] = False
    y, _, _ = fill(method, x, known, how)
    found = (y == x)[:, start:start + SPAN]
    return mean([(sum(row), len(row)) for row in found.tolist()])


# scores

WORD = re.compile(r"(?:[^\W\d_]|')+")
NAME = re.compile(r"^[A-Z][A-Za-z ]*:$", re.M)       # a line that names a speaker


def mean(parts):
    """Sum of a / sum of b over parts (a, b), with its standard error by the delta method."""
    a, b = torch.tensor(parts, dtype=torch.float64).unbind(1)
    ratio = a.sum() / b.sum()
    stderr = (a - ratio * b).std() * len(a) ** 0.5 / b.sum()
    return ratio.item(), stderr.item()


def vocabulary(text):
    """The words of a text, in lower case: a word is a run of letters and apostrophes."""
    return {word.lower() for word in WORD.findall(text)}


def overlap(text, source):
    """Length of the longest piece of text that is in source, to the letter."""
    longest = 0
    for i in range(len(text)):
        while i + longest < len(text) and text[i:i + longest + 1] in source:
            longest += 1
    return longest


def text_metrics(texts, source, known_words):
    """What a list of texts is like, beside the training text `source`. -> dict, pairs are (mean,
    standard error over texts): words, the share of words that are known, of those strictly inside a
    text, whose ends are cut; names, lines that name a speaker, in 1,000 characters; entropy of the
    characters in bits; fourgrams, different 4-grams as a share of all; overlap, the longest piece
    of each text that stands in source; longest, the longest of all."""
    counts = Counter("".join(texts))
    bits = {ch: -math.log2(n / counts.total()) for ch, n in counts.items()}
    fourgrams = Counter()
    words = []
    names = []
    surprise = []
    for text in texts:
        fourgrams.update(text[i:i + 4] for i in range(len(text) - 3))
        known = [word.lower() in known_words for word in WORD.findall(text)[1:-1]]
        words.append((sum(known), len(known)))
        names.append((1000 * len(NAME.findall(text)), len(text)))
        surprise.append((sum(bits[ch] for ch in text), len(text)))
    overlaps = [overlap(text, source) for text in texts]
    return {
        "words": mean(words),
        "names": mean(names),
        "entropy": mean(surprise),
        "fourgrams": len(fourgrams) / max(1, fourgrams.total()),
        "overlap": mean([(length, 1) for length in overlaps]),
        "longest": max(overlaps),
    }


@functools.cache
def training_text(data):
    """The training part of a Text as a str, at most 10 million characters of it, for it is searched
    again and again; and the set of its words."""
    text = data.tokenizer.decode(data.train[:10 ** 7].tolist())
    return text, vocabulary(text)


def eval_model(s):
    """The evaluation model: an autoregressive checkpoint, whose likelihood is exact."""
    checkpoint = open_checkpoint(s.eval_model or os.path.relpath(HERE / "results/judge.pt"))
    check(checkpoint.name == "ar",
          f"{checkpoint.path} is a {checkpoint.name} checkpoint, whose likelihood is a bound; an "
          "evaluation model is trained with --objective=ar")
    return checkpoint


def fitting(eval_model, checkpoint):
    """The evaluation model, or None if it was trained on another text or other characters."""
    same_data = eval_model.meta["data"]["sha256"] == checkpoint.meta["data"]["sha256"]
    if same_data and eval_model.meta["alphabet"] == checkpoint.meta["alphabet"]:
        return eval_model
    print(f"{eval_model.path} was trained on {eval_model.meta['data']['name']}, or its characters "
          f"are others: it does not score {checkpoint.path}", file=sys.stderr)


@torch.no_grad()
def eval_nll(eval_model, x, n_chars=None):
    """Generative NLL, exact: nats per character of the texts x (n, L) under an autoregressive model
    of the same alphabet, in pieces of at most its block size. n_chars (n,): how many characters the
    texts have, if that is not L. -> (mean, standard error over texts)"""
    nats = torch.zeros(len(x), device=x.device)
    for piece in x.split(eval_model.c.block_size, 1):
        piece_nats, _ = eval_model.method.bound(piece)
        nats = nats + piece_nats * piece.size(1)
    if n_chars is None:
        n_chars = torch.full((len(x),), x.size(1))
    return mean(list(zip(nats.tolist(), n_chars.tolist(), strict=True)))


# tables

def sample_row(title, x, data, eval_model, infilled=None, n_calls=None, speed=None):
    """A row of SAMPLE_COLUMNS, for the texts x (n, L); eval_model may be None."""
    texts = [data.tokenizer.decode(ids) for ids in x.tolist()]
    m = text_metrics(texts, *training_text(data))
    n_chars = count_chars(data.tokenizer, x)
    nll = None
    if eval_model:
        nll = eval_nll(eval_model, x, n_chars)
    if speed:
        speed *= n_chars.sum().item() / x.numel()
    return (title, len(x), nll, m["entropy"], m["words"], m["names"], m["fourgrams"],
            m["overlap"], m["longest"], infilled, n_calls, speed)


def sample_tables(checkpoints, data, s, eval_model):
    """What the samples of checkpoints of the same data are like, beside as much held-out text and
    as much by the evaluation model itself; below it the first of each text. -> tables"""
    blocks = spaced_rows(data.val, s.n).long()
    for how in dict.fromkeys(sampler_settings(checkpoint, s) for checkpoint in checkpoints):
        print(f"\n{how}")
    table = Table(f"samples, {data.name}, windows of {data.T}; generative NLL by {eval_model.path}",
                  SAMPLE_COLUMNS)
    firsts = []

    def add(title, x, data, scorer, *more):
        table.add(*sample_row(title, x, data, scorer, *more))
        first = data.tokenizer.decode(x[0].tolist()).replace("\n", "/")
        firsts.append((title, printable(first)))

    scorer = fitting(eval_model, checkpoints[0])
    add(f"held out, beside {len(data.train):,} {data.tokenizer.things}", blocks, data, scorer)
    if scorer and scorer.c.block_size >= data.T:
        how = Sample(temperature=1.0, seed=s.seed)
        nothing_known = torch.zeros_like(blocks, dtype=torch.bool)
        x, *cost = fill(scorer.method, torch.zeros_like(blocks), nothing_known, how)
        add("the evaluation model's own, temperature 1", x, data, scorer, None, *cost)
    for checkpoint in checkpoints:
        x, *cost = sample_texts(checkpoint, len(blocks), sampler_settings(checkpoint, s))
        add(checkpoint.path, x, corpus(checkpoint, s), fitting(eval_model, checkpoint),
            infilling(checkpoint, blocks), *cost)
    title = f"the first of each, {data.name}, / for a new line"
    return [table, Table(title, {"text": 0, "sample": 0}, firsts)]

"""Samples of text: one way to write with a checkpoint of any method, and what texts are worth."""
import functools
import os
import sys
import time
from dataclasses import asdict, fields, replace

import torch

from config import DEVICE, HERE, Sample, check
from diffusion import Autoregressive, MaskedDiffusion
from evaluation.likelihood import corpus, open_checkpoint, spaced_rows
from evaluation.metrics import mean, text_metrics, vocabulary
from evaluation.report import Table
from gaussian import TokenDiffusion
from train import reseed

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


def describe_sampler(how, s):
    """The settings of a sampler that s, an Evaluate, may change, in words."""
    names = [name for name in vars(how) if name in vars(s) and name not in ("out", "n")]
    return ", ".join(f"{name}={vars(how)[name]}" for name in names if vars(how)[name] != "")


def fill(method, x, known, how):
    """Write x (B, T) where it is not known (B, T) -> the text, network calls that a text
    needed on average, seconds."""
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
            n_calls += 1 + how.two_pass
    return y, n_calls, time.perf_counter() - start_time


def sample_texts(checkpoint, n, how):
    """n blocks written from nothing, how being a SAMPLER of the checkpoint's script.
    -> x (n, T), network calls, characters a second"""
    T = checkpoint.c.block_size
    x = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    x, n_calls, seconds = fill(checkpoint.method, x, torch.zeros_like(x, dtype=torch.bool), how)
    return x, n_calls, n * T / seconds


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
    T = x.size(1)
    start = max(0, T - SPAN) // 2
    span = torch.zeros_like(x, dtype=torch.bool)
    span[:, start:start + SPAN] = True
    y, _, _ = fill(method, x, ~span, how)
    n_found = ((y == x) & span).sum(1).tolist()
    return mean([(n, min(SPAN, T)) for n in n_found])


# scoring

def eval_model(s):
    """The evaluation model: an autoregressive checkpoint, whose likelihood is exact."""
    checkpoint = open_checkpoint(s.eval_model or os.path.relpath(HERE / "results/judge.pt"))
    check(checkpoint.name == "ar",
          f"{checkpoint.path} is a {checkpoint.name} checkpoint, whose likelihood is a bound; an "
          "evaluation model is trained with --objective=ar")
    return checkpoint


def fitting(eval_model, checkpoint):
    """The evaluation model, or None if it was trained on another text or other characters."""
    if all(eval_model.meta[key] == checkpoint.meta[key] for key in ("alphabet", "data")):
        return eval_model
    print(f"{eval_model.path} was trained on {eval_model.meta['data']['name']}, or its characters "
          f"are others: it does not score {checkpoint.path}", file=sys.stderr)


@torch.no_grad()
def eval_nll(eval_model, x):
    """Generative NLL, exact: nats per character of the texts x (n, L) under an autoregressive model
    of the same alphabet, in pieces of at most its block size.
    -> (mean, standard error over texts)"""
    nats = torch.zeros(len(x), device=x.device)
    for piece in x.split(eval_model.c.block_size, 1):
        piece_nats, _ = eval_model.method.bound(piece)
        nats = nats + piece_nats * piece.size(1)
    return mean([(n, x.size(1)) for n in nats.tolist()])


@functools.cache
def training_text(data):
    """The training part of a Text as a str, at most 10 million characters of it, for it is searched
    again and again; and the set of its words."""
    text = data.tokenizer.decode(data.train[:10 ** 7].tolist())
    return text, vocabulary(text)


def sample_row(title, x, data, eval_model, infilled=None, n_calls=None, speed=None):
    """A row of SAMPLE_COLUMNS, for the texts x (n, L); eval_model may be None."""
    texts = [data.tokenizer.decode(ids) for ids in x.tolist()]
    m = text_metrics(texts, *training_text(data))
    nll = None
    if eval_model:
        nll = eval_nll(eval_model, x)
    return (title, len(x), nll, m["entropy"], m["words"], m["names"], m["fourgrams"],
            m["overlap"], m["longest"], infilled, n_calls, speed)


# tables

def frontier(checkpoint, s):
    """Quality against variety: [(title, s)], at four temperatures, or for a Gaussian model with
    four td, which is its temperature."""
    if isinstance(checkpoint.method, TokenDiffusion):
        return [(f"td {td:g}", replace(s, td=td)) for td in (0.0, 0.5, 1.0, 2.0)]
    return [(f"temperature {t:g}", replace(s, temperature=t)) for t in (0.7, 0.8, 0.9, 1.0)]


def sample_tables(checkpoints, s, eval_model):
    """What the samples of checkpoints are like, a table for each corpus and block size, beside as
    much held-out text and as much by the evaluation model itself; below it the first of each text.
    -> tables"""
    tables = []
    samplers = dict.fromkeys(sampler_settings(checkpoint, s) for checkpoint in checkpoints)
    for how in samplers:
        print(f"\nsampler: {describe_sampler(how, s)}")
    groups = {}
    for checkpoint in checkpoints:
        groups.setdefault(corpus(checkpoint, s), []).append(checkpoint)
    for data, group in groups.items():
        title = f"samples, {data.name}, windows of {data.T}; generative NLL by {eval_model.path}"
        tables.append(Table(title, SAMPLE_COLUMNS))
        firsts = []
        for title, x, *more in sampled(group, data, s, eval_model):
            tables[-1].add(*sample_row(title, x, data, *more))
            firsts.append((title, data.tokenizer.decode(x[0].tolist()).replace("\n", "/")))
        title = f"the first of each, {data.name}, / for a new line"
        tables.append(Table(title, {"text": 0, "sample": 0}, firsts))
    return tables


def sampled(checkpoints, data, s, eval_model):
    """The texts of a table of samples, as they are written: yields the arguments of sample_row but
    data."""
    blocks = spaced_rows(data.val, s.n).long()
    n = len(blocks)
    scorers = [fitting(eval_model, checkpoint) for checkpoint in checkpoints]
    scorer = scorers[0]
    yield f"held out, beside {len(data.train):,} characters", blocks, scorer
    if scorer and scorer.c.block_size >= data.T:
        x = torch.zeros_like(blocks)
        how = Sample(temperature=1.0, seed=s.seed)
        x, n_calls, seconds = fill(scorer.method, x, torch.zeros_like(x, dtype=torch.bool), how)
        yield ("the evaluation model's own, temperature 1", x, scorer, None, n_calls,
               x.numel() / seconds)
    for checkpoint, scorer in zip(checkpoints, scorers, strict=True):
        x, n_calls, speed = sample_texts(checkpoint, n, sampler_settings(checkpoint, s))
        yield checkpoint.path, x, scorer, infilling(checkpoint, blocks), n_calls, speed
        if s.frontier:
            for title, changed in frontier(checkpoint, s):
                how = sampler_settings(checkpoint, changed)
                x, n_calls, speed = sample_texts(checkpoint, n, how)
                yield f"{checkpoint.path}, {title}", x, scorer, None, n_calls, speed

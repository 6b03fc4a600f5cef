"""Checkpoints of any method, and their likelihood: the bound with both its errors, differences from
the first checkpoint, the exact value from left to right, cross-entropy by noise level."""
import contextlib
import functools
import importlib
import math
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import train
from checkpoint import load
from config import GPU, HERE, Masked, Mnist, Sample, Settings, check
from data import CHUNK, Text
from diffusion import MaskedDiffusion
from evaluation.report import Table
from gaussian import TokenDiffusion, position_times, q_sample
from mnist_ddpm import Images
from train import block_stderr, spaced_rows


@dataclass(frozen=True)
class Evaluate(Settings):   # python -m evaluation: which checkpoints, how much of each measurement
    out: str = ""                  # checkpoints or folders of runs, with commas; empty: all
    quick: bool = False            # train tiny versions in out/quick, and measure these alone
    report: bool = False           # write the page, out/report.html
    json: str = ""                 # write what was measured to this file
    dataset: str = ""              # of checkpoints trained on a file: where that is, if it moved
    data_dir: str = ""             # where corpora are kept; empty: where each run found its own
    seed: int = 1337
    # likelihood
    bound: bool = True
    windows: int = 4000            # the bound is over at most so many evenly spaced windows
    draws: int = 2                 # sets of masks or noise it is averaged over
    exact: int = 200               # windows for the exact left-to-right likelihood; 0: none
    # samples
    n: int = 200                   # blocks to sample, and held-out blocks to infill; 0: none
    digits: int = 10000 if GPU else 1000   # images to sample; 0: none
    eval_model: str = ""           # an AR checkpoint that scores samples; empty: results/judge.pt
    # of masked models and the baseline, as in config.Sample
    steps: int = 256
    order: Literal["random", "left", "confidence", "margin", "entropy"] = "margin"
    counts: Literal["even", "documents", "cosine", "entropy"] = "even"
    min_distance: int = 4
    entropy_bound: float = 0.1
    temperature: float = 0.9
    top_k: int = 0
    remask: float = 0.01
    # of Gaussian models, as in config.EmbedSampler and config.ImageSampler
    gaussian_steps: int = 50
    sampler: Literal["", "ddim", "ancestral"] = ""   # empty: what each takes by itself
    td: float = 0.0
    two_pass: bool = False
    rounding: Literal["", "learned", "cosine", "clamp"] = ""
    guidance: float = 1.4

    def __post_init__(self):
        # what a sampler takes is checked there; fewer than these have no standard error
        least = {"windows": 2, "draws": 2, "exact": 2, "n": 2, "digits": 10}
        for name, number in least.items():
            value = getattr(self, name)
            none = value == 0 and name not in ("windows", "draws")
            check(value >= number or none, f"{name}={value} must be {number} or more")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    path: str
    name: str                      # of the method: masked, ar, bits, embed, mnist, ...
    c: Settings                    # what it was trained with
    meta: dict                     # the dict in the file
    method: nn.Module              # with the EMA weights
    script: types.ModuleType       # that trained it: SETTINGS, SAMPLER, build


def import_script(stem):
    """STEM.py of the clone's root or of experiments/. Nothing else is imported by name."""
    check(str(stem).isidentifier(), f"{stem!r} is no name of a script")
    module = stem
    if not (HERE / f"{stem}.py").is_file():
        module = f"experiments.{stem}"
        check((HERE / f"experiments/{stem}.py").is_file(), f"{stem}.py is not in this clone")
    script = importlib.import_module(module)
    check(vars(script).keys() >= {"SETTINGS", "SAMPLER", "build"},
          f"{stem}.py has no SETTINGS, SAMPLER and build")
    return script


def open_checkpoint(path):
    """A checkpoint or a run's folder -> Checkpoint, built by the script that it names."""
    path = Path(path)
    stem = "train"
    name = "masked"
    # whatever torch.load makes of a file that is not ours: load says what is wrong with it
    with contextlib.suppress(Exception):
        file = path / "best.pt" if path.is_dir() else path
        state = torch.load(file, map_location="cpu", weights_only=True)
        stem = state["script"]
        name = state["method"]
    script = import_script(stem)
    method, c, meta = load(path, script.SETTINGS, script.build, [name])
    return Checkpoint(str(path), name, c, meta, method, script)


# what was read stays; the keys are settings
read_text = functools.cache(Text)
read_images = functools.cache(Images)


def corpus(checkpoint, s):
    """The Text a checkpoint was trained on, or for pixels, which have no alphabet, the Images. A
    file is where it was, or at s.dataset. Read once; one line and exit 1 if they are others."""
    before = checkpoint.meta["data"]
    name = before["name"]
    data_dir = s.data_dir
    if not data_dir and os.path.isdir(checkpoint.c.data_dir):
        data_dir = checkpoint.c.data_dir
    asks = ""
    if name.startswith("file "):
        asks = ": pass its path, --dataset=PATH"
        name = s.dataset or checkpoint.c.dataset
        check(s.dataset or os.path.isfile(name),
              f"{checkpoint.path} was trained on {name}, which is not there{asks}")
    if checkpoint.meta["alphabet"]:
        c = Masked(dataset=name, data_dir=data_dir, block_size=checkpoint.c.block_size,
                   train_size=checkpoint.c.train_size)
        data = read_text(c, checkpoint.meta["is_bytes"])
    else:
        data = read_images(Mnist(dataset=name, data_dir=data_dir))
    check(data.meta["data"]["sha256"] == before.get("sha256"),
          f"{checkpoint.path} was trained on other data ({before['name']}) than this {data.name}"
          f"{asks}")
    return data


def grouped(checkpoints, s):
    """[(data, checkpoints)] for each corpus, unit and block size. Of checkpoints that differ in
    train_size, the data of the first."""
    groups = {}
    for checkpoint in checkpoints:
        data = corpus(checkpoint, s)
        key = data.meta["data"]["sha256"], data.T, data.unit
        groups.setdefault(key, []).append(checkpoint)
    return [(corpus(group[0], s), group) for group in groups.values()]


def likelihood(method, val, draws=2):
    """The bound of a method on val (W, T), from so many sets of masks or noise. -> dict: bound,
    windows (W,), masked_ce and fifths as of train.evaluate, averaged over the sets; stderr, of the
    text; mc, the Monte Carlo error of the bound, from how much each window varies: mc^2 = var /
    (draws W). It errs on the large side, as if windows drew their noise levels independently; in
    truth they share them out. An exact likelihood needs one draw, and has no such error."""
    levels = method.eval_levels
    if levels == 1:
        draws = 1
    sets = [train.evaluate(method, val, levels, seed=seed) for seed in range(draws)]
    each = torch.stack([e["windows"] for e in sets])                   # (draws, W)
    windows = each.mean(0)
    mc = 0.0
    if draws > 1:
        mc = (each.var(0).mean() / each.numel()).sqrt().item()
    return {
        "windows": windows,
        "bound": windows.mean().item(),
        "stderr": block_stderr(windows),
        "mc": mc,
        "masked_ce": sum(e["masked_ce"] for e in sets) / draws,
        "fifths": torch.tensor([e["fifths"] for e in sets]).mean(0).tolist(),
    }


def left_to_right(method, x0):
    """The exact likelihood of a masked model that writes from left to right, one character a call:
    x0 (B, T) -> nats per character (B,) float64."""
    T = x0.size(1)
    s = Sample(order="left", steps=T, min_distance=0, temperature=1.0, remask=0.0)
    nothing_known = torch.zeros_like(x0, dtype=torch.bool)
    return method.sampler_nll(x0, nothing_known, s).cpu() / T


def unigram_of(data):
    """The frequencies (V,) of the characters of the training text, with one added to each count."""
    V = len(data.tokenizer)
    counts = torch.ones(V, dtype=torch.float64, device=data.train.device)
    for chunk in data.train.split(CHUNK):        # tokens may be more than memory holds
        counts += torch.bincount(chunk.long(), minlength=V)
    return counts.to(data.val.device) / counts.sum().item()


def count_chars(tokenizer, x):
    """How many characters the tokens x (n, L) have: (n,), on the CPU. Of bytes, a byte is one."""
    lengths = torch.tensor([len(text) for text in tokenizer.chars])
    return lengths[x.cpu().long()].sum(1)


@torch.no_grad()
def cross_entropy_by_noise(method, data, n=64):
    """Nats of the text that Gaussian diffusion predicts, in fifths of the time, from n windows at
    five times each.

    A network that predicts numbers has no probabilities: log p = log unigram - beta |xhat - C|^2,
    with the best beta in each fifth, so that the scale of its table does not matter."""
    x0 = spaced_rows(data.val, n).long().repeat(5, 1)
    B, T = x0.shape
    g = torch.Generator().manual_seed(0)
    t = (torch.arange(B) + torch.rand(B, generator=g)) / B
    rand = None
    if method.stagger:
        rand = torch.rand(B, T, generator=g)
    known = torch.zeros(B, T, dtype=torch.bool)
    t_pos, _ = position_times(t.double()[:, None], rand, method.stagger, known)
    t_pos = t_pos.expand(B, T).to(x0.device)
    gamma = method.gamma_min + t_pos * (method.gamma_max - method.gamma_min)
    x = method.embed_tokens(x0)
    z = q_sample(x, gamma, torch.randn(x.shape, generator=g).to(x))

    # predict; the scores of tokens that are not probabilities depend on beta
    x_prev = None
    if method.self_cond:
        x_prev, _ = method.predict_tokens(z, gamma)
    xhat, probs = method.predict_tokens(z, gamma, x_prev=x_prev)
    means = []
    for i in range(1, 6):
        here = ((t_pos * 5).ceil() == i) & (t_pos < 1)
        if method.predict == "tokens":
            tried = [probs[here].clamp(min=1e-30).log()]
        else:
            distance = (xhat[here][:, None] - method.table).square().sum(-1)
            log_unigram = unigram_of(data).to(distance).log()
            tried = [log_unigram - 2.0 ** k * distance for k in range(-10, 16)]
        means.append(min(F.cross_entropy(logits, x0[here]).item() for logits in tried))
    return means


# tables

CE_TITLE = "cross-entropy of the predicted characters by noise, nats"
FIFTH_COLUMNS = {"checkpoint": 0, "0-20%": 3, "20-40%": 3, "40-60%": 3, "60-80%": 3, "80-100%": 3}


def likelihood_columns(unit):
    columns = {
        "checkpoint": 0, "method": 0, "parameters": 0, "steps": 0, f"bound, nats/{unit}": 4,
        "± text": 4, "± draws": 4, f"bits/{unit}": 3, "minus the first": 4, "masked CE": 3,
        "left to right": 4, "minus its bound there": 4}
    if unit == "token":
        columns["bound, nats/char"] = 4
    return columns


def mean_and_stderr(windows):
    return windows.mean().item(), block_stderr(windows)


def likelihood_tables(checkpoints, data, s):
    """The bounds of checkpoints on the same data: all have the same windows under the same masks
    and are compared with the first; and their parts by noise level. -> tables"""
    W = len(data.val)
    cut = f"{s.windows:,} of {W:,} " if s.windows < W else ""
    title = f"{data.name}, held out: {cut}windows of {data.T} {data.unit}s"
    table = Table(title, likelihood_columns(data.unit))
    first = None
    by_noise = {}
    for checkpoint in checkpoints:
        method = checkpoint.method
        e = likelihood(method, spaced_rows(data.val, s.windows), s.draws)
        table.add(*bound_row(checkpoint, data, e, first, s))
        if first is None:
            first = e["windows"]
        if method.eval_levels > 1:
            rows = by_noise.setdefault(f"nats by {method.noise_name}", [])
            rows.append([checkpoint.path, *e["fifths"]])
        if isinstance(method, TokenDiffusion) and data.meta["alphabet"]:
            rows = by_noise.setdefault(CE_TITLE, [])
            rows.append([checkpoint.path, *cross_entropy_by_noise(method, data, 256)])
    return [table, *(Table(title, FIFTH_COLUMNS, rows) for title, rows in by_noise.items())]


def bound_row(checkpoint, data, e, first, s):
    """A row of a table of bounds; first (W,): those of the first row, or None."""
    method = checkpoint.method
    bits = (e["bound"] / math.log(2), math.hypot(e["stderr"], e["mc"]) / math.log(2))
    mc = e["mc"]
    if method.eval_levels == 1:
        mc = "exact"
    difference = None
    if first is not None:
        difference = mean_and_stderr(e["windows"] - first)
    in_order = None
    gap = None
    if s.exact and isinstance(method, MaskedDiffusion):
        x = spaced_rows(spaced_rows(data.val, s.windows), s.exact).long()
        nats = torch.cat([left_to_right(method, batch) for batch in x.split(128)])
        in_order = mean_and_stderr(nats)
        gap = mean_and_stderr(nats - spaced_rows(e["windows"], s.exact))
    n_parameters = sum(p.numel() for p in method.parameters())
    row = (checkpoint.path, checkpoint.name, n_parameters, checkpoint.meta["step"], e["bound"],
           e["stderr"], mc, bits, difference, e["masked_ce"], in_order, gap)
    if data.unit == "token":
        n_chars = count_chars(data.tokenizer, spaced_rows(data.val, s.windows))
        row = (*row, e["bound"] * data.T / n_chars.double().mean().item())
    return row

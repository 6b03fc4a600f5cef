"""Checkpoints of any method, and their likelihood: the bound with both its errors, differences from
the first checkpoint, the exact value from left to right."""
import functools
import importlib
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train
from checkpoint import load
from config import GPU, HERE, Masked, Settings, check
from data import Text
from diffusion import MaskedDiffusion
from evaluation.report import Table
from train import block_stderr, spaced_rows


@dataclass(frozen=True)
class Evaluate(Settings):   # python -m evaluation: which checkpoints, how much of each measurement
    out: str = ""                  # checkpoints or folders of runs, with commas; empty: all
    quick: bool = False            # train tiny versions in out/quick, and measure these alone
    report: bool = False           # write the page, out/report.html
    json: str = ""                 # write what was measured to this file
    dataset: str = ""              # the path of the text of checkpoints trained on a file
    data_dir: str = ""             # where corpora are kept; empty: data/
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
    frontier: bool = False         # also samples at four temperatures, or with four td
    # of masked models and the baseline, as in config.Sample
    steps: int = 256
    order: Literal["random", "confidence", "margin", "entropy"] = "margin"
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
        # what a sampler takes is checked there: n=0, which is no samples, is refused by Settings
        for name in ("windows", "draws"):
            value = getattr(self, name)
            check(value >= 2, f"{name}={value} must be 2 or more")
        for name, least in [("exact", 2), ("n", 2), ("digits", 10)]:
            value = getattr(self, name)
            check(value == 0 or value >= least, f"{name}={value} must be 0, or {least} or more")


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
    if (HERE / f"{stem}.py").is_file():
        script = importlib.import_module(stem)
    else:
        check((HERE / f"experiments/{stem}.py").is_file(),
              f"its script, {stem}.py, is neither here nor in experiments/")
        script = importlib.import_module(f"experiments.{stem}")
    check(vars(script).keys() >= {"SETTINGS", "SAMPLER", "build"},
          f"its script, {stem}.py, has no SETTINGS, SAMPLER and build")
    return script


def open_checkpoint(path):
    """A checkpoint or a run's folder -> Checkpoint, built by the script that it names."""
    path = Path(path)
    file = path / "best.pt" if path.is_dir() else path
    script = train
    methods = ["masked", "ar"]
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        script = import_script(state["script"])
        methods = [state["method"]]
    except SystemExit as error:
        raise SystemExit(f"{path} cannot be opened: {error}") from None
    except Exception:              # whatever torch.load makes of a file that is not ours
        pass                       # load says what is wrong with it
    method, c, meta = load(path, script.SETTINGS, script.build, methods)
    return Checkpoint(str(path), meta["method"], c, meta, method, script)


@functools.cache
def read_text(dataset, data_dir, block_size, train_size, is_bytes):
    c = Masked(dataset=dataset, data_dir=data_dir, block_size=block_size, train_size=train_size)
    return Text(c, is_bytes)


def corpus(checkpoint, s):
    """The Text a checkpoint was trained on, read once; one line and exit 1 if it is another."""
    name = checkpoint.meta["data"]["name"]
    if name.startswith("file "):
        check(s.dataset, f"{checkpoint.path} was trained on the {name}: pass its path, "
                         "--dataset=PATH")
        name = s.dataset
    c = checkpoint.c
    data = read_text(name, s.data_dir, c.block_size, c.train_size, checkpoint.meta["is_bytes"])
    check(data.meta["data"]["sha256"] == checkpoint.meta["data"].get("sha256"),
          f"{checkpoint.path} was trained on another {name} than this {data.name}")
    return data


# -------------------------------------------------------------------------------------------------
# the bound

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


@torch.no_grad()
def left_to_right(method, x0):
    """The exact likelihood of a masked model that writes from left to right: x0 (B, T) -> nats per
    token (B,) float64.

    -log p(x0) = - sum_i log p(x_i | x_<i, all others masked) / T, in T network calls: one order of
    the many that the bound averages over."""
    B, T = x0.shape
    position = torch.arange(T, device=x0.device)
    nats = torch.zeros(B, dtype=torch.float64)
    for i in tqdm(range(T), desc="left to right", leave=False, disable=None):
        x = x0.masked_fill(position >= i, method.mask_id)
        share = torch.full((B,), (T - i) / T, device=x0.device)
        logits = method.net(x, share)                                  # (B, T, V)
        nats += F.cross_entropy(logits[:, i], x0[:, i], reduction="none").cpu().double()
    return nats / T


# -------------------------------------------------------------------------------------------------
# tables

LIKELIHOOD_COLUMNS = {
    "checkpoint": 0, "method": 0, "parameters": 0, "steps": 0, "bound, nats/char": 4, "± text": 4,
    "± draws": 4, "bits/char": 3, "minus the first": 4, "masked CE": 3, "left to right": 4,
    "minus its bound there": 4}
FIFTH_COLUMNS = {"checkpoint": 0, "0-20%": 3, "20-40%": 3, "40-60%": 3, "60-80%": 3, "80-100%": 3}


def n_parameters(method):
    return sum(p.numel() for p in method.parameters())


def mean_and_stderr(windows):
    return windows.mean().item(), block_stderr(windows)


def likelihood_tables(checkpoints, s):
    """The bounds, a table for each corpus, alphabet and block size, in which all have the same
    windows under the same masks and are compared with the first; and their parts by noise level.
    -> tables"""
    groups = {}
    for checkpoint in checkpoints:
        data = corpus(checkpoint, s)
        key = data.name, data.meta["data"]["sha256"], data.tokenizer.chars, data.T, data.unit
        groups.setdefault(key, []).append(checkpoint)
    tables = []
    noise_levels = {}
    for group in groups.values():
        data = corpus(group[0], s)
        tables.append(Table(bound_title(data, s.windows), LIKELIHOOD_COLUMNS))
        first = None
        for checkpoint in group:
            e = likelihood(checkpoint.method, spaced_rows(data.val, s.windows), s.draws)
            tables[-1].add(*bound_row(checkpoint, data, e, first, s))
            if first is None:
                first = e["windows"]
            if checkpoint.method.eval_levels > 1:
                title = f"nats by {checkpoint.method.noise_name}"
                noise_levels.setdefault(title, []).append([checkpoint.path, *e["fifths"]])
    for title, rows in noise_levels.items():
        tables.append(Table(title, FIFTH_COLUMNS, rows))
    return tables


def bound_title(data, most):
    W = len(data.val)
    cut = f"{most:,} of {W:,} " if most < W else ""
    unit = "bytes; nats and bits are per byte" if data.unit == "byte" else "characters"
    return (f"{data.name}, held out: {cut}windows of {data.T}, {len(data.tokenizer)} different "
            f"{unit}")


def bound_row(checkpoint, data, e, first, s):
    """A row of LIKELIHOOD_COLUMNS; first (W,): the bounds of the first row, or None."""
    method = checkpoint.method
    exact = method.eval_levels == 1
    error = math.hypot(e["stderr"], e["mc"])
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
    return (checkpoint.path, checkpoint.name, n_parameters(method), checkpoint.meta["step"],
            e["bound"], e["stderr"], "exact" if exact else e["mc"],
            (e["bound"] / math.log(2), error / math.log(2)), difference,
            None if exact else e["masked_ce"], in_order, gap)

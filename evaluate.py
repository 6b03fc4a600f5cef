"""Measure checkpoints: the bound with both its errors, differences from the first, the exact left-to-right likelihood, and what samples
are worth. Prints Markdown with the command, commit and machine on top.                                          settings: config.Evaluate

    python evaluate.py                                                  # out/masked if trained, else the checkpoint in results/
    python evaluate.py --out=out/masked,results/masked.pt --n=0         # no samples: bounds, and their paired difference
    python evaluate.py --bound=False --exact=0 --steps=16 --order=confidence"""
import functools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import train
from config import AMP, DEVICE, GPU, HERE, Evaluate, Masked, Sampler, parse, run
from data import Text
from generate import newest

BUILD = {"masked": train.build, "ar": train.build}
WORD, NAME = re.compile(r"(?:[^\W\d_]|')+"), re.compile(r"^[A-Z][A-Za-z ]*:$", re.M)   # words; lines that name a speaker
SPAN = 16   # characters of a held-out block that are infilled, in its middle


def stamp():
    """One line: the command, the commit (+ if files were changed since) and the machine."""
    git = lambda *args: subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except OSError:   # no git
        commit = ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), "") if Path("/proc/cpuinfo").exists() else ""
    machine = torch.cuda.get_device_name() if GPU else f"{cpu or platform.machine()}, {torch.get_num_threads()} threads"
    command = shlex.join(["python", os.path.relpath(sys.argv[0], HERE), *sys.argv[1:]])
    return (f"`{command}` at commit {commit or 'unknown'}; {machine}, {str(AMP)[6:]}, PyTorch "
            f"{torch.__version__}")


def open_checkpoint(path):
    """-> a checkpoint ready to measure: .path, .name of the method, .c settings, .meta, .method (averaged weights)."""
    name, c, meta, weights = train.load(path, tuple(BUILD))
    method = BUILD[name](c, meta).to(DEVICE).eval()
    method.load_state_dict(weights)
    return SimpleNamespace(path=str(path), name=name, c=c, meta=meta, method=method)


@functools.cache
def text(name, data_dir, block_size, train_size):
    """A corpus in windows of block_size, read once; with .source, the training part as a str, and .words, the words it has."""
    data = Text(Masked(dataset=name, data_dir=data_dir, block_size=block_size, train_size=train_size))
    data.source = data.alphabet.decode(data.train[:10 ** 7].tolist())     # of text8 and enwik8 a ninth: it is searched again and again
    data.words = vocabulary(data.source)
    return data


def corpus(checkpoint, s):
    """The text a checkpoint was trained on; one line and exit 1 if it is not to be had."""
    name, sha256 = checkpoint.meta["data"].values()
    if name.startswith("file ") and not s.dataset:
        raise SystemExit(f"{checkpoint.path} was trained on the {name}: pass its path, --dataset=PATH")
    data = text(s.dataset if name.startswith("file ") else name, s.data_dir, checkpoint.c.block_size, checkpoint.c.train_size)
    if data.meta["data"]["sha256"] != sha256:
        raise SystemExit(f"{checkpoint.path} was trained on another {name} than this {data.name}")
    return data


# ---- likelihood

def likelihood(method, val):
    """The bound of method on val (W, T), from two sets of masks: as `train.evaluate`, with windows, buckets and masked_ce averaged, and
    mc, the Monte Carlo error of the bound, from the differences of the windows: mc^2 = var / (4 W). It errs on the large side, as if
    windows drew their noise levels independently; in truth they share them out."""
    a = train.evaluate(method, val, method.levels)
    b = a if method.levels == 1 else train.evaluate(method, val, method.levels, seed=1)
    windows = (a["windows"] + b["windows"]) / 2
    mc = ((a["windows"] - b["windows"]).std() / 2 / len(windows) ** .5).item()
    return dict(windows=windows, bound=windows.mean().item(), stderr=train.text_error(windows), mc=mc,
                masked_ce=(a["masked_ce"] + b["masked_ce"]) / 2, buckets=[(x + y) / 2 for x, y in zip(a["buckets"], b["buckets"], strict=True)])


@torch.no_grad()
def left_to_right(method, x0):
    """The exact likelihood of a masked model that writes from left to right: x0 (B, T) -> nats per token (B,) float64.

    -log p(x0) = - sum_i log p(x_i | x_<i, all others masked) / T, T network calls: one order of the many that the bound averages over."""
    B, T = x0.shape
    nats = torch.zeros(B, dtype=torch.float64)
    for i in range(T):
        x = x0.masked_fill(torch.arange(T, device=x0.device) >= i, method.mask)
        logits = method.net(x, torch.full((B,), (T - i) / T, device=x0.device))       # (B, T, V)
        nats += F.cross_entropy(logits[:, i], x0[:, i], reduction="none").cpu().double()
    return nats / T


def likelihood_tables(checkpoints, s):
    """Print the bounds and what belongs to them for checkpoints, each compared window by window with the first."""
    print("| checkpoint | method | parameters | steps | block | bound, nats/char | ± text | ± masks | bits/char | minus the first | masked CE "
          "| left to right (windows) | minus its bound there |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    first, buckets = None, []
    for k in checkpoints:
        data = corpus(k, s)
        e = likelihood(k.method, data.val)
        first = first or (data, e)
        same = data.T == first[0].T and data.meta == first[0].meta
        gap = e["windows"] - first[1]["windows"] if same else None                    # the same windows under the same masks
        minus = "" if first[1] is e else f"{gap.mean():+.4f} ± {train.text_error(gap):.4f}" if same else "other windows"
        ltr, ltr_gap = "", ""
        if s.exact and k.name == "masked":
            at = torch.linspace(0, len(data.val) - 1, min(s.exact, len(data.val))).long()
            nats = torch.cat([left_to_right(k.method, x.long()) for x in data.val[at].split(128)])
            gap = nats - e["windows"][at]
            ltr, ltr_gap = f"{nats.mean():.4f} ± {train.text_error(nats):.4f} ({len(at)})", f"{gap.mean():+.4f} ± {train.text_error(gap):.4f}"
        exact = k.method.levels == 1
        size = sum(p.numel() for p in k.method.parameters())
        print(f"| {k.path} | {k.name} | {size:,} | {k.meta['step']:,} | {data.T} | {e['bound']:.4f} | {e['stderr']:.4f} | "
              f"{'exact' if exact else format(e['mc'], '.4f')} | {e['bound'] / math.log(2):.3f} | {minus} | "
              f"{'' if exact else format(e['masked_ce'], '.3f')} | {ltr} | {ltr_gap} |", flush=True)
        buckets += [] if exact else [f"| {k.path} | " + " | ".join(f"{b:.3f}" for b in e["buckets"]) + " |"]
    if buckets:
        print("\n| cross-entropy where masked are | 0-20% | 20-40% | 40-60% | 60-80% | 80-100% |\n|---|---:|---:|---:|---:|---:|")
        print("\n".join(buckets))


# ---- samples

def mean(parts):
    """Sum of a / sum of b over parts (a, b), with its standard error by the delta method."""
    a, b = torch.tensor(parts, dtype=torch.float64).unbind(1)
    ratio = a.sum() / b.sum()
    return ratio.item(), ((a - ratio * b).std() * len(a) ** .5 / b.sum()).item()


def vocabulary(text):
    """The words of a text, in lower case: a word is a run of letters and apostrophes."""
    return {w.lower() for w in WORD.findall(text)}


def overlap(text, source):
    """Length of the longest piece of text that is in source, to the letter."""
    longest = 0
    for i in range(len(text)):
        while i + longest < len(text) and text[i:i + longest + 1] in source:
            longest += 1
    return longest


def text_metrics(texts, source, known):
    """What a list of texts is like, beside the training text `source` with the words `known`. -> dict, pairs are (mean, standard error
    over texts): words, the share of words that are known, of those strictly inside a text (its ends are cut); names, lines that name a
    speaker, in 1,000 characters; entropy of the characters in bits; fourgrams, different 4-grams as a share of all; overlap, the longest
    piece of each text that stands in source; longest, the longest of all."""
    counts = Counter("".join(texts))
    surprise = {ch: -math.log2(n / counts.total()) for ch, n in counts.items()}
    grams = Counter("".join(g) for t in texts for g in zip(t, t[1:], t[2:], t[3:], strict=False))
    overlaps = [overlap(t, source) for t in texts]
    words = [[w.lower() in known for w in WORD.findall(t)[1:-1]] for t in texts]
    return dict(words=mean([(sum(w), len(w)) for w in words]), names=mean([(1000 * len(NAME.findall(t)), len(t)) for t in texts]),
                entropy=mean([(sum(surprise[ch] for ch in t), len(t)) for t in texts]), fourgrams=len(grams) / max(1, grams.total()),
                overlap=mean([(o, 1) for o in overlaps]), longest=max(overlaps))


@torch.no_grad()
def judged(judge, x):
    """Nats per character of the texts x (n, L) under an autoregressive judge of the same alphabet, exact, in pieces of at most its
    block size. -> (mean, standard error over texts)"""
    nats = sum(judge.method.bound(piece)[0] * piece.size(1) for piece in x.split(judge.c.block_size, 1))
    return mean([(n, x.size(1)) for n in nats.tolist()])


def written(method, x, known, s):
    """The sampler's result x (B, T), network calls a text needed on average, and seconds."""
    train.reseed(s.seed)
    begun, calls, open_ = time.time(), 0., torch.ones(len(x), dtype=torch.bool, device=x.device)
    for y, _ in method.sample(x, known, s):                                           # noqa: B007
        calls += open_.double().mean().item()
        open_ = (y == method.mask).any(1)
    return y, calls, time.time() - begun


def infilling(checkpoint, val):
    """Share of the characters of a held-out span of SPAN that are found, greedily, the most certain first, one a call; the twin sees
    only what is left of it. No sampler setting touches it. -> (mean, standard error over blocks)"""
    x, T = val.long(), val.size(1)
    span = torch.zeros(T, dtype=torch.bool, device=x.device)
    span[max(0, T - SPAN) // 2:][:SPAN] = True
    y, *_ = written(checkpoint.method, x, ~span.expand_as(x), Sampler(steps=SPAN, order="entropy", temperature=0.0, remask=0.0))
    return mean([(n, span.sum().item()) for n in ((y == x) & span).sum(1).tolist()])


HEAD = ("| text | blocks | judge, nats/char | entropy, bits | known words | names in 1,000 | distinct 4-grams | overlap with training, mean "
        "(longest) | infilled | calls | characters/s |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")


def sample_row(title, x, data, judge, more=("", "", "")):
    """One row of the table of samples, for the texts x (n, L). more: infilled, calls, characters/s"""
    texts = [data.alphabet.decode(i) for i in x.tolist()]
    pm = lambda pair, digits: f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
    m = text_metrics(texts, data.source, data.words)
    return (f"| {title} | {len(texts)} | {pm(judged(judge, x), 3) if judge else ''} | {pm(m['entropy'], 3)} | {pm(m['words'], 3)} | "
            f"{pm(m['names'], 1)} | {m['fourgrams']:.3f} | {pm(m['overlap'], 1)} ({m['longest']}) | " + " | ".join(more) + " |")


def judge_of(s):
    """The judge: an autoregressive checkpoint, whose likelihood is exact."""
    judge = open_checkpoint(s.judge or HERE / "results/judge.pt")
    if judge.name != "ar":
        raise SystemExit(f"{judge.path} is a {judge.name} checkpoint, whose likelihood is a bound; a judge is trained with --objective=ar")
    return judge


def sample_setup(checkpoint, s, judge):
    """-> (the corpus; blocks, at most s.n evenly spaced held-out windows; the judge, or None if it was trained on another text)"""
    data = corpus(checkpoint, s)
    blocks = data.val[torch.linspace(0, len(data.val) - 1, min(s.n, len(data.val))).long()].long()
    fits = judge.meta["data"]["sha256"] == checkpoint.meta["data"]["sha256"]
    if not fits:
        print(f"{judge.path} was trained on {judge.meta['data']['name']}: it does not judge {checkpoint.path}", file=sys.stderr)
    return data, blocks, judge if fits else None


def sample(checkpoint, n, s):
    """n blocks written from nothing by the sampler s. -> (x (n, T), network calls, characters a second)"""
    T = checkpoint.c.block_size
    nothing = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    x, calls, seconds = written(checkpoint.method, nothing, nothing > 0, s)
    return x, calls, n * T / seconds


def sample_tables(checkpoints, s, judge):
    """Print what the samples of checkpoints are like, beside as much held-out text in the same windows."""
    print(HEAD)
    shown = set()
    for k in checkpoints:
        data, blocks, fitting = sample_setup(k, s, judge)
        if data not in shown:
            title = f"{data.name}, held out" + f", beside {len(data.train):,} characters" * bool(k.c.train_size)
            print(sample_row(title, blocks, data, fitting), flush=True)
        shown.add(data)
        x, calls, speed = sample(k, len(blocks), s)
        found = "{:.3f} ± {:.3f}".format(*infilling(k, blocks))
        print(sample_row(k.path, x, data, fitting, (found, f"{calls:.1f}", f"{speed:,.0f}")), flush=True)


def main(argv):
    s = parse(argv, Evaluate())
    checkpoints = [open_checkpoint(p) for p in s.out.split(",") if p] or [open_checkpoint(newest())]
    judge = judge_of(s) if s.n else None
    for k in checkpoints:
        corpus(k, s)                                                   # what is missing is told before anything is measured
    print(stamp() + "\n")
    if s.bound:
        likelihood_tables(checkpoints, s)
    if s.n:
        print(f"\nsampler: {', '.join(f'{k}={getattr(s, k)}' for k in Sampler.__dataclass_fields__)}\n")
        sample_tables(checkpoints, s, judge)


if __name__ == "__main__":
    run(main)

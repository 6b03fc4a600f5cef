"""Measure checkpoints: the bound with both its errors, differences from the first, the exact left-to-right likelihood, and what samples
are worth. Prints Markdown with the command, commit and machine on top.                                          settings: config.Evaluate

    python evaluate.py                                                  # out/masked if trained, else the checkpoint in results/
    python evaluate.py --out=out/masked,results/masked.pt --n=0         # no samples: bounds, and their paired difference
    python evaluate.py --bound=False --exact=0 --steps=16 --order=confidence
    python evaluate.py --out=out/mnist --guidance=1                     # digits, beside real ones, noise and blur"""
import functools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import analog_bits
import embed_diffusion
import mnist_ddpm
import train
from config import AMP, DEVICE, GPU, HERE, CodeSampler, EmbedSampler, Evaluate, Masked, Mnist, Picture, Sampler, parse, run
from data import Images, Text, patches, whole
from generate import newest
from metrics import Reader, blurred, digit_metrics, frechet, mean, noise_like, read, text_metrics, train_reader, vocabulary
from mnist_ddpm import grey, many

BUILD = {"masked": train.build, "ar": train.build, "bits": analog_bits.build, "embed": embed_diffusion.build, "mnist": mnist_ddpm.build}
CODES = {"bits": CodeSampler, "embed": EmbedSampler}                                  # how they are sampled
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
    method, c, meta = train.load(path, lambda c, meta: BUILD[meta["method"]](c, meta), tuple(BUILD))
    return SimpleNamespace(path=str(path), name=meta["method"], c=c, meta=meta, method=method)


@functools.cache
def text(name, data_dir, block_size, train_size, raw):
    """A corpus in windows of block_size, read once; with .source, the training part as a str, and .words, the words it has."""
    data = Text(Masked(dataset=name, data_dir=data_dir, block_size=block_size, train_size=train_size), raw)
    data.source = data.alphabet.decode(data.train[:10 ** 7].tolist())     # of text8 and enwik8 a ninth: it is searched again and again
    data.words = vocabulary(data.source)
    return data


def corpus(checkpoint, s):
    """The text a checkpoint was trained on; one line and exit 1 if it is not to be had."""
    name, sha256 = checkpoint.meta["data"].values()
    if name.startswith("file ") and not s.dataset:
        raise SystemExit(f"{checkpoint.path} was trained on the {name}: pass its path, --dataset=PATH")
    c = checkpoint.c
    data = text(s.dataset if name.startswith("file ") else name, s.data_dir, c.block_size, c.train_size, getattr(c, "code", "") == "bytes")
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
    print("| checkpoint | method | parameters | steps | block | bound, nats/char | ± text | ± draws | bits/char | minus the first | masked CE "
          "| left to right (windows) | minus its bound there |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    first, buckets = None, {}
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
              f"{'' if math.isnan(e['masked_ce']) or exact else format(e['masked_ce'], '.3f')} | {ltr} | {ltr_gap} |", flush=True)
        if not exact:
            buckets.setdefault(k.method.noise, []).append(f"| {k.path} | " + " | ".join(f"{b:.3f}" for b in e["buckets"]) + " |")
    for noise, rows in buckets.items():
        print(f"\n| nats by {noise} | 0-20% | 20-40% | 40-60% | 60-80% | 80-100% |\n|---|---:|---:|---:|---:|---:|")
        print("\n".join(rows))


# ---- samples

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
    masks = isinstance(s, Sampler)                                                    # else every text takes every step
    for y, _ in method.sample(x, known, s):                                           # noqa: B007
        calls += open_.double().mean().item() if masks else 1 + s.twice
        open_ = (y == method.mask).any(1)
    return y, calls, time.time() - begun


def sampler(checkpoint, s):
    """How a checkpoint of its kind is sampled."""
    if checkpoint.name not in CODES:
        return s
    rounding = {"rounding": s.rounding} if checkpoint.name == "embed" else {}
    return CODES[checkpoint.name](steps=s.gaussian_steps, sampler=s.sampler or CodeSampler.sampler, td=s.td, twice=s.twice, seed=s.seed, **rounding)


def infilling(checkpoint, val):
    """Share of the characters of a held-out span of SPAN that are found, greedily, the most certain first, one a call, bits in 50 DDIM
    steps; the twin sees only what is left of it. No sampler setting touches it. -> (mean, standard error over blocks)"""
    x, T = val.long(), val.size(1)
    span = torch.zeros(T, dtype=torch.bool, device=x.device)
    span[max(0, T - SPAN) // 2:][:SPAN] = True
    greedy = (CODES[checkpoint.name](sampler="ddim", replace=not checkpoint.c.prompts + checkpoint.c.spread) if checkpoint.name in CODES else
              Sampler(steps=SPAN, order="entropy", temperature=0.0, remask=0.0))
    y, *_ = written(checkpoint.method, x, ~span.expand_as(x), greedy)
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
    fits = all(judge.meta[k] == checkpoint.meta[k] for k in ("alphabet", "data"))
    if not fits:
        print(f"{judge.path} was trained on {judge.meta['data']['name']}, or its characters are others: it does not judge {checkpoint.path}",
              file=sys.stderr)
    return data, blocks, judge if fits else None


def sample(checkpoint, n, s):
    """n blocks written from nothing by the sampler s. -> (x (n, T), network calls, characters a second)"""
    T = checkpoint.c.block_size
    nothing = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    x, calls, seconds = written(checkpoint.method, nothing, nothing > 0, sampler(checkpoint, s))
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


# ---- digits

@functools.cache
def real_digits(name, data_dir, sha256):
    """Real digits as `metrics.digit_metrics` wants them: train and test images (n, 28, 28), features of the test images, and two Readers:
    those in results/ if they were trained on this data, else trained once, for some minutes, and kept in out/."""
    data = Images(Mnist(dataset=name, data_dir=data_dir))
    if data.meta["data"]["sha256"] != sha256:
        raise SystemExit(f"these {name} are others than the checkpoint was trained on")
    images, test = whole(data.train, 4), whole(data.val, 4)
    kept = [HERE / folder / f"readers-{sha256[:8]}.pt" for folder in ("results", "out")]
    path = next((p for p in kept if p.exists()), kept[1])
    if not path.exists():
        print(f"training two readers of {name}, once, some minutes: {path}", file=sys.stderr)
        path.parent.mkdir(exist_ok=True)
        train.save(path, [{k: v.half() for k, v in train_reader(images, data.labels, seed).state_dict().items()} for seed in (0, 1)])
    readers = []
    for weights in torch.load(path, map_location=DEVICE, weights_only=True):
        readers.append(Reader().to(DEVICE).eval())
        readers[-1].load_state_dict(weights)
    features, digit = read(readers[0], test)
    right = [(d == data.val_labels).double().mean().item() for d in (digit, read(readers[1], test)[1])]
    about = f"{name}; the judge reads {right[0]:.2%} of its {len(test):,} test images right, the other reader {right[1]:.2%}"
    return SimpleNamespace(about=about, data=data, sets=(images, test, features, *readers), labels=data.labels)


DIGITS_HEAD = ("| digits | n | read as asked | Frechet distance | times the floor | precision | recall | nearest training digit, of a test digit's "
               "| read as 0, 1 ... 9, % | digits/s |\n|---|---:|---:|---:|---:|---:|---:|---:|---|---:|")


def digit_row(title, m, floor, speed=""):
    """One row of the table of digits, m from `metrics.digit_metrics`."""
    pm = lambda pair: "" if math.isnan(pair[0]) else f"{pair[0]:.3f} ± {pair[1]:.3f}"
    shares = " ".join(f"{100 * n / sum(m['read']):.0f}" for n in m["read"])
    return (f"| {title} | {sum(m['read'])} | {pm(m['right'])} | {pm(m['frechet'])} | {m['frechet'][0] / floor:.1f} | {pm(m['precision'])} | "
            f"{pm(m['recall'])} | {pm(m['near'])} | {shares} | {speed} |")


def digit_floor(real, n, seed):
    """Print the head of the table and what n real digits, noise and blurred digits score. -> the Frechet distance of the real ones: the mean
    of up to ten draws, since one may be half as much again; its error is the deviation of one draw."""
    print(f"digits: {real.about}\n")
    train.reseed(seed)
    draws = [i.to(DEVICE) for i in torch.randperm(len(real.labels)).split(n)[:10]]
    images, labels = real.sets[0][draws[0]], real.labels[draws[0]]
    m = digit_metrics(images, labels, real.sets, itself=1)
    each = torch.tensor([frechet(read(real.sets[3], real.sets[0][i])[0], real.sets[2]) for i in draws if len(i) == n])
    floor = each.mean().item()
    m["frechet"] = (floor, each.std(correction=min(1, len(each) - 1)).item())
    print(DIGITS_HEAD + "\n" + digit_row("real, from the training set", m, floor))
    print(digit_row("noise, pixel by pixel as in real ones", digit_metrics(noise_like(real.sets[0], n), None, real.sets), floor))
    print(digit_row("real, blurred", digit_metrics(blurred(images), labels, real.sets), floor), flush=True)
    return floor


def digit_sample(k, real, s):
    """Pictures of s.digits digits, all ten in turn, by checkpoint k. -> (their metrics, pictures a second)"""
    asked, begun = torch.arange(s.digits) % 10, time.time()
    how = Picture(guidance=s.guidance, steps=s.gaussian_steps, sampler=s.sampler or Picture.sampler, td=s.td, seed=s.seed)
    x = grey(many(k.method, asked, k.c, how)).to(DEVICE)
    speed = f"{s.digits / (time.time() - begun):.1f}"
    return digit_metrics(x, asked, real.sets), speed


def digit_tables(checkpoints, s):
    """Print the bounds of checkpoints of digits, and what pictures by them are like, below the floors of their data."""
    reals = [real_digits(k.meta["data"]["name"], s.data_dir, k.meta["data"]["sha256"]) for k in checkpoints]
    if s.bound:
        print("| checkpoint, without labels or guidance | parameters | steps | bits/dim | ± images | ± draws |\n|---|---:|---:|---:|---:|---:|")
    for k, real in zip(checkpoints, reals, strict=True) if s.bound else ():
        e = likelihood(k.method, patches(whole(real.data.val, 4), k.c.patch))
        bits = " | ".join(f"{e[name] / math.log(2):.3f}" for name in ("bound", "stderr", "mc"))
        print(f"| {k.path} | {sum(p.numel() for p in k.method.parameters()):,} | {k.meta['step']:,} | {bits} |", flush=True)
    if s.digits:
        print(f"\nguidance {s.guidance:g}, {s.gaussian_steps} {s.sampler or Picture.sampler} steps, td {s.td:g}", end="; ")
    shown, floor = None, 0
    for k, real in zip(checkpoints, reals, strict=True) if s.digits else ():
        if real is not shown:
            shown, floor = real, digit_floor(real, s.digits, s.seed)
        m, speed = digit_sample(k, real, s)
        print(digit_row(k.path, m, floor, speed), flush=True)


def main(argv):
    s = parse(argv, Evaluate())
    every = [open_checkpoint(p) for p in s.out.split(",") if p] or [open_checkpoint(newest())]
    checkpoints, digits = [k for k in every if k.name != "mnist"], [k for k in every if k.name == "mnist"]
    judge = judge_of(s) if s.n and checkpoints else None
    for k in checkpoints:
        corpus(k, s)                                                   # what is missing is told before anything is measured
    for k in digits:
        real_digits(k.meta["data"]["name"], s.data_dir, k.meta["data"]["sha256"])
    print(stamp() + "\n")
    if s.bound and checkpoints:
        likelihood_tables(checkpoints, s)
    if s.n and checkpoints:
        for how in dict.fromkeys(sampler(k, s) for k in checkpoints):
            names = Sampler.__dataclass_fields__ if isinstance(how, Sampler) else ("steps", "sampler", "td", "twice", "rounding", "seed")
            print(f"\nsampler: {', '.join(f'{k}={getattr(how, k)}' for k in names if hasattr(how, k))}\n")
        sample_tables(checkpoints, s, judge)
    if digits:
        print("\n" * bool(checkpoints), end="")
        digit_tables(digits, s)


if __name__ == "__main__":
    run(main)

"""Measure checkpoints: the bound with both its errors, differences from the first, the exact left-to-right likelihood, and what samples
are worth. Prints Markdown with the command, commit and machine on top.                                          settings: config.Evaluate

    python -m evaluation                                                  # every checkpoint under out/ and results/
    python -m evaluation --out=out/masked,results/masked.pt --n=0         # these, no samples: bounds, and their paired difference
    python -m evaluation --report                                         # out/report.html, too: one page for any browser
    python -m evaluation --json=out/table.json --frontier                 # the same as JSON; samples at four temperatures
    python -m evaluation --quick                                          # first trains tiny versions of all four and the twin
    python -m evaluation --bound=False --exact=0 --steps=16 --order=confidence
    python -m evaluation --out=out/mnist --guidance=1                     # digits, beside real ones, noise and blur"""
import functools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import analog_bits
import embed_diffusion
import mnist_ddpm
import train
from config import AMP, DEVICE, GPU, HERE, CodeSampler, EmbedSampler, Evaluate, Masked, Picture, Sampler, parse
from data import Text, patches, whole
from evaluation import report
from evaluation.digits import digit_floor, digit_row, digit_sample, picture, pictures, real_digits
from evaluation.metrics import mean, text_metrics, vocabulary
from evaluation.report import Table

BUILD = {"masked": train.build, "ar": train.build, "bits": analog_bits.build, "embed": embed_diffusion.build, "mnist": mnist_ddpm.build}
CODES = {"bits": CodeSampler, "embed": EmbedSampler}                                  # how they are sampled
SPAN = 16   # characters of a held-out block that are infilled, in its middle


def module_name():
    """What stands after python -m: evaluation, experiments.samplers, ..."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else "evaluation"


def stamp():
    """One line: the command, the commit (+ if files were changed since) and the machine."""
    git = lambda *args: subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except OSError:   # no git
        commit = ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), "") if Path("/proc/cpuinfo").exists() else ""
    machine = torch.cuda.get_device_name() if GPU else f"{cpu or platform.machine()}, {torch.get_num_threads()} threads"
    command = shlex.join(["python", "-m", module_name(), *sys.argv[1:]])
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

def likelihood(method, val, draws=2):
    """The bound of method on val (W, T), from so many sets of masks or noise: as `train.evaluate`, with windows, buckets and masked_ce averaged,
    and mc, the Monte Carlo error of the bound, from how much each window varies: mc^2 = var / (draws W). It errs on the large side, as if
    windows drew their noise levels independently; in truth they share them out. An exact likelihood needs no draws, and has no such error."""
    sets = [train.evaluate(method, val, method.levels, seed=seed) for seed in range(draws if method.levels > 1 else 1)]
    each = torch.stack([e["windows"] for e in sets])                                  # (draws, W)
    windows, mc = each.mean(0), (each.var(0).mean() / each.numel()).sqrt().item() if sets[1:] else 0.
    return dict(windows=windows, bound=windows.mean().item(), stderr=train.text_error(windows), mc=mc,
                masked_ce=sum(e["masked_ce"] for e in sets) / len(sets), buckets=torch.tensor([e["buckets"] for e in sets]).mean(0).tolist())


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


FIFTHS = {"checkpoint": 0, **{f"{i}-{i + 20}%": 3 for i in range(0, 100, 20)}}
LIKELIHOOD = {"checkpoint": 0, "method": 0, "parameters": 0, "steps": 0, "bound, nats/char": 4, "± text": 4, "± draws": 4, "bits/char": 3,
              "minus the first": 4, "masked CE": 3, "left to right": 4, "minus its bound there": 4}


def likelihood_tables(checkpoints, s):
    """The bounds and what belongs to them, a table for each corpus, alphabet and block size, where all are in the same windows under the same
    masks and compared one by one with the first. -> tables"""
    mean_of = lambda windows: (windows.mean().item(), train.text_error(windows))

    def axis(k):
        return corpus(k, s).name, k.meta["alphabet"], k.c.block_size, k.meta["data"]["sha256"], k.method.unit
    tables, noises, ces = [], {}, []
    for here in dict.fromkeys(map(axis, checkpoints)):
        unit = {"char": "characters", "byte": "bytes; nats and bits are per byte"}[here[-1]]
        tables.append(Table(f"{here[0]}, held out: windows of {here[2]}, {len(here[1])} different {unit}", LIKELIHOOD))
        first = None
        for k in (k for k in checkpoints if axis(k) == here):
            data, exact, bits = corpus(k, s), k.method.levels == 1, math.log(2)
            e = likelihood(k.method, data.val, s.draws)
            minus = None if first is None else mean_of(e["windows"] - first)
            first = e["windows"] if first is None else first
            ltr = gap = None
            if s.exact and k.name == "masked":
                at = torch.linspace(0, len(data.val) - 1, min(s.exact, len(data.val))).long()
                nats = torch.cat([left_to_right(k.method, x.long()) for x in data.val[at].split(128)])
                ltr, gap = (mean_of(x) for x in (nats, nats - e["windows"][at]))
            tables[-1].add(k.path, k.name, sum(p.numel() for p in k.method.parameters()), k.meta["step"], e["bound"], e["stderr"],
                           "exact" if exact else e["mc"], (e["bound"] / bits, math.hypot(e["stderr"], e["mc"]) / bits),
                           minus, None if exact else e["masked_ce"], ltr, gap)
            if not exact:
                noises.setdefault(f"nats by {k.method.noise}", []).append((k.path, *e["buckets"]))
            if k.name in CODES:
                ces.append((k.path, *embed_diffusion.cross_entropy_by_noise(k.method, data, 256)))
    for title, rows in (*noises.items(), *[("cross-entropy of the predicted characters by noise, nats", ces)] * bool(ces)):
        tables.append(Table(title, FIFTHS))
        for row in rows:
            tables[-1].add(*row)
    return tables


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


SAMPLES = {"text": 0, "blocks": 0, "judge, nats/char": 3, "entropy, bits": 3, "known words": 3, "names in 1,000": 1, "distinct 4-grams": 3,
           "overlap with training": 1, "longest": 0, "infilled": 3, "calls": 1, "characters/s": 0}


def sample_row(title, x, data, judge, infilled=None, calls=None, speed=None):
    """A row of the table SAMPLES, for the texts x (n, L)."""
    m = text_metrics([data.alphabet.decode(i) for i in x.tolist()], data.source, data.words)
    return (title, len(x), judged(judge, x) if judge else None, m["entropy"], m["words"], m["names"], m["fourgrams"], m["overlap"], m["longest"],
            infilled, calls, speed)


def judge_of(s):
    """The judge: an autoregressive checkpoint, whose likelihood is exact."""
    judge = open_checkpoint(s.judge or os.path.relpath(HERE / "results/judge.pt"))
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
    """What the samples of checkpoints are like, a table for each corpus and block size, beside as much held-out text in the same windows and as
    much by the judge itself; and below it the first of each. -> tables"""
    tables, about = [], ""
    for how in dict.fromkeys(sampler(k, s) for k in checkpoints):
        names = Sampler.__dataclass_fields__ if isinstance(how, Sampler) else ("steps", "sampler", "td", "twice", "rounding", "seed")
        about += f"\n\nsampler: {', '.join(f'{k}={getattr(how, k)}' for k in names if getattr(how, k, '') != '')}"
    print(about)
    for data in dict.fromkeys(corpus(k, s) for k in checkpoints):
        table, first = Table(f"samples, {data.name}, windows of {data.T}; the judge is {judge.path}", SAMPLES), []
        for title, x, *more in sampled(data, [k for k in checkpoints if corpus(k, s) is data], s, judge):
            table.add(*sample_row(title, x, data, *more))
            first.append((title, data.alphabet.decode(x[0].tolist()).replace("\n", "/")))
        tables += [table, Table(f"the first of each, {data.name}, / for a new line", {"text": 0, "sample": 0})]
        for row in first:
            tables[-1].add(*row)
    return tables


def sampled(data, checkpoints, s, judge):
    """The texts of a table of samples, as they are written: title, x (n, T), and what else sample_row takes."""
    for i, k in enumerate(checkpoints):
        _, blocks, fitting = sample_setup(k, s, judge)
        if not i:
            yield f"held out, beside {len(data.train):,} characters", blocks, fitting
            if fitting and fitting.c.block_size >= data.T:
                own = Sampler(temperature=1.0, seed=s.seed)
                x, calls, seconds = written(fitting.method, torch.zeros_like(blocks), torch.zeros_like(blocks) > 0, own)
                yield "the judge's own, temperature 1", x, fitting, None, calls, x.numel() / seconds
        x, calls, speed = sample(k, len(blocks), s)
        yield k.path, x, fitting, infilling(k, blocks), calls, speed
        for title, how in frontier(k, s) if s.frontier else ():
            x, calls, speed = sample(k, len(blocks), how)
            yield f"{k.path}, {title}", x, fitting, None, calls, speed


def frontier(k, s):
    """The frontier of quality against variety: samplers at four temperatures, or for bits and embeddings four td, which is their temperature."""
    if k.name in CODES:
        return [(f"td {td:g}", replace(s, td=td)) for td in (0., .5, 1., 2.)]
    return [(f"temperature {t:g}", replace(s, temperature=t)) for t in (.7, .8, .9, 1.)]


# ---- digits

def digit_tables(checkpoints, s):
    """The bounds of checkpoints of digits, and what pictures by them are like, a table for each set of digits, below its floors. -> tables"""
    tables, noises = [], []
    key = lambda k: (k.meta["data"]["name"], s.data_dir, k.meta["data"]["sha256"])
    if s.bound:
        columns = {"checkpoint": 0, "parameters": 0, "steps": 0, "bits/dim": 3, "± images": 3, "± draws": 3}
        tables.append(Table("digits, held out, without labels or guidance", columns))
    for k in checkpoints if s.bound else ():
        e = likelihood(k.method, patches(whole(pictures(*key(k)).val, 4), k.c.patch), s.draws)
        tables[0].add(f"{k.path}, {key(k)[0]}", sum(p.numel() for p in k.method.parameters()), k.meta["step"],
                      *(e[name] / math.log(2) for name in ("bound", "stderr", "mc")))
        noises.append((k.path, *e["buckets"]))
    if noises:
        tables.append(Table("nats by noise level, digits", FIFTHS))
        for row in noises:
            tables[-1].add(*row)
    for data in dict.fromkeys(map(key, checkpoints)) if s.digits else ():
        print(f"\nguidance {s.guidance:g}, {s.gaussian_steps} {s.sampler or Picture.sampler} steps, td {s.td:g}")
        table, floor = digit_floor(real_digits(*data), s.digits, s.seed)
        tables.append(table)
        for k in (k for k in checkpoints if key(k) == data):
            m, speed = digit_sample(k, real_digits(*data), s)
            table.add(*digit_row(k.path, m, floor, speed))
    return tables


# ---- all of it

def everything():
    """Paths of all checkpoints under out/ and results/; of a run that has not come to its first report the one that is not there yet."""
    runs = sorted({p.parent / "best.pt" for name in ("best.pt", "ckpt.pt") for p in HERE.glob(f"out/**/{name}")})
    return [os.path.relpath(p) for p in (*runs, *sorted(HERE.glob("results/*.pt"))) if not p.name.startswith("readers-")]


def usable(paths, s):
    """The checkpoints among paths that can be opened and whose data are to be had; what cannot is named, a line each. SystemExit: none can."""
    found, lost, missing = [], [], {}                                                 # missing: data that are not to be had are looked for once
    for path in paths:
        try:
            k = open_checkpoint(path)
            sha256 = k.meta["data"]["sha256"]
            if sha256 in missing:
                raise SystemExit(missing[sha256])
            try:
                pictures(k.meta["data"]["name"], s.data_dir, sha256) if k.name == "mnist" else corpus(k, s)
            except SystemExit as e:
                missing[sha256] = str(e)
                raise
            found.append(k)
        except SystemExit as e:
            lost.append(str(e) if str(path) in str(e) else f"{path}: {e}")
    lost = lost or ["no checkpoint under out/ or results/: train first, or pass --out=FOLDER"] * (not found)
    for line in lost if found else lost[:-1]:
        print(line, file=sys.stderr)
    if not found:
        raise SystemExit(lost[-1])
    return found


QUICK = "--block_size=64 --n_layer=2 --n_head=2 --n_embd=64 --max_iters=600 --eval_interval=200 --compile=False".split()


def quick(s):
    """Train tiny versions of all four and the twin in out/quick, where they are not yet, on data that need no network, or go on with them. -> s
    for them; SystemExit: stopped, by Ctrl-C"""
    tasks = {"ar": (train.main, "--objective=ar"), "masked": (train.main, "--objective=masked"), "bits": (analog_bits.main, "--seed=1337"),
             "embed": (embed_diffusion.main, "--seed=1337"), "mnist": (mnist_ddpm.main, "--dataset=digits")}
    for name, (main, more) in tasks.items():
        out = HERE / "out/quick" / name
        finished = lambda path=out / "best.pt": path.exists() and "bound" in train.read(path, tuple(BUILD))
        if not finished():
            main(["--resume", f"--out={out}"] if (out / "ckpt.pt").exists() else ["--dataset=pydoc", *QUICK, more, f"--out={out}"])
        if not finished():
            raise SystemExit(130)
    out = ",".join(os.path.relpath(HERE / "out/quick" / name) for name in tasks)
    return replace(s, out=out, judge=str(HERE / "out/quick/ar"), digits=0, n=min(s.n, 50))


def replay(k, s):
    """One text or digit as it is made, for the page."""
    name = f"{k.name}: {k.path}"
    if k.name == "mnist":
        return {"name": name, **report.drawing(k.method, k.c, 3, picture(s))}
    return {"name": name, **report.writing(k.method, corpus(k, s).alphabet, k.c.block_size, sampler(k, s))}


def main(argv):
    s = parse(argv, Evaluate())
    files = {HERE / "out/report.html": report.page} if s.report or s.quick else {}
    files |= {Path(s.json): json.dumps} if s.json else {}
    for path in files:                                                                # what cannot be written is told before anything is measured
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    s = quick(s) if s.quick else s
    every = usable([p for p in s.out.split(",") if p] or everything(), s)
    checkpoints, digits = [k for k in every if k.name != "mnist"], [k for k in every if k.name == "mnist"]
    judge, tables = judge_of(s) if s.n and checkpoints else None, []
    print(stamp())
    if s.bound and checkpoints:
        tables += likelihood_tables(checkpoints, s)
    if s.n and checkpoints:
        tables += sample_tables(checkpoints, s, judge)
    if digits:
        tables += digit_tables(digits, s)
    if files:
        runs = [(k.path, Path(k.path) / "best.pt" if Path(k.path).is_dir() else k.path) for k in every]
        data = report.gather(stamp(), tables, runs, [replay(k, s) for k in every])
    for path, render in files.items():
        path.write_text(render(data), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


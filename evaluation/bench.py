"""Speed of the text models, as Markdown.    settings: config.Masked

    python -m evaluation.bench
    python -m evaluation.bench --n_layer=8
    python -m evaluation.bench --gpu          # the parts of a step, its kernels, sampling

Times are midhinges, the mean of the two quartiles, ± half of their distance; with --gpu medians,
the least and the greatest. The networks take their steps in turn, so that a busy machine slows all
alike. The share of the peak is against a large matrix product in the same precision, in the same
round.
"""
import copy
import operator
import statistics
import time
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import analog_bits
import config
import embed_diffusion
import train
from config import AMP, DEVICE, GPU, Bits, CodeSampler, Config, Embed, EmbedSampler, Masked, Sample
from config import check, parse, run
from evaluation.report import Table, stamp
from generate import Recorded
from step import TrainingStep, call

V = 65                     # of random text, which costs nothing to read
META = {"alphabet": "".join(map(chr, range(32, 32 + V)))}
N_WARM = 3                 # rounds that are not timed
PLAIN = "plain: eager, fp32, AdamW"
VARIANTS = {               # of masked diffusion and its baseline: precision, what else differs
    "as trained": (AMP, {}),
    "not compiled": (AMP, {"compile": False}),
    "fp32": (torch.float32, {}),
    PLAIN: (torch.float32, {"compile": False, "optimizer": "adamw"}),
}


@dataclass(frozen=True)
class Bench(Masked):   # python -m evaluation.bench
    gpu: bool = False              # the parts of a step and its kernels, on a GPU


def text_models(c):
    """The four with settings that are those of c where they share them: {name: (script, c)}."""
    shared = {f.name: getattr(c, f.name) for f in fields(Config)}
    return {
        "masked": (train, replace(c, objective="masked")),
        "AR": (train, replace(c, objective="ar")),
        "bits": (analog_bits, Bits(**shared)),
        "embeddings": (embed_diffusion, Embed(**shared)),
    }


def timed(f, *args):
    """Seconds that f(*args) takes, with the device's queue empty before and after."""
    if GPU:
        torch.cuda.synchronize()
    start_time = time.perf_counter()
    f(*args)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def midhinge(times):
    """The mean of the lower and the upper quartile, and half of their distance."""
    low, _, high = statistics.quantiles(times, n=4)
    return (low + high) / 2, (high - low) / 2


class Trained:
    """A network that is trained on random text in a precision, and the seconds of its steps."""

    def __init__(self, script, c, dtype):
        self.c = c
        self.dtype = dtype
        config.AMP = dtype
        self.method = script.build(c, META).to(DEVICE).train()
        ema = copy.deepcopy(self.method).requires_grad_(False)
        self.train_step = TrainingStep(self.method, ema, self, c)
        self.seconds = []

    def batch(self, n):
        return torch.randint(V, (n, self.c.block_size), device=DEVICE)

    def step(self, i):
        config.AMP = self.dtype
        if i == 0 and self.c.compile:
            self.train_step.compile()
        self.seconds.append(timed(self.train_step, i))

    def flops(self):
        """Of a step: 2 a weight and token forward, 4 backward, those of attention, and half a
        further forward pass with self-conditioning."""
        embedded = {id(m.weight) for m in self.method.modules() if isinstance(m, nn.Embedding)}
        n_weights = sum(p.numel() for p in self.method.parameters() if id(p) not in embedded)
        passes = 3
        if isinstance(self.c, Bits | Embed) and self.c.self_cond:
            passes = 3.5
        per_token = 2 * n_weights + 4 * self.c.n_layer * self.c.block_size * self.c.n_embd
        return passes * per_token * self.c.batch_size * self.c.grad_accum * self.c.block_size


def training(c, rounds=15):
    """Print a row for each model, and for masked diffusion and its baseline one a variant."""
    rows = {}
    for name, (script, settings) in text_models(c).items():
        for title, (dtype, change) in VARIANTS.items():
            if script is train or title == "as trained":
                rows[name, title] = Trained(script, replace(settings, **change), dtype)
    n = 4096 if GPU else 2048
    squares = {dtype: torch.randn(n, n, device=DEVICE).to(dtype) for dtype, _ in VARIANTS.values()}
    products = {dtype: [] for dtype in squares}
    for i in range(N_WARM + rounds):
        for dtype, square in squares.items():
            products[dtype].append(timed(torch.mm, square, square))
        for row in rows.values():
            row.step(i)

    title = (f"{c.n_layer} layers x {c.n_head} heads x {c.n_embd}, block {c.block_size}, batch "
             f"{c.batch_size} x {c.grad_accum}, {rounds} rounds")
    table = Table(title, {"training step": 0, "ms": 1, "characters/s": 0, "share of matmul peak": 0,
                          "matmul, GFLOP/s": 0, "times plain": 2})
    n_chars = c.batch_size * c.grad_accum * c.block_size
    for (name, title), row in rows.items():
        seconds = row.seconds[N_WARM:]
        mid, spread = midhinge(seconds)
        peak = 2 * n ** 3 / statistics.median(products[row.dtype])
        ratio = None
        if (name, PLAIN) in rows:
            plain = rows[name, PLAIN].seconds[N_WARM:]
            ratio = statistics.median(map(operator.truediv, plain, seconds))
        table.add(f"{name}, {title}", (1e3 * mid, 1e3 * spread), n_chars / mid,
                  f"{row.flops() / mid / peak:.0%}", peak / 1e9, ratio)


@torch.no_grad()
def sampling(c, n=8, rounds=5):
    """Print a row for each way to write n blocks at once."""
    masked, ar, bits, embeddings = [script.build(settings, META).to(DEVICE).eval()
                                    for script, settings in text_models(c).values()]
    T = c.block_size
    x = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    nothing_known = torch.zeros_like(x, dtype=torch.bool)

    def uncached(x, known, how):
        for _ in range(T):
            yield ar.logits(x)     # the whole window for each character

    table = Table(f"writing {n} blocks of {T} at once",
                  {"sampler": 0, "network calls": 0, "ms a call": 2, "characters/s": 0})
    for title, sample, how in [
            ("masked, one a call", masked.sample, Sample(steps=T, remask=0.0)),
            ("masked, three a call", masked.sample, Sample(steps=-(-T // 3), remask=0.0)),
            ("AR, one a call", ar.sample, Sample()),
            ("AR, without the cache", uncached, None),
            ("bits", bits.sample, CodeSampler()),
            ("embeddings", embeddings.sample, EmbedSampler())]:
        n_calls = len(list(sample(x, nothing_known, how)))
        times = [timed(list, sample(x, nothing_known, how)) for _ in range(rounds)]
        mid, spread = midhinge(times)
        table.add(title, n_calls, (1e3 * mid / n_calls, 1e3 * spread / n_calls), n * T / mid)


# -------------------------------------------------------------------------------------------------
# on a GPU

def milliseconds(f, calls=8, rounds=5):
    """Of a call of f(i): the median of a few rounds of several calls, the least, the greatest."""
    def several():
        for i in range(calls):
            f(i)

    several()
    times = [1e3 * timed(several) / calls for _ in range(rounds)]
    return statistics.median(times), min(times), max(times)


def gpu_step(c):
    """Print what the parts of a training step take, and the kernels of a step by their time."""
    trained = Trained(train, c, AMP)
    step = trained.train_step
    table = Table("a training step", {"part": 0, "ms": 2, "least": 2, "greatest": 2})
    table.add("eager", *milliseconds(step))
    compile_seconds = timed(step.compile)
    whole = milliseconds(step)
    table.add("as trained: compiled, recorded as CUDA graphs", *whole)
    replay = step.run
    step.run = call
    table.add("compiled, not recorded", *milliseconds(step))
    parts = {
        "forward and backward, recorded": lambda _: replay(step.micro_batch),
        "update, recorded": lambda _: replay(step.update),
        "batch": lambda _: trained.batch(c.batch_size),
        "forward and backward": lambda _: step.micro_batch(),
        "clip": lambda _: nn.utils.clip_grad_norm_(step.method.parameters(), 1.0),
    }
    for opt in step.opts:
        parts[type(opt).__name__] = lambda _, opt=opt: opt.step()
    for title, part in parts.items():
        table.add(title, *milliseconds(part))
    step.run = replay

    n = 8192
    square = torch.randn(n, n, device=DEVICE).to(AMP)
    peak = 2 * n ** 3 / milliseconds(lambda _: square @ square)[0] * 1e3
    share = trained.flops() / whole[0] * 1e3 / peak
    n_chars = c.batch_size * c.grad_accum * c.block_size
    print(f"\ncompiled in {compile_seconds:.0f} s; {n_chars / whole[0] * 1e3:,.0f} characters/s; "
          f"{share:.1%} of the {peak / 1e12:.0f} TFLOP/s of a matrix product of {n}; "
          f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    profiled(step)


def profiled(step, n_steps=5):
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for i in range(n_steps):
            step(i)
        torch.cuda.synchronize()
    kernels = seen.key_averages()
    busy = sum(kernel.self_device_time_total for kernel in kernels) / n_steps / 1e3
    n = sum(kernel.count for kernel in kernels) / n_steps
    print(f"the GPU is busy for {busy:.2f} ms a step, with {n:.0f} kernels")
    table = Table("kernels of a step", {"kernel": 0, "times": 0, "ms": 3})
    slowest = sorted(kernels, key=operator.attrgetter("self_device_time_total"), reverse=True)
    for kernel in slowest[:30]:
        milliseconds_a_step = kernel.self_device_time_total / n_steps / 1e3
        table.add(kernel.key[:90], kernel.count / n_steps, milliseconds_a_step)


@torch.no_grad()
def gpu_sampling(c):
    method = train.build(c, META).to(DEVICE).eval()
    method.net = Recorded(method.net)
    how = Sample(steps=c.block_size, remask=0.0)
    table = Table("sampling", {"texts": 0, "calls/s": 0, "characters/s": 0})
    for n in (1, 64):
        x = torch.zeros(n, c.block_size, dtype=torch.long, device=DEVICE)
        nothing_known = torch.zeros_like(x, dtype=torch.bool)
        times = [timed(list, method.sample(x, nothing_known, how)) for _ in range(4)]
        middle = statistics.median(times[1:])
        table.add(n, c.block_size / middle, n * c.block_size / middle)


def main(argv):
    c = Bench(**parse(argv, Bench))
    check(GPU or not c.gpu, "no CUDA device here: without --gpu this measures a CPU")
    print(stamp())
    if c.gpu:
        gpu_step(c)
        gpu_sampling(c)
    else:
        training(c)
        sampling(c)


if __name__ == "__main__":
    run(main)

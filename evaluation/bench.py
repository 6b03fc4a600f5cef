"""Speed and memory of the text models, as Markdown rows: python -m evaluation.bench [--n_layer=8 ...]                    settings: config.Masked

Times are midhinges, the mean of the two quartiles, ± half of their distance, over steps taken in turn, one of each variant after the other, so
that a busy machine slows all alike (a median would jump: bits and embeddings take a further pass in every other step). The share of the peak is
against a large matrix product in the same precision, measured in the same round."""
import itertools
import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import analog_bits
import embed_diffusion
import model
import train
from config import AMP, DEVICE, GPU, Bits, CodeSampler, Config, Embed, EmbedSampler, Masked, Sample, autocast, parse, run
from diffusion import draw, predicted
from model import compile_net
from train import optimizers, reseed, train_step

BUILD = {Masked: train.build, Bits: analog_bits.build, Embed: embed_diffusion.build}
VARIANTS = {   # name: (precision, what to change)
    "as trained": (AMP, {}),
    "not compiled": (AMP, {"compile": False}),
    "fp32": (torch.float32, {}),
    "plain: eager, fp32, AdamW": (torch.float32, {"compile": False, "optimizer": "adamw"}),
}


class Noise:
    """Random tokens: a corpus that costs nothing to read."""

    def __init__(self, c, V=65):
        self.c, self.meta = c, {"alphabet": "".join(map(chr, range(32, 32 + V)))}

    def batch(self, n):
        """n windows, int64 (n, T)."""
        return torch.randint(len(self.meta["alphabet"]), (n, self.c.block_size), device=DEVICE)


def timed(f):
    """Seconds that f() takes, with the device's queue empty before and after."""
    if GPU:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    f()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def midhinge(times):
    """The mean of the lower and the upper quartile, and half of their distance."""
    low, _, high = statistics.quantiles(times, n=4)
    return (low + high) / 2, (high - low) / 2


def trainer(c, dtype):
    """A function that takes one whole training step with the settings c in precision dtype, and the floating-point operations of a step: 2 a weight
    and token forward, 4 backward, those of attention, and half a further forward pass with self-conditioning."""
    reseed(c.seed)
    data = Noise(c)
    method = BUILD[type(c)](c, data.meta).to(DEVICE).train()
    opts, scaler = optimizers(method, c), torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    precise, number = autocast if dtype == AMP else lambda: torch.autocast(DEVICE, enabled=False), itertools.count()

    def step():
        model.autocast = precise
        train_step(method, data, c, next(number), opts, scaler, SimpleNamespace(asked=False))

    model.autocast = precise
    if c.compile:
        compile_net(method, data, c)
    looked_up = {id(m.weight) for m in method.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(p.numel() for p in method.parameters() if id(p) not in looked_up)
    passes = 3 + getattr(method, "selfcond", False) / 2
    return step, passes * (2 * weights + 4 * c.n_layer * c.block_size * c.n_embd) * c.batch_size * c.grad_accum * c.block_size


def memory(c, dtype):
    """Peak memory in MB of a process that takes three such steps: of the GPU, else of the process, PyTorch itself included."""
    step, _ = trainer(c, dtype)
    for _ in range(3):
        step()
    if GPU:
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "linux":   # not ru_maxrss, which starts from the parent's
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def kinds(c):
    """Settings of the four text models that are those of c where they share them."""
    shared = {f.name: getattr(c, f.name) for f in fields(Config)}
    return {"masked": replace(c, objective="masked"), "twin": replace(c, objective="ar"), "bits": Bits(**shared), "embeddings": Embed(**shared)}


def training(c, rounds=15):
    """Print a row for each model, and for masked diffusion and its twin one for each variant."""
    peaks, rows = {d: [] for d in {AMP, torch.float32}}, {}
    n = 4096 if GPU else 2048
    square = {d: torch.randn(n, n, device=DEVICE, dtype=d) for d in peaks}
    for kind, settings in kinds(c).items():
        for name in list(VARIANTS)[:None if isinstance(settings, Masked) else 1]:
            dtype, change = VARIANTS[name]
            varied = replace(settings, **change)
            rows[kind, name] = (*trainer(varied, dtype), varied, dtype, [])
    for i in range(rounds + 3):
        for d, x in square.items():
            peaks[d].append(2 * n ** 3 / timed(lambda x=x: x @ x))
        for step, _, _, _, times in rows.values():
            took = timed(step)
            times += [took] if i >= 3 else []
    print(f"\n{c.n_layer} layers x {c.n_head} heads x {c.n_embd}, block {c.block_size}, batch {c.batch_size} x {c.grad_accum}, {DEVICE}, "
          f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, {rounds} rounds; matrix products of {n}: "
          + ", ".join(f"{statistics.median(p) / 1e9:,.0f} GFLOP/s in {str(d)[6:]}" for d, p in peaks.items()) + "\n")
    print("| training step | ms | characters/s | share of matmul peak | times plain | peak memory, MB |\n|---|---:|---:|---:|---:|---:|")
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        mbs = pool.starmap(memory, [(settings, dtype) for _, _, settings, dtype, _ in rows.values()], chunksize=1)
    for mb, ((kind, name), (_, flops, _, dtype, times)) in zip(mbs, rows.items(), strict=True):
        (took, spread), plain = midhinge(times), rows.get((kind, list(VARIANTS)[-1]), [None])[-1]
        chars = c.batch_size * c.grad_accum * c.block_size
        ratio = f"{statistics.median(b / a for a, b in zip(times, plain, strict=True)):.2f}x" if plain else ""
        share = flops / took / statistics.median(peaks[dtype])
        print(f"| {kind}, {name} | {1e3 * took:.1f} ± {1e3 * spread:.1f} | {chars / took:,.0f} | {share:.0%} | {ratio} | {mb:,.0f} |", flush=True)


def forgetful(method, x, known, s):
    """The twin's sampler with nothing remembered: a whole pass for each character."""
    with torch.no_grad():
        for i in range(x.size(1)):
            x = x.clone()
            x[:, i:i + 1], sure = draw(predicted(method.logits(x)[:, i:i + 1], s))
            yield x, sure


def sampling(c, n=8, rounds=5):
    """Print a row for each way to write n blocks at once."""
    model.autocast = autocast
    T = c.block_size
    nothing = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    print(f"\n| writing {n} blocks of {T} at once | network calls | ms a call | characters/s |\n|---|---:|---:|---:|")
    masked, twin, bits, embeddings = (BUILD[type(k)](k, Noise(c).meta).to(DEVICE).eval() for k in kinds(c).values())
    for title, sample, how in (
            ("masked, one a call", masked.sample, Sample(steps=T, remask=0)),
            ("masked, three a call", masked.sample, Sample(steps=-(-T // 3), remask=0)),
            ("twin, one a call", twin.sample, Sample()), ("twin, nothing remembered", partial(forgetful, twin), Sample()),
            ("bits", bits.sample, CodeSampler()), ("embeddings", embeddings.sample, EmbedSampler())):
        write = lambda f=sample, s=how: sum(1 for _ in f(nothing, nothing > 0, s))
        calls = write()
        took, spread = midhinge([timed(write) for _ in range(rounds)])
        print(f"| {title} | {calls} | {1e3 * took / calls:.2f} ± {1e3 * spread / calls:.2f} | {n * T / took:,.0f} |", flush=True)


def main(argv):
    c = parse(argv, Masked())
    training(c)
    sampling(c)


if __name__ == "__main__":
    run(main)

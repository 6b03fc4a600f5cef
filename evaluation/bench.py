"""Speed and memory of the text models, as Markdown.    settings: config.Masked

    python -m evaluation.bench
    python -m evaluation.bench --n_layer=8

Times are midhinges, the mean of the two quartiles, ± half of their distance: a median would jump,
since bits and embeddings take a further pass in every other step. Each row is a process of its own,
and the processes take their steps in turn, so that a busy machine slows all alike. The share of the
peak is against a large matrix product in the same precision, in the same process and round.
"""
import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

import config

# a process of fp32 rows is started with this; model.py and train.py read config.AMP when imported
if "BENCH_FP32" in os.environ:
    config.AMP = torch.float32

import analog_bits  # noqa: E402
import embed_diffusion  # noqa: E402
import train  # noqa: E402
from config import DEVICE, GPU, Bits, CodeSampler, Config, Embed, EmbedSampler  # noqa: E402
from config import Masked, Sample, parse, run  # noqa: E402
from diffusion import sample_tokens, token_log_probs  # noqa: E402
from evaluation.report import machine  # noqa: E402

V = 65                     # of random text, which costs nothing to read
META = {"alphabet": "".join(map(chr, range(32, 32 + V)))}
N_WARM = 3                 # rounds that are not timed
VARIANTS = [               # title, whether in fp32, what else differs
    ("as trained", False, {}),
    ("not compiled", False, {"compile": False}),
    ("fp32", True, {}),
    ("plain: eager, fp32, AdamW", True, {"compile": False, "optimizer": "adamw"}),
]


class RandomText:

    def __init__(self, c):
        self.T = c.block_size

    def batch(self, n):
        return torch.randint(V, (n, self.T), device=DEVICE)


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


def build(c):
    script = {Masked: train, Bits: analog_bits, Embed: embed_diffusion}[type(c)]
    return script.build(c, META).to(DEVICE)


def kinds(c):
    """Settings of the four text models that are those of c where they share them: {kind: c}."""
    shared = {f.name: getattr(c, f.name) for f in fields(Config)}
    return {"masked": replace(c, objective="masked"), "AR": replace(c, objective="ar"),
            "bits": Bits(**shared), "embeddings": Embed(**shared)}


# training

def flops_of_a_step(c, method):
    """2 a weight and token forward, 4 backward, those of attention, and half a further forward pass
    with self-conditioning."""
    embedded = {id(m.weight) for m in method.modules() if isinstance(m, nn.Embedding)}
    n_weights = sum(p.numel() for p in method.parameters() if id(p) not in embedded)
    passes = 3
    if isinstance(c, Bits | Embed) and c.self_cond:
        passes = 3.5
    per_token = 2 * n_weights + 4 * c.n_layer * c.block_size * c.n_embd
    return passes * per_token * c.batch_size * c.grad_accum * c.block_size


def worker(c, connection):
    """A process that takes a training step and a matrix product whenever it is told to, and answers
    with the times of both; told to stop, with the FLOPs of a step and its peak memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # it ends with the process that started it
    train.reseed(c.seed)
    data = RandomText(c)
    method = build(c).train()
    opts = train.build_optimizers(method, c)
    scaler = torch.amp.GradScaler(DEVICE, enabled=config.AMP == torch.float16)
    n = 4096 if GPU else 2048
    square = torch.randn(n, n, device=DEVICE, dtype=config.AMP)
    if c.compile:
        with contextlib.redirect_stdout(sys.stderr):
            train.compile_net(method, data, c)
    step = 0
    while connection.recv():
        seconds = timed(train.train_step, method, data, c, step, opts, scaler, False)
        connection.send((seconds, 2 * n ** 3 / timed(torch.mm, square, square)))
        step += 1
    connection.send((flops_of_a_step(c, method), peak_memory()))


def peak_memory():
    """In MB: of the GPU, else of this process, PyTorch itself included."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "linux":    # not ru_maxrss, which starts from the parent's
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    import resource                # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def start_worker(c, fp32):
    """-> our end of the connection to it"""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    if fp32:
        os.environ["BENCH_FP32"] = "1"
    context.Process(target=worker, args=(c, theirs), daemon=True).start()
    os.environ.pop("BENCH_FP32", None)
    theirs.close()
    return ours


def training(c, rounds=15):
    """Print a row for each model, and for masked diffusion and its baseline one a variant."""
    workers = {}
    for kind, settings in kinds(c).items():
        variants = VARIANTS if isinstance(settings, Masked) else VARIANTS[:1]
        for title, fp32, change in variants:
            workers[kind, title] = start_worker(replace(settings, **change), fp32)
    measured = {key: [] for key in workers}
    for i in range(N_WARM + rounds):
        for key, connection in workers.items():
            try:
                connection.send(True)
                answer = connection.recv()
            except (EOFError, OSError):
                raise SystemExit(f"the process of {', '.join(key)} has ended, see above") from None
            if i >= N_WARM:
                measured[key].append(answer)

    print(f"\n{c.n_layer} layers x {c.n_head} heads x {c.n_embd}, block {c.block_size}, batch "
          f"{c.batch_size} x {c.grad_accum}, {DEVICE}, {machine()}, PyTorch {torch.__version__}, "
          f"{rounds} rounds\n")
    print("| training step | ms | characters/s | share of matmul peak | matmul, GFLOP/s | "
          "times plain | peak memory, MB |\n|---|---:|---:|---:|---:|---:|---:|")
    n_chars = c.batch_size * c.grad_accum * c.block_size
    for (kind, title), connection in workers.items():
        connection.send(False)
        flops, memory = connection.recv()
        times = [seconds for seconds, _ in measured[kind, title]]
        peak = statistics.median(peak for _, peak in measured[kind, title])
        mid, spread = midhinge(times)
        ratio = ""
        plain = measured.get((kind, VARIANTS[-1][0]))
        if plain:
            ratios = [slow / fast for (slow, _), fast in zip(plain, times, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}x"
        print(f"| {kind}, {title} | {1e3 * mid:.1f} ± {1e3 * spread:.1f} | {n_chars / mid:,.0f} | "
              f"{flops / mid / peak:.0%} | {peak / 1e9:,.0f} | {ratio} | {memory:,.0f} |",
              flush=True)


# sampling

class Uncached:
    """The baseline's sampler without its cache: a whole pass for each character."""

    def __init__(self, ar):
        self.ar = ar

    @torch.no_grad()
    def sample(self, x, known, s):
        for i in range(x.size(1)):
            log_probs = token_log_probs(self.ar.logits(x)[:, i:i + 1], s.temperature, s.top_k)
            tokens, confidence = sample_tokens(log_probs)
            x = x.clone()
            x[:, i:i + 1] = tokens
            yield x, confidence


def sampling(c, n=8, rounds=5):
    """Print a row for each way to write n blocks at once."""
    T = c.block_size
    masked, ar, bits, embeddings = [build(settings).eval() for settings in kinds(c).values()]
    rows = [
        ("masked, one a call", masked, Sample(steps=T, remask=0.0)),
        ("masked, three a call", masked, Sample(steps=-(-T // 3), remask=0.0)),
        ("AR, one a call", ar, Sample()),
        ("AR, without the cache", Uncached(ar), Sample()),
        ("bits", bits, CodeSampler()),
        ("embeddings", embeddings, EmbedSampler()),
    ]
    x = torch.zeros(n, T, dtype=torch.long, device=DEVICE)
    nothing_known = torch.zeros_like(x, dtype=torch.bool)
    print(f"\n| writing {n} blocks of {T} at once | network calls | ms a call | characters/s |\n"
          "|---|---:|---:|---:|")
    for title, method, how in rows:
        n_calls = 0
        for _ in method.sample(x, nothing_known, how):
            n_calls += 1
        times = [timed(list, method.sample(x, nothing_known, how)) for _ in range(rounds)]
        mid, spread = midhinge(times)
        print(f"| {title} | {n_calls} | {1e3 * mid / n_calls:.2f} ± {1e3 * spread / n_calls:.2f} | "
              f"{n * T / mid:,.0f} |", flush=True)


def main(argv):
    c = Masked(**parse(argv, Masked))
    training(c)
    sampling(c)


if __name__ == "__main__":
    run(main)

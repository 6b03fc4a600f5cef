"""Where the time of a training step goes on a GPU, and how fast the samplers are there, as Markdown.
settings: config.Masked

    python -m evaluation.gpu_bench

A row is the median of 5 times 8 calls, and their least and greatest. The device's queue is empty
before and after each 8.
"""
import statistics
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import train
from config import AMP, DEVICE, Masked, Sample, check, parse, run
from evaluation.bench import META, Trained
from evaluation.report import Table, stamp
from generate import Recorded
from step import call

CALLS = 8


def milliseconds(f, rounds=5):
    """Of a call of f(i): median, least, greatest."""
    for i in range(CALLS):
        f(i)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start_time = time.perf_counter()
        for i in range(CALLS):
            f(i)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start_time) / CALLS)
    return statistics.median(times), min(times), max(times)


def main(argv):
    c = Masked(**parse(argv, Masked))
    check(DEVICE == "cuda", "no CUDA device here: python -m evaluation.bench measures a CPU")
    print(stamp())
    steps(c)
    sampling(c)


def steps(c):
    trained = Trained(train, c, AMP)
    step = trained.train_step
    method = step.method
    table = Table("a training step", {"part": 0, "ms": 2, "least": 2, "greatest": 2})

    def forward_backward(_):
        step.micro_batch()
        method.zero_grad()

    def clip(_):
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)

    table.add("eager", *milliseconds(step))
    start_time = time.perf_counter()
    step.compile()
    compile_seconds = time.perf_counter() - start_time
    whole = milliseconds(step)
    table.add("as trained: compiled, and recorded as CUDA graphs", *whole)
    replay = step.run
    table.add("its graph of forward and backward", *milliseconds(lambda _: replay(step.micro_batch)))
    table.add("its graph of the update", *milliseconds(lambda _: replay(step.update)))
    step.run = call
    table.add("compiled, not recorded", *milliseconds(step))
    table.add("batch", *milliseconds(lambda _: trained.batch(c.batch_size)))
    table.add("forward and backward", *milliseconds(forward_backward))
    step.micro_batch()
    table.add("clip", *milliseconds(clip))
    for opt in step.opts:
        table.add(type(opt).__name__, *milliseconds(lambda _, opt=opt: opt.step()))

    n = 8192
    square = torch.randn(n, n, device=DEVICE).to(AMP)
    product = milliseconds(lambda _: square @ square)[0]
    peak = 2 * n ** 3 / product * 1e3
    share = trained.flops() / whole[0] * 1e3 / peak
    n_chars = c.batch_size * c.block_size
    print(f"\ncompiled in {compile_seconds:.0f} s; {n_chars / whole[0] * 1e3:,.0f} characters/s; "
          f"{share:.1%} of the {peak / 1e12:.0f} TFLOP/s of a matrix product of {n}; "
          f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for i in range(5):
            step(i)
        torch.cuda.synchronize()
    events = seen.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 5e3
    kernels = sum(event.count for event in events) / 5
    print(f"the GPU is busy for {busy:.2f} ms a step, with {kernels:.0f} kernels\n")
    print(events.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90))


def sampling(c):
    method = train.build(c, META).to(DEVICE).eval()
    method.net = Recorded(method.net)
    table = Table("sampling", {"texts": 0, "calls/s": 0, "characters/s": 0})
    for n in (1, 64):
        x = torch.zeros(n, c.block_size, dtype=torch.long, device=DEVICE)
        known = torch.zeros_like(x, dtype=torch.bool)
        how = Sample(steps=c.block_size, remask=0.0)
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            start_time = time.perf_counter()
            n_calls = len(list(method.sample(x, known, how)))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start_time)
        middle = statistics.median(seconds)
        table.add(n, n_calls / middle, n * c.block_size / middle)


if __name__ == "__main__":
    run(main)

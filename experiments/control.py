"""What control costs, on a checkpoint of embeddings: steering by strength; and hybrids beside diffusion alone and a twin alone, in one window and in
texts of eight.

    python -m experiments.control --out=out/ladder/best --twin=out/bits-arms/twin --n=64 --data_dir=data

A text has its wish if no character of it is one that is not allowed. The judge is another autoregressive model than the twin that guides."""
import time
from dataclasses import replace

import torch

import generate
from config import EmbedSampler, Evaluate, Sample, parse, run
from embed_diffusion import prepare, wish
from evaluation.evaluate import SAMPLES, judge_of, open_checkpoint, sample_row, sample_setup, stamp
from evaluation.report import Table
from train import reseed

WISHES = ("no:e", "only:abcdefghijklmnopqrstuvwxyz \\n", "at:64=T", "line:30")
STRENGTHS = (0., 1., 2., 5.)
LONG = 8   # windows in a long text


def hybrids(twin):
    """Title and sampler of each row."""
    plain = [(f"diffusion, {steps} steps", EmbedSampler(steps=steps)) for steps in (50, 128, 400)]
    plain += [(f"diffusion, td {td:g}, {steps} steps", EmbedSampler(steps=steps, td=td)) for td, steps in ((.2, 50), (.4, 50), (.2, 100), (.4, 100))]
    blocks = [(f"blocks of {block}, {steps} steps each", EmbedSampler(mode="blocks", block=block, steps=steps))
              for block, steps in ((8, 8), (16, 16), (32, 32), (64, 64), (32, 50))]
    guided = [(f"guided, {weight:g} of the twin, 50 steps", EmbedSampler(mode="guided", weight=weight, twin=twin)) for weight in (.25, .5, .75)]
    return plain + blocks + guided


def long_texts():
    """Title and sampler of each row of the table of long texts."""
    return [("diffusion, 50 steps a window", EmbedSampler()),
            *((f"blocks of 32, {steps} steps each", EmbedSampler(mode="blocks", block=32, steps=steps)) for steps in (25, 50))]


def main(argv):
    twin = next((a.partition("=")[2] for a in argv if a.startswith("--twin=")), "")
    s = parse([a for a in argv if not a.startswith("--twin=")], Evaluate())
    k, ar = open_checkpoint(s.out), open_checkpoint(twin)
    if k.name != "embed" or ar.name != "ar":
        raise SystemExit("--out is a checkpoint of embed_diffusion.py, --twin one of train.py --objective=ar")
    data, blocks, judge = sample_setup(k, s, judge_of(s))
    T = k.c.block_size

    def texts(method, how, L=T):
        """how.n texts of L characters, network calls, seconds."""
        reseed(s.seed)
        begun, calls = time.time(), 0
        for x, _ in generate.write(method, torch.zeros(L, dtype=torch.long), torch.zeros(L, dtype=torch.bool), T, how):                # noqa: B007
            calls += 1 + bool(getattr(method, "twin", None))
        return x, calls, time.time() - begun

    def row(title, method, how, L=T):
        x, calls, seconds = texts(method, how, L)
        table.add(*sample_row(title, x, data, judge, None, calls, x.numel() / seconds))

    k.method.net.compile(dynamic=False)
    texts(k.method, EmbedSampler(n=len(blocks), steps=2))                             # it is compiled at the first call
    print(stamp())
    table = Table(f"hybrids, {data.name}, windows of {T}; calls of both networks; the diffusion model compiled, the twins not", SAMPLES)
    table.add(*sample_row("held out", blocks, data, judge))
    for title, how in hybrids(twin):
        how = replace(how, n=len(blocks), seed=s.seed)
        prepare(k.method, data.alphabet, how, T)
        row(title, k.method, how)
        k.method.twin = None
    row("the twin", ar.method, Sample(n=len(blocks), seed=s.seed, temperature=1.))

    n = max(2, len(blocks) // 4)
    table = Table(f"texts of {LONG * T} characters", SAMPLES)
    long = data.val[:len(data.val) // LONG * LONG].reshape(-1, LONG * T)
    table.add(*sample_row("held out", long[torch.linspace(0, len(long) - 1, n).long()].long(), data, judge))
    for title, how in long_texts():
        how = replace(how, n=n, seed=s.seed)
        prepare(k.method, data.alphabet, how, T)
        row(title, k.method, how, LONG * T)
    row("the twin", ar.method, Sample(n=n, seed=s.seed, temperature=1.), LONG * T)

    table = Table("steering", {"wish": 0, "strength": 0, "texts that have it": 3, "characters that are allowed": 3, "judge, nats/char": 3,
                               "entropy, bits": 3, "known words": 3, "distinct 4-grams": 3})
    for steer in WISHES:
        allowed = wish(steer, data.alphabet)(torch.arange(T))                         # (T, V)
        for strength in STRENGTHS:
            how = EmbedSampler(steer=steer, strength=strength, n=len(blocks), seed=s.seed)
            prepare(k.method, data.alphabet, how, T)
            x, _, _ = texts(k.method, how)
            kept = allowed.gather(1, x.cpu().T).T.double()                            # (n, T)
            _, _, nats, entropy, words, _, fourgrams, *_ = sample_row("", x, data, judge)
            shares = ((v.mean().item(), v.std().item() / len(v) ** .5) for v in (kept.prod(1), kept.mean(1)))
            table.add(steer, strength, *shares, nats, entropy, words, fourgrams)


if __name__ == "__main__":
    run(main)

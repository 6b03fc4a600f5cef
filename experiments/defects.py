"""What the two defects of document 004's sampler cost, on a model with its settings: python -m experiments.defects --out=out/documents --n=96

The model: python train.py --dataset=shakespeare --schedule=cosine --weight=pooled --optimizer=adamw --learning_rate=3e-4 --time=True
The sampler: 100 calls, the most confident first, max(1, int(masked / (t + 1))) characters a call. Defect one: call t told the network t,
which in training, under the cosine schedule, had stood for the fraction m(t) masked. Defect two: the counts and the top-k were taken over
all texts of the batch at once."""

import torch

from config import Evaluate, at_least, parse, run
from diffusion import SCHEDULES, draw
from evaluation.evaluate import SAMPLES, judge_of, open_checkpoint, sample, sample_row, sample_setup, stamp
from evaluation.report import Table

STEPS = 100


def documents(net, mask, wrong_time, flattened):
    """A sampler with the signature of MaskedDiffusion.sample and either defect."""
    @torch.no_grad()
    def walk(x, known, s):
        x, sure = torch.where(known, x, mask), known.float()
        for t in range(STEPS - 1, -1, -1):
            masked = x == mask
            told = SCHEDULES["cosine"](torch.full((len(x),), (t + 1) / STEPS)) if wrong_time else masked.float().mean(1)
            p = net(x, told.to(x.device)).softmax(-1)
            token, prob = draw(p)
            shape = (1, -1) if flattened else x.shape
            score = p.amax(-1).masked_fill(~masked, -1).view(shape)
            n = (masked.view(shape).sum(1) // (t + 1)).clamp(min=1)
            now = (score.argsort(1, descending=True).argsort(1) < n[:, None]).view(x.shape) & masked
            x, sure = torch.where(now, token, x), torch.where(now, prob, sure)
            yield x, sure
    return walk


def main(argv):
    s = parse(argv, Evaluate())
    at_least(s, 2, "n")
    k = open_checkpoint(s.out)
    if not getattr(k.c, "time", False) or k.name != "masked":
        raise SystemExit(f"{k.path} is no masked model that is fed the time: train one with --time=True")
    data, blocks, judge = sample_setup(k, s, judge_of(s))
    print(stamp())
    table = Table(f"samples, {data.name}, windows of {data.T}", SAMPLES)
    for wrong_time, flattened in ((False, False), (True, False), (False, True), (True, True)):
        k.method.sample = documents(k.method.net, k.method.mask, wrong_time, flattened)
        x, calls, speed = sample(k, len(blocks), s)
        title = " and ".join(["told t"] * wrong_time + ["one top-k for all"] * flattened) or "neither defect"
        table.add(*sample_row(title, x, data, judge, None, calls, speed))


if __name__ == "__main__":
    run(main)

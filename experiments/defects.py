"""What do the two defects of document 004's sampler cost? On a model with its settings, the arm
`documents` of experiments/ablation.sh. Three minutes on one CPU core.

    python -m experiments.defects --out=out/ablation/documents --n=96

Its sampler: 100 calls, the most confident first, max(1, int(masked / (t + 1))) characters a call.
Defect one: call t tells the network t, which in training, under the cosine schedule, stood for the
fraction m(t) masked. Defect two: counts and top-k are taken over all texts of the batch at once.
"""
import time

import torch

from config import DEVICE, check, parse, run
from diffusion import mask_rate, rank, sample_tokens
from evaluation.likelihood import Evaluate, corpus, open_checkpoint
from evaluation.report import Table, stamp
from evaluation.samples import SAMPLE_COLUMNS, eval_model, sample_row
from train import reseed

STEPS = 100


@torch.no_grad()
def write_as_documents(net, mask_id, x, wrong_time, one_top_k):
    """Fill x (B, T), all MASK, with either defect. -> x, network calls a text needed on average"""
    n_calls = 0.0
    for t in range(STEPS - 1, -1, -1):
        masked = x == mask_id
        if not masked.any():
            break
        n_calls += masked.any(1).double().mean().item()
        told = masked.float().mean(1)
        if wrong_time:
            told = mask_rate("cosine", torch.full_like(told, (t + 1) / STEPS))
        log_probs = net(x, told).log_softmax(-1)
        tokens, _ = sample_tokens(log_probs)
        score = log_probs.amax(-1).masked_fill(~masked, -torch.inf)
        if one_top_k:
            score = score.view(1, -1)
        n = (score > -torch.inf).sum(1) // (t + 1)
        first = rank(-score) < n.clamp(min=1)[:, None]
        x = torch.where(first.view(x.shape) & masked, tokens, x)
    return x, n_calls


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    checkpoint = open_checkpoint(s.out)
    check(s.n and checkpoint.name == "masked" and checkpoint.c.time,
          f"{checkpoint.path} is no masked model that is fed the time (--time), or n is 0")
    data = corpus(checkpoint, s)
    scorer = eval_model(s)
    method = checkpoint.method
    print(stamp())
    table = Table(f"samples, {data.name}, windows of {data.T}", SAMPLE_COLUMNS)
    for title, *defects in [("neither defect", False, False), ("told t", True, False),
                            ("one top-k for all", False, True), ("both", True, True)]:
        reseed(s.seed)
        x = torch.full((s.n, data.T), method.mask_id, device=DEVICE)
        start_time = time.perf_counter()
        x, n_calls = write_as_documents(method.net, method.mask_id, x, *defects)
        speed = x.numel() / (time.perf_counter() - start_time)
        table.add(*sample_row(title, x, data, scorer, None, n_calls, speed))


if __name__ == "__main__":
    run(main)

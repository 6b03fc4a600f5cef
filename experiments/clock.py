"""What is the masked CE of a model at the mask rates of others? Total cross-entropy over masked
characters, which most projects call validation loss, depends on how many are masked; document
004, whose 2.29 it is set beside, has the cosine schedule. A few minutes on one core.

    python -m experiments.clock --out=results/masked.pt
"""
import torch
from tqdm import tqdm

from checkpoint import find_checkpoint
from config import check, parse, run
from diffusion import mask_rate
from evaluation.likelihood import Evaluate, corpus, open_checkpoint
from evaluation.report import Table, stamp

LEVELS = 8           # of each window, evenly spaced; those of the next window lie between them
GOLDEN = 0.6180339887


@torch.no_grad()
def pooled_ce(method, val, schedule):
    """Nats per masked character of the windows val (W, T), t even in (0, 1)."""
    rows = torch.arange(len(val) * LEVELS)
    t = (rows % LEVELS + rows // LEVELS * GOLDEN % 1) / LEVELS
    rate = mask_rate(schedule, t).double().to(val.device)
    nats = 0.0
    masked = 0.0
    for batch in tqdm(rows.split(128), desc=schedule, leave=False, disable=None):
        x0 = val[batch // LEVELS].long()
        row_nats, share = method.bound(x0, rate[batch], batch.tolist())
        nats += (row_nats.double() * share).sum().item()
        masked += share.sum().item()
    return nats / masked


def main(argv):
    s = Evaluate(**parse(argv, Evaluate))
    checkpoint = open_checkpoint(find_checkpoint(s.out, "masked"))
    check(checkpoint.name == "masked", f"{checkpoint.path} is no masked model")
    print(stamp())
    table = Table("masked CE", {"schedule": 0, "masked CE, nats": 3})
    for schedule in ("linear", "square", "cosine"):
        table.add(schedule, pooled_ce(checkpoint.method, corpus(checkpoint, s).val, schedule))


if __name__ == "__main__":
    run(main)

"""What does control cost? Every combination of settings of embed_diffusion.py sample that are typed
with commas between them, a row each. 64 texts: half a minute to four minutes a row on a CPU core.

    python -m experiments.control --out=out/embed --steps=50,128,400
    python -m experiments.control --out=out/embed --td=0,0.2,0.4 --steps=50,100
    python -m experiments.control --out=out/embed --mode=blocks --block=8,16,32,64 --steps=32,50
    python -m experiments.control --out=out/embed --mode=guided --ar=out/ar --ar_weight=0.25,0.5
    python -m experiments.control --out=out/embed --mode=blocks --length=1024 --n=16
    python -m experiments.control --out=out/embed --steer=no:e,line:30 --strength=0,1,2,5

A text has what was asked if each of its characters is allowed. The evaluation model is not the
baseline, --ar, which guides. Rows of the baseline alone: experiments.samplers --out=out/ar.
"""
import time
from dataclasses import dataclass

import torch

from config import DEVICE, EmbedSampler, check, run
from embed_diffusion import control, write_controlled
from evaluation.likelihood import corpus, open_checkpoint
from evaluation.report import Table, stamp
from evaluation.samples import SAMPLE_COLUMNS, eval_model, sample_row
from experiments.samplers import combinations
from generate import lay_out
from step import reseed
from train import spaced_rows

COLUMNS = SAMPLE_COLUMNS | {"texts that have it": 3, "allowed characters": 3}


@dataclass(frozen=True)
class ControlSettings(EmbedSampler):   # and what texts are compared with
    n: int = 64
    eval_model: str = ""           # an AR checkpoint that scores samples; empty: results/judge.pt
    dataset: str = ""              # the path of the text of a checkpoint trained on a file
    data_dir: str = ""             # where corpora are kept; empty: data/


def write_texts(method, tokenizer, s, L, T):
    """s.n texts of L characters in windows of T. -> x (n, L), which characters have what was asked
    (n, L) bool, calls of either network, characters a second"""
    ids, known = lay_out([], L, T, method.mask_id)
    allowed, ar = control(method, tokenizer, s, L, T)
    frames = write_controlled(method, ids, known, T, s, allowed, ar)
    reseed(s.seed)
    n_calls = 0
    start_time = time.perf_counter()
    for x, _ in frames:
        n_calls += 1 + s.two_pass + (s.mode == "guided")
    speed = x.numel() / (time.perf_counter() - start_time)
    if allowed is None:
        return x, torch.ones_like(x), n_calls, speed
    return x, allowed[torch.arange(L, device=DEVICE), x], n_calls, speed


def main(argv):
    rows = combinations(argv, ControlSettings)
    _, s = rows[0]
    check(s.out, "pass --out=RUN of embed_diffusion.py")
    checkpoint = open_checkpoint(s.out)
    check(checkpoint.name == "embed", f"{s.out} is no checkpoint of embed_diffusion.py")
    data = corpus(checkpoint, s)
    scorer = eval_model(s)
    L = s.length or data.T
    val = data.val.flatten()
    blocks = spaced_rows(val[:len(val) // L * L].view(-1, L), s.n).long()
    print(stamp())
    table = Table(f"texts of {L}, {data.name}", COLUMNS)
    table.add(*sample_row("held out", blocks, data, scorer), None, None)
    for title, how in rows:
        x, has_it, n_calls, speed = write_texts(checkpoint.method, data.tokenizer, how, L, data.T)
        has_it = has_it.double()
        shares = [(share.mean().item(), share.std().item() / s.n ** 0.5)
                  for share in (has_it.prod(1), has_it.mean(1))]
        table.add(*sample_row(title, x, data, scorer, None, n_calls, speed), *shares)


if __name__ == "__main__":
    run(main)

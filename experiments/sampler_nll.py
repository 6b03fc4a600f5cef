"""Which order is best, what does revealing k characters a call cost, and what does distance buy
back? The exact -log-probability of held-out text under every sampler of a masked model, and, of
texts that it wrote, its own beside the evaluation model's. An hour and a half on two CPU cores;
what was measured is kept in out/sampler_nll.pt, and the same command goes on.

    python -m experiments.sampler_nll --out=results/masked.pt
    python -m experiments.sampler_nll --windows=400 --fp32 --n=0 --only="left, steps 8;entropy"

`steps` is the number of network calls for a window of T characters. "minus the bound" is paired by
window, as is "minus margin". order=random is an average over orders, so its number is a bound, of
one random order a window.
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
from checkpoint import find_checkpoint
from config import DEVICE, HERE, Sample, Settings, check, parse, run
from evaluation.likelihood import corpus, likelihood, mean_and_stderr, open_checkpoint
from evaluation.report import Table, stamp
from evaluation.samples import eval_model, fill, text_metrics, training_text
from step import reseed
from train import spaced_rows

CALLS = (8, 16, 32, 43, 64)
ORDERS = ("left", "random", "confidence", "margin", "entropy")
BATCH = 400
EXACT = Sample(temperature=1.0, remask=0.0, min_distance=0, counts="even", order="margin")


@dataclass(frozen=True)
class Samplers(Settings):   # python -m experiments.sampler_nll
    out: str = ""                  # a masked checkpoint or a run's folder
    eval_model: str = ""           # an AR checkpoint that scores what is written; empty: judge.pt
    dataset: str = ""              # the path of the text of a checkpoint trained on a file
    data_dir: str = ""             # where corpora are kept; empty: data/
    windows: int = 128             # of held-out text, evenly spaced
    n: int = 256                   # texts that are written by each of ten samplers; 0: none
    only: str = ""                 # a;b: of held-out text only rows with a or b in their title
    fp32: bool = False             # in half precision near ties fall otherwise

    def __post_init__(self):
        # fewer have no standard error
        check(self.windows >= 2, f"windows={self.windows} must be 2 or more")
        check(self.n >= 2 or self.n == 0, f"n={self.n} must be 0, or 2 or more")


def vary(**change):
    """A title and a sampler: EXACT with a change."""
    title = ", ".join(f"{name} {value}" for name, value in change.items())
    return title, Sample(**{**vars(EXACT), **change})


def held_out_samplers(T):
    """{title: sampler} of the table of held-out text, in windows of T."""
    rows = [vary(order=order, steps=T) for order in ORDERS]
    for order in ORDERS:
        distances = (0, 4, 8)
        if order == "left":
            distances = (0, 4, 8, T // 3)
        for steps in CALLS:
            rows += [vary(order=order, steps=steps, min_distance=d) for d in distances]
    rows += [vary(counts="entropy", steps=T, entropy_bound=bound) for bound in (0.1, 0.5)]
    rows += [vary(order="margin", steps=43, min_distance=4, temperature=t) for t in (0.8, 0.9, 1.1)]
    return dict(rows)


def written_samplers(T):
    """{title: sampler} of the ten that write."""
    rows = [vary(order=order, steps=T) for order in ORDERS]
    rows += [vary(order="margin", steps=43, min_distance=d) for d in (0, 4)]
    rows += [vary(order="left", steps=43, min_distance=T // 3)]
    rows += [vary(order="margin", steps=T, temperature=0.9)]
    rows += [vary(order="random", steps=16, min_distance=4)]
    return dict(rows)


def nats_per_char(method, x, how, known=None):
    """(W,) float64: of what is not known (T,) in held-out windows x (W, T), by the sampler how."""
    if known is None:
        known = torch.zeros(x.size(1), dtype=torch.bool)
    reseed(how.seed)
    parts = [method.sampler_nll(batch, known.to(x.device).expand_as(batch), how)
             for batch in x.split(BATCH)]
    return torch.cat(parts).cpu() / (~known).sum()


def ar_nats_per_char(ar, x, known):
    """The same by the baseline, which reads what stands to the left alone."""
    nats = [F.cross_entropy(ar.logits(batch).mT, batch, reduction="none")
            for batch in x.split(BATCH)]
    return torch.cat(nats).double().cpu()[:, ~known].mean(1)


class Kept:
    """A dict on the disk: what was measured is not measured again."""

    def __init__(self, path):
        self.path = path
        self.values = {}
        if path.exists():
            self.values = torch.load(path, weights_only=True)

    def get(self, key, measure, *args):
        if key not in self.values:
            self.values[key] = measure(*args)
            self.path.parent.mkdir(exist_ok=True)
            part = self.path.with_suffix(".part")
            torch.save(self.values, part)
            os.replace(part, self.path)
        return self.values[key]


def held_out_table(method, data, s, kept, key):
    """Exact nats a character of held-out text under every sampler."""
    x = spaced_rows(data.val, s.windows).long()
    bound = kept.get(f"{key}, bound", lambda: likelihood(method, x)["windows"])
    samplers = {title: how for title, how in held_out_samplers(data.T).items()
                if any(part in title for part in s.only.split(";"))}
    nats = {}
    for title, how in tqdm(samplers.items(), desc="held out", disable=None):
        nats[title] = kept.get(f"{key}, {title}", nats_per_char, method, x, how)
    check(samplers, f"no sampler has {s.only!r} in its title")
    best = nats.get(f"order margin, steps {data.T}")
    table = Table(f"-log p of {len(x)} held-out windows", {
        "sampler": 0, "nats/char": 4, "minus the bound": 4, "minus margin at one a call": 4})
    table.add("the bound", mean_and_stderr(bound), None, None)
    for title, values in nats.items():
        to_best = None
        if best is not None:
            to_best = mean_and_stderr(values - best)
        table.add(title, mean_and_stderr(values), mean_and_stderr(values - bound), to_best)


def spans(T):
    """{title: known (T,)}: all but the title's part of a window."""
    parts = {"16 characters in the middle": (T // 2 - 8, T // 2 + 8),
             "the middle half": (T // 4, T - T // 4),
             "the second half": (T // 2, T)}
    knowns = {}
    for title, (start, end) in parts.items():
        knowns[title] = torch.ones(T, dtype=torch.bool)
        knowns[title][start:end] = False
    return knowns


def infilling_table(method, data, s, kept, key):
    """A part of a window given the rest, one character at a call."""
    x = spaced_rows(data.val, s.windows).long()
    ar = eval_model(s)
    columns = {order: 4 for order in ORDERS}
    table = Table(f"-log p of a part of {len(x)} held-out windows given the rest, nats a character;"
                  f" the baseline, {ar.path}, reads the left side alone",
                  {"part": 0, **columns, "baseline": 4, "baseline - margin": 4})
    for title, known in spans(data.T).items():
        nats = []
        for order in ORDERS:
            _, how = vary(order=order, steps=data.T)
            nats.append(kept.get(f"{key}, {title}, {order}", nats_per_char, method, x, how, known))
        by_ar = kept.get(f"{key}, {title}, {ar.path}", ar_nats_per_char, ar.method, x, known)
        difference = by_ar - nats[ORDERS.index("margin")]
        table.add(title, *map(mean_and_stderr, [*nats, by_ar, difference]))


def written_row(method, data, scorer, n, how):
    """What n texts are like that the sampler how wrote. -> numbers and pairs, for a row"""
    x = torch.zeros(n, data.T, dtype=torch.long, device=DEVICE)
    x, _, _ = fill(method, x, torch.zeros_like(x, dtype=torch.bool), how)
    own = nats_per_char(method, x, how)
    scored = torch.cat([scorer.method.bound(batch)[0] for batch in x.split(128)]).double().cpu()
    m = text_metrics([data.tokenizer.decode(ids) for ids in x.tolist()], *training_text(data))
    # texts are independent, unlike windows
    pairs = [(nats.mean().item(), (nats.std() / n ** 0.5).item())
             for nats in (scored, own, scored - own)]
    return [*pairs, m["entropy"], m["words"]]


def written_table(method, data, s, kept, key):
    """Of written text: generative NLL - own -log p estimates KL(sampler || evaluation model)."""
    scorer = eval_model(s)
    table = Table(f"{s.n} texts by each; generative NLL by {scorer.path}", {
        "sampler": 0, "generative NLL": 3, "own -log p": 3, "their difference": 3,
        "entropy, bits": 3, "known words": 3})
    for title, how in tqdm(written_samplers(data.T).items(), desc="written", disable=None):
        key_of_row = f"{key}, {s.n} texts, {title}, {scorer.path}"
        row = kept.get(key_of_row, written_row, method, data, scorer, s.n, how)
        table.add(title, *map(tuple, row))


@torch.no_grad()
def main(argv):
    s = Samplers(**parse(argv, Samplers))
    if s.fp32:
        config.AMP = torch.float32                 # before the network is built
    checkpoint = open_checkpoint(find_checkpoint(s.out, "masked"))
    check(checkpoint.name == "masked", f"{checkpoint.path} is no masked model")
    data = corpus(checkpoint, s)
    kept = Kept(HERE / "out/sampler_nll.pt")
    dtype = str(config.AMP).removeprefix("torch.")
    key = f"{checkpoint.path}, step {checkpoint.meta['step']}, {dtype}, {s.windows} windows"
    print(f"{stamp()}\n\n{key}")
    held_out_table(checkpoint.method, data, s, kept, key)
    if not s.only:
        infilling_table(checkpoint.method, data, s, kept, key)
    if s.n and not s.only:
        written_table(checkpoint.method, data, s, kept, key)


if __name__ == "__main__":
    run(main)

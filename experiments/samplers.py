"""What is quality worth in network calls? Every way to sample a checkpoint of text, a row each, or
only the tables that are named. The masked model in results/, n=100: an hour on two CPU cores.

    python -m experiments.samplers --out=results/masked.pt --n=100
    python -m experiments.samplers "head to head" --n=400
    python -m experiments.samplers --out=out/bits --eval_model=out/warpeace-ar --n=64

A row is what python -m evaluation --bound=False prints with its settings, but for infilling.
"""
from dataclasses import replace

from checkpoint import find_checkpoint
from config import check, parse, run
from evaluation.likelihood import Evaluate, corpus, open_checkpoint, spaced_rows
from evaluation.report import Table, stamp
from evaluation.samples import (SAMPLE_COLUMNS, eval_model, sample_row, sample_texts,
                                sampler_settings)
from gaussian import TokenDiffusion

PLAIN = dict(order="random", temperature=1.0, remask=0.0, min_distance=0)
APART = PLAIN | dict(min_distance=4)
MARGIN = APART | dict(order="margin", steps=43)
ORDERS = ["random", "confidence", "margin", "entropy"]
MASKED = {
    "one network call": [PLAIN | dict(steps=1)],
    "even counts": [PLAIN | dict(order=order, steps=steps) for steps in (8, 16, 32, 64, 128)
                    for order in ORDERS],
    "even counts, apart": [
        *(APART | dict(order=order, steps=steps) for steps in (16, 32, 43, 64) for order in ORDERS),
        *(MARGIN | dict(min_distance=distance) for distance in (0, 2, 8, 16))],
    "cosine counts": [MARGIN | dict(counts="cosine", steps=steps) for steps in (32, 64)],
    "entropy-bounded": [PLAIN | dict(counts="entropy", entropy_bound=bound)
                        for bound in (0.01, 0.1, 1.0, 3.0, 6.0)],
    "entropy-bounded, apart": [APART | dict(counts="entropy", entropy_bound=bound)
                               for bound in (3.0, 6.0)],
    "the documents' counts": [PLAIN | dict(order="confidence", counts="documents", steps=steps)
                              for steps in (32, 64, 100)],
    "temperature": [PLAIN | dict(order=order, steps=128, temperature=t)
                    for order in ("random", "margin") for t in (0.7, 0.8, 0.9)],
    "temperature, apart": [MARGIN | dict(temperature=t) for t in (0.7, 0.8, 0.9, 1.1)],
    "head to head": [PLAIN | dict(steps=128), *(APART | dict(steps=k) for k in (8, 16, 43)),
                     MARGIN, MARGIN | dict(temperature=1.05)],
    "remasking": [{}, dict(temperature=1.0), dict(temperature=1.1), dict(order="entropy"),
                  PLAIN | dict(remask=0.01)],
}
BOTH = ["ddim", "ancestral"]
CODES = {   # bits and embeddings
    **{f"{steps} steps": [dict(sampler=name, td=td, gaussian_steps=steps) for name in BOTH
                          for td in (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)] for steps in (10, 50, 250)},
    "two passes": [dict(sampler=name, td=td, gaussian_steps=25, two_pass=True) for name in BOTH
                   for td in (0.0, 1.0)],
    "2,000 steps": [dict(sampler="ancestral", td=1.0, gaussian_steps=2000)],
}


def main(argv):
    named = [arg for arg in argv if arg in MASKED | CODES]
    s = Evaluate(**parse([arg for arg in argv if arg not in named], Evaluate))
    check(s.n, "samplers are compared by samples: n=0 has none")
    checkpoint = open_checkpoint(find_checkpoint(s.out, "masked"))
    tables = MASKED
    if isinstance(checkpoint.method, TokenDiffusion):
        tables = CODES
    check(set(named) <= set(tables), f"{checkpoint.path} has the tables {', '.join(tables)}")
    data = corpus(checkpoint, s)
    scorer = eval_model(s)
    blocks = spaced_rows(data.val, s.n).long()
    print(stamp())
    table = Table(f"samples, {data.name}, windows of {data.T}", SAMPLE_COLUMNS)
    table.add(*sample_row("held out", blocks, data, scorer))
    for title in named or tables:
        for row in tables[title]:
            how = sampler_settings(checkpoint, replace(s, **row))
            x, n_calls, speed = sample_texts(checkpoint, len(blocks), how)
            shown = [f"{name}={value}" for name, value in row.items() if value != 0]
            first = f"{title}: {', '.join(shown) or 'the default'}"
            table.add(*sample_row(first, x, data, scorer, None, n_calls, speed))


if __name__ == "__main__":
    run(main)

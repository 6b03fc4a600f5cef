"""Quality against network calls: every way to sample one checkpoint of text, a row each; or only the tables that are named:

    python -m experiments.samplers --out=results/masked.pt --n=100
    python -m experiments.samplers "head to head" --n=400
    python -m experiments.samplers --out=out/bits --judge=out/ar --n=300

A row is what `python -m evaluation --bound=False` prints with the row's settings; only infilling, which no sampler setting touches, is left out."""
from dataclasses import replace

from config import Evaluate, at_least, parse, run
from evaluation.evaluate import SAMPLES, judge_of, open_checkpoint, sample, sample_row, sample_setup, stamp
from evaluation.report import Table
from generate import newest

ORDERS = ("random", "confidence", "margin", "entropy")
PLAIN = dict(order="random", temperature=1.0, remask=0.0, apart=0)
MASKED = {
    "one network call": [PLAIN | dict(steps=1)],
    "even counts": [PLAIN | dict(order=o, steps=k) for k in (8, 16, 32, 64, 128) for o in ORDERS],
    "even counts, apart": [PLAIN | dict(order=o, steps=k, apart=4) for k in (16, 32, 43, 64) for o in ORDERS]
    + [PLAIN | dict(order="margin", steps=43, apart=a) for a in (0, 2, 8, 16)],
    "cosine counts": [PLAIN | dict(order="margin", counts="cosine", steps=k, apart=4) for k in (32, 64)],
    "entropy-bounded": [PLAIN | dict(counts="entropy", gamma=g) for g in (.01, .1, 1., 3., 6.)],
    "entropy-bounded, apart": [PLAIN | dict(counts="entropy", gamma=g, apart=4) for g in (3., 6.)],
    "the documents' counts": [PLAIN | dict(order="confidence", counts="documents", steps=k) for k in (32, 64, 100)],
    "temperature": [PLAIN | dict(order=o, steps=128, temperature=t) for o in ("random", "margin") for t in (.7, .8, .9)],
    "temperature, apart": [PLAIN | dict(order="margin", steps=43, apart=4, temperature=t) for t in (.7, .8, .9, 1.1)],
    "head to head": [PLAIN | dict(steps=128), *(PLAIN | dict(steps=k, apart=4) for k in (8, 16, 43)),
                     *(PLAIN | dict(order="margin", steps=43, apart=4, temperature=t) for t in (1.0, 1.05))],
    "remasking": [dict(), dict(temperature=1.0), dict(temperature=1.1), dict(order="entropy"), PLAIN | dict(remask=.01),
                  PLAIN | dict(remask=.01, remask_by="random")],
}
CODES = {   # bits and embeddings
    **{f"{k} steps": [dict(sampler=o, td=td, gaussian_steps=k) for o in ("ddim", "ancestral") for td in (0., .5, 1., 2., 5., 10.)]
       for k in (10, 50, 250)},
    "two passes": [dict(sampler=o, td=td, gaussian_steps=25, twice=True) for o in ("ddim", "ancestral") for td in (0., 1.)],
    "2,000 steps": [dict(sampler="ancestral", td=1., gaussian_steps=2000)],
}


def main(argv):
    s = parse([a for a in argv if a not in MASKED | CODES], Evaluate())
    at_least(s, 2, "n")
    k = open_checkpoint(s.out or newest())
    tables = MASKED if k.name == "masked" else CODES
    data, blocks, judge = sample_setup(k, s, judge_of(s))
    k.method.net.compile(dynamic=False)                                               # one shape of batch: twice as fast on a CPU
    sample(k, len(blocks), replace(s, steps=2, gaussian_steps=2))              # it is compiled at the first call
    print(stamp())
    table = Table(f"samples, {data.name}, windows of {data.T}", SAMPLES)
    table.add(*sample_row("held out", blocks, data, judge))
    for title in [a for a in argv if a in tables] or tables:
        for row in tables[title]:
            x, calls, speed = sample(k, len(blocks), replace(s, **row))
            shown = [f"{name}={value}" for name, value in row.items() if value != 0] or ["the default"]
            table.add(*sample_row(f"{title}: {', '.join(shown)}", x, data, judge, None, calls, speed))


if __name__ == "__main__":
    run(main)

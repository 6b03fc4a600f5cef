"""What do guidance, steps and the sampler do to digits? A row each, of one checkpoint, or only the
tables that are named. --digits=1000: two hours on one CPU core.

    python -m experiments.digits --out=out/mnist --digits=1000
    python -m experiments.digits guidance "a thousand steps" --digits=256

A row is what python -m evaluation prints with its settings.
"""
from dataclasses import replace

from checkpoint import find_checkpoint
from config import check, parse, run
from evaluation.digits import digit_floor, digit_row, real_digits, sample_digits
from evaluation.likelihood import Evaluate, corpus, open_checkpoint
from evaluation.report import stamp
from evaluation.samples import sampler_settings

BOTH = ["ddim", "ancestral"]
TABLES = {
    "guidance": [dict(guidance=g) for g in (0.0, 1.0, 1.5, 2.0, 4.0)],
    "ancestral": [dict(guidance=g, sampler="ancestral") for g in (1.0, 2.0, 4.0)],
    **{f"{steps} steps": [dict(guidance=g, sampler=name, gaussian_steps=steps) for name in BOTH
                          for g in (1.0, 2.0, 4.0)] for steps in (10, 250)},
    "a thousand steps": [dict(guidance=1.0, sampler=name, gaussian_steps=1000) for name in BOTH],
    "asymmetric time": [dict(guidance=1.0, sampler=name, td=td) for name in BOTH
                        for td in (0.5, 1.0, 2.0)],
}


def main(argv):
    named = [arg for arg in argv if arg in TABLES]
    s = Evaluate(**parse([arg for arg in argv if arg not in named], Evaluate))
    checkpoint = open_checkpoint(find_checkpoint(s.out, "mnist"))
    check(s.digits and checkpoint.name == "mnist",
          f"{checkpoint.path} is no checkpoint of mnist_ddpm.py, or digits is 0")
    print(stamp())
    real = real_digits(corpus(checkpoint, s))
    table, floor = digit_floor(real, s.digits, s.seed)
    for title in named or TABLES:
        for row in TABLES[title]:
            how = sampler_settings(checkpoint, replace(s, **row))
            m, speed = sample_digits(checkpoint, real, s.digits, how)
            first = f"{title}: guidance {how.guidance:g}, {how.steps} {how.sampler} steps"
            if how.td:
                first += f", td {how.td:g}"
            table.add(*digit_row(first, m, floor, speed))


if __name__ == "__main__":
    run(main)

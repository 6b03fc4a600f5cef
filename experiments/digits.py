"""Guidance, steps and samplers of one MNIST checkpoint, a row each; or only the tables that are named:

    python -m experiments.digits --out=out/mnist --digits=1000
    python -m experiments.digits guidance "a thousand steps" --digits=256

A row is what `python -m evaluation --bound=False` prints with the row's settings."""
from dataclasses import replace

from config import HERE, Evaluate, Picture, at_least, parse, run
from evaluation.digits import digit_floor, digit_row, digit_sample, real_digits
from evaluation.evaluate import open_checkpoint, stamp

TABLES = {
    "guidance": [dict(guidance=g) for g in (0.0, 1.0, 1.5, 2.0, 4.0)],
    "ancestral": [dict(guidance=g, sampler="ancestral") for g in (1.0, 2.0, 4.0)],
    "10 steps": [dict(guidance=g, gaussian_steps=10, sampler=k) for k in ("ddim", "ancestral") for g in (1.0, 2.0, 4.0)],
    "250 steps": [dict(guidance=g, gaussian_steps=250, sampler=k) for k in ("ddim", "ancestral") for g in (1.0, 2.0, 4.0)],
    "a thousand steps": [dict(guidance=1.0, gaussian_steps=1000, sampler=k) for k in ("ddim", "ancestral")],
    "asymmetric time": [dict(guidance=1.0, td=td, sampler=k) for k in ("ddim", "ancestral") for td in (.5, 1.0, 2.0)],
}


def main(argv):
    s = parse([a for a in argv if a not in TABLES], Evaluate())
    at_least(s, 10, "digits")
    k = open_checkpoint(s.out or HERE / "out/mnist")
    k.method.net.compile(dynamic=False)                                               # one shape of batch: twice as fast on a CPU
    print(stamp())
    real = real_digits(k.meta["data"]["name"], s.data_dir, k.meta["data"]["sha256"])
    table, floor = digit_floor(real, s.digits, s.seed)
    for title in [a for a in argv if a in TABLES] or TABLES:
        for row in TABLES[title]:
            t = replace(s, **row)
            m, speed = digit_sample(k, real, t)
            how = f"guidance {t.guidance:g}, {t.gaussian_steps} {t.sampler or Picture.sampler} steps" + f", td {t.td:g}" * bool(t.td)
            table.add(*digit_row(f"{title}: {how}", m, floor, speed))


if __name__ == "__main__":
    run(main)

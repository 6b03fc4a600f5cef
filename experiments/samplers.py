"""What is quality worth in network calls? Every combination of sampler settings that are typed with
commas between them, a row each, of one checkpoint: with n=100 some 2 minutes a row on a CPU core.

    python -m experiments.samplers --order=random,margin --steps=8,16,43 --temperature=1 --remask=0
    python -m experiments.samplers --out=out/bits --td=0,1 --gaussian_steps=10,50 --n=64
    python -m experiments.samplers --out=out/mnist --guidance=0,1,2,4 --sampler=ddim,ancestral

A row is what python -m evaluation --bound=False prints with its settings, but for infilling.
samplers.sh has the commands behind the tables in results/.
"""
from itertools import product

from checkpoint import find_checkpoint
from config import check, parse, run
from evaluation.digits import digit_floor, digit_row, real_digits, sample_digits
from evaluation.likelihood import Evaluate, corpus, open_checkpoint
from evaluation.report import Table, stamp
from evaluation.samples import (SAMPLE_COLUMNS, eval_model, sample_row, sample_texts,
                                sampler_settings)
from train import spaced_rows

ONE_VALUE = {"out", "dataset", "data_dir", "eval_model", "ar"}      # a comma belongs to the name


def combinations(argv, settings):
    """[(what differs, settings), ...]: one of each value that is typed, in every combination."""
    choices = []
    for arg in argv:
        name, equals, values = arg.partition("=")
        if name.removeprefix("--") in ONE_VALUE:
            choices.append([arg])
        else:
            choices.append([name + equals + value for value in values.split(",")])
    rows = []
    for args in product(*choices):
        differ = [arg for arg, others in zip(args, choices, strict=True) if len(others) > 1]
        title = ", ".join(arg.removeprefix("--") for arg in differ)
        rows.append((title or "as typed", settings(**parse(args, settings))))
    return rows


def main(argv):
    rows = combinations(argv, Evaluate)
    _, s = rows[0]
    check(s.n and s.digits, "samplers are compared by samples: n=0 or digits=0 has none")
    checkpoint = open_checkpoint(find_checkpoint(s.out, "masked"))
    data = corpus(checkpoint, s)
    print(stamp())
    if not checkpoint.meta["alphabet"]:
        real = real_digits(data)
        table, floor = digit_floor(real, s.digits, s.seed)
        for title, row in rows:
            how = sampler_settings(checkpoint, row)
            m, speed = sample_digits(checkpoint, real, s.digits, how)
            table.add(*digit_row(title, m, floor, speed))
        return

    scorer = eval_model(s)
    blocks = spaced_rows(data.val, s.n).long()
    table = Table(f"samples, {data.name}, windows of {data.T}", SAMPLE_COLUMNS)
    table.add(*sample_row("held out", blocks, data, scorer))
    for title, row in rows:
        how = sampler_settings(checkpoint, row)
        x, n_calls, speed = sample_texts(checkpoint, len(blocks), how)
        table.add(*sample_row(title, x, data, scorer, None, n_calls, speed))


if __name__ == "__main__":
    run(main)

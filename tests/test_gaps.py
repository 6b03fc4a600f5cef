"""What evaluation prints and reads, to the last digit."""
from types import SimpleNamespace

import torch

from evaluation import digits, likelihood
from evaluation.report import Table
from evaluation.samples import training_text


def test_texts_are_compared_with_ten_million_characters_at_most():
    tokenizer = SimpleNamespace(decode=lambda ids: f"{len(ids)} characters")
    for n, kept in [(10 ** 7 + 2, 10 ** 7), (10 ** 7 - 2, 10 ** 7 - 2)]:
        data = SimpleNamespace(tokenizer=tokenizer, train=torch.zeros(n, dtype=torch.uint8))
        text, words = training_text.__wrapped__(data)
        assert text == f"{kept} characters" and "characters" in words


def last_row(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_rows_of_digits_and_likelihood_as_they_are_printed(capsys):
    pair = (0.25, 0.0625)
    m = {"right": pair, "frechet": (3.0, 0.5), "precision": pair, "recall": pair, "near": pair,
         "read": [4, 1, 3, 0, 0, 0, 0, 0, 0, 8]}
    Table("digits", digits.DIGIT_COLUMNS, [digits.digit_row("ours", m, 2.0, 7.25)])
    score = "0.250 ± 0.062"
    assert last_row(capsys) == (f"| ours | 16 | {score} | 3.000 ± 0.500 | 1.5 | {score} | {score} "
                                f"| {score} | 25 6 19 0 0 0 0 0 0 50 | 7.2 |")
    row = ["ours", "masked", 1234, 50, 1.5, 0.25, 0.125, pair, pair, 1.5, pair, pair]
    Table("bounds", likelihood.likelihood_columns("char"), [row])
    four = "0.2500 ± 0.0625"
    assert last_row(capsys) == ("| ours | masked | 1,234 | 50 | 1.5000 | 0.2500 | 0.1250 "
                                f"| {score} | {four} | 1.500 | {four} | {four} |")
    Table("by noise", likelihood.FIFTH_COLUMNS, [["ours", 0.5, 1.0, 1.5, 2.0, 2.5]])
    assert last_row(capsys) == "| ours | 0.500 | 1.000 | 1.500 | 2.000 | 2.500 |"

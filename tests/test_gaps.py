"""What the changes of mutate.py, seed 0, showed that no test noticed."""
import re
import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

import config
from config import Bits, Embed, Masked, Mnist, Sample
from evaluation import digits, likelihood
from evaluation.report import Table
from evaluation.samples import training_text


def test_help_shows_the_settings_and_nothing_of_how_they_are_checked(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"], Sample)
    assert re.findall(r"^class (\w+)", capsys.readouterr().out, re.M) == ["Writing", "Sample"]


@pytest.mark.parametrize("rank, count", [(1, 1), (2, 1), (1, 2)])
def test_a_process_without_a_gpu_of_its_own_ends_in_a_line(rank, count, monkeypatch):
    """The first lines of config.py on a machine with `count` GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    if rank < count:
        runpy.run_path(str(ROOT / "config.py"))
        assert chosen == [rank]
    else:
        with pytest.raises(SystemExit, match=f"there is no GPU number {rank}$"):
            runpy.run_path(str(ROOT / "config.py"))
        assert not chosen


@pytest.mark.parametrize("settings", [Masked, Bits, Embed, Mnist])
def test_the_evaluations_of_a_default_run_are_evenly_spaced(settings):
    assert settings().max_iters % settings().eval_interval == 0


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


GOLDEN = """
import json, sys
from pathlib import Path
from experiments import golden
golden.PATH = Path(sys.argv.pop(1))
values = {"a.loss": {"losses": [1.0, 2.0], "bound": 4.0}, "a.text": ["x"], "b.picture": [0.5, 0.25]}
golden.cases = lambda: (values | json.loads(sys.argv.pop(1))).items()
golden.main(sys.argv[1:])
"""


def test_golden_finds_the_largest_difference_and_records_what_is_asked_for(tmp_path):
    path = tmp_path / "golden.json"
    path.write_text("{}")

    def golden(changes, *args, code=0):
        return run("-c", GOLDEN, str(path), changes, *args, code=code)

    golden("{}", "--record")
    assert golden("{}").stdout == "all 3 cases are as recorded\n"
    changes = ('{"a.loss": {"losses": [1.0, 2.02], "bound": 4.0}, "a.text": ["y"],'
               ' "b.picture": [0.5, 0.375], "b.new": [1.0]}')
    done = golden(changes, code=1)
    assert done.stdout.splitlines() == [
        "a.loss: differs by 1.0e-02", "a.text: differs by 1.0e+00",
        "b.picture: differs by 1.2e-01", "b.new: differs by 1.0e+00"]
    assert done.stderr.endswith("4 of 3 cases differ\n")
    golden(changes, "--record=b.")
    assert golden(changes, code=1).stderr.endswith("2 of 4 cases differ\n")
    golden(changes, "--record")
    golden(changes)

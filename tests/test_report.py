"""What was measured, as Markdown and as what the page shows; files that cannot be opened or
written; --quick. The page in a browser: test_page.py."""
import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_evaluate import drawn, save

import analog_bits
import mnist_ddpm
import train
from config import Masked
from data import CharTokenizer, Text
from evaluation import __main__ as command
from evaluation import likelihood
from evaluation.likelihood import Evaluate
from evaluation.report import (
    Table, evenly, learning_curve, samples_in_training, summary, text_frame)

TINY = ["--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8",
        "--eval_interval=20", "--windows=8", "--compile=False"]


def test_a_table_prints_its_rows_and_keeps_its_numbers(capsys):
    table = Table("bounds", {"checkpoint": 0, "steps": 0, "nats": 3, "bits": 2})
    table.add("a|b", 12345, 1.23456, (2.345, 0.06789))
    table.add("b", 7, math.nan, None)
    table.add("c", 7, (math.nan, 1.0), "exact")
    assert capsys.readouterr().out == (
        "\nbounds\n\n| checkpoint | steps | nats | bits |\n|---|---:|---:|---:|\n"
        "| a\\|b | 12,345 | 1.235 | 2.35 ± 0.07 |\n| b | 7 |  |  |\n| c | 7 |  | exact |\n")
    assert table.rows[0] == ["a|b", "12,345", "1.235", "2.35 ± 0.07"]


def test_frames_are_the_first_the_last_and_evenly_between():
    assert evenly(list(range(257))) == list(range(0, 257, 4))
    assert evenly([1, 2]) == [1, 2]


def test_curves_are_read_and_what_is_cut_is_left_out(tmp_path):
    log = tmp_path / "log.csv"
    assert learning_curve(tmp_path) == []
    for text in ("", "step,bits\n1,2\n", "step,seconds,bits\n1,2\n", "step,seconds,bits\nx,2,3\n",
                 "step,seconds,bits\n", "step,seconds,bits\n1,2,nan\n"):
        log.write_text(text)
        assert learning_curve(tmp_path) == [], text
    log.write_text("step,seconds,loss,bits\n100,60,1,4.5\n200,150,1,inf\n300,180,1,4.25\n")
    curve = [[100, 1, 4.5], [300, 3, 4.25]]
    assert learning_curve(tmp_path) == learning_curve(tmp_path / "best.pt") == curve
    (tmp_path / "masked.csv").write_bytes(log.read_bytes())
    log.unlink()
    assert learning_curve(tmp_path / "masked.pt") == curve


def test_bytes_are_replayed_as_the_characters_they_are():
    tokenizer = CharTokenizer("".join(map(chr, range(256))), is_bytes=True)
    ids = torch.tensor([*"é€ok".encode()])
    assert text_frame(tokenizer, ids, torch.full(ids.shape, 0.5)) == ("é€ok", "2222")
    assert text_frame(tokenizer, ids * 0 + 256, torch.zeros(7)) == ("·" * 7, " " * 7)


def test_samples_of_a_run_are_read_with_their_steps(tmp_path):
    assert samples_in_training(tmp_path) is None
    log = tmp_path / "samples.txt"
    log.write_bytes("--- step 400\nA\n\nb\n\n--- step 800\né--- step 7\n".encode() + b"\xff\n")
    for path in (str(tmp_path), str(tmp_path / "best.pt")):
        assert samples_in_training(path) == {"name": path, "steps": [400, 800], "frames": [
            ["A\n\nb\n", ""], ["é--- step 7\n\ufffd", ""]]}
    log.write_text("".join(f"--- step {i}\nx\n" for i in range(129)))
    assert samples_in_training(tmp_path)["steps"] == list(range(0, 129, 2))
    log.write_text("cut")
    assert samples_in_training(tmp_path)["frames"] == []


def test_the_summary_has_one_row_a_model():
    """A column for each of the chosen quantities, empty where it was not measured."""
    columns = {"checkpoint": 0, "method": 0, "bound, nats/char": 2, "± text": 2}
    bounds = Table("bounds", columns)
    bounds.add("a", "masked", 1.5, 0.1)
    bounds.add("b", "bits", 2.5, 0.1)
    samples = Table("samples", {"text": 0, "method": 0, "known words": 2, "infilled": 2})
    samples.add("held out", "", 0.9, None)
    samples.add("b", "other", 0.7, None)
    said = summary([bounds, samples], ["b", "a", "c"])
    assert list(said["columns"]) == ["model", "method", "bound, nats/char", "known words"]
    assert said["rows"] == [["b", "bits", "2.50", "0.70"], ["a", "masked", "1.50", ""],
                            ["c", "", "", ""]]


# what cannot be read or written

def test_checkpoints_that_cannot_be_opened_are_named_in_a_line_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "HERE", tmp_path)
    out = tmp_path / "out"
    c = Masked(dataset="pydoc", block_size=32, n_layer=1, n_head=1, n_embd=16)
    meta = Text(c).meta
    save(out / "good", "masked", train, c, meta, drawn(train, c, meta))
    raw = (out / "good/best.pt").read_bytes()
    state = torch.load(out / "good/best.pt", weights_only=True)
    weights = state["ema"]
    changes = {"nan": {"ema": {name: p * math.nan for name, p in weights.items()}},
               "foreign": {"data": {"name": "x"}}, "short": {"ema": dict([*weights.items()][1:])}}
    for name, change in changes.items():
        (out / name).mkdir()
        torch.save({**state, **change}, out / name / "best.pt")
    for name, content in [("cut/best.pt", raw[:5000]), ("unfinished/ckpt.pt", raw)]:
        (out / name).parent.mkdir()
        (out / name).write_bytes(content)
    found = command.usable(command.all_checkpoints(), Evaluate())
    assert [checkpoint.path for checkpoint in found] == [os.path.relpath(out / "good")]
    assert found[0].c == c
    told = capsys.readouterr().err.splitlines()
    for line, words in zip(told, ["cut/best.pt is damaged", "foreign: no text file 'x'",
                                  "nan/best.pt has weights that are no numbers",
                                  "short does not fit this network",
                                  "no checkpoint at"], strict=True):
        assert words in line
    with pytest.raises(SystemExit, match="no checkpoint to measure"):
        command.main([f"--out={out}/cut,{out}/none"])
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError):
        command.main([f"--out={tmp_path}/none", f"--json={tmp_path}/file/table.json"])
    assert capsys.readouterr() == ("", "") and (tmp_path / "file").read_text() == "kept"


# --quick

def start_here(argv, cwd, stdout):
    """subprocess.run, but of all scripts only the baseline gets a process of its own."""
    if "--objective=ar" in argv:
        return subprocess.run(argv, cwd=cwd, stdout=stdout)
    assert argv[0] == sys.executable and cwd == ROOT and stdout is sys.stdout is sys.stderr
    importlib.import_module(Path(argv[1]).stem).main(argv[2:])


def stop_halfway(folder):
    """A run of bits that was stopped at step 6 of 10, before its first evaluation."""
    analog_bits.main([*TINY, "--dataset=pydoc", "--max_iters=6", f"--out={folder}"])
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    config = {**state["config"], "max_iters": 10}
    torch.save({**state, "config": config}, folder / "ckpt.pt")
    (folder / "best.pt").unlink()
    (folder / "status").write_text("stopped")


def test_quick_trains_what_is_not_finished_and_measures_it(tmp_path, monkeypatch, capfd):
    """Of a run that was stopped, what is missing; of finished ones, nothing. The tables alone are
    on standard output."""
    quick = tmp_path / "out/quick"
    page = tmp_path / "out/report.html"
    monkeypatch.setattr(command, "QUICK", quick)
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "QUICK_SETTINGS", [*TINY, "--max_iters=10"])
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=start_here))
    monkeypatch.setattr(likelihood, "read_images", functools.cache(mnist_ddpm.Images))
    few_digits = mnist_ddpm.draw_digits(300, 50)
    monkeypatch.setattr(mnist_ddpm, "draw_digits", lambda: few_digits)
    stop_halfway(quick / "bits")
    capfd.readouterr()
    command.main(["--quick", "--n=4", "--exact=2", "--windows=8", "--gaussian_steps=3",
                  "--steps=4", f"--json={tmp_path}/sub/table.json"])
    told = capfd.readouterr()
    lines = [line for line in told.out.splitlines() if line and not line.startswith("|")]
    assert lines[0].startswith("`python -m ") and len(lines) == 1 + 3 + 8, lines
    assert told.err.count("step 10 |") == 5 and told.err.count("wrote ") == 2
    names = ["ar", "bits", "embed", "masked", "mnist"]
    assert sorted(path.name for path in quick.iterdir()) == names
    assert all((path / "status").read_text() == "finished" for path in quick.iterdir())
    assert torch.load(quick / "bits/best.pt", weights_only=True)["step"] == 10
    data = json.loads((tmp_path / "sub/table.json").read_text())
    rows = json.dumps(data["tables"][0]["rows"], ensure_ascii=False)
    assert rows in page.read_text(encoding="utf-8")

    # what the JSON says
    tables = {table["title"].split(",")[0]: table["rows"] for table in data["tables"]}
    assert [row[1] for row in tables["pydoc"]] == ["ar", "masked", "bits", "embed"]
    assert float(tables["pydoc"][1][4]) == pytest.approx(math.log(97), abs=1)
    assert [row[1] for row in tables["digits"]] == ["mnist"]
    assert [row[1] for row in tables["samples"]] == ["4"] * (2 + 4)
    firsts = tables["the first of each"]
    assert [row[0] for row in firsts] == [row[0] for row in tables["samples"]]
    assert len(data["replays"]) == len(data["curves"]) == 5
    for replay in data["replays"]:
        assert len(replay["frames"]) == replay["calls"] + 1 <= 65
    assert [run["steps"] for run in data["learned"]] == [[10], [10], [6, 10], [10]]
    assert [row[1] for row in data["summary"]["rows"]] == ["ar", "masked", "bits", "embed", "mnist"]
    assert list(data["summary"]["columns"])[:5] == ["model", "method", "parameters", "steps",
                                                    "bound, nats/char"]
    text = data["replays"][1]["frames"]
    assert set(text[0][0]) == {"·"} and "·" not in text[-1][0]

    # again: nothing is trained, and the same digits
    monkeypatch.setattr(command, "subprocess", None)
    command.main(["--quick", "--n=0", "--exact=2", "--windows=8", f"--json={tmp_path}/again.json"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tables"][0]["rows"] == tables["pydoc"]

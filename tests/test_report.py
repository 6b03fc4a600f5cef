"""What was measured, as Markdown and as what the page shows; files that cannot be opened or
written; --quick. The page in a browser: test_page.py."""
import json
import math
import os

import pytest
import torch
from conftest import run

import analog_bits
import train
from config import Masked
from data import CharTokenizer
from evaluation import __main__ as command
from evaluation.likelihood import Evaluate
from evaluation.report import Table, evenly, learning_curve, text_frame

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16",
        "--batch_size=8", "--max_iters=10", "--warmup_iters=1", "--train_size=20000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "masked"
    train.main([*TINY, f"--out={folder}"])
    return folder


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
    assert text_frame(tokenizer, ids, torch.full(ids.shape, 0.5)) == ("é€ok", "4444")
    assert text_frame(tokenizer, ids * 0 + 256, torch.zeros(7)) == ("·" * 7, " " * 7)


# what cannot be read or written

def test_weights_that_do_not_fit_and_nothing_usable_are_a_line_each(trained, tmp_path, capsys):
    state = torch.load(trained / "best.pt", weights_only=True)
    state["ema"].popitem()
    torch.save(state, tmp_path / "short.pt")
    (tmp_path / "best.pt").write_bytes(b"no")
    with pytest.raises(SystemExit, match="no checkpoint to measure"):
        command.main([f"--out={tmp_path},{tmp_path}/none,{tmp_path}/short.pt"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "damaged" in lines[0] and "no checkpoint" in lines[1]
    assert "another version" in lines[2]


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run("-m", "evaluation", f"--out={tmp_path}/none",
               f"--json={tmp_path}/file/table.json", code=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Error" in lines[0] and "no checkpoint" not in lines[0]
    assert (tmp_path / "file").read_text() == "kept"


# --quick

def test_quick_trains_what_is_not_finished_and_measures_it(tmp_path, monkeypatch, capfd):
    """Of a run that was stopped, what is missing; of finished ones, nothing. The tables alone are
    on standard output."""
    quick = tmp_path / "out/quick"
    monkeypatch.setattr(command, "QUICK", quick)
    monkeypatch.setattr(command, "PAGE", tmp_path / "out/report.html")
    monkeypatch.setattr(command, "QUICK_SETTINGS", [*TINY[1:-1], "--compile=False"])
    stop_halfway(quick / "bits")
    capfd.readouterr()
    command.main(["--quick", "--n=4", "--exact=2", "--windows=40",
                  "--gaussian_steps=3", "--steps=4", f"--json={tmp_path}/sub/table.json"])
    told = capfd.readouterr()
    lines = [line for line in told.out.splitlines() if line and not line.startswith("|")]
    assert lines[0].startswith("`python -m ") and len(lines) == 1 + 3 + 8, lines
    assert told.err.count("step 10 |") == 5 and told.err.count("wrote ") == 2
    names = ["ar", "bits", "embed", "masked", "mnist"]
    assert sorted(path.name for path in quick.iterdir()) == names
    assert all((path / "status").read_text() == "finished" for path in quick.iterdir())
    assert torch.load(quick / "bits/best.pt", weights_only=True)["step"] == 10
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "sub/table.json").read_text())
    assert json.dumps(data["tables"][0]["rows"], ensure_ascii=False) in page

    # what the JSON says
    tables = {table["title"]: table["rows"] for table in data["tables"]}
    bounds, = [rows for title, rows in tables.items() if "pydoc, held out" in title]
    assert [row[1] for row in bounds] == ["ar", "masked", "bits", "embed"]
    assert float(bounds[1][4]) == pytest.approx(math.log(97), abs=1)
    assert any("digits, held out" in title for title in tables)
    samples, = [rows for title, rows in tables.items() if "samples" in title]
    firsts, = [rows for title, rows in tables.items() if "the first of each" in title]
    assert [row[0] for row in firsts] == [row[0] for row in samples]
    assert len(samples) == 2 + 4
    assert len(data["replays"]) == len(data["curves"]) == 5
    for replay in data["replays"]:
        assert len(replay["frames"]) == replay["calls"] + 1 <= 65
    text = data["replays"][1]["frames"]
    assert set(text[0][0]) == {"·"} and "·" not in text[-1][0]

    # again: nothing is trained, and the same digits
    times = [path.stat().st_mtime_ns for path in sorted(quick.rglob("best.pt"))]
    command.main(["--quick", "--n=0", "--exact=2", "--windows=40", f"--json={tmp_path}/again.json"])
    assert times == [path.stat().st_mtime_ns for path in sorted(quick.rglob("best.pt"))]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["tables"][0]["rows"] == bounds


def stop_halfway(folder):
    """A run of bits that was stopped at step 6 of 10, before its first evaluation."""
    analog_bits.main([*TINY[:-3], "--max_iters=6", "--warmup_iters=1", f"--out={folder}"])
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    config = {**state["config"], "max_iters": 10}
    torch.save({**state, "config": config}, folder / "ckpt.pt")
    (folder / "best.pt").unlink()
    (folder / "status").write_text("stopped")


def test_of_all_checkpoints_those_that_cannot_be_opened_are_named(
        trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "HERE", tmp_path)
    state = torch.load(trained / "best.pt", weights_only=True)
    for name in ("good", "cut", "nan", "foreign", "unfinished"):
        (tmp_path / "out" / name).mkdir(parents=True)
    torch.save(state, tmp_path / "out/good/best.pt")
    raw = (trained / "best.pt").read_bytes()
    (tmp_path / "out/cut/best.pt").write_bytes(raw[:5000])
    torch.save({**state, "data": {"name": "x"}}, tmp_path / "out/foreign/best.pt")
    no_numbers = {key: p * math.nan for key, p in state["ema"].items()}
    torch.save({**state, "ema": no_numbers}, tmp_path / "out/nan/best.pt")
    (tmp_path / "out/unfinished/ckpt.pt").write_bytes(raw)
    found = command.usable(command.all_checkpoints(), Evaluate())
    assert [checkpoint.path for checkpoint in found] == [
        os.path.relpath(tmp_path / "out/good")]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    for line, words in zip(told, ["out/cut: ", "foreign: no text file 'x'",
                                  "nan/best.pt has weights that are no numbers",
                                  "no checkpoint at"], strict=True):
        assert words in line
    assert found[0].c == Masked(**state["config"])

"""Every caller is answered: paths, texts, clocks, streams and processes as they come."""
import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, end, last_line, read_log, start, wait_for

import checkpoint
import config
import generate
import train
from checkpoint import find_checkpoint, out_option, read_checkpoint
from config import Embed, Masked, parse
from embed_diffusion import read_table
from evaluation.__main__ import typed_paths
from evaluation.likelihood import Checkpoint
from evaluation.samples import fitting

SHORT = [*TINY, "--max_iters=4", "--eval_interval=2"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder, which is ~ and where the caller is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------------------
# paths and data

def test_every_typed_path_goes_through_one_function(home):
    """~ is the home folder; what travels in a checkpoint is found from another folder."""
    (home / "my.txt").write_text("abc")
    typed = parse(["--out=~/run", "--dataset=~/my.txt", "--data_dir=corpora", "--table=t.txt"],
                  Embed)
    assert typed == {"out": str(home / "run"), "dataset": str(home / "my.txt"),
                     "data_dir": str(home / "corpora"), "table": str(home / "t.txt")}
    assert parse(["--dataset=my.txt"], Masked) == {"dataset": str(home / "my.txt")}
    assert parse(["--dataset=shakespeare", "--out=a"], Masked) == {"dataset": "shakespeare",
                                                                   "out": "a"}
    assert parse(["--data_dir=", "--out="], Masked) == {"data_dir": "", "out": ""}
    for settings in (config.Sample, config.EmbedSampler, config.ImageSampler, Masked, Embed):
        said = re.findall(r"(?m)^    (\w+): str = .*(?:path|folder|file|where)",
                          config.inspect.getsource(settings))
        assert set(said) <= config.PATHS | {"prompt"}


def test_paths_that_evaluation_is_told(home):
    """A path with a comma is a path if it is there."""
    (home / "a,b").mkdir()
    assert typed_paths("a,b") == ["a,b"]
    assert typed_paths("a,c,") == ["a", "c"]
    assert typed_paths("~/run,~/other") == [f"{home}/run", f"{home}/other"]
    assert typed_paths("") == []


def test_commands_that_are_suggested_can_be_typed(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "HERE", tmp_path / "my clone")
    folder = tmp_path / "my clone/out/masked"
    train.main([*SHORT, corpus])
    done = capsys.readouterr().out.splitlines()[-1]
    assert done == f"done: python generate.py --out='{folder}'"
    (folder / "status").write_text("token")
    find_checkpoint("", "masked")
    assert capsys.readouterr().err == (f"{folder} is newer, but not finished: --out='{folder}' "
                                       "writes with it\n")
    assert out_option("out/masked") == "--out=out/masked"


def test_data_are_what_is_in_them_not_where_they_are_nor_what_they_are_called(home, monkeypatch,
                                                                              capsys):
    out = f"--out={home}/run"
    Path("my.txt").write_text("abcd abd acd\n" * 99)
    train.main([*SHORT, "--dataset=my.txt", out])
    monkeypatch.chdir(ROOT)
    train.main(["--resume", "--max_iters=6", out])         # it is found from another folder
    other = home / "other name.txt"
    (home / "my.txt").rename(other)
    train.main(["--resume", f"--dataset={other}", "--max_iters=8", out])
    capsys.readouterr()
    train.main(["--resume", "--max_iters=2", out])         # fewer steps than are done
    said = capsys.readouterr().out
    assert "-2" not in said and said.splitlines()[-1].startswith("done: ")
    assert [row["step"] for row in read_log(home / "run")] == ["2", "4", "6", "8"]
    other.unlink()
    with pytest.raises(SystemExit) as e:
        train.main(["--resume", "--max_iters=10", out])
    line = last_line(e.value)
    assert line.startswith(f"no text file '{other}'") and "--dataset=PATH says where it is" in line


def test_a_table_is_the_same_however_it_was_saved(tmp_path):
    for content in (b"\xef\xbb\xbfa 1 2\nb 3 4\n", b"a 1 2\r\nb 3 4\r\n", b"a 1 2\rb 3 4\r"):
        (tmp_path / "t.txt").write_bytes(content)
        rows = read_table(tmp_path / "t.txt", "ab")
        assert {ch: row.tolist() for ch, row in rows.items()} == {"a": [1, 2], "b": [3, 4]}


def test_the_evaluation_model_scores_the_same_text_under_any_name(capsys):
    def checkpoint(name, sha256, alphabet):
        meta = {"alphabet": alphabet, "data": {"name": name, "sha256": sha256}}
        return Checkpoint(name, "ar", None, meta, None, None)
    model = checkpoint("shakespeare", "1", "ab")
    assert fitting(model, checkpoint("file my copy.txt", "1", "ab")) is model
    assert capsys.readouterr().err == ""
    for other in (checkpoint("shakespeare", "2", "ab"), checkpoint("shakespeare", "1", "abc")):
        assert fitting(model, other) is None
        assert "does not score shakespeare" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# who calls

def test_closed_streams_and_empty_variables_stop_nothing(corpus, tmp_path):
    command = " ".join([f"'{sys.executable}' train.py", *SHORT, corpus, f"--out={tmp_path}/run"])
    shell = f"WORLD_SIZE= RANK= {command} >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], cwd=ROOT, timeout=300).returncode == 0
    assert (tmp_path / "run/status").read_text() == "finished"


def test_a_line_is_in_the_log_when_it_is_printed(corpus, tmp_path):
    """Also where stdout is a file: a run that is watched from elsewhere."""
    process = start("train.py", *TINY, corpus, "--max_iters=1000000", f"--out={tmp_path}/run",
                    env={"PYTHONUNBUFFERED": ""})
    wait_for(tmp_path / "run/ckpt.pt", process)
    process.kill()                                         # what is not written by now is lost
    _, out = end(process)
    assert out.startswith("masked, ") and "\nstep 100 | " in out


def test_a_reader_that_leaves_hears_nothing_of_pythons_own():
    process = start("generate.py", "--out=results/masked.pt", "--length=8", "--steps=2",
                    stderr=subprocess.PIPE, env={"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=300) == 1
    assert "results/masked.pt: masked" in said
    assert "Broken" not in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_any_stream_will_do(name, monkeypatch):
    """As in a notebook, whose streams have no reconfigure, or with none at all."""
    shown = []
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, name, stream)
        config.run(shown.append)
        print("goes somewhere", file=getattr(sys, name))
    assert len(shown) == 2


@pytest.mark.parametrize("rank, count, address", [(0, 2, None), (3, 1, None), (2, 2, "localhost")])
def test_processes_that_torchrun_did_not_start_are_one_line(rank, count, address, corpus, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr(train, "RANK", rank)
    monkeypatch.setattr(train, "WORLD_SIZE", count)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(SystemExit) as e:
        train.main([*SHORT, corpus, f"--out={tmp_path}/run"])
    assert f"RANK={rank} and WORLD_SIZE={count} are set, but not by torchrun" in last_line(e.value)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------
# clocks, memory

def test_in_a_thread_at_a_clock_that_stands_still(corpus, tmp_path, monkeypatch, capsys):
    """Where no signal can be caught. The baseline, whose bound is exact."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    args = [*SHORT, corpus, "--objective=ar", f"--out={tmp_path}/run"]
    thread = threading.Thread(target=train.main, args=(args,))
    thread.start()
    thread.join()
    generate.main([f"--out={tmp_path}/run", "--length=8"])
    assert re.search(r"bits, exact \| [\d,]+ chars/s\n", capsys.readouterr().out)


def test_after_a_resume_the_speed_is_of_all_steps_and_all_seconds(corpus, tmp_path, monkeypatch,
                                                                    capsys):
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    train.main([*SHORT, corpus, f"--out={tmp_path}/run"])
    train.main(["--resume", "--max_iters=8", f"--out={tmp_path}/run"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    rows = (tmp_path / "run/log.csv").read_text().splitlines()[1:]
    assert len(lines) == len(rows) == 4
    for line, row in zip(lines, rows, strict=True):
        step, seconds = map(float, row.split(",")[:2])
        speed = int(re.search(r"([\d,]+) chars/s", line)[1].replace(",", ""))
        assert abs(speed - step * 4 * 16 / seconds) <= 0.5
    assert float(rows[-1].split(",")[1]) > float(rows[1].split(",")[1])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError(),
                                   RuntimeError("CUDA out of memory. Tried to allocate")])
def test_no_permission_and_no_memory_are_no_damage(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error
    (tmp_path / "best.pt").write_bytes(b"x")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        read_checkpoint(tmp_path, Masked, ["masked"])
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as e:
        config.run(fail)
    assert re.match("PermissionError: |out of memory: ", last_line(e.value))

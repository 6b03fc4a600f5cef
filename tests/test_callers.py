"""Every caller is answered: paths, texts, terminals, clocks and processes as they come."""
import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, end, last_line, read_log, run, start, wait_for

import checkpoint
import config
import data
import generate
import mnist_ddpm
import train
from checkpoint import find_checkpoint, out_option, read_checkpoint
from config import Embed, Masked, Sample, parse
from data import CharTokenizer, Text, clean
from embed_diffusion import read_table
from evaluation.__main__ import typed_paths
from evaluation.likelihood import Checkpoint
from evaluation.samples import fitting
from generate import parse_prompt, screen_rows, watch

SHORT = [*TINY, "--max_iters=4", "--eval_interval=2"]


# -------------------------------------------------------------------------------------------------
# paths

def test_every_typed_path_goes_through_one_function(tmp_path, monkeypatch):
    """~ is the home folder; what travels in a checkpoint is found from another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("abc")
    typed = parse(["--out=~/run", "--dataset=~/my.txt", "--data_dir=corpora", "--table=t.txt"],
                  Embed)
    assert typed == {"out": str(tmp_path / "run"), "dataset": str(tmp_path / "my.txt"),
                     "data_dir": str(tmp_path / "corpora"), "table": str(tmp_path / "t.txt")}
    assert parse(["--dataset=my.txt"], Masked) == {"dataset": str(tmp_path / "my.txt")}
    assert parse(["--dataset=shakespeare", "--out=a"], Masked) == {"dataset": "shakespeare",
                                                                   "out": "a"}
    assert parse(["--data_dir=", "--out="], Masked) == {"data_dir": "", "out": ""}
    for settings in (config.Sample, config.EmbedSampler, config.ImageSampler, Masked, Embed):
        said = re.findall(r"(?m)^    (\w+): str = .*(?:path|folder|file|where)",
                          config.inspect.getsource(settings))
        assert set(said) <= config.PATHS | {"prompt"}


def test_a_run_resumes_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("abcd abd acd\n" * 99)
    train.main([*SHORT, "--dataset=my.txt", f"--out={tmp_path}/run"])
    monkeypatch.chdir(ROOT)
    train.main(["--resume", "--max_iters=6", f"--out={tmp_path}/run"])
    assert read_log(tmp_path / "run")[-1]["step"] == "6"


def test_commands_that_are_suggested_can_be_typed(tmp_path, corpus, capsys):
    out = tmp_path / "two words"
    train.main([*SHORT, corpus, f"--out={out}"])
    assert capsys.readouterr().out.splitlines()[-1] == f"done: python generate.py --out='{out}'"
    assert out_option("out/masked") == "--out=out/masked"


# -------------------------------------------------------------------------------------------------
# data

@pytest.mark.parametrize("raw", [
    b"ab\rc\rab\r", b"ab\r\nc\r\nab\r\n", b"ab\r\r\nc\r\r\nab\r\r\n",
    "\ufeffab\nc\n\ufeffab\n".encode(), "\ufeffab\nc\nab\n".encode("utf-16-le"),
    "\ufeffab\nc\nab\n".encode("utf-16-be")])
def test_a_text_is_the_same_however_it_was_saved(raw, tmp_path):
    path = tmp_path / "my.txt"
    path.write_bytes(raw)
    text, _ = data.load_text(str(path), tmp_path)
    assert text == "ab\nc\nab\n"


def test_an_empty_line_stays_one():
    assert clean("a\r\rb\r\n\r\nc\n\nd") == "a\n\nb\n\nc\n\nd"


def test_prompts_and_tables_go_through_the_same_door(tmp_path):
    tokenizer = CharTokenizer("\nab\\n")
    assert parse_prompt("\ufeffa\r\nb", tokenizer) == [tokenizer.encode("a\nb").tolist()]
    for content in (b"\xef\xbb\xbfa 1 2\nb 3 4\n", b"a 1 2\r\nb 3 4\r\n", b"a 1 2\rb 3 4\r"):
        (tmp_path / "t.txt").write_bytes(content)
        rows = read_table(tmp_path / "t.txt", "ab")
        assert {ch: row.tolist() for ch, row in rows.items()} == {"a": [1, 2], "b": [3, 4]}


def test_escapes():
    tokenizer = CharTokenizer("\nablnx{\\")
    for typed, meant in [(r"\nabla", "\nabla"), (r"\\nabla", r"\nabla"), (r"\\\nx", "\\\nx"),
                         (r"a\b", r"a\b"), (r"{{\\n", r"{\n")]:
        assert parse_prompt(typed, tokenizer) == [tokenizer.encode(meant).tolist()], typed


def test_mnist_that_a_browser_has_unpacked_is_read(tmp_path, monkeypatch):
    """Under its .gz name: what is in the file is told by its first bytes."""
    pixels = np.arange(2 * 784, dtype=np.uint8).tobytes()
    raw = {name: bytes(16) + pixels if "images" in name else bytes(8) + b"\1\2"
           for name, _ in mnist_ddpm.MNIST}
    monkeypatch.setattr(mnist_ddpm, "MNIST", [
        (name, data.hashlib.sha256(content).hexdigest()) for name, content in raw.items()])
    (tmp_path / "mnist").mkdir()
    for i, (name, content) in enumerate(raw.items()):
        packed = data.gzip.compress(content) if i % 2 else content
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(packed)
    images, labels, _, _ = mnist_ddpm.load_mnist(tmp_path)
    assert images.tobytes() == pixels and labels.tolist() == [1, 2]


def test_a_corpus_of_one_character_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 999)
    with pytest.raises(SystemExit) as e:
        Text(Masked(dataset=str(tmp_path / "a.txt")))
    assert "has 1 different characters, not 2 to 30,000" in last_line(e.value)


def test_data_are_what_is_in_them_not_what_they_are_called(tmp_path, corpus, capsys):
    train.main([*SHORT, corpus, f"--out={tmp_path}/run"])
    other = tmp_path / "other name.txt"
    other.write_bytes(Path(corpus.partition("=")[2]).read_bytes())
    train.main(["--resume", f"--dataset={other}", f"--out={tmp_path}/run", "--max_iters=6"])
    assert read_log(tmp_path / "run")[-1]["step"] == "6"
    other.unlink()
    with pytest.raises(SystemExit) as e:
        train.main(["--resume", f"--out={tmp_path}/run", "--max_iters=8"])
    line = last_line(e.value)
    assert line.startswith(f"no text file '{other}'") and "--dataset=PATH says where it is" in line


# -------------------------------------------------------------------------------------------------
# who calls

def in_shell(line, **env):
    return subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=300)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_stops_nothing(closed, corpus, tmp_path):
    command = " ".join([f"'{sys.executable}' train.py", *SHORT, corpus, f"--out={tmp_path}/run"])
    done = in_shell(f"{command} {closed}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/status").read_text() == "finished"


def test_a_line_is_in_the_log_when_it_is_printed(corpus, tmp_path):
    """Also where stdout is a file: a run that is watched from elsewhere."""
    process = start("train.py", *TINY, corpus, "--max_iters=1000000", f"--out={tmp_path}/run",
                    env={"PYTHONUNBUFFERED": ""})
    wait_for(tmp_path / "run/ckpt.pt", process)
    process.kill()                                         # what is not written by now is lost
    _, out = end(process)
    assert out.startswith("masked, ") and "\nstep 100 | " in out


def test_any_stream_will_do(monkeypatch):
    """As in a notebook, whose stdout has no reconfigure, or with none at all."""
    shown = []
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        config.run(shown.append)
        print("goes somewhere")
    assert len(shown) == 2


def test_training_in_a_thread(corpus, tmp_path):
    """Where no signal can be caught."""
    thread = threading.Thread(target=train.main, args=([*SHORT, corpus, f"--out={tmp_path}/run"],))
    thread.start()
    thread.join()
    assert (tmp_path / "run/status").read_text() == "finished"


@pytest.mark.parametrize("env", [
    {"WORLD_SIZE": "2"}, {"RANK": "3"},
    {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}])
def test_processes_that_torchrun_did_not_start_are_one_line(env, corpus, tmp_path):
    done = run("train.py", *SHORT, corpus, f"--out={tmp_path}/run", code=1, **env)
    line, = done.stderr.splitlines()
    assert "are set, but not by torchrun" in line
    assert not (tmp_path / "run").exists()


def test_empty_variables_are_none(corpus, tmp_path):
    run("train.py", *SHORT, corpus, f"--out={tmp_path}/run", WORLD_SIZE="", RANK="")
    assert (tmp_path / "run/status").read_text() == "finished"


# -------------------------------------------------------------------------------------------------
# clocks

def test_a_clock_that_stands_still(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    train.main([*SHORT, corpus, f"--out={tmp_path}/run"])
    generate.main([f"--out={tmp_path}/run", "--length=8"])
    assert "chars/s" in capsys.readouterr().out


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


# -------------------------------------------------------------------------------------------------
# what is said

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


def test_fewer_steps_than_are_done(corpus, tmp_path, capsys):
    train.main([*SHORT, corpus, f"--out={tmp_path}/run"])
    capsys.readouterr()
    train.main(["--resume", "--max_iters=2", f"--out={tmp_path}/run"])
    out = capsys.readouterr().out
    assert "-2" not in out and out.splitlines()[-1].startswith("done: ")
    assert len(read_log(tmp_path / "run")) == 2


def test_a_newer_run_that_is_unfinished_is_named_with_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "HERE", tmp_path / "my clone")
    folder = tmp_path / "my clone/out/masked"
    folder.mkdir(parents=True)
    (folder / "best.pt").touch()
    find_checkpoint("", "masked")
    assert capsys.readouterr().err == (f"{folder} is newer, but not finished: --out='{folder}' "
                                       "writes with it\n")


# -------------------------------------------------------------------------------------------------
# terminals

def test_rows_of_a_terminal():
    assert screen_rows("ab\nc", 80) == ["ab", "c"]
    assert screen_rows("abcde", 2) == ["ab", "cd", "e"]
    assert screen_rows("战争与和平", 5) == ["战争", "与和", "平"]         # two columns each
    assert screen_rows(["e", "\u0301", "x"], 2) == ["e\u0301x"]        # an accent takes none
    assert screen_rows(["\x1b[38;5;203ma\x1b[0m"] * 3, 2) == ["\x1b[38;5;203ma\x1b[0m" * 2,
                                                              "\x1b[38;5;203ma\x1b[0m"]
    assert screen_rows("a\tb\n", 80) == ["a b", ""]


def test_of_a_long_text_the_part_that_changes_is_watched(monkeypatch, capsys):
    """20 rows in a window of 6; characters change from the first row to the last."""
    monkeypatch.setattr(generate.shutil, "get_terminal_size", lambda: os.terminal_size((4, 6)))
    tokenizer = CharTokenizer("ab")
    frames = []
    for i in range(0, 80, 4):
        ids = torch.zeros(1, 80, dtype=torch.long)
        ids[0, :i + 1] = 1
        frames.append((ids, torch.ones(1, 80)))
    assert len(list(watch(iter(frames), tokenizer))) == 20
    start, *shown, end = capsys.readouterr().out.split("\x1b[J")
    heights = []
    for i, frame in enumerate(shown):
        rows = re.sub(r"\x1b\[\?25l|\x1b\[\d+F|\x1b\[\d+A", "", frame).rstrip("\n").split("\n")
        heights.append(len(rows))
        if i:
            assert rows[-1] == "baaa" or i < 5             # the row that has just changed
    assert max(heights) == 5                               # never more than fits: nothing scrolls
    assert end == "\x1b[?25h"


def test_where_nothing_is_written_nothing_is_erased(capsys):
    assert list(watch(iter([]), CharTokenizer("ab"))) == []
    assert capsys.readouterr().out == "\x1b[?25l\x1b[J\x1b[?25h"


# -------------------------------------------------------------------------------------------------
# idle work

@pytest.mark.parametrize("args, calls", [
    (["--prompt=The", "--length=3"], 0), (["--prompt=a{3}b"], 6), (["--length=5"], 10),
    (["--prompt=a{3}b", "--steps=2"], 2), (["--prompt=a{3}b", "--steps=200", "--remask=0"], 3)])
def test_at_most_two_calls_a_blank(args, calls, capsys):
    torch.manual_seed(0)
    generate.main([f"--out={ROOT}/results/masked.pt", *args])
    said = capsys.readouterr()
    assert int(re.search(r"(\d+) network calls", said.err)[1]) == calls
    assert "·" not in said.out


def test_a_text_of_many_windows_has_a_bar(monkeypatch):
    bars = []

    def bar(windows, **how):
        bars.append((len(windows), how["disable"]))
        return windows

    class Silent:
        mask_id = 9

        def sample(self, x, known, s, locked):
            yield x * 0, known.float()

    monkeypatch.setattr(generate, "tqdm", bar)
    for L, s in [(8, Sample()), (80, Sample()), (80, Sample(watch=True))]:
        ids = torch.full((L,), 9)
        list(generate.write(Silent(), ids, ids < 9, 8, s))
    assert bars == [(1, True), (19, None), (19, True)]     # None: in a terminal


# -------------------------------------------------------------------------------------------------
# python -m evaluation

def test_a_path_with_a_comma_is_a_path_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert typed_paths("a,b") == ["a,b"]
    assert typed_paths("a,c,") == ["a", "c"]
    assert typed_paths("~/run,~/other") == [f"{tmp_path}/run", f"{tmp_path}/other"]
    assert typed_paths("") == []


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


def test_no_control_code_of_a_text_reaches_a_terminal(monkeypatch):
    text = "a\x1b[2Jb\x9b\r\n\tc\x7f"
    assert data.printable(text) == text                    # into a file
    monkeypatch.setattr(data, "TERMINAL", True)
    assert data.printable(text) == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd"


def test_a_reader_that_has_seen_enough_of_a_text(tmp_path):
    """generate.py | head -1: no line of Python's own, with and without its buffers."""
    command = f"'{sys.executable}' generate.py --length=300 --steps=2 --n=40 | head -1"
    for unbuffered in ("", "1"):
        done = in_shell(command, PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 0 and len(done.stdout) > 0
        assert "Broken" not in done.stderr and "Traceback" not in done.stderr

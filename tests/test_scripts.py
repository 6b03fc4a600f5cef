"""The scripts that write text, as a newcomer types them; the windows of long texts; terminals."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import data
import generate
from config import Sample
from data import CharTokenizer
from generate import half_windows, lay_out, parse_prompt, screen_rows, watch, write

SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--batch_size=8",
         "--max_iters=120", "--eval_interval=60", "--windows=20"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of train.py in a process of its own, whose lines are read, too."""
    out = tmp_path_factory.mktemp("run") / "masked"
    done = run("train.py", *SMALL, corpus, f"--out={out}")
    first, *lines = done.stdout.splitlines()
    for words in ("masked, ", " parameters, cpu ", "text.txt: ", "to validate", "Ctrl-C saves"):
        assert words in first
    line = (r"step (\d+) \| train CE [\d.]+, val CE [\d.]+ \| bound ([\d.]+) ± [\d.]+ nats/char = "
            r"[\d.]+ ± [\d.]+ bits \| by share masked up to 0.2: .* 1.0: [\d.]+ \| "
            r"[\d,]+ chars/s")
    steps = [re.fullmatch(line, text) for text in lines if text.startswith("step ")]
    assert [m[1] for m in steps] == ["60", "100", "120"]
    assert float(steps[2][2]) < float(steps[0][2])         # the bound falls
    assert re.search(r"over 20 of \d+ windows: ", lines[-2])
    assert lines[-1] == f"done: python generate.py --out={out}"
    assert "\x1b" not in done.stdout and done.stderr == ""  # no terminal: no colours, no bar
    return out


@pytest.fixture
def written(trained, capsys):
    """A function of arguments -> what generate.py prints with the run: the text, what is said."""
    def call(*args):
        generate.main([f"--out={trained}", *args])
        return capsys.readouterr()
    return call


def test_the_same_seed_writes_the_same_texts(written):
    args = ["--n=2", "--length=50"]
    text, said = written(*args)
    first, second = re.fullmatch(r"--- text 1 of 2\n(.{50})\n--- text 2 of 2\n(.{50})\n", text,
                                 re.S).groups()
    assert first != second and "·" not in text
    assert re.search(r"\n\d+ network calls, [\d.]+ s, [\d,]+ characters/s\n", said)
    assert written(*args).out == text
    assert written(*args, "--seed=2").out != text


@pytest.mark.parametrize("args, length, calls", [
    ("--prompt=the --length=3 --steps=9", 3, 0), ("--prompt=a{3}e", 5, 6), ("--length=5", 5, 10),
    ("--prompt=a{3}e --steps=2", 5, 2), ("--prompt=a{3}e --steps=200 --remask=0", 5, 3),
    ("--prompt=the --length=100 --remask=0", 100, 97)])
def test_at_most_two_calls_a_blank(args, length, calls, written):
    text, said = written(*args.split())
    assert len(text) == length + 1 and "·" not in text
    assert int(re.search(r"(\d+) network calls", said)[1]) == calls


# -------------------------------------------------------------------------------------------------
# windows

@pytest.mark.parametrize("prompt, length, text", [
    ("", 0, "········"), ("ab", 0, "ab······"), ("abca", 0, "abca····"),
    ("abcab", 0, "abcab········"), ("a{2}b", 0, "a··b"), ("a{2}b", 6, "a··b··"),
    ("{20}", 0, "·" * 20), ("ab", 3, "ab·"), ("ab", 2, "ab")])
def test_how_long_a_text_is(prompt, length, text):
    tokenizer = CharTokenizer("abc")
    ids, known = lay_out(parse_prompt(prompt, tokenizer), length, 8, mask_id=3)
    assert tokenizer.decode(ids) == text and torch.equal(known, ids < 3)


class Spy:
    """A method that writes 1 everywhere, and checks what it is given."""
    mask_id = 9

    def __init__(self):
        self.widths = set()

    def sample(self, x, known, s, locked):
        assert ((x == 9) == ~known).all()                  # what is before is written by now
        assert not (known & locked).any()
        self.widths.add(x.size(1))
        yield torch.where(known, x, 9), torch.zeros(x.shape)
        yield torch.where(known | locked, x, 1), torch.ones(x.shape) * 0.5


@pytest.mark.parametrize("L", [1, 8, 9, 12, 30])
def test_windows_cover_every_length_and_never_show_an_unwritten_context(L):
    ids = torch.zeros(L, dtype=torch.long)
    known = torch.arange(L) % 5 == 3
    spy = Spy()
    *_, (x, confidence) = write(spy, ids, known, 8, Sample(n=2))
    assert x.tolist() == [(~known).long().tolist()] * 2
    expected = torch.where(known, 1.0, 0.5).tolist()
    assert confidence.tolist() == [expected] * 2
    assert spy.widths == {8}
    starts, ends = zip(*half_windows(L, 8), strict=True)
    assert starts[0] == 0 and ends[-1] == L
    assert all(0 < b - a <= 4 for a, b in zip(starts, starts[1:]))


def test_a_text_that_is_written_has_a_bar_of_calls(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **how):
            bars.append([0, how["disable"], "open"])

        def update(self):
            bars[-1][0] += 1

        def close(self):
            bars[-1][2] = "closed"

    monkeypatch.setattr(generate, "tqdm", Bar)
    calls = []
    for L, s in [(8, Sample()), (80, Sample()), (80, Sample(watch=True))]:
        ids = torch.full((L,), 9)
        calls.append(len(list(write(Spy(), ids, ids < 9, 8, s))))
    # None: in a terminal
    assert bars == [[n, off, "closed"] for n, off in zip(calls, (None, None, True), strict=True)]
    assert calls[0] < calls[1] == calls[2]


# -------------------------------------------------------------------------------------------------
# terminals

def test_watch_shows_frames_only_in_a_terminal(trained, written, monkeypatch):
    args = ["--watch", "--length=32", "--steps=4"]
    text, err = written(*args)
    assert "\x1b" not in text and len(text) == 33 and generate.CAPTION not in err
    with monkeypatch.context() as patch:                   # a terminal, but a dumb one
        for module in (generate, data):
            patch.setattr(module, "TERMINAL", True, raising=False)
        assert "\x1b" not in written(*args).out
    if os.name != "posix":
        return
    import pty
    leader, follower = pty.openpty()
    env = {**os.environ, "NO_COLOR": "", "TERM": "xterm"}
    command = [sys.executable, "generate.py", f"--out={trained}", *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=subprocess.PIPE,
                               env=env, text=True)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:                                        # so Linux says that it is closed
        pass
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err.count(generate.CAPTION) == 1
    os.close(leader)
    frames, _, painted = shown.decode().partition("\x1b[?25h")
    assert frames.count("\x1b[J") == 5 and "·" in frames   # four frames, and none is left
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert colours.search(painted)
    assert colours.sub("", painted).replace("\r", "") == text


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
    assert list(watch(iter([]), tokenizer)) == []
    assert capsys.readouterr().out == "\x1b[?25l\x1b[J\x1b[?25h"       # nothing is erased
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

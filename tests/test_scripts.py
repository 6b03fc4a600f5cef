"""The scripts that write text as a newcomer types them, each in a process of its own."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

from config import Sample
from data import CharTokenizer
from generate import half_windows, join_pieces, lay_out, parse_prompt, write

SMALL = ["--dataset=pydoc", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32",
         "--batch_size=8", "--max_iters=120", "--eval_interval=60"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py, whose lines are read, too."""
    out = tmp_path_factory.mktemp("run") / "masked"
    done = run("train.py", *SMALL, f"--out={out}")
    first, *lines = done.stdout.splitlines()
    for words in ("masked, ", " parameters, cpu ", "pydoc: ", "to validate", "Ctrl-C saves"):
        assert words in first
    line = (r"step (\d+) \| loss [\d.]+ \| ([\d.]+) ± [\d.]+ nats/char = [\d.]+ ± [\d.]+ bits, a "
            r"bound \| masked CE [\d.]+ \| by share masked up to 0.2: .* 1.0: [\d.]+ \| "
            r"[\d,]+ chars/s")
    steps = [re.fullmatch(line, text) for text in lines if text.startswith("step ")]
    assert [m[1] for m in steps] == ["60", "100", "120"]
    assert float(steps[2][2]) < float(steps[0][2])         # the bound falls
    assert re.search(r"over ([\d,]+) of \1 windows: ", lines[-2])
    assert lines[-1] == f"done: python generate.py --out={out}"
    assert "\x1b" not in done.stdout and done.stderr == ""  # no terminal: no colours, no bar
    return out


def test_the_same_seed_writes_the_same_texts(trained):
    args = ["generate.py", f"--out={trained}", "--n=2", "--length=50"]
    done = run(*args)
    text = done.stdout
    assert len(text) == 2 * 50 + 3 and text[50:52] == "\n\n"
    assert "\x1b" not in text and "·" not in text
    assert re.search(r"\n\d+ network calls, [\d.]+ s, [\d,]+ characters/s\n", done.stderr)
    assert run(*args).stdout == text
    assert run(*args, "--seed=2").stdout != text


def test_blanks_are_filled_where_they_stand(trained):
    out = run("generate.py", f"--out={trained}", "--prompt=The {5} of {{x}} is\\n{3}.").stdout
    assert re.fullmatch(r"The [^·]{5} of {x}} is\n[^·]{3}\.\n", out, re.S)


@pytest.mark.parametrize("args, calls", [
    ("--order=confidence --steps=4", 4), ("--order=margin --counts=documents --steps=9", 9),
    ("--remask=0.1", 64), ("--order=entropy --counts=cosine --steps=5", 5),
    ("--counts=entropy --entropy_bound=0.5 --remask=0", 32), ("--temperature=0 --top_k=3", 64)])
def test_samplers(trained, args, calls):
    done = run("generate.py", f"--out={trained}", "--length=32", *args.split())
    assert len(done.stdout) == 33 and "·" not in done.stdout
    assert 1 <= int(re.search(r"(\d+) network calls", done.stderr)[1]) <= calls


def test_a_long_text_is_written_window_by_window(trained):
    done = run("generate.py", f"--out={trained}", "--length=100", "--prompt=The ", "--remask=0")
    assert done.stdout.startswith("The ") and len(done.stdout) == 101
    assert "\n96 network calls" in done.stderr             # one character a call


def test_the_baseline_writes_after_a_prompt(tmp_path):
    run("train.py", *SMALL, "--objective=ar", f"--out={tmp_path}/ar")
    done = run("generate.py", f"--out={tmp_path}/ar", "--prompt=The ", "--length=60")
    assert done.stdout.startswith("The ") and len(done.stdout) == 61


def test_it_writes_at_once_from_the_checkpoint_in_the_repository(copy):
    done = run("generate.py", "--prompt=ROMEO:", cwd=copy)
    assert done.stdout.startswith("ROMEO:") and len(done.stdout) == 129
    assert done.stderr.startswith(f"{copy}/results/masked.pt: masked, trained on shakespeare")
    assert not (copy / "out").exists()


def test_watch_shows_frames_only_in_a_terminal(trained):
    done = run("generate.py", f"--out={trained}", "--watch", "--length=32")
    assert "\x1b" not in done.stdout and len(done.stdout) == 33
    if os.name != "posix":
        return
    args = ["generate.py", f"--out={trained}", "--watch", "--length=32", "--steps=4"]
    frames, shown_again, text = in_terminal(args).partition("\x1b[?25h")
    assert frames.count("\x1b[J") == 5 and "·" in frames   # four frames, and none is left
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert colours.search(text) and len(colours.sub("", text).replace("\r", "")) == 33
    assert "\x1b" not in in_terminal(args, NO_COLOR="1")
    assert "\x1b" not in in_terminal(args, TERM="dumb")


def in_terminal(args, **env):
    """What a script writes to a pseudo-terminal."""
    import pty
    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | env
    process = subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=follower,
                               stderr=subprocess.DEVNULL, env=env)
    os.close(follower)
    out = b""
    try:
        while part := os.read(leader, 4096):
            out += part
    except OSError:                                        # so Linux says that it is closed
        pass
    assert process.wait(timeout=60) == 0
    os.close(leader)
    return out.decode()


# -------------------------------------------------------------------------------------------------
# prompts and windows

def test_prompts():
    tokenizer = CharTokenizer("\n {}abcn\\")
    mask_id = len(tokenizer)

    def parsed(text):
        ids, known = join_pieces(parse_prompt(text, tokenizer), mask_id)
        assert ((ids == mask_id) == ~known).all()
        return tokenizer.decode(ids).replace("·", "_")

    assert parsed("ab{3}c") == "ab___c"                    # blanks stand where they stand
    assert parsed("{1}a{2}{1}") == "_a___"
    assert parsed(r"a\nb") == "a\nb" and parsed("{{a}{2}b") == "{a}__b"
    assert parsed("") == ""
    for bad in ("{", "{x}", "{0}", "{-1}", "{12", "a{}"):
        with pytest.raises(SystemExit, match="a blank is written"):
            parsed(bad)


@pytest.mark.parametrize("prompt, length, n, unknown", [
    ("", 0, 8, 8), ("ab", 0, 8, 6), ("abca", 0, 8, 4), ("abcab", 0, 13, 8),
    ("abc" * 4, 0, 20, 8), ("a{2}b", 0, 4, 2), ("a{2}b", 6, 6, 4),
    ("{20}", 0, 20, 20), ("ab", 3, 3, 1), ("ab", 2, 2, 0)])
def test_how_long_a_text_is(prompt, length, n, unknown):
    ids, known = lay_out(parse_prompt(prompt, CharTokenizer("abc")), length, 8, mask_id=3)
    assert len(ids) == len(known) == n and (~known).sum() == unknown
    assert ((ids == 3) == ~known).all()


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


@pytest.mark.parametrize("L", [1, 7, 8, 9, 12, 13, 30])
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

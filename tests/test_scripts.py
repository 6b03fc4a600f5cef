"""The scripts as a newcomer types them, in a subprocess each, on tiny settings and the offline default."""
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import ROOT, run

from config import Sample
from generate import draw, write

TINY = ["--dataset=pydoc", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--batch_size=8", "--max_iters=120",
        "--eval_interval=60"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "masked"
    r = run("train.py", *TINY, f"--out={out}")
    steps = re.findall(r"step (\d+) \|.*?([\d.]+) ± [\d.]+ nats/char = [\d.]+ ± [\d.]+ bits, a bound \| masked CE [\d.]+ \| by share", r.stdout)
    assert [s for s, _ in steps] == ["60", "100", "120"] and float(steps[2][1]) < float(steps[0][1])      # the bound falls
    first = r.stdout.splitlines()[0]
    assert all(w in first for w in ("masked, ", "parameters, ", "pydoc: ", "to validate", "120 steps, about", "Ctrl-C saves"))
    assert "over the whole validation split" in r.stdout and "done: python generate.py" in r.stdout
    assert "\x1b" not in r.stdout                                    # no terminal, no colour
    return out


def test_generate(trained):
    r = run("generate.py", f"--out={trained}", "--n=2", "--length=50")
    assert len(r.stdout.rstrip("\n").split("\n\n")) >= 2 and "\x1b" not in r.stdout and "·" not in r.stdout
    assert run("generate.py", f"--out={trained}", "--n=2", "--length=50").stdout == r.stdout          # the same seed, the same text
    assert run("generate.py", f"--out={trained}", "--n=2", "--length=50", "--seed=2").stdout != r.stdout


def test_blanks_are_filled_where_they_stand(trained):
    out = run("generate.py", f"--out={trained}", "--prompt=The {5} of {{x}} is\\n{3}.").stdout
    assert re.fullmatch(r"The .{5} of {x}} is\n.{3}\.\n", out, re.S)


@pytest.mark.parametrize("args", [["--order=confidence", "--steps=4"], ["--order=margin", "--counts=documents", "--steps=9"],
                                  ["--remask=0.1", "--remask_by=random"], ["--order=entropy", "--counts=cosine", "--steps=5"],
                                  ["--counts=entropy", "--gamma=0.5"], ["--temperature=0", "--top_k=3"]])
def test_samplers(trained, args):
    r = run("generate.py", f"--out={trained}", "--length=32", *args)
    assert len(r.stdout) >= 32 and "·" not in r.stdout
    calls = int(re.search(r"(\d+) network calls", r.stderr)[1])
    assert calls <= int(next((a.split("=")[1] for a in args if "steps" in a), 256))


def test_a_long_text_is_written_window_by_window(trained):
    r = run("generate.py", f"--out={trained}", "--length=100", "--prompt=The ", "--remask=0")
    assert r.stdout.startswith("The ") and len(r.stdout) == 101
    assert int(re.search(r"(\d+) network calls", r.stderr)[1]) == 96    # one character a call


def test_windows_cover_every_length_and_never_show_an_unwritten_context():
    class Spy:   # a method that writes 1 everywhere, and records what it was given
        mask, seen = 9, []

        def sample(self, x, known, s):
            self.seen.append((x.shape[1], (x[known] != 9).all().item(), (x[~known] == 9).all().item()))
            yield torch.where(known, x, 1), torch.ones(x.shape)

    for L in (1, 7, 8, 9, 12, 13, 30):
        ids, known = torch.zeros(L, dtype=torch.long), torch.arange(L) % 5 == 3
        *_, (x, _) = write(Spy(), ids, known, 8, Sample(n=2))
        assert x.tolist() == [(~known).long().tolist()] * 2
    assert all(seen == (8, True, True) for seen in Spy.seen)


def test_watch_shows_frames_only_in_a_terminal(trained):
    r = run("generate.py", f"--out={trained}", "--watch", "--length=32")
    assert "\x1b" not in r.stdout and len(r.stdout) == 33
    if os.name == "posix":
        for color in (True, False):
            out = in_terminal(["generate.py", f"--out={trained}", "--watch", "--length=32", "--steps=4"], {} if color else {"NO_COLOR": "1"})
            assert (out.count("\x1b[J") == 4 and "\x1b[?25h" in out and "·" in out) if color else "\x1b" not in out


def in_terminal(args, env):
    """What a script writes to a pseudo-terminal."""
    import pty
    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | env
    p = subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=follower, stderr=subprocess.DEVNULL, env=env)
    os.close(follower)
    out = b""
    try:
        while part := os.read(leader, 4096):
            out += part
    except OSError:   # Linux's way to say that the other end is closed
        assert p.wait(timeout=60) == 0
    os.close(leader)
    return out.decode()


def test_svg_is_xml_that_ends_with_the_text(trained, tmp_path):
    out = run("generate.py", f"--out={trained}", "--length=40", "--prompt=The <", f"--svg={tmp_path}/u.svg").stdout
    root = ET.parse(tmp_path / "u.svg").getroot()
    assert {e.tag.split("}")[1] for e in root.iter()} <= {"svg", "title", "rect", "text", "animate"}
    texts = [(t.text, t.find("{*}animate")) for t in root.iter() if t.tag.endswith("text")]
    last = [text for text, flip in texts if flip is None or flip.get("values").endswith("1")]
    assert "".join(last) == "".join(out.split())


def test_svg_of_a_known_history():
    class A:   # an alphabet of two letters
        show = staticmethod(lambda i: "ab·"[i])
        def __len__(self): return 2

    frames = [(torch.tensor([[0, 2, 1]]), torch.tensor([[1., 0., .5]])), (torch.tensor([[0, 1, 1]]), torch.tensor([[1., .9, .5]]))]
    svg = draw(frames, torch.tensor([True, False, False]), A(), seconds=3)
    assert svg.count("·<animate") == 2 and svg.count(">a<") == 1 and svg.count(">b<animate") == 2 and 'dur="3s"' in svg
    assert 'keyTimes="0.0000;0.5000" values="0;1"' in svg and 'keyTimes="0.0000;0.2500" values="1;0"' in svg


def test_control_characters_are_not_drawn():
    class A:
        show = staticmethod(lambda i: "a\x0c\x1b·"[i])
        def __len__(self): return 3

    svg = draw([(torch.tensor([[0, 1, 2]]), torch.ones(1, 3))], torch.tensor([True, False, False]), A())
    assert ET.fromstring(svg) is not None and "\x1b" not in svg


def test_the_twin_writes_after_a_prompt(tmp_path):
    run("train.py", *TINY, "--objective=ar", f"--out={tmp_path}/ar")
    r = run("generate.py", f"--out={tmp_path}/ar", "--prompt=The ", "--length=60")
    assert r.stdout.startswith("The ") and len(r.stdout) == 61


def test_evaluate_prints_every_table(trained, tmp_path):
    """Two checkpoints that are the same differ by exactly nothing; the twin, trained on less, has no masks and so no error from them; bits
    of bytes read the same text, with a sampler of their own."""
    run("train.py", *TINY, "--objective=ar", "--train_size=2000", f"--out={tmp_path}/ar")
    run("analog_bits.py", *TINY, "--code=bytes", f"--out={tmp_path}/bits")
    out = run("-m", "evaluation", f"--out={trained},{trained / 'best.pt'},{tmp_path}/ar,{tmp_path}/bits", "--n=3", "--exact=2", "--steps=8",
              "--gaussian_steps=4", "--twice", f"--judge={tmp_path}/ar").stdout
    assert out.count("sampler: ") == 2
    assert out.startswith("`python -m evaluation --out=") and " at commit " in out and "PyTorch" in out
    tables = [(title, [line.split(" | ") for line in table.splitlines()[2:]]) for title, table in re.findall(r"\n(.+)\n\n((?:\|.*\n)+)", out)]
    (axis, bounds), (other, per_byte), (masks, buckets), (times, _), (guesses, guess), *sampled = tables
    written, firsts = sampled[::2], [rows for _, rows in sampled[1::2]]
    assert axis.startswith("pydoc, held out: windows of 32, ") and "per byte" in other and (masks, times) == ("nats by share masked", "nats by time")
    assert [r[1] for r in bounds] == ["masked", "masked", "ar"] and [r[1] for r in per_byte] == ["bits"] and bounds[0][4:7] == bounds[1][4:7]
    assert bounds[1][8] == "0.0000 ± 0.0000" and bounds[2][6] == "exact" and "±" in bounds[2][8] and "±" in bounds[0][10]
    assert guesses.startswith("cross-entropy") and len(guess) == 1 and float(guess[0][1]) < float(guess[0][-1].strip(" |")) < 6
    assert len(buckets) == 2 and all(float(b) > 0 for b in re.findall(r"[\d.]+", buckets[0][-1]))
    assert [title for title, _ in written] == [f"samples, pydoc, windows of 32; the judge is {tmp_path}/ar"] * 3   # one for each training text
    assert all(r[1] == "3" and len(r) == 12 for _, rows in written for r in rows)
    (real, own, first, _), (less, _, twin), (_, bits) = (rows for _, rows in written)
    assert "held out, beside 2,000 characters" in less[0] and "held out" in real[0] and "the judge's own" in own[0]
    assert [len(rows) for rows in firsts] == [4, 3, 2] and all(len(rows[0][1]) > 30 for rows in firsts)
    assert "held out" in firsts[0][0][0] and firsts[0][2][1] == firsts[0][3][1] != firsts[0][1][1]       # the same checkpoint writes the same
    assert first[10] == "8.0" and twin[10] == own[10] == "32.0" and bits[10] == "8.0"


def test_generate_writes_at_once_from_the_checkpoint_in_the_repository(tmp_path):
    """As after cloning: a copy of the repository's files without out/."""
    for f in [*ROOT.glob("*.py"), ROOT / "results/masked.pt"]:
        to = tmp_path / f.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(f.read_bytes())
    r = subprocess.run([sys.executable, "generate.py", "--prompt=ROMEO:"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert r.returncode == 0 and r.stdout.startswith("ROMEO:") and "results/masked.pt" in r.stderr


def test_bench_prints_markdown_rows():
    out = run("-m", "evaluation.bench", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--compile=False").stdout
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 20 and len({r.count("|") for r in rows[:4]}) == 1 and all(" ± " in r for r in rows[1:] if "---" not in r and "calls" not in r)

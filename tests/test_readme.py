"""What README.md says to type into Python, typed; the small changes of docs/hacking.md, made."""
import re
import subprocess
import sys
import textwrap

from conftest import ROOT


def test_the_lines_from_python_write():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = textwrap.dedent(re.search(r"    import config.*?(?=\n\n)", page, re.S)[0])
    assert len(lines.splitlines()) <= 5
    lines = lines.replace('open_model(""', 'open_model("results/masked.pt"')
    lines = lines.replace("config.Sample()", "config.Sample(steps=8)")
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout.removesuffix("\n")
    assert text.startswith("ROMEO:") and len(text) == 128 and "·" not in text


def change(path, old, new):
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new), encoding="utf-8")


def test_small_changes_are_as_small_as_hacking_says(copy, corpus):
    """A schedule, an order of unmasking and a setting, in a copy of the tree."""
    config = copy / "config.py"
    change(copy / "diffusion.py", '    if schedule == "square":\n',
           '    if schedule == "cubic":\n        return t ** 3\n    if schedule == "square":\n')
    change(config, '["linear", "square", "cosine"]', '["linear", "square", "cosine", "cubic"]')
    change(copy / "diffusion.py", '    if order == "confidence":\n',
           '    if order == "left":\n        return -1.0 * torch.arange(probs.size(1)).expand('
           'len(probs), -1)\n    if order == "confidence":\n')
    change(config, '["random", "confidence", "margin", "entropy"]',
           '["random", "confidence", "margin", "entropy", "left"]')
    change(config, "    dropout: float = 0.1 if GPU else 0.0\n",
           "    dropout: float = 0.1 if GPU else 0.0\n    colour: int = 3            # new\n")

    def python(*args):
        done = subprocess.run([sys.executable, *args], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    tiny = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=8"]
    python("train.py", corpus, *tiny, "--max_iters=2", "--schedule=cubic", "--colour=4")
    assert "colour: int = 3" in python("train.py", "--help").stdout
    python("generate.py")                                  # with the new run
    old = python("generate.py", "--out=results/masked.pt", "--order=left", "--steps=128",
                 "--min_distance=0", "--remask=0", "--prompt={20}")
    said = old.stdout + old.stderr
    assert "results/masked.pt is older than" in said and "colour: the default is taken" in said

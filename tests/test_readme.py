"""What README.md says to type, typed; and what it says is printed, as results/outputs.md has it."""
import io
import re
import subprocess
import sys
import textwrap

from conftest import ROOT

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_lines_from_python_write(monkeypatch):
    """In a plain shell, and where stdout is no file, as in a notebook."""
    lines = textwrap.dedent(re.search(r"    from config import.*?(?=\n\n)", PAGE, re.S)[0])
    assert len(lines.splitlines()) == 3
    lines = lines.replace("Sample(", 'Sample(out="results/masked.pt", steps=8, ')
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = re.split(r"\n\n(?=ROMEO:)", done.stdout.removesuffix("\n"))
    assert len(texts) == 2
    for text in texts:
        assert re.fullmatch(r"ROMEO:.{20,60}JULIET:", text, re.S) and "·" not in text
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    exec(lines, {})
    assert shown.getvalue() == done.stdout


def test_what_is_printed_is_what_was_printed():
    """Commands and their output as experiments/outputs.sh wrote them down."""
    printed = (ROOT / "results/outputs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^    \$ python .*\n(?:(?:    .*)?\n)*?(?=\n\S|\n    \$)", PAGE)
    assert len(blocks) == 3
    for block in blocks:
        assert block in printed, block
    lines = re.findall(r"(?m)^    (real|AR|masks|embeddings|bits)   +(.{64})$", PAGE)
    assert len(lines) == 5
    for name, text in lines:
        assert f"    {name:<12} {text}\n" in printed, name

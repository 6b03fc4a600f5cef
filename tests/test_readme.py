"""What README.md says to type into Python, typed."""
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

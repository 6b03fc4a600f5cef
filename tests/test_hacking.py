"""docs/hacking.md, done as it says in a copy of the tree; what README.md says to type, typed, and
what it says is printed, as results/outputs.md has it."""
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import textwrap

import torch
from conftest import ROOT, TINY, end, read_state, run, start

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = (r"[Ii]n\s`([\w.]+)`,\s(above|instead of)\s(?:the line that begins with )?`([^`\n]+)`,"
         r"\stype\n\n((?:    .*\n|\n(?=    ))+)")
COMMAND = r"python (?:-m )?[\w.]+[^`\n]*|(?<=`)--\w+=\"[^`]+"

# Commands, one after another in one process: importing torch takes longer than all of them.
COMMANDS = """
import json, runpy, sys
for name, args in json.loads(sys.argv[1]).items():
    print("typed:", name, flush=True)
    sys.argv = args
    run = runpy.run_path if args[0].endswith(".py") else runpy.run_module
    try:
        run(args[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, error
"""


def type_in(path, where, line, block):
    """Type the lines of the page above the line of a file that begins so, or instead of it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [i for i, text in enumerate(lines) if text.strip().startswith(line)]
    assert len(found) == 1, f"{path.name} has {len(found)} lines {line}"
    end = found[0] + (where != "above")
    lines[found[0]:end] = [text[4:] for text in block.splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def made_short(command, corpus):
    """The arguments of a command of the page, and what makes it short."""
    args = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    if args[0].startswith("--"):
        args = ["train.py", *args]
    if "evaluation" in args:
        return args
    if "generate.py" in args or "sample" in args:
        return [*args, "--steps=4"]
    return [*args, *TINY, corpus, "--max_iters=2"]


def type_commands(commands, cwd):
    """{command: its arguments} -> {command: what it printed}"""
    code, out = end(start("-c", COMMANDS, json.dumps(commands), cwd=cwd))
    assert code == 0, out
    parts = re.split(r"(?m)^typed: (.*)\n", out)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_change_is_made_by_the_lines_of_the_page(copy, tmp_path):
    for folder in ("evaluation", "experiments"):
        shutil.copytree(ROOT / folder, copy / folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"ROMEO: {i * i} is what I say.\n" for i in range(400)))
    corpus = f"--dataset={text}"

    # a copy of a method, under a name of its own
    method = (copy / "experiments/uniform.py").read_text(encoding="utf-8")
    method = method.replace('"uniform"', '"mine"')
    method = method.replace("experiments.uniform", "experiments.mine")
    (copy / "experiments/mine.py").write_text(method, encoding="utf-8")

    # blocks and commands, in their order; with the new network old checkpoints no longer load
    page = (ROOT / "docs/hacking.md").read_text(encoding="utf-8")
    page = page.partition("## Five changes")[2].partition("\n## ")[0]
    said = {}
    for part in page.partition("**Another network**")[::2]:
        commands = {}
        for found in re.finditer(f"{BLOCK}|({COMMAND})", part):
            file, where, line, block, command = found.groups()
            if block:
                type_in(copy / file, where, line, block)
            else:
                for typed in (command, command.replace("uniform", "mine")):
                    commands[typed] = made_short(typed, corpus)
        said |= type_commands(commands, copy)
    assert len(said) == 10 + 3, list(said)

    # a schedule and an order
    runs = {name: read_state(copy / f"out/{name}", "best.pt")
            for name in ("masked", "masked.1", "masked.2", "uniform")}
    spec = importlib.util.spec_from_file_location("changed", copy / "diffusion.py")
    diffusion = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diffusion)
    assert runs["masked"]["config"]["schedule"] == "cubic"
    assert diffusion.mask_rate("cubic", 0.5) == 0.125
    scores = diffusion.position_scores(torch.rand(2, 9, 3), "right")
    assert (scores.diff() > 0).all() and scores.shape == (2, 9)

    # a setting, and a checkpoint that was made before it
    assert runs["masked.1"]["config"]["note"] == "a first try"
    help = re.search(r"--note= +(.*)", said["python train.py --help"])
    assert help[1] == "a remark, kept in the checkpoint"
    old = said["python generate.py --out=results/masked.pt"]
    assert re.search(r"masked.pt was made before these settings existed: .*\bnote\b.*; their", old)

    # a network and a method
    assert "net.gru.weight_hh_l0" in runs["masked.2"]["ema"]
    assert "out/masked.2: masked" in said["python generate.py"]
    assert " nats/char" in said["python -m experiments.uniform"]
    assert "ROMEO:" in said['python -m experiments.uniform sample --prompt="ROMEO:{40}"']
    for name in ("uniform", "mine"):
        measured = said[f"python -m evaluation --out=out/{name} --n=0"]
        assert re.search(rf"out/{name} \| {name} \| [\d,]+ \| 2 \| \d", measured)
    assert "done: python -m experiments.mine sample" in said["python -m experiments.mine"]


def test_the_lines_from_python_write(monkeypatch):
    """Also where stdout is no file, as in a notebook."""
    lines = textwrap.dedent(re.search(r"    from config import.*?(?=\n\n)", README, re.S)[0])
    assert len(lines.splitlines()) == 3
    for long, short in (("Sample(", 'Sample(out="results/masked.pt", steps=8, '), ("-60}", "-23}")):
        assert long in lines
        lines = lines.replace(long, short)
    shown = io.StringIO()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdout", shown)
    exec(lines, {})
    texts = re.split(r"\n\n(?=ROMEO:)", shown.getvalue().removesuffix("\n"))
    assert len(texts) == 2
    for text in texts:
        assert re.fullmatch(r"ROMEO:.{20,23}JULIET:", text, re.S) and "·" not in text
    assert run("-c", lines).stdout == shown.getvalue()     # in a plain shell


def test_what_is_printed_is_what_was_printed():
    """Commands and their output as experiments/outputs.sh wrote them down."""
    printed = (ROOT / "results/outputs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^    \$ python .*\n(?:(?:    .*)?\n)*?(?=\n\S|\n    \$)", README)
    assert len(blocks) == 3
    for block in blocks:
        assert block in printed, block
    lines = re.findall(r"(?m)^    (real|AR|masks|embeddings|bits)   +(.{64})$", README)
    assert len(lines) == 5
    for name, text in lines:
        assert f"    {name:<12} {text}\n" in printed, name

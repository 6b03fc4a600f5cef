"""docs/hacking.md, done as it says in a copy of the tree."""
import importlib.util
import re
import shlex
import shutil

import torch
from conftest import ROOT, TINY, read_state, run

BLOCK = (r"[Ii]n\s`([\w.]+)`,\s(above|instead of)\s(?:the line that begins with )?`([^`\n]+)`,"
         r"\stype\n\n((?:    .*\n|\n(?=    ))+)")
COMMAND = r"python (?:-m )?[\w.]+[^`\n]*|(?<=`)--\w+=\"[^`]+"


def type_in(path, where, line, block):
    """Type the lines of the page above the line of a file that begins so, or instead of it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [i for i, text in enumerate(lines) if text.strip().startswith(line)]
    assert len(found) == 1, f"{path.name} has {len(found)} lines {line}"
    end = found[0] + (where != "above")
    lines[found[0]:end] = [text[4:] for text in block.splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_each_change_is_made_by_the_lines_of_the_page(copy, tmp_path):
    for folder in ("evaluation", "experiments"):
        shutil.copytree(ROOT / folder, copy / folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"ROMEO: {i * i} is what I say.\n" for i in range(400)))
    corpus = f"--dataset={text}"

    # blocks and commands, in their order; the commands are made short
    page = (ROOT / "docs/hacking.md").read_text(encoding="utf-8")
    page = page.partition("## Five changes")[2].partition("\n## ")[0]
    said = {}
    for found in re.finditer(f"{BLOCK}|({COMMAND})", page):
        file, where, line, block, command = found.groups()
        if block:
            type_in(copy / file, where, line, block)
            continue
        args = shlex.split(command.removeprefix("python "))
        if args[0].startswith("--"):
            args = ["train.py", *args]
        if "evaluation" in args:
            args.append(corpus)
        elif "generate.py" in args or "sample" in args:
            args.append("--steps=4")
        else:
            args += [*TINY, corpus, "--max_iters=2"]
        done = run(*args, cwd=copy)
        said[command] = done.stdout + done.stderr
    assert len(said) == 10, list(said)

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
    assert '    note: str = ""' in said["python train.py --help"]
    old = said["python generate.py --out=results/masked.pt"]
    assert re.search(r"masked.pt is older than .*\bnote\b.*: the default is taken", old)

    # a network and a method
    assert "net.gru.weight_hh_l0" in runs["masked.2"]["ema"]
    assert "out/masked.2: masked" in said["python generate.py"]
    assert " nats/char" in said["python -m experiments.uniform"]
    assert "ROMEO:" in said['python -m experiments.uniform sample --prompt="ROMEO:{40}"']
    measured = said["python -m evaluation --out=out/uniform --n=0"]
    assert re.search(r"out/uniform \| uniform \| [\d,]+ \| 2 \| \d", measured)

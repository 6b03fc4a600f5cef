"""The scripts behind the tables, tiny: what each measures against known answers, and the commands
of the shell scripts against the settings there are."""
import math
import os
import shlex
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_state, run

import analog_bits
import embed_diffusion
import mnist_ddpm
import train
from checkpoint import load
from config import Bits, Embed, Masked, Mnist, parse
from data import CharTokenizer, Text
from evaluation.likelihood import Evaluate
from experiments import animate, control, freeze, kills, sampler_nll, samplers, strips

SMALL = dict(n_layer=1, n_head=1, n_embd=16)


def save_checkpoint(out, module, name, c, meta, **more):
    """An untrained checkpoint in a folder, as its script would write it."""
    train.reseed(0)
    method = module.build(c, meta)
    out.mkdir(parents=True)
    config = {**vars(c), "out": "", "resume": False}
    torch.save({"method": name, "script": module.__name__, "config": config, "step": 7,
                "ema": method.state_dict(), **meta, **more}, out / "best.pt")
    return str(out)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folders of checkpoints of each method on the same text, and its path."""
    path = corpus.partition("=")[2]
    folder = tmp_path_factory.mktemp("runs")
    text = dict(dataset=path, block_size=128, **SMALL)
    meta = Text(Masked(**text)).meta
    pixels = {"alphabet": "", "data": {"name": "digits", "sha256": ""}}
    ar = Masked(objective="ar", **text)
    mnist = Mnist(patch=14, **SMALL)
    return {
        "dataset": corpus, "path": path,
        "masked": save_checkpoint(folder / "masked", train, "masked", Masked(**text), meta),
        "ar": save_checkpoint(folder / "ar", train, "ar", ar, meta),
        "bits": save_checkpoint(folder / "bits", analog_bits, "bits", Bits(**text), meta),
        "embed": save_checkpoint(folder / "embed", embed_diffusion, "embed", Embed(**text), meta),
        "mnist": save_checkpoint(folder / "mnist", mnist_ddpm, "mnist", mnist, pixels)}


def table_rows(out):
    """{first cell: cells} of the Markdown tables in a text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in out.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows}


# pictures

def test_the_svg_is_xml_that_ends_with_the_text(tmp_path):
    args = ["--length=40", "--prompt=The & ", "--steps=8", "--out=results/masked.pt"]
    done = run("-m", "experiments.animate", *args, f"--svg={tmp_path}/u.svg")
    assert done.stdout == run("generate.py", *args).stdout
    assert done.stderr.endswith(f"wrote {tmp_path}/u.svg\n")
    root = ET.parse(tmp_path / "u.svg").getroot()
    tags = {e.tag.split("}")[1] for e in root.iter()}
    assert tags == {"svg", "title", "rect", "text", "animate"}
    last = []
    for e in root.findall("{*}text"):
        change = e.find("{*}animate")
        if change is None or change.get("values").endswith("1"):
            last.append(e.text)
    assert "".join(last) == "".join(done.stdout.split())


def test_the_svg_of_a_known_history():
    """In two rows: two characters come out of MASK, of the prompt one cannot be drawn."""
    tokenizer = CharTokenizer("ab\x1b")
    history = [(torch.tensor([0, 3, 3, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0])),
               (torch.tensor([0, 3, 1, 2]), torch.tensor([1.0, 0.0, 0.5, 1.0])),
               (torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.9, 0.5, 1.0]))]
    known = torch.tensor([True, False, False, True])
    svg = animate.text_svg(history, known, tokenizer, seconds=3, columns=2)
    assert 'viewBox="0 0 51 92" width="51" height="92"' in svg
    assert svg.count("·<animate") == 2 and svg.count(">a<") == 1 and svg.count(">b<animate") == 2
    assert svg.count('dur="3s"') == 4 and svg.count("#f0f6fc") == 1 and "\x1b" not in svg
    for place, at, color in [('x="25.6" y="32" ', "0.5000", "hsl(117 "),
                             ('x="16.0" y="54" ', "0.2500", "hsl(65 ")]:
        dot, char = [line for line in svg.splitlines() if place in line]
        assert f'keyTimes="0.0000;{at}" values="1;0"' in dot and "#484f58" in dot
        assert f'keyTimes="0.0000;{at}" values="0;1"' in char and color in char


def test_strips_are_evenly_spaced_looks(runs, tmp_path, monkeypatch):
    frames = [torch.full((100, 28, 28), i / 50) + torch.arange(100)[:, None, None] / 100 - 1
              for i in range(50)]
    monkeypatch.setattr(strips, "sample_images", lambda *args: ((z, z) for z in frames))
    monkeypatch.setattr(strips, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    strips.main([runs["mnist"]])
    looks = [frames[i][digit] for digit in (7, 2) for i in range(0, 50, 7)]
    strip = mnist_ddpm.png(mnist_ddpm.grid(torch.stack(looks), 8))
    assert (tmp_path / "results/strip.png").read_bytes() == strip
    digits = mnist_ddpm.png(mnist_ddpm.grid(frames[-1], 20))
    assert (tmp_path / "results/digits.png").read_bytes() == digits


def test_freeze(runs, tmp_path):
    state = read_state(Path(runs["masked"]), "best.pt")
    state["config"]["data_dir"] = "/home/somebody"
    torch.save(state, tmp_path / "best.pt")
    (tmp_path / "log.csv").write_text("step\n1\n")
    freeze.main([str(tmp_path), str(tmp_path / "small.pt")])
    small = torch.load(tmp_path / "small.pt", weights_only=True)
    assert small["config"]["data_dir"] == "" and (tmp_path / "small.csv").read_text() == "step\n1\n"
    for name, value in state["ema"].items():
        assert torch.equal(small["ema"][name], value.half()), name
    method, _, _ = load(tmp_path / "small.pt", Masked, train.build, ["masked"])
    assert method.net.embed.weight.dtype == torch.float32


# tables of settings

def test_every_combination_of_what_has_commas():
    args = ["--order=random,margin", "--steps=8,16", "--out=a,b", "--two_pass", "--temperature=1"]
    rows = samplers.combinations(args, Evaluate)
    assert [title for title, _ in rows] == [
        "order=random, steps=8", "order=random, steps=16", "order=margin, steps=8",
        "order=margin, steps=16"]
    assert [(s.order, s.steps) for _, s in rows] == [
        ("random", 8), ("random", 16), ("margin", 8), ("margin", 16)]
    assert all(s.out == "a,b" and s.two_pass and s.temperature == 1 for _, s in rows)
    assert samplers.combinations([], Evaluate) == [("as typed", Evaluate())]
    with pytest.raises(SystemExit, match="order"):
        samplers.combinations(["--order=random,best"], Evaluate)


def test_samplers_of_text(runs, capsys):
    """Each row has its own settings: calls are what was asked for, and the score log V, or what
    uniform characters have."""
    args = [f"--eval_model={runs['ar']}", runs["dataset"], "--n=2"]
    samplers.main([f"--out={runs['masked']}", "--min_distance=0,4", "--steps=1,128", "--remask=0",
                   "--order=random", *args])
    rows = table_rows(capsys.readouterr().out)
    calls = {first: row[-2] for first, row in rows.items() if "steps" in first}
    assert calls == {f"min_distance={d}, steps={n}": f"{n}.0" for d in (0, 4) for n in (1, 128)}
    V = len(read_state(Path(runs["ar"]), "best.pt")["alphabet"])
    assert rows["held out"][2] == f"{math.log(V):.3f} ± 0.000" and rows["held out"][-2] == ""
    samplers.main([f"--out={runs['bits']}", "--two_pass=False,True", "--gaussian_steps=5", *args])
    rows = table_rows(capsys.readouterr().out)
    assert [rows[f"two_pass={value}"][-2] for value in (False, True)] == ["5.0", "10.0"]
    with pytest.raises(SystemExit, match="n=0 or digits=0 has none"):
        samplers.main([f"--out={runs['bits']}", "--n=0"])


def test_every_sampler_of_a_silent_network_pays_log_V(runs, monkeypatch, capsys, tmp_path):
    """In held-out text, in parts of it, and in written text; what was measured is not measured
    again."""
    monkeypatch.setattr(sampler_nll, "HERE", tmp_path)
    args = [f"--out={runs['masked']}", f"--eval_model={runs['ar']}", runs["dataset"],
            "--windows=4", "--n=2"]
    sampler_nll.main(args)
    out = capsys.readouterr().out
    V = len(read_state(Path(runs["ar"]), "best.pt")["alphabet"])
    nats = f"{math.log(V):.4f} ± 0.0000"
    held_out = {first: row for first, row in table_rows(out).items() if "steps 8," in first}
    assert len(held_out) == 16                             # five orders, three or four distances
    for row in held_out.values():
        assert row[1:3] == [nats, "0.0000 ± 0.0000"]
    infilled = table_rows(out.partition("of a part of")[2].partition("2 texts by each")[0])
    assert len(infilled) == 5                              # three parts, and the head
    for row in [*infilled.values()][2:]:
        assert row[1:] == [nats] * 6 + ["0.0000 ± 0.0000"]
    written = table_rows(out.partition("2 texts by each")[2])
    assert len(written) == 12                              # ten samplers, and the head
    for row in [*written.values()][2:]:
        assert row[1:4] == [f"{math.log(V):.3f} ± 0.000"] * 2 + ["0.000 ± 0.000"]

    def measured_again(*_):
        raise AssertionError
    for name in ("nats_per_char", "written_row"):
        monkeypatch.setattr(sampler_nll, name, measured_again)
    sampler_nll.main(args)
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit, match="no sampler has 'step 8' in its title"):
        sampler_nll.main([*args, "--only=step 8"])
    sampler_nll.main([*args, "--only=steps 8,"])
    only = table_rows(capsys.readouterr().out)
    assert only.keys() > held_out.keys() and len(only) == 19   # the bound, and the head
    with pytest.raises(SystemExit, match="is no masked model"):
        sampler_nll.main([f"--out={runs['ar']}", runs["dataset"]])


def test_kills_find_every_checkpoint_as_it_should_be():
    """And a digest tells apart all but what a clock has measured."""
    state = {"step": 20, "ema": {"w": torch.ones(2)}, "adam": [torch.zeros(1), 0.5]}
    others = [{**state, "step": 40}, {**state, "ema": {"w": torch.tensor([1.0, 1.5])}},
              {**state, "ema": {"v": torch.ones(2)}}, {**state, "adam": [torch.zeros(1), 0.25]}]
    assert len({kills.digest(x) for x in [state, *others]}) == 5
    assert kills.digest({**state, "progress": {"seconds": 1.5}}) == kills.digest(state)
    out = run("-m", "experiments.kills", "2", "0").stdout
    assert "2 kills, " in out and "2 checkpoints as of a run that was not killed" in out


def test_samplers_of_digits(runs, monkeypatch, capsys):
    """The settings of a row reach the sampler; what it makes is measured elsewhere."""
    asked = []

    def sample_digits(checkpoint, real, n, how):
        asked.append((n, how.guidance, how.steps, how.sampler, how.td))
        return {}, 1.0

    class Rows:
        def add(self, *cells):
            print(cells)

    monkeypatch.setattr(samplers, "corpus", lambda checkpoint, s: None)
    monkeypatch.setattr(samplers, "real_digits", lambda data: None)
    monkeypatch.setattr(samplers, "digit_floor", lambda real, n, seed: (Rows(), 1.0))
    monkeypatch.setattr(samplers, "sample_digits", sample_digits)
    monkeypatch.setattr(samplers, "digit_row", lambda title, m, floor, speed: [title])
    samplers.main(["--guidance=0,2", "--sampler=ddim,ancestral", "--td=1", "--digits=20",
                   f"--out={runs['mnist']}"])
    assert asked == [(20, g, 50, name, 1.0) for g in (0, 2) for name in ("ddim", "ancestral")]
    assert "('guidance=2, sampler=ancestral',)" in capsys.readouterr().out


def test_control(runs, monkeypatch, capsys):
    """Calls are those of both networks; a text has its wish if each of its characters has."""
    args = [f"--out={runs['embed']}", f"--ar={runs['ar']}", f"--eval_model={runs['ar']}",
            runs["dataset"], "--n=2"]

    def rows_of(*more):
        control.main([*args, *more])
        return table_rows(capsys.readouterr().out)

    rows = rows_of("--mode=diffusion,guided", "--steps=2,3")
    assert {first: row[-4] for first, row in rows.items() if "mode" in first} == {
        "mode=diffusion, steps=2": "2", "mode=diffusion, steps=3": "3",
        "mode=guided, steps=2": "4", "mode=guided, steps=3": "6"}
    rows = rows_of("--mode=blocks", "--block=64", "--two_pass=False,True", "--steps=2",
                   "--length=200")
    assert [rows[f"two_pass={value}"][-4] for value in (False, True)] == ["8", "16"]   # four blocks
    assert rows["held out"][1] == "2" and int(rows["two_pass=True"][-3].replace(",", "")) > 50

    tokenizer = CharTokenizer(read_state(Path(runs["embed"]), "best.pt")["alphabet"])

    def write_controlled(method, ids, known, T, s, allowed, ar):
        x = torch.full((2, len(ids)), int(tokenizer.encode("s")[0]))
        x[1, :32] = int(tokenizer.encode("e")[0])
        yield x, x.float()

    monkeypatch.setattr(control, "write_controlled", write_controlled)
    rows = rows_of("--steer=no:e,no:q", "--strength=1")
    assert rows["steer=no:e"][-2:] == ["0.500 ± 0.500", "0.875 ± 0.125"]
    assert rows["steer=no:q"][-2:] == ["1.000 ± 0.000", "1.000 ± 0.000"]
    with pytest.raises(SystemExit, match="is no checkpoint of embed_diffusion.py"):
        control.main([f"--out={runs['bits']}", *args[1:]])


# the shell scripts

SETTINGS = {"train.py": Masked, "analog_bits.py": Bits, "embed_diffusion.py": Embed,
            "evaluation": Evaluate}
N_RUNS = {"ablation": 32, "bits": 15, "ladder": 32, "repeated": 9, "samplers": 0, "side": 24}


@pytest.mark.parametrize("name", N_RUNS)
def test_each_command_of_a_shell_script_has_settings_that_exist(name, tmp_path):
    """`python` writes down how it was called, makes the checkpoint and the status of its run, and
    is not called again for a run that has finished."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"
    stub.write_text(f"""#!/bin/bash
[ "$1" = -c ] && exec {shlex.quote(os.sys.executable)} "$@"
printf '%s\\n' "$*" >> {shlex.quote(str(tmp_path))}/calls
for arg; do case $arg in --out=*) out=${{arg#--out=}} ;; esac; done
case $1 in *.py) mkdir -p "$out"; echo finished > "$out/status"; touch "$out/best.pt" ;; esac
""")
    stub.chmod(0o755)
    if name == "side":
        (tmp_path / "out/warpeace-ar").mkdir(parents=True)
        (tmp_path / "out/warpeace-ar/best.pt").touch()
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / f"experiments/{name}.sh"), "my data"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    outs = []
    for call in calls:
        script, *args = call.replace("my data", "my_data").removeprefix("-m ").split()
        if script == "experiments.table":
            continue
        recipes = embed_diffusion.EMBED_RECIPES if script == "embed_diffusion.py" else None
        if script == "experiments.samplers":
            rows = samplers.combinations(args, Evaluate)
            assert all(s.data_dir.endswith("my_data") for _, s in rows)
            continue
        s = SETTINGS[script](**parse(args, SETTINGS[script], recipes))
        assert s.data_dir.endswith("my_data")
        if script.endswith(".py"):
            outs.append(s.out)
    assert len(outs) == len(set(outs)) == N_RUNS[name]
    (tmp_path / "calls").write_text("")
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60)
    again = [call for call in (tmp_path / "calls").read_text().splitlines() if ".py " in call]
    assert len(again) == (3 if name == "bits" else 0)

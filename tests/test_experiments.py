"""The scripts behind the tables, tiny: what each measures against known answers, and the commands
of the shell scripts against the settings there are."""
import math
import os
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_state
from test_evaluate import drawn, save, tables_of

import analog_bits
import embed_diffusion
import generate
import mnist_ddpm
import train
from checkpoint import load
from config import Bits, Embed, Masked, Mnist, parse
from data import CharTokenizer, Text
from evaluation.likelihood import Evaluate, open_checkpoint
from experiments import animate, control, freeze, kills, sampler_nll, samplers, strips


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """{method: the folder of an untrained checkpoint}, of the same text in windows of 32: networks
    that say nothing, and two with drawn weights; that text, as it is typed, and the size V of its
    alphabet."""
    folder = tmp_path_factory.mktemp("runs")
    small = dict(n_layer=1, n_head=1, n_embd=16)
    text = dict(dataset=corpus.partition("=")[2], block_size=32, **small)
    meta = Text(Masked(**text)).meta
    pixels = {"alphabet": "", "data": {"name": "digits", "sha256": ""}}
    runs = {"dataset": corpus, "V": len(meta["alphabet"])}
    for name, script, c in [("masked", train, Masked(**text)),
                            ("ar", train, Masked(objective="ar", **text)),
                            ("bits", analog_bits, Bits(**text)),
                            ("embed", embed_diffusion, Embed(**text)),
                            ("mnist", mnist_ddpm, Mnist(patch=14, **small))]:
        train.reseed(0)
        its = pixels if name == "mnist" else meta
        runs[name] = save(folder / name, name, script, c, its, script.build(c, its))
    for name in ("masked", "ar"):
        c = Masked(objective=name, **text)
        runs[f"drawn {name}"] = save(folder / f"drawn {name}", name, train, c, meta,
                                     drawn(train, c, meta))
    return runs


def table_rows(out):
    """{first cell: cells} of the Markdown tables in a text."""
    return {row[0]: row for _, rows in tables_of(out) for row in rows}


SCRIPTS = [path for folder in ("evaluation", "experiments") for path in ROOT.glob(f"{folder}/*.py")
           if path.read_text(encoding="utf-8").endswith("    run(main)\n")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_is_wrong_with_bad_input(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert isinstance(ended.value.code, str)


# pictures

def last_texts(svg):
    """Of each pane of an SVG, what can be seen at last, row by row, without spaces."""
    cells = []
    for group in ET.fromstring(svg).findall("{*}text"):
        change = group.find("{*}animate")
        if change is None or change.get("values").endswith("1"):
            cells += [(int(cell.get("y")), int(cell.get("x")), cell.text)
                      for cell in group.findall("{*}tspan")]
    middle = 424
    panes = {}
    for y, x, text in sorted(cells):
        panes.setdefault((y > 130, x > middle), []).append(text)
    return ["".join(texts) for _, texts in sorted(panes.items())]


def test_the_picture_ends_with_the_text_that_generate_writes(runs, tmp_path, capsys):
    args = [f"--out={runs['masked']}", "--length=30", "--prompt=is ", "--steps=8"]
    generate.main(args)
    text = capsys.readouterr().out
    animate.main([*args, f"--svg={tmp_path}/u.svg"])
    assert capsys.readouterr().out == text
    svg = (tmp_path / "u.svg").read_text(encoding="utf-8")
    assert last_texts(svg) == ["".join(text.split())] and svg.count(">masked: 8 calls, ") == 1
    with pytest.raises(SystemExit, match="writes from left to right"):
        animate.main([f"--out={runs['ar']}", "--prompt=is {4} of", f"--svg={tmp_path}/u.svg"])
    with pytest.raises(SystemExit, match="writes no characters"):
        animate.main([f"--out={runs['mnist']}", f"--svg={tmp_path}/u.svg"])


def test_four_models_write_at_the_same_time(runs, tmp_path, capsys):
    paths = [str(runs[name]) for name in ("ar", "masked", "embed", "bits")]
    animate.main([f"--out={','.join(paths)}", "--length=30", f"--svg={tmp_path}/four.svg"])
    said = capsys.readouterr()
    svg = (tmp_path / "four.svg").read_text(encoding="utf-8")
    titles = re.findall(r">(\w+): (\d+) calls, (\d+\.\d) s<", svg)
    names = [name for name, _, _ in titles]
    assert names == ["autoregressive", "masked", "embeddings", "bits"]
    calls = re.findall(r"(\d+) network calls", said.err)
    assert [n for _, n, _ in titles] == calls and calls[0] == "30" and calls[2:] == ["50", "50"]
    texts = last_texts(svg)
    assert len(texts) == 4 and "".join(texts) == "".join(said.out.split())


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
    assert [(title, s.order, s.steps) for title, s in rows] == [
        (f"order={order}, steps={steps}", order, steps)
        for order in ("random", "margin") for steps in (8, 16)]
    assert all(s.out == "a,b" and s.two_pass and s.temperature == 1 for _, s in rows)
    assert samplers.combinations([], Evaluate) == [("as typed", Evaluate())]
    with pytest.raises(SystemExit, match="order"):
        samplers.combinations(["--order=random,best"], Evaluate)


def test_samplers_of_text(runs, capsys):
    """Each row has its own settings: calls are what was asked for, and the score log V, or what
    uniform characters have."""
    args = [f"--eval_model={runs['ar']}", runs["dataset"], "--n=2"]
    samplers.main([f"--out={runs['masked']}", "--min_distance=0,4", "--steps=1,32", "--remask=0",
                   "--order=random", *args])
    rows = table_rows(capsys.readouterr().out)
    calls = {first: row[-2] for first, row in rows.items() if "steps" in first}
    assert calls == {f"min_distance={d}, steps={n}": f"{n}.0" for d in (0, 4) for n in (1, 32)}
    assert rows["held out"][2] == f"{math.log(runs['V']):.3f} ± 0.000"
    assert rows["held out"][-2] == ""
    samplers.main([f"--out={runs['bits']}", "--two_pass=False,True", "--gaussian_steps=5", *args])
    rows = table_rows(capsys.readouterr().out)
    assert [rows[f"two_pass={value}"][-2] for value in (False, True)] == ["5.0", "10.0"]
    with pytest.raises(SystemExit, match="n=0 or digits=0 has none"):
        samplers.main([f"--out={runs['bits']}", "--n=0"])


@pytest.fixture
def sampler_tables(runs, monkeypatch, capsys, tmp_path):
    """The three tables of experiments.sampler_nll, as a function of the kind of networks."""
    monkeypatch.setattr(sampler_nll, "HERE", tmp_path)
    monkeypatch.setattr(sampler_nll, "CALLS", (8,))

    def tables(kind, *more):
        sampler_nll.main([f"--out={runs[f'{kind}masked']}", f"--eval_model={runs[f'{kind}ar']}",
                          runs["dataset"], "--windows=4", "--n=2", *more])
        return [rows for _, rows in tables_of(capsys.readouterr().out)]

    return tables


def test_every_sampler_of_a_silent_network_pays_log_V(runs, sampler_tables):
    """In held-out text, in parts of it, and in written text."""
    (bound, *held_out), infilled, written = sampler_tables("")
    nats = f"{math.log(runs['V']):.4f} ± 0.0000"
    # five orders: one a call, and at eight calls three or four distances; entropy; temperatures
    assert bound == ["the bound", nats, "", ""] and len(held_out) == 5 + 16 + 2 + 3
    for row in held_out:
        assert [cell.lstrip("-") for cell in row[1:]] == [nats] + ["0.0000 ± 0.0000"] * 2
    assert len(infilled) == 3 and len(written) == 10
    for row in infilled:
        assert row[1:] == [nats] * 6 + ["0.0000 ± 0.0000"]
    for row in written:
        assert row[1:4] == [f"{math.log(runs['V']):.3f} ± 0.000"] * 2 + ["0.000 ± 0.000"]


def test_rows_of_samplers_are_compared_and_measured_once(runs, sampler_tables, monkeypatch):
    tables = sampler_tables("drawn ")
    held_out, infilled, written = [
        [[float(cell.split()[0]) for cell in row[1:] if cell] for row in rows] for rows in tables]
    bound = held_out[0][0]
    margin = held_out[1 + sampler_nll.ORDERS.index("margin")][0]
    for nats, to_bound, to_margin in held_out[1:]:
        assert to_bound == pytest.approx(nats - bound, abs=2e-4)
        assert to_margin == pytest.approx(nats - margin, abs=2e-4)
    for *_, margin, _, baseline, difference in infilled:
        assert difference == pytest.approx(baseline - margin, abs=2e-4)
    for nll, own, difference, *_ in written:
        assert difference == pytest.approx(nll - own, abs=2e-3)

    method = open_checkpoint(runs["drawn masked"]).method
    x = torch.randint(runs["V"], (3, 32))
    _, how = sampler_nll.vary(order="random", steps=8)
    nats, again = [sampler_nll.nats_per_char(method, x, how) for _ in range(2)]
    assert torch.equal(nats, again)
    monkeypatch.setattr(sampler_nll, "nats_per_char", None)
    monkeypatch.setattr(sampler_nll, "written_row", None)
    assert sampler_tables("drawn ") == tables
    only, = sampler_tables("drawn ", "--only=steps 8,")
    assert [row[:3] for row in only[1:]] == [
        row[:3] for row in tables[0] if "steps 8," in row[0]]
    with pytest.raises(SystemExit, match="no sampler has 'step 8' in its title"):
        sampler_tables("drawn ", "--only=step 8")
    with pytest.raises(SystemExit, match="is no masked model"):
        sampler_nll.main([f"--out={runs['ar']}", runs["dataset"]])


def test_kills_find_every_checkpoint_as_it_should_be(capsys, monkeypatch):
    """And a digest tells apart all but what a clock has measured."""
    state = {"step": 20, "ema": {"w": torch.ones(2)}, "adam": [torch.zeros(1), 0.5]}
    others = [{**state, "step": 40}, {**state, "ema": {"w": torch.tensor([1.0, 1.5])}},
              {**state, "ema": {"v": torch.ones(2)}}, {**state, "adam": [torch.zeros(1), 0.25]}]
    assert len({kills.digest(x) for x in [state, *others]}) == 5
    assert kills.digest({**state, "progress": {"seconds": 1.5}}) == kills.digest(state)
    kills.main(["2", "0"])
    out = capsys.readouterr().out
    assert "2 kills, " in out and "2 checkpoints as of a run that was not killed" in out
    found = [(20, "another"), (20, "another"), (40, "another")]
    monkeypatch.setattr(kills, "kill_and_resume", lambda *_: found)
    with pytest.raises(SystemExit, match="they differ"):
        kills.main(["3", "0"])
    assert "3 kills, 2 different steps up to 40: 0 checkpoints" in capsys.readouterr().out


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
    rows = rows_of("--mode=blocks", "--block=16", "--two_pass=False,True", "--steps=2",
                   "--length=50")
    assert [rows[f"two_pass={value}"][-4] for value in (False, True)] == ["8", "16"]   # four blocks
    assert rows["held out"][1] == "2" and int(rows["two_pass=True"][-3].replace(",", "")) > 50

    tokenizer = CharTokenizer(read_state(Path(runs["embed"]), "best.pt")["alphabet"])

    def write_controlled(method, ids, known, T, s, allowed, ar):
        x = torch.full((2, len(ids)), int(tokenizer.encode("s")[0]))
        x[1, :8] = int(tokenizer.encode("e")[0])
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
N_RUNS = {"ablation": 32, "bits": 15, "equal": 27, "ladder": 32, "repeated": 9, "samplers": 0,
          "side": 24}


@pytest.mark.parametrize("name", N_RUNS)
def test_each_command_of_a_shell_script_has_settings_that_exist(name, tmp_path, capsys):
    """`python` writes down how it was called, makes the checkpoint and the status of its run, and
    is not called again for a run that has finished."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/python"
    stub.write_text(f"""#!/bin/bash
printf '%s\\n' "$*" >> '{tmp_path}/calls'
[ "$1" = -c ] && echo {' '.join(embed_diffusion.RECIPES)}
for arg; do case $arg in --out=*) out=${{arg#--out=}} ;; esac; done
case $1 in *.py) mkdir -p "$out"; echo finished > "$out/status"; touch "$out/best.pt" ;; esac
""")
    stub.chmod(0o755)
    if name == "side":
        (tmp_path / "out/warpeace-ar").mkdir(parents=True)
        (tmp_path / "out/warpeace-ar/best.pt").touch()
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def calls():
        script = ROOT / f"experiments/{name}.sh"
        subprocess.run(["bash", str(script), "my data"], cwd=tmp_path, env=env, check=True,
                       timeout=60)
        lines = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").write_text("")
        return lines

    outs = []
    for call in calls():
        script, *args = call.replace("my data", "my_data").removeprefix("-m ").split()
        if script == "-c":
            exec(call.removeprefix("-c "))
            assert capsys.readouterr().out.split() == [*embed_diffusion.RECIPES]
        elif script == "experiments.samplers":
            assert all(s.data_dir.endswith("my_data")
                       for _, s in samplers.combinations(args, Evaluate))
        elif script != "experiments.table":
            recipes = embed_diffusion.RECIPES if script == "embed_diffusion.py" else None
            s = SETTINGS[script](**parse(args, SETTINGS[script], recipes))
            assert s.data_dir.endswith("my_data")
            if script.endswith(".py"):
                outs.append(s.out)
    assert len(outs) == len(set(outs)) == N_RUNS[name]
    again = [call for call in calls() if ".py " in call]
    assert len(again) == (3 if name == "bits" else 0)

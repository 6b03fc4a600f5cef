"""The scripts behind the tables, tiny: what each measures against known answers, and the commands
of the shell scripts against the settings there are."""
import itertools
import os
import shlex
import struct
import subprocess
import xml.etree.ElementTree as ET
import zlib
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
from experiments import animate, control, digits, freeze, samplers, strips

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
    for e in root.iter():
        if e.tag.endswith("text"):
            change = e.find("{*}animate")
            if change is None or change.get("values").endswith("1"):
                last.append(e.text)
    assert "".join(last) == "".join(done.stdout.split())


def test_the_svg_of_a_known_history():
    tokenizer = CharTokenizer("ab")
    history = [(torch.tensor([0, 2, 2]), torch.tensor([1.0, 0.0, 0.0])),
               (torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.0, 0.5])),
               (torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.9, 0.5]))]
    svg = animate.text_svg(history, torch.tensor([True, False, False]), tokenizer, seconds=3)
    assert svg.count("·<animate") == 2 and svg.count(">a<") == 1 and svg.count(">b<animate") == 2
    assert svg.count('dur="3s"') == 4 and svg.count("#f0f6fc") == 1
    for j, at, color in [(1, "0.5000", "hsl(117 "), (2, "0.2500", "hsl(65 ")]:
        x = f'x="{16 + 9.6 * j:.1f}" y="32" fill='
        dot, char = [line for line in svg.splitlines() if x in line]
        assert f'keyTimes="0.0000;{at}" values="1;0"' in dot and "#484f58" in dot
        assert f'keyTimes="0.0000;{at}" values="0;1"' in char and color in char


def test_control_characters_are_not_drawn():
    tokenizer = CharTokenizer("a\x0c\x1b")
    history = [(torch.tensor([0, 1, 2]), torch.ones(3))]
    svg = animate.text_svg(history, torch.tensor([True, False, False]), tokenizer)
    assert len(list(ET.fromstring(svg))) == 3 and "\x1b" not in svg      # title, rect, a


def png_chunks(raw):
    """[(kind, data), ...] of a PNG, whose checksums are right."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = []
    at = 8
    while at < len(raw):
        n, = struct.unpack(">I", raw[at:at + 4])
        kind = raw[at + 4:at + 8]
        data = raw[at + 8:at + 8 + n]
        assert struct.unpack(">I", raw[at + 8 + n:at + 12 + n]) == (zlib.crc32(kind + data),)
        chunks.append((kind, data))
        at += 12 + n
    return chunks


def test_strips(runs, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(strips, "HERE", tmp_path)
    strips.main([runs["mnist"]])
    sizes = [png_chunks((tmp_path / f"results/{name}.png").read_bytes())[0][1][:8]
             for name in ("digits", "strip")]
    assert sizes == [struct.pack(">II", 560, 140), struct.pack(">II", 224, 56)]


def test_freeze(runs, tmp_path, capsys):
    state = read_state(Path(runs["masked"]), "best.pt")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    state["config"]["data_dir"] = "/home/somebody"
    torch.save(state, run_folder / "best.pt")
    (run_folder / "log.csv").write_text("step\n1\n")
    freeze.main([str(run_folder), str(tmp_path / "small.pt")])
    small = torch.load(tmp_path / "small.pt", weights_only=True)
    assert small["config"]["data_dir"] == "" and (tmp_path / "small.csv").read_text() == "step\n1\n"
    for name, value in state["ema"].items():
        assert torch.equal(small["ema"][name], value.half()), name
    method, _, _ = load(tmp_path / "small.pt", Masked, train.build, ["masked"])
    assert method.net.embed.weight.dtype == torch.float32


# tables of settings

def test_samplers(runs, capsys):
    args = [f"--eval_model={runs['ar']}", runs["dataset"], "--n=2"]
    samplers.main(["one network call", "head to head", f"--out={runs['masked']}", *args])
    rows = table_rows(capsys.readouterr().out)
    calls = {first: row[-2] for first, row in rows.items() if ": " in first}
    assert calls == {
        "one network call: order=random, temperature=1.0, steps=1": "1.0",
        "head to head: order=random, temperature=1.0, steps=128": "128.0",
        **{f"head to head: order=random, temperature=1.0, min_distance=4, steps={k}": f"{k}.0"
           for k in (8, 16, 43)},
        "head to head: order=margin, temperature=1.0, min_distance=4, steps=43": "43.0",
        "head to head: order=margin, temperature=1.05, min_distance=4, steps=43": "43.0"}
    samplers.main(["two passes", f"--out={runs['bits']}", *args])
    rows = table_rows(capsys.readouterr().out)
    assert [row[-2] for first, row in rows.items() if ": " in first] == ["50.0"] * 4
    with pytest.raises(SystemExit, match="has the tables 10 steps, 50 steps"):
        samplers.main(["head to head", f"--out={runs['bits']}", *args])


def test_each_row_of_settings_is_a_sampler():
    for row in itertools.chain(*samplers.MASKED.values(), *samplers.CODES.values(),
                               *digits.TABLES.values()):
        Evaluate(**row)
    rows = list(itertools.chain(*control.HYBRIDS.values(), *control.LONG_TEXTS.values()))
    assert len(control.HYBRIDS) == 15 and len(control.LONG_TEXTS) == 3 and rows


def test_digits(runs, monkeypatch, capsys):
    """The settings of a row reach the sampler; what it makes is measured elsewhere."""
    asked = []

    def sample_digits(checkpoint, real, n, how):
        asked.append((n, how.guidance, how.steps, how.sampler, how.td))
        return {}, 1.0

    class Rows:
        def add(self, *cells):
            print(cells)

    monkeypatch.setattr(digits, "corpus", lambda checkpoint, s: None)
    monkeypatch.setattr(digits, "real_digits", lambda data: None)
    monkeypatch.setattr(digits, "digit_floor", lambda real, n, seed: (Rows(), 1.0))
    monkeypatch.setattr(digits, "sample_digits", sample_digits)
    monkeypatch.setattr(digits, "digit_row", lambda title, m, floor, speed: [title])
    digits.main(["guidance", "asymmetric time", f"--out={runs['mnist']}", "--digits=20"])
    assert asked[:5] == [(20, g, 50, "ddim", 0.0) for g in (0.0, 1.0, 1.5, 2.0, 4.0)]
    assert asked[5:] == [(20, 1.0, 50, name, td) for name in ("ddim", "ancestral")
                         for td in (0.5, 1.0, 2.0)]
    out = capsys.readouterr().out
    assert "'asymmetric time: guidance 1, 50 ancestral steps, td 0.5'" in out


def test_control(runs, monkeypatch, capsys):
    """Calls are those of both networks; a text has its wish if each of its characters has."""
    hybrids = {name: row for name, row in control.HYBRIDS.items()
               if name in ("diffusion, 50 steps", "guided, 0.5 of the baseline, 50 steps")}
    monkeypatch.setattr(control, "HYBRIDS", hybrids)
    monkeypatch.setattr(control, "LONG_TEXTS", {"long": dict(mode="blocks", block=64, steps=2)})
    monkeypatch.setattr(control, "LONG", 2)
    monkeypatch.setattr(control, "WISHES", ["no:e"])
    args = [f"--out={runs['embed']}", f"--ar={runs['ar']}", f"--eval_model={runs['ar']}",
            runs["dataset"], "--n=2"]
    control.main(args)
    out = capsys.readouterr().out
    rows = table_rows(out)
    assert rows["diffusion, 50 steps"][-2] == "50"
    assert rows["guided, 0.5 of the baseline, 50 steps"][-2] == "100"
    assert rows["long"][-2] == "8"                       # four blocks of 64
    assert [line.split(" | ")[-2] for line in out.splitlines()
            if line.startswith("| the baseline |")] == ["128", "256"]
    assert rows["no:e"][-3] == "5"                       # the last strength

    tokenizer = CharTokenizer(read_state(Path(runs["embed"]), "best.pt")["alphabet"])

    def write_texts(checkpoint, tokenizer, how, L):
        x = torch.full((2, L), int(tokenizer.encode("s")[0]))
        x[1, :32] = int(tokenizer.encode("e")[0])
        return x, 1, 1.0

    monkeypatch.setattr(control, "write_texts", write_texts)
    control.main(args)
    row = table_rows(capsys.readouterr().out)["no:e"]
    assert row[-2:] == ["0.500 ± 0.500", "0.875 ± 0.125"] and len(tokenizer)


# the shell scripts

SETTINGS = {"train.py": Masked, "analog_bits.py": Bits, "embed_diffusion.py": Embed,
            "evaluation": Evaluate, "experiments.samplers": Evaluate}
N_RUNS = {"ablation": 32, "bits": 15, "ladder": 32, "repeated": 9, "side": 24}


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
        s = SETTINGS[script](**parse(args, SETTINGS[script], recipes))
        assert s.data_dir == "my_data"
        if script.endswith(".py"):
            outs.append(s.out)
    assert len(outs) == len(set(outs)) == N_RUNS[name]
    (tmp_path / "calls").write_text("")
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60)
    again = [call for call in (tmp_path / "calls").read_text().splitlines() if ".py " in call]
    assert len(again) == (3 if name == "bits" else 0)

"""Settings: overrides, types, choices, --help; two dozen bad inputs, each one line and exit 1."""
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
import train
from config import Bits, Embed, EmbedSampler, Evaluate, Masked, Mnist, Picture, Sample, parse
from evaluation import evaluate

ROOT = Path(__file__).parent.parent


def test_overrides_have_the_type_of_the_field():
    c = parse(["--dropout=0", "--learning_rate=1", "--out=a=b", "--n_layer=3", "--compile=false", "--time", "--data_dir=123"], Masked())
    assert (c.dropout, c.learning_rate, c.out, c.n_layer, c.compile, c.time, c.data_dir) == (0.0, 1.0, "a=b", 3, False, True, "123")
    assert parse([], c) == c
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.n_layer = 4


def test_help_is_the_source(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"], Masked())
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(f.name in out for f in dataclasses.fields(Masked)) and "# why" not in out
    assert "what is typed here wins" in out


BAD = [   # script, arguments, what the one line says
    ("train", ["--n_layers=3"], "no setting 'n_layers', did you mean 'n_layer'?"),
    ("train", ["--zzz=3"], "no setting 'zzz'; there are: dataset"),
    ("train", ["--n_layer=six"], "--n_layer: expected int, got 'six'"),
    ("train", ["--n_layer=1.5"], "--n_layer: expected int, got '1.5'"),
    ("train", ["--learning_rate=fast"], "--learning_rate: expected float, got 'fast'"),
    ("train", ["--learning_rate=nan"], "learning_rate=nan must be 0 or more"),
    ("train", ["--compile=maybe"], "--compile: expected bool, got 'maybe'"),
    ("train", ["--batch_size", "32"], "write --batch_size=VALUE, not '--batch_size'"),
    ("train", ["batch_size=32"], "write --batch_size=VALUE, not 'batch_size=32'"),
    ("train", ["sample"], "write --dataset=VALUE, not 'sample'"),
    ("train", ["--n_embd=384", "--n_head=5"], "n_embd=384 is not a multiple of n_head=5"),
    ("train", ["--n_embd=15", "--n_head=5"], "n_embd/n_head=3 must be even"),
    ("train", ["--batch_size=0"], "batch_size=0 must be 1 or more"),
    ("train", ["--block_size=1"], "block_size=1 must be 2 or more"),
    ("train", ["--dropout=1"], "dropout and ema must be below 1"),
    ("train", ["--seed=-1"], "seed=-1 must be 0 or more"),
    ("train", ["--objective=gan"], "--objective: one of masked, ar, got 'gan'"),
    ("train", ["--dataset=nowhere.txt"], "no dataset 'nowhere.txt': one of auto, shakespeare"),
    ("train", ["--dataset={tmp}"], "Is a directory"),
    ("train", ["--dataset={tmp}/empty.txt"], "has 0 characters"),
    ("train", ["--dataset={tmp}/short.txt"], "has 100 characters"),
    ("train", ["--dataset={tmp}/binary.txt"], "is not text: it has zero bytes"),
    ("train", ["--dataset={tmp}/latin1.txt"], "is not UTF-8 text: byte 3 is 0xe9"),
    ("train", ["--dataset=shakespeare", "--data_dir={tmp}/cut"], "is not shakespeare: cut, or another file"),
    ("train", ["--resume", "--out={tmp}/none"], "no checkpoint at"),
    ("train", ["--resume", "--out={tmp}/bits"], "is a bits checkpoint: python"),
    ("train", ["--resume", "--out={tmp}/run", "--n_layer=3"], "this run has n_layer=1, which cannot change"),
    ("train", ["--resume", "--out={tmp}/run", "--dataset={tmp}/other.txt"], "was trained on file text.txt, not on this file other.txt"),
    ("train", ["--resume", "--out={tmp}/run"], "is finished, at step 2; --max_iters=4 would go on"),
    ("train", ["--dataset={tmp}/text.txt", "--out={tmp}/text.txt/x"], "NotADirectoryError"),
    ("generate", ["--order=alphabetical"], "--order: one of random, confidence, margin, entropy"),
    ("generate", ["--n_layer=8"], "no setting 'n_layer'"),
    ("generate", ["--steps=0"], "steps=0 must be 1 or more"),
    ("generate", ["--temperature=-1"], "temperature=-1.0 must be 0 or more"),
    ("generate", ["--remask=2"], "remask=2.0 is a share, at most 1"),
    ("generate", ["--out={tmp}/none"], "no checkpoint at"),
    ("generate", ["--out={tmp}/text.txt"], "is damaged, or no checkpoint"),
    ("generate", ["--out={tmp}/cut.pt"], "is damaged, or no checkpoint"),
    ("generate", ["--out={tmp}/list.pt"], "is damaged, or no checkpoint"),
    ("generate", ["--out={tmp}/less.pt"], "is damaged, or no checkpoint"),
    ("generate", ["--n=99999999"], "a million is the most"),
    ("generate", ["--out={tmp}/run", "--prompt={99999999999999999999}"], "a blank is written {12}"),
    ("generate", ["--out={tmp}/bits.pt"], "is a bits checkpoint: python"),
    ("generate", ["--out={tmp}/old.pt"], "made by another version: it has the setting 'n_experts'"),
    ("generate", ["--out={tmp}/older.pt"], "made by another version: it lacks the setting 'n_layer'"),
    ("generate", ["--out={tmp}/run", "--prompt=Zebra"], "the model has never seen 'Z'"),
    ("generate", ["--out={tmp}/run", "--prompt=a{b"], "a blank is written {12}"),
    ("generate", ["--out={tmp}/run", "--prompt=abcd", "--length=3"], "length=3 is shorter than the prompt, which has 4"),
    ("generate", ["--out={tmp}/twin", "--prompt=a{3}b"], "cannot use the text after a blank"),
    ("generate", ["--out={tmp}/run", "--prompt=a{5-3}b"], "a blank is written {12} or {20-60}"),
    ("generate", ["--out={tmp}/run", "--prompt=a{3-7}bd"], "with the 2 characters that follow a blank may have 6, not 7"),
    ("generate", ["--out={tmp}/twin", "--prompt=a{3-5}"], "{3-5}: a blank of unknown length needs a masked checkpoint"),
    ("generate", ["--out={tmp}/run", "--svg={tmp}/none/x.svg"], "FileNotFoundError"),
    ("train", ["--dataset={tmp}/text.txt", "--block_size=16", "--train_size=15"], "train_size=15 is less than one block_size=16"),
    ("evaluate", ["--out={tmp}/run,{tmp}/none"], "no checkpoint at"),
    ("evaluate", ["--out={tmp}/run"], "run was trained on the file text.txt: pass its path, --dataset=PATH"),
    ("evaluate", ["--out={tmp}/run", "--dataset={tmp}/other.txt"], "was trained on another file text.txt than this"),
    ("evaluate", ["--out={tmp}/run", "--dataset={tmp}/text.txt", "--bound=False", "--judge={tmp}/run"], "run is a masked checkpoint, whose"),
    ("evaluate", ["--n=1"], "n and exact must be 0, or 2 and more: one has no error"),
    ("evaluate", ["--batch_size=3"], "no setting 'batch_size'"),
]
TINY = ["--max_iters=2", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "cut").mkdir()
    for name, content in {"empty.txt": b"", "short.txt": b"x" * 100, "binary.txt": b"ab\0c" * 999, "latin1.txt": b"caf\xe9 " * 999,
                          "text.txt": b"abcd abd acd\n" * 999, "other.txt": b"abcd acb acb\n" * 999,
                          "cut/tinyshakespeare.txt": b"First Citizen:\n"}.items():
        (tmp / name).write_bytes(content)
    for objective, out in (("masked", "run"), ("ar", "twin")):
        train.main([*TINY, f"--dataset={tmp}/text.txt", f"--out={tmp}/{out}", f"--objective={objective}"])
    whole = (tmp / "run/best.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[:len(whole) // 2])
    state = torch.load(tmp / "run/best.pt", weights_only=True)
    torch.save([1, 2], tmp / "list.pt")
    torch.save({**state, "method": "bits"}, tmp / "bits.pt")
    (tmp / "bits").mkdir()
    (tmp / "bits/ckpt.pt").write_bytes((tmp / "bits.pt").read_bytes())
    torch.save({k: v for k, v in state.items() if k != "alphabet"}, tmp / "less.pt")
    torch.save({**state, "config": {**state["config"], "n_experts": 8}}, tmp / "old.pt")
    torch.save({**state, "config": {k: v for k, v in state["config"].items() if k != "n_layer"}}, tmp / "older.pt")
    return tmp


@pytest.mark.parametrize("script, args, says", BAD)
def test_bad_input_is_one_line_and_exit_1(script, args, says, files, capsys):
    main = {"train": train.main, "generate": generate.main, "evaluate": evaluate.main}[script]
    with pytest.raises((SystemExit, OSError)) as e:      # run() turns an OSError into the same one line
        main([a.replace("{tmp}", str(files)) for a in args])
    line = str(e.value) if e.type is SystemExit else f"{e.type.__name__}: {e.value}"
    assert says in line and "\n" not in line and e.value.args[0] not in (0, None)


@pytest.mark.parametrize("script, args, says", [BAD[0], BAD[29], BAD[36], BAD[-1]])
def test_and_so_it_is_from_the_shell(script, args, says, files):
    module = {"evaluate": "evaluation"}.get(script, script)
    r = subprocess.run([sys.executable, "-m", module, *(a.replace("{tmp}", str(files)) for a in args)], cwd=ROOT, capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode == 1 and says in last and "Traceback" not in r.stderr


def test_every_setting_is_read_somewhere():
    source = "".join(p.read_text(encoding="utf-8") for p in (*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py")) if p.name != "config.py")
    for f in {f.name for k in (Masked, Mnist, Bits, Embed, Sample, EmbedSampler, Picture, Evaluate) for f in dataclasses.fields(k)}:
        assert re.search(rf"\b(c|s|m|self\.c)\.{f}\b", source), f"nothing reads the setting {f}"

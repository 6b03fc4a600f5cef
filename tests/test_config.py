"""Settings: types, choices, recipes, --help; bad inputs, each one line and exit code 1."""
import dataclasses
import re
from typing import get_args

import pytest
import torch
from conftest import ROOT, last_line, run

import analog_bits
import config
import embed_diffusion
import generate
import mnist_ddpm
import train
from config import EMBED_RECIPES, MNIST_RECIPES, Embed, Masked, Mnist, Sample, parse

SCRIPTS = {"train": train, "generate": generate, "bits": analog_bits, "embed": embed_diffusion,
           "mnist": mnist_ddpm}


def test_what_is_typed_has_the_type_of_the_field():
    typed = parse(["--dropout=0", "--learning_rate=1", "--out=a=b", "--n_layer", "3", "--time",
                   "--compile=false", "--dataset=123"], Masked)
    assert typed == dict(dropout=0.0, learning_rate=1.0, out="a=b", n_layer=3, compile=False,
                         time=True, dataset="123")
    assert [type(typed[name]) for name in ("dropout", "learning_rate")] == [float, float]
    assert parse([], Masked) == {}
    assert parse(["--n_layer=1", "--n_layer=2"], Masked) == {"n_layer": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Masked(**typed).n_layer = 4


def test_a_recipe_gives_what_is_not_typed():
    typed = parse(["--loss=elbo", "--recipe=ddpm", "--n_layer=1"], Mnist, MNIST_RECIPES)
    assert typed == {**MNIST_RECIPES["ddpm"], "loss": "elbo", "n_layer": 1}
    assert Mnist(**MNIST_RECIPES["best"]) == Mnist()
    assert Embed(**EMBED_RECIPES["best"]) == Embed()
    for recipes, settings in ((MNIST_RECIPES, Mnist), (EMBED_RECIPES, Embed)):
        every = [settings(**values) for values in recipes.values()]
        assert len(set(every)) == len(every)


def test_a_rung_of_the_ladder_is_one_change():
    """Each stands on all before it and changes what it says: from the baseline, which fails."""
    before = EMBED_RECIPES["baseline"]
    for rung, change in [*config.LADDER.items()][1:]:
        recipe = EMBED_RECIPES[rung]
        assert recipe == before | change and recipe != before, rung
        before = recipe


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_source(script, capsys):
    with pytest.raises(SystemExit) as e:
        SCRIPTS[script].main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    settings = Sample
    if script != "generate":
        settings = SCRIPTS[script].SETTINGS
    for f in dataclasses.fields(settings):
        assert re.search(rf"^    {f.name}: .* = ", out, re.M), f.name
    assert ("--recipe=" in out) == (script in ("embed", "mnist"))


BAD = [   # script, arguments, what the one line says
    ("train --n_layers=3", "no setting '--n_layers=3', did you mean --n_layer?"),
    ("train --zzz=3", "no setting '--zzz=3', did you mean --"),
    ("train --n_layer=six", "argument --n_layer: invalid int value: 'six'"),
    ("train --n_layer=1.5", "argument --n_layer: invalid int value: '1.5'"),
    ("train --learning_rate=fast", "argument --learning_rate: invalid float value: 'fast'"),
    ("train --learning_rate=nan", "learning_rate=nan must be 0 or more"),
    ("train --learning_rate=inf", "learning_rate=inf must be 0 or more"),
    ("train --compile=maybe", "argument --compile: invalid boolean value: 'maybe'"),
    ("train --batch_size", "argument --batch_size: expected one argument"),
    ("train --batch=3", "no setting '--batch=3', did you mean --batch_size?"),
    ("train batch_size=32", "no setting 'batch_size=32', did you mean --batch_size?"),
    ("train sample", "no setting 'sample', did you mean"),
    ("train --n_embd=384 --n_head=5", "n_embd/n_head is 76.8: it must be even"),
    ("train --n_embd=15 --n_head=5", "n_embd/n_head is 3: it must be even"),
    ("train --batch_size=0", "batch_size=0 must be 1 or more"),
    ("train --dropout=1", "dropout=1.0 must be less than 1"),
    ("train --seed=-1", "seed=-1 must be 0 or more"),
    ("train --objective=gan", "argument --objective: invalid choice: 'gan' (choose from"),
    ("train --dataset=nowhere.txt", "no text file 'nowhere.txt', and no corpus: shakespeare"),
    ("train --dataset=TMP", "no text file 'TMP', and no corpus"),
    ("train --dataset=TMP/empty.txt", "empty.txt has 0 different characters"),
    ("train --dataset=TMP/short.txt", "has 90 characters to train on, 10 to validate"),
    ("train --dataset=TMP/binary.txt", "is not text: it has zero bytes"),
    ("train --dataset=TMP/latin1.txt", "is not UTF-8 text, see byte 3"),
    ("train --dataset=shakespeare --data_dir=TMP/cut", "is cut, or another file"),
    ("train --dataset=TMP/text.txt --block_size=16 --train_size=15",
     "has 15 characters to train on, 1,299 to validate; block_size=16 needs 16 and 32"),
    ("train --dataset=TMP/text.txt --out=TMP/text.txt/x", "NotADirectoryError"),
    ("train --resume --out=TMP/none", "no checkpoint at TMP/none/ckpt.pt"),
    ("train --resume --out=TMP/bits", "is a bits checkpoint, not masked or ar"),
    ("train --resume --out=TMP/run --n_layer=3", "this run has n_layer=1, which cannot become 3"),
    ("train --resume --out=TMP/run --objective=ar", "this run has objective=masked, which cannot"),
    ("train --resume --out=TMP/run --dataset=TMP/other.txt",
     "this run was trained on file text.txt, not on this file other.txt"),
    ("train --resume --out=TMP/run --dataset=TMP/changed/text.txt",
     "this run was trained on file text.txt, not on this file text.txt"),
    ("generate --order=alphabetical", "argument --order: invalid choice: 'alphabetical'"),
    ("generate --n_layer=8", "no setting '--n_layer=8', did you mean"),
    ("generate --steps=-1", "steps=-1 must be 0 or more"),
    ("generate --temperature=-1", "temperature=-1.0 must be 0 or more"),
    ("generate --out=TMP/none", "no checkpoint at TMP/none: train first, or pass --out=FOLDER"),
    ("generate --out=TMP/text.txt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/cut.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/list.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/pickle.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/nan.pt", "has weights that are no numbers: its run diverged"),
    ("generate --out=TMP/less.pt", "was made by another version"),
    ("generate --out=TMP/new.pt", "was made by another version"),
    ("generate --out=TMP/shape.pt", "was made by another version"),
    ("generate --out=TMP/bits.pt", "is a bits checkpoint, not masked or ar"),
    ("generate --out=TMP/run --prompt={99999999999999999999}", "a blank is written {12}"),
    ("generate --out=TMP/run --prompt=Zebra", "the model has never seen 'Z'"),
    ("generate --out=TMP/run --prompt=a{b", "a blank is written {12} or {20-60}, a brace {{"),
    ("generate --out=TMP/run --prompt=a{5-3}b", "a blank is written {12} or {20-60}"),
    ("generate --out=TMP/run --prompt=abcd --length=3",
     "length=3 is shorter than the prompt, which has 4 characters"),
    ("generate --out=TMP/ar --prompt=a{3}b", "cannot use the text after a blank"),
    ("generate --out=TMP/ar --prompt=a{3-5}", "of unknown length needs a masked checkpoint"),
    ("generate --out=TMP/run --prompt=a{3-7}bd",
     "with the 2 characters that follow, a blank may have 6, not 7"),
    ("mnist --recipe=dppm", "argument --recipe: invalid choice: 'dppm'"),
    ("mnist --predict=levels --loss=simple", "predict=levels has loss=ce or elbo"),
    ("mnist --recipe=levels --loss=simple", "predict=levels has loss=ce or elbo"),
    ("mnist --recipe=levels --predict=v", "predict=v has loss=simple or elbo or min-snr"),
    ("mnist --loss=ce", "predict=v has loss=simple or elbo or min-snr"),
    ("mnist --patch=5", "argument --patch: invalid choice: 5"),
    ("mnist sample --digit=10", "argument --digit: invalid choice: 10"),
    ("mnist sample --out=TMP/run", "is a masked checkpoint, not mnist"),
    ("embed --predict=x0 --loss=ce", "predict=x0 has loss=simple or diffusion-lm"),
    ("embed --table=TMP/text.txt --table_init=small", "table needs table_init=unit"),
]
TINY = ["--max_iters=2", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8",
        "--batch_size=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, runs and checkpoints, good and bad."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "cut").mkdir()
    (tmp / "changed").mkdir()
    contents = {"empty.txt": b"", "short.txt": b"xy" * 50, "binary.txt": b"ab\0c" * 999,
                "latin1.txt": b"caf\xe9 " * 999, "text.txt": b"abcd abd acd\n" * 999,
                "other.txt": b"abcd acb acb\n" * 999, "changed/text.txt": b"abcd dbc acd\n" * 999,
                "cut/tinyshakespeare.txt": b"First Citizen:\n"}
    for name, content in contents.items():
        (tmp / name).write_bytes(content)
    for objective, out in (("masked", "run"), ("ar", "ar")):
        train.main([*TINY, f"--dataset={tmp}/text.txt", f"--out={tmp}/{out}",
                    f"--objective={objective}"])
    whole = (tmp / "run/best.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[:len(whole) // 2])
    state = torch.load(tmp / "run/best.pt", weights_only=True)
    weights = state["ema"]
    head = "net.head.weight"
    variants = {
        "bits.pt": {"method": "bits"},
        "new.pt": {"config": {**state["config"], "n_experts": 8}},
        "shape.pt": {"config": {**state["config"], "n_embd": 16}},
        "nan.pt": {"ema": {**weights, head: weights[head] * float("nan")}},
    }
    for name, change in variants.items():
        torch.save({**state, **change}, tmp / name)
    torch.save({k: v for k, v in state.items() if k != "alphabet"}, tmp / "less.pt")
    old = {k: v for k, v in state["config"].items() if k != "train_size"}
    torch.save({**state, "config": old}, tmp / "old.pt")
    torch.save([1, 2], tmp / "list.pt")
    torch.save({**state, "method": Masked()}, tmp / "pickle.pt")       # of a class: never run
    (tmp / "bits").mkdir()
    torch.save({**state, "method": "bits"}, tmp / "bits/ckpt.pt")
    return tmp


@pytest.mark.parametrize("typed, says", BAD, ids=[typed for typed, _ in BAD])
def test_bad_input_is_one_line_and_exit_1(typed, says, files):
    script, *args = typed.replace("TMP", str(files)).split()
    before = {p: p.stat().st_mtime_ns for p in files.rglob("*") if p.name != "status"}
    with pytest.raises((SystemExit, OSError)) as e:        # run() ends an OSError with a line, too
        SCRIPTS[script].main(args)
    assert says.replace("TMP", str(files)) in last_line(e.value)
    assert before == {p: p.stat().st_mtime_ns for p in files.rglob("*") if p.name != "status"}


@pytest.mark.parametrize("typed, says", [BAD[0], BAD[18], BAD[26], BAD[40]])
def test_and_so_it_is_from_the_shell(typed, says, files):
    script, *args = typed.replace("TMP", str(files)).split()
    line, = run(f"{script}.py", *args, code=1).stderr.splitlines()
    assert says.replace("TMP", str(files)) in line


def test_a_setting_that_a_checkpoint_lacks_takes_its_default_and_a_line_says_so(files, capsys):
    _, c, _ = generate.load(files / "old.pt", Masked, train.build, ["masked"])
    assert c.train_size == Masked.train_size
    line, = capsys.readouterr().err.splitlines()           # stdout is for texts
    assert line == f"{files}/old.pt is older than train_size: the default is taken"


def all_settings():
    """The classes of config.py that a script takes."""
    classes = [x for x in vars(config).values() if isinstance(x, type)]
    return [x for x in classes if issubclass(x, config.Settings) and x != config.Settings]


def test_every_setting_is_read_somewhere_and_has_a_default_that_is_allowed():
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    names = {f.name for settings in all_settings() for f in dataclasses.fields(settings)}
    for name in names:
        assert re.search(rf"\b(c|s|self\.c|self)\.{name}\b", source), f"nothing reads {name}"
    for settings in all_settings():
        for f in dataclasses.fields(settings):
            choices = get_args(f.type)
            assert not choices or f.default in choices, f.name

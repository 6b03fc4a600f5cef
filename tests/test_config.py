"""Settings: types, choices, recipes, --help; bad inputs, each one line and exit code 1; what the
environment says."""
import dataclasses
import importlib
import io
import re
import runpy
import sys
from typing import get_args

import pytest
import torch
from conftest import ROOT, last_line, run

import config
import embed_diffusion
import generate
import train
from config import MNIST_RECIPES, Bits, Config, Embed, Masked, Mnist, parse

SCRIPTS = {
    "train.py": Masked, "generate.py": config.Sample,
    "analog_bits.py": Bits, "analog_bits.py sample": config.CodeSampler,
    "embed_diffusion.py": Embed, "embed_diffusion.py sample": config.EmbedSampler,
    "mnist_ddpm.py": Mnist, "mnist_ddpm.py sample": config.ImageSampler,
}


def all_settings():
    """The classes of config.py that a script takes."""
    classes = [x for x in vars(config).values() if isinstance(x, type)]
    return [x for x in classes if issubclass(x, config.Settings) and x != config.Settings]


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
    with pytest.raises(SystemExit, match="^objective=gan is none of "):
        Masked(objective="gan")


def test_a_recipe_gives_what_is_not_typed():
    typed = parse(["--loss=elbo", "--recipe=ddpm", "--n_layer=1"], Mnist, MNIST_RECIPES)
    assert typed == {**MNIST_RECIPES["ddpm"], "loss": "elbo", "n_layer": 1}
    assert Mnist(**MNIST_RECIPES["best"]) == Mnist()
    assert Embed(**embed_diffusion.RECIPES["best"]) == Embed()
    for recipes, settings in ((MNIST_RECIPES, Mnist), (embed_diffusion.RECIPES, Embed)):
        every = [settings(**values) for values in recipes.values()]
        assert len(set(every)) == len(every)


def test_settings_have_defaults_that_are_allowed_and_are_read_somewhere():
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for settings in all_settings():
        for f in dataclasses.fields(settings):
            read = re.search(rf"\b(c|s|self\.c|self)\.{f.name}\b", source)
            assert read, f"nothing reads {f.name}"
            choices = get_args(f.type)
            assert not choices or f.default in choices, f.name
    for settings in (Masked, Bits, Embed, Mnist):          # evaluations are evenly spaced
        assert settings().max_iters % settings().eval_interval == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples_and_every_setting_in_force(script, monkeypatch, capsys):
    """Of every script as it is typed: usage, then a line a setting, with the comment in config."""
    file, *kind = script.split()
    monkeypatch.setattr(sys, "argv", [file, *kind, "--help", "--seed=5"])
    # the script is not __main__ here, as it is in a shell
    monkeypatch.setitem(sys.modules, "__main__", importlib.import_module(file.removesuffix(".py")))
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert out.count(f"    python {file}") >= 3 or script.startswith("analog_bits")
    settings = SCRIPTS[script]
    in_force = vars(settings(seed=5))
    said = re.findall(r"(?m)^  --(\w+)=(\S*)(?:$|  +(.*))", out)
    assert [(name, value) for name, value, _ in said] == [(name, str(value))
                                                          for name, value in in_force.items()]
    assert ("seed", "5") in [row[:2] for row in said]
    comments = {name: comment for name, _, comment in said}
    assert not [name for name in comments if not comments[name]]
    has_recipes = script in ("embed_diffusion.py", "mnist_ddpm.py")
    assert ("--recipe=best: " in out) == has_recipes


def test_help_of_a_recipe_has_its_values(capsys):
    with pytest.raises(SystemExit):
        parse(["--recipe=ddpm", "--help"], Mnist, MNIST_RECIPES)
    out = capsys.readouterr().out
    assert "--predict=eps  " in out
    assert re.search(r"--schedule=linear +linear \| cosine \| sqrt; of the noise", out)


@pytest.mark.parametrize("field, default, said", [
    ("n_layer", 0, "n_layer=0 must be 1 or more"), ("n_embd", "160", "n_embd='160' is no int"),
    ("ema", None, "ema=None is no float"), ("optimizer", "adam", "optimizer=adam is none of"),
    ("weight_decay", -1.0, "weight_decay=-1.0 must be 0 or more")])
def test_a_default_that_is_no_allowed_value_is_one_line(field, default, said):
    """Somebody edits config.py."""
    fields = [(field, Config.__dataclass_fields__[field].type, default)]
    edited = dataclasses.make_dataclass("Edited", fields, bases=(Config,), frozen=True)
    with pytest.raises(SystemExit, match=f"^{re.escape(said)}"):
        edited(**parse([], edited))


BAD = [   # script, arguments, what the one line says
    ("train --n_layers=3", "no setting '--n_layers=3', did you mean --n_layer?"),
    ("train --zzz=3", "no setting '--zzz=3', did you mean --dataset --"),
    ("train --batch=3", "no setting '--batch=3', did you mean --batch_size?"),
    ("train ema=0.99912", "no setting 'ema=0.99912', did you mean --ema?"),
    ("generate ROMEO:", "no setting 'ROMEO:'; a prompt is written --prompt=ROMEO:"),
    ("generate ROMEO's", """no setting "ROMEO's"; a prompt is written --prompt='ROMEO'"'"'s'"""),
    ("mnist_ddpm sampel", "no setting 'sampel', did you mean sample?"),
    ("train --compile=maybe", "argument --compile: invalid boolean value: 'maybe'"),
    ("train --objective=gan", "argument --objective: invalid choice: 'gan' (choose from"),
    ("train --learning_rate=nan", "learning_rate=nan must be 0 or more"),
    ("train --learning_rate=inf", "learning_rate=inf must be 0 or more"),
    ("train --seed=-1", "seed=-1 must be 0 or more"),
    ("train --batch_size=0", "batch_size=0 must be 1 or more"),
    ("analog_bits sample --steps=0", "steps=0 must be 1 or more"),
    ("generate --steps=-1", "steps=-1 must be 0 or more"),
    ("train --n_embd=15 --n_head=5", "n_embd/n_head is 3: it must be even"),
    ("train --n_embd=384 --n_head=5", "n_embd/n_head is 76.8: it must be even"),
    ("train --dropout=1", "dropout=1.0 must be less than 1"),
    ("train --dataset=nowhere.txt", "no text file 'nowhere.txt', and no corpus: shakespeare"),
    ("train --dataset=TMP", "no text file 'TMP', and no corpus"),
    ("train --dataset=TMP/one.txt", "one.txt has 1 different characters, not 2 to 30,000"),
    ("train --dataset=TMP/many.txt", "many.txt has 30,001 different characters, not 2 to 30,000"),
    ("train --dataset=TMP/text.txt --block_size=8 --train_size=7",
     "has 7 characters to train on, 1,299 to validate; block_size=8 needs 8 and 16"),
    ("train --dataset=TMP/short.txt --block_size=8", "to train on, 10 to validate"),
    ("train --dataset=TMP/binary.txt", "is not text: it has zero bytes"),
    ("train --dataset=shakespeare --data_dir=TMP/cut", "is cut, or another file"),
    ("train --dataset=TMP/text.txt --out=TMP/text.txt/x", "NotADirectoryError"),
    ("train --resume --out=TMP/none", "no checkpoint at TMP/none/ckpt.pt"),
    ("train --resume --out=TMP/run --n_layer=3", "this run has n_layer=1, which cannot become 3"),
    ("train --resume --out=TMP/run --dataset=TMP/changed/text.txt",
     "this run was trained on file text.txt, not on this file text.txt"),
    ("generate --steps=-1", "steps=-1 must be 0 or more"),
    ("generate --out=TMP/none", "no checkpoint at TMP/none: train first, or pass --out=FOLDER"),
    ("generate --out=TMP/cut.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/list.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/pickle.pt", "is damaged, or no checkpoint of ours"),
    ("generate --out=TMP/nan.pt", "has weights that are no numbers: its run diverged"),
    ("generate --out=TMP/less.pt", "does not fit this network: the code was changed since"),
    ("generate --out=TMP/new.pt", "was made by another version"),
    ("generate --out=TMP/shape.pt", "does not fit this network: the code was changed since"),
    ("generate --out=TMP/run --prompt=abcd --length=3",
     "length=3 is shorter than the prompt, which has 4"),
    ("generate --out=TMP/ar --prompt=a{3}b", "cannot use the text after a blank"),
    ("generate --out=TMP/ar --prompt=a{3-5}", "of unknown length needs a masked checkpoint"),
    ("mnist_ddpm --recipe=dppm", "argument --recipe: invalid choice: 'dppm'"),
    ("mnist_ddpm --predict=levels --loss=simple", "predict=levels has loss=ce or elbo"),
    ("mnist_ddpm --loss=ce", "predict=v has loss=simple or elbo or min-snr"),
    ("mnist_ddpm sample --out=TMP/run", "is a masked checkpoint, not mnist"),
    ("embed_diffusion --predict=x0 --loss=ce", "predict=x0 has loss=simple or diffusion-lm"),
    ("embed_diffusion --predict=eps --loss=simple", "logit-normal times need predict=tokens"),
    ("embed_diffusion --table=TMP/text.txt --table_init=small", "table needs table_init=unit"),
]
TINY = ["--max_iters=2", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8",
        "--batch_size=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, runs and checkpoints, good and bad."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "cut").mkdir()
    (tmp / "changed").mkdir()
    many = "".join(map(chr, range(0x4e00, 0x4e00 + 30_001)))
    contents = {"one.txt": b"a" * 999, "many.txt": many.encode(), "short.txt": b"xy" * 50,
                "binary.txt": b"ab\0c" * 999, "text.txt": b"abcd abd acd\n" * 999,
                "changed/text.txt": b"abcd dbc acd\n" * 999,
                "cut/tinyshakespeare.txt": b"First Citizen:\n"}
    for name, content in contents.items():
        (tmp / name).write_bytes(content)
    for objective, out in (("masked", "run"), ("ar", "ar")):
        train.main([*TINY, f"--dataset={tmp}/text.txt", f"--out={tmp}/{out}",
                    f"--objective={objective}"])
    whole = (tmp / "run/best.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[:len(whole) // 2])
    state = torch.load(tmp / "run/best.pt", weights_only=True)
    head = state["ema"]["net.head.weight"]
    variants = {
        "pickle.pt": {"method": Masked()},                 # of a class: never run
        "new.pt": {"config": {**state["config"], "n_experts": 8}},
        "shape.pt": {"config": {**state["config"], "n_embd": 16}},
        "nan.pt": {"ema": {**state["ema"], "net.head.weight": head * float("nan")}},
        "old.pt": {"config": {k: v for k, v in state["config"].items() if k != "train_size"}},
    }
    for name, change in variants.items():
        torch.save({**state, **change}, tmp / name)
    torch.save({k: v for k, v in state.items() if k != "alphabet"}, tmp / "less.pt")
    torch.save([1, 2], tmp / "list.pt")
    return tmp


@pytest.mark.parametrize("typed, says", BAD, ids=[typed for typed, _ in BAD])
def test_bad_input_is_one_line_and_exit_1(typed, says, files, monkeypatch):
    script, *args = typed.replace("TMP", str(files)).split()
    before = {p: p.stat().st_mtime_ns for p in files.rglob("*")}
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.setitem(sys.modules, "__main__", importlib.import_module(script))
    monkeypatch.setattr(train.TrainingStep, "__call__", None)          # what gets so far fails
    with pytest.raises(SystemExit) as e:
        config.run(importlib.import_module(script).main)
    assert says.replace("TMP", str(files)) in last_line(e.value)
    assert before == {p: p.stat().st_mtime_ns for p in files.rglob("*")}


def test_and_so_it_is_from_the_shell(files):
    line, = run("train.py", f"--out={files}/text.txt/x", f"--dataset={files}/text.txt",
                code=1).stderr.splitlines()
    assert line.startswith("NotADirectoryError")


def test_a_setting_that_a_checkpoint_lacks_takes_its_default_and_a_line_says_so(files, capsys):
    _, c, _ = generate.load(files / "old.pt", Masked, train.build, ["masked"])
    assert c.train_size == Masked.train_size
    line, = capsys.readouterr().err.splitlines()           # stdout is for texts
    assert line == (f"{files}/old.pt was made before these settings existed: train_size; their "
                    "defaults are taken")


# -------------------------------------------------------------------------------------------------
# the environment

class Terminal(io.StringIO):
    def isatty(self):
        return True


def config_where(monkeypatch, **env):
    """The names that config.py defines where these variables are set."""
    for name in ("NO_COLOR", "TERM", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "config.py"))


def test_colours_are_for_terminals_that_take_them(monkeypatch):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        c = config_where(monkeypatch, TERM="xterm")
        assert not c["TERMINAL"] and not c["COLOR"]
    monkeypatch.setattr(sys, "stdout", Terminal())
    for env, coloured in [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False),
                          ({"TERM": "dumb"}, False)]:
        c = config_where(monkeypatch, **env)
        assert c["TERMINAL"] and c["COLOR"] == coloured, env


def test_processes_are_numbered_and_an_empty_variable_is_none(monkeypatch):
    for rank, count, expected in [("3", "4", (3, 4)), ("", "", (0, 1))]:
        c = config_where(monkeypatch, RANK=rank, WORLD_SIZE=count)
        assert (c["RANK"], c["WORLD_SIZE"]) == expected


@pytest.mark.parametrize("rank, count", [(1, 1), (2, 1), (1, 2)])
def test_a_process_without_a_gpu_of_its_own_ends_in_a_line(rank, count, monkeypatch):
    """On a machine with `count` GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    env = {"RANK": "2", "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
    if rank < count:
        config_where(monkeypatch, **env)
        assert chosen == [rank]
    else:
        with pytest.raises(SystemExit, match=f"there is no GPU number {rank}$"):
            config_where(monkeypatch, **env)
        assert not chosen

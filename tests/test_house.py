"""The house as the README promises it: who imports whom, three packages, commands and names that exist, files that stay readable."""
import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest

import config
from experiments import readme

ROOT = Path(__file__).parent.parent

ARROWS = {"config": set(), "diffusion": set(), "model": {"config"}, "data": {"config"}, "train": {"config", "model", "diffusion", "data"},
          "generate": {"config", "data", "train"},
          "mnist_ddpm": {"config", "model", "diffusion", "data", "train"},
          "analog_bits": {"config", "model", "diffusion", "data", "train", "generate"},
          "embed_diffusion": {"config", "model", "diffusion", "data", "train", "generate", "tables"},  "tables": set()}
SETTINGS = {"train.py": config.Masked, "generate.py": config.Sample, "mnist_ddpm.py": config.Mnist, "mnist_ddpm.py sample": config.Picture,
            "analog_bits.py": config.Bits, "analog_bits.py sample": config.CodeSampler,
            "embed_diffusion.py": config.Embed, "embed_diffusion.py sample": config.EmbedSampler}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {(n.module if isinstance(n, ast.ImportFrom) else a.name).split(".")[0]
            for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}


def test_arrows_and_three_packages():
    ours = {p.stem: imports(p) for p in ROOT.glob("*.py")}
    assert set(ours) == set(ARROWS), "a new file needs its arrows here"
    for name, found in ours.items():
        assert found & set(ours) <= ARROWS[name], f"{name} may not import {found & set(ours) - ARROWS[name]}"
        assert found - set(ours) - set(sys.stdlib_module_names) <= {"torch", "numpy", "tqdm"}, name


def test_readme_commands_name_real_files_and_settings():
    commands = re.findall(r"(?:python|torchrun[^\n]*?) (\w+\.py(?: sample)?)((?: +--[^\s#`]+(?:\"[^\"]*\")?)*)", README)
    assert len(commands) > 10
    for script, args in commands:
        names = {"help", *(f.name for f in dataclasses.fields(SETTINGS[script])), *["recipe"] * hasattr(SETTINGS[script], "recipes")}
        for name in re.findall(r"--(\w+)", args):
            assert name in names, f"README: {script} --{name}"


def test_readme_names_exist():
    """file.py: name means that file.py defines or mentions name; a path that is named is there."""
    named = re.findall(r"`(\w+)\.py: (\w+(?:\.\w+)?)`", README)
    assert len(named) > 8
    for file, name in named:
        path = next(p for p in (ROOT / f"{file}.py", ROOT / f"evaluation/{file}.py") if p.exists())
        source = path.read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b|^{part}\b|\"{part}\"", source, re.M), f"README: {file}.py: {name}"
    for path in re.findall(r"[(\s`]((?:results|tests|data|docs|evaluation|experiments)/[\w./-]+\w)", README):
        assert (ROOT / path).exists() or path.startswith("data/"), f"README: {path}"


def test_public_functions_have_docstrings():
    for p in ROOT.glob("*.py"):
        tree = ast.parse(p.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), p.name
        for n in tree.body:
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name != "main" and p.name != "config.py":
                assert ast.get_docstring(n), f"{p.name}: {n.name}"


def test_files_stay_readable():
    for p in ROOT.glob("*.py"):
        lines = p.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (500 if p.name == "diffusion.py" else 395) and max(map(len, lines)) <= 150, p.name


def test_every_setting_says_what_it_is():
    for k in [config.Config, config.Sampler, config.Evaluate, *SETTINGS.values()]:
        assert inspect.getdoc(k) and inspect.getsource(k).count("#") > min(3, len(k.__annotations__))


def test_readme_tables_are_what_results_say():
    text, differ = readme.rebuilt(README)
    assert text == README and not differ, "python -m experiments.readme"
    assert set(re.findall(r"<!-- table: (\S+) -->", README)) == set(readme.TABLES)
    changed, differ = readme.rebuilt(README.replace("1.549", "1.449"))
    assert changed == README and differ == ["samples"]


def test_a_row_that_is_gone_is_told():
    with pytest.raises(KeyError, match="no row 'nobody'"):
        readme.found("masked", "nobody", "calls")
    with pytest.raises(KeyError, match="no row"):
        readme.found("masked:9", "results/masked.pt", "calls")
    assert readme.markdown([("a", "b"), ("0.5 ± 0.01", "10.5, x=0.5")]) == "| a | b |\n|---|---:|\n| .5 ± .01 | 10.5, x=0.5 |\n"

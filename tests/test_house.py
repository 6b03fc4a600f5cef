"""The house as design and README promise it: who imports whom, three packages, plain code,
settings, commands and names that exist."""
import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

from evaluation.likelihood import Evaluate
from experiments import readme
from test_config import SCRIPTS, all_settings

TOP = sorted(ROOT.glob("*.py"))
TREE = [*TOP, *sorted(ROOT.glob("evaluation/*.py")), *sorted(ROOT.glob("experiments/*.py"))]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in TREE}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_OLD = {"LOG.md"}      # it keeps the commands and words of its day
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))
        if path.name not in OF_OLD}
PAGES = "\n".join([README, *DOCS.values()])

CORE = {"config", "diffusion", "gaussian", "model", "data", "checkpoint", "step", "train",
        "generate"}
ARROWS = {
    "config": set(), "diffusion": set(), "gaussian": {"diffusion"},
    "model": {"config"}, "data": {"config"}, "checkpoint": {"config"},
    "step": {"config"},
    "train": {"config", "model", "data", "diffusion", "checkpoint", "step"},
    "generate": {"config", "data", "step", "train", "checkpoint"},
    "analog_bits": CORE, "embed_diffusion": CORE, "mnist_ddpm": CORE,
}
REPEATED = {"build", "main", "sample", "SETTINGS", "SAMPLER"}     # every script has its own
SET_FROM_OUTSIDE = {      # rows and counts that data fill, and what torch offers no function for
    "embed_diffusion.py: method.table", "embed_diffusion.py: method.bigrams",
    "step.py: module._compiled_call_impl", "generate.py: method.net",
    "evaluation/bench.py: method.net", "evaluation/bench.py: step.run",
    "step.py: torch.utils.deterministic.fill_uninitialized_memory",
    "experiments/golden.py: config.AMP", "evaluation/bench.py: config.AMP",
    "experiments/sampler_nll.py: config.AMP",
}
UNSAID = {"__init__", "__post_init__", "forward", "main", "sample", "build"}
OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Attribute,
              ast.Subscript)
EVERY_FILE = pytest.mark.parametrize("name", SOURCES)


def nodes(name, *kinds):
    return [n for n in ast.walk(TREES[name]) if isinstance(n, kinds)]


def imports(name):
    found = {n.module.split(".")[0] for n in nodes(name, ast.ImportFrom)}
    return found | {a.name.split(".")[0] for n in nodes(name, ast.Import) for a in n.names}


def code_lines(name):
    """Lines without comments, docstrings and blank ones."""
    lines = SOURCES[name].splitlines()
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for n in nodes(name, ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(n):
            first = n.body[0]
            lines[first.lineno - 1:first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line.rstrip() for line in lines if line.strip()]


# -------------------------------------------------------------------------------------------------
# rooms and arrows

def test_arrows_and_three_packages():
    ours = {path.stem for path in TOP}
    assert ours == set(ARROWS), "a new file needs its arrows here"
    for path in TOP:
        found = imports(path.name)
        assert found & ours <= ARROWS[path.stem], path.stem
        assert not found & {"evaluation", "experiments", "tests"}, path.stem
    for name in SOURCES:
        local = ours | {"evaluation", "experiments"}
        others = imports(name) - local - set(sys.stdlib_module_names)
        assert others <= {"torch", "numpy", "tqdm"}, name
        assert not name.startswith("evaluation/") or "experiments" not in imports(name), name


EVENING = ("model.py", "diffusion.py", "step.py", "train.py")


def evening():
    """Lines of these files above their ruled lines."""
    above = [SOURCES[name].split("\n# ---")[0] for name in EVENING]
    return sum(len(text.splitlines()) for text in above)


def test_the_top_level_is_an_evening():
    assert sum(len(SOURCES[path.name].splitlines()) for path in TOP) <= 3736
    assert evening() <= 915


# -------------------------------------------------------------------------------------------------
# plain code

@EVERY_FILE
def test_a_file_is_read_line_by_line(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 100
    code = code_lines(name)
    assert len(nodes(name, *OPERATIONS)) / len(code) <= 2.9


@EVERY_FILE
def test_no_shortcuts(name):
    """Two statements or assignments on a line, getattr with a default, a ternary among a call's
    arguments, a list times a truth value; an attribute set from outside: only self has some, and a
    Progress, which is nothing else."""
    starts = [n.lineno for n in nodes(name, ast.stmt)]
    assert len(starts) == len(set(starts)), "two statements on a line"
    assigned = [n.target for n in nodes(name, ast.AugAssign, ast.AnnAssign)]
    for n in nodes(name, ast.Assign):
        assert len(n.targets) == 1, n.lineno
        both = isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple)
        assert not both, n.lineno
        assigned.append(n.targets[0])
    for x in assigned:
        if isinstance(x, ast.Attribute):
            what = ast.unparse(x)
            is_own = what.split(".")[0] in ("self", "progress")
            assert is_own or f"{name}: {what}" in SET_FROM_OUTSIDE, what
    for n in nodes(name, ast.Call):
        assert ast.unparse(n.func) != "getattr" or len(n.args) < 3, n.lineno
        values = [*n.args, *(keyword.value for keyword in n.keywords)]
        assert not any(isinstance(value, ast.IfExp) for value in values), n.lineno
    for n in nodes(name, ast.BinOp):
        sides = [n.left, n.right]
        listed = any(isinstance(x, ast.List | ast.Constant | ast.JoinedStr) for x in sides)
        if isinstance(n.op, ast.Mult) and listed:
            assert not any(isinstance(x, ast.Compare | ast.BoolOp) for x in sides), n.lineno
            assert not any(ast.unparse(x).startswith("bool(") for x in sides), n.lineno


@EVERY_FILE
def test_files_and_long_functions_say_what_they_are(name):
    """A file and from 15 lines on a function has a docstring; from 40 lines on, headings."""
    assert ast.get_docstring(TREES[name])
    lines = SOURCES[name].splitlines()
    for n in nodes(name, ast.FunctionDef):
        body = lines[n.lineno:n.end_lineno]
        if len(body) >= 40:
            headings = sum(line.strip().startswith("# ") for line in body)
            assert headings >= len(body) / 40, f"{n.name} has {len(body) + 1} lines"
        if len(body) >= 15 and "/" not in name:
            assert ast.get_docstring(n) or n.name in UNSAID, n.name


def test_lines_are_short_and_lambdas_few():
    """The mean line of code, without its indentation; of the top level, and of all."""
    for names in ([path.name for path in TOP], SOURCES):
        lengths = [len(line.strip()) for name in names for line in code_lines(name)]
        assert sum(lengths) / len(lengths) <= 40
    assert sum(len(nodes(name, ast.Lambda)) for name in SOURCES) <= 12


def test_no_name_is_defined_in_two_files():
    defined = {}
    for name, tree in TREES.items():
        for n in tree.body:
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name not in REPEATED:
                assert n.name not in defined, f"{n.name} is in {name} and {defined[n.name]}"
                defined[n.name] = name


# -------------------------------------------------------------------------------------------------
# settings

def test_settings_are_few_and_every_one_says_what_it_is():
    source = SOURCES["config.py"]
    own = [n for n in nodes("config.py", ast.ClassDef) for n in n.body
           if isinstance(n, ast.AnnAssign)]
    assert len(own) <= 105
    known = {"seed", "max_iters", "eval_interval", "dropout", "block_size", "n_layer", "n_head",
             "n_embd", "warmup_iters", "weight_decay", "learning_rate", "batch_size", "steps",
             "patch", "objective", "optimizer", "train_table"}
    lines = source.splitlines()
    for n in own:
        said = "#" in lines[n.end_lineno - 1].split('"')[-1] + lines[n.lineno - 1].split('"')[-1]
        choice = "Literal" in ast.unparse(n.annotation)
        elsewhere = any(re.search(rf"^    {n.target.id}: .*# ", line) for line in lines)
        assert said or choice or elsewhere or n.target.id in known, n.target.id
    for settings in all_settings():
        head = inspect.getsource(settings).partition("):")[2].splitlines()[0]
        assert head.strip().startswith("#"), settings      # what it is of


# -------------------------------------------------------------------------------------------------
# README and docs

def test_readme_commands_name_real_files_and_settings():
    words = r"([\w./]+)((?: sample)?)((?: +--[^\s#`\"]+(?:\"[^\"]*\")?)*)"
    commands = re.findall(rf"(?:python|torchrun --\S+) ((?:-m )?){words}", PAGES)
    assert len(commands) > 25
    modules = 0
    for module, file, sample, args in commands:
        if module and file in ("pip", "experiments.NAME"):
            continue
        names = {"help", "recipe"}
        if module:
            modules += 1
            path = ROOT / file.strip("`").replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), file
            if file != "evaluation":
                continue
            settings = Evaluate
        else:
            assert (ROOT / file).exists(), file
            settings = SCRIPTS[file + sample]
        names |= {f.name for f in dataclasses.fields(settings)}
        assert set(re.findall(r"--(\w+)", args)) <= names, f"README, docs: {file}{sample}{args}"
    assert modules > 5


def test_readme_names_exist():
    """file.py: name means that file.py defines or mentions name; a path that is named is there."""
    named = re.findall(r"`((?:\w+/)?\w+\.py): (\w+(?:\.\w+)?)`", PAGES)
    assert len(named) > 8
    for file, name in named:
        source = next(SOURCES[key] for key in (file, f"evaluation/{file}") if key in SOURCES)
        for part in name.split("."):
            defined = rf"(def|class) {part}\b|^{part}\b|\"{part}\"|^    {part}: |self\.{part} ="
            assert re.search(defined, source, re.M), f"README, docs: {file}: {name}"
    folders = "results|tests|data|docs|evaluation|experiments"
    for path in re.findall(rf"[(\s`]((?:{folders})/[\w./-]+\w)", PAGES):
        assert (ROOT / path).exists() or path.startswith("data/"), f"README, docs: {path}"


def test_links_and_pictures_are_there():
    for folder, pages in [(ROOT, [README]), (ROOT / "docs", DOCS.values())]:
        for page in pages:
            links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", page)
            for link in (link for pair in links for link in pair if link):
                assert link.startswith("http") or (folder / link).exists(), link
    for name in DOCS:
        assert f"(docs/{name})" in README, name


def test_readme_is_short_and_says_how_much_there_is_to_read():
    assert 9_000 <= len(README.encode()) <= 11_264
    assert not re.search(r"±(?!1)|\btwins?\b|\bjudge[sd]?\b", README.replace("judge.pt", ""))
    assert not re.search(r"(?<![\d.,=\w/])\.\d", PAGES), "numbers have their zero"
    said = int(re.search(r"Some (\d+) lines", README)[1])
    assert abs(evening() - said) <= 10


def test_tables_are_what_results_say():
    differ = [name for path in readme.PAGES
              for name in readme.rebuilt(path.read_text(encoding="utf-8"))[1]]
    assert not differ, "python -m experiments.readme"
    assert sorted(re.findall(r"(?m)^<!-- table: (\S+) -->$", PAGES)) == sorted(readme.TABLES)
    assert re.findall(r"<!-- table: (\S+) -->", README) == ["four"]
    changed, differ = readme.rebuilt(DOCS["masked.md"].replace("1.466", "1.446"))
    assert changed == DOCS["masked.md"] and differ == ["samples"]
    for part, row in (("masked", "nobody"), ("masked:9", "results/masked.pt")):
        with pytest.raises(KeyError, match="no row"):
            readme.found(part, row, "calls")


def test_no_path_of_a_machine_in_any_file():
    machine = ["/" + "tmp/", str(Path.home()) + "/", str(ROOT)]
    homes = ["/" + "home/", "/" + "Users/"]
    shown = [*TREE, *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md"),
             *ROOT.glob("experiments/*.sh"), ROOT / "README.md"]
    for path in [*shown, *ROOT.glob("tests/*.py")]:
        text = path.read_text(encoding="utf-8")
        found = [words for words in machine if words in text]
        if path in shown:
            found += [words for words in homes if words in text]
        assert not found, path

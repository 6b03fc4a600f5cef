"""Which small changes do the tests notice? In a copy of the repository, whose files are changed and
restored; two hours on one core:    python tests/mutate.py SEED FIRST END    (for example 0 0 80)"""
import ast
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("e*/*.py"))]
TESTS = {"diffusion": "samplers", "gaussian": "tokens", "analog_bits": "bits", "report": "page",
         "embed_diffusion": "embed control tables", "generate": "blanks scripts",
         "table": "tables", "mnist_ddpm": "mnist data", "__main__": "report metrics",
         "samples": "metrics", "samplers": "metrics", "digits": "metrics", "readme": "house",
         "checkpoint": "callers", "train": "callers", "config": "callers mnist",
         "evaluation": "evaluate evaluation_command", "experiments": "experiments"}
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
         ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, "min": "max", "max": "min",
         "amin": "amax", "amax": "amin", "minimum": "maximum", "maximum": "minimum"}


def changes(node):
    """(kind, what may stand in the place of a node) ..."""
    one = ast.Constant(1)
    match node:
        case ast.BinOp(a, op, b) if type(op) in OTHER:
            yield "sign", ast.BinOp(a, OTHER[type(op)](), b)
        case ast.UnaryOp(ast.USub(), a):
            yield "sign", a
        case ast.Compare(a, [op], b) if type(op) in OTHER:
            yield "comparison", ast.Compare(a, [OTHER[type(op)]()], b)
        case ast.Constant(x) if type(x) in (int, float):
            yield "constant", ast.Constant(x + 1 if isinstance(x, int) else 2 * x or 1.0)
        case ast.Slice(low, high, step) if high:
            yield "index", ast.Slice(low, ast.BinOp(high, ast.Add(), one), step)
        case ast.Subscript(x, ast.Constant(int()) | ast.UnaryOp(ast.USub()) | ast.BinOp() as i):
            yield "index", ast.Subscript(x, ast.BinOp(i, ast.Add(), one))
        case ast.Call(f, [*first, a, b], named) if ast.unparse(a) != ast.unparse(b):
            yield "argument order", ast.Call(f, [*first, b, a], named)
        case ast.Name(name) if name in OTHER:
            yield "min for max", ast.Name(OTHER[name])
        case ast.Attribute(x, name) if name in OTHER:
            yield "min for max", ast.Attribute(x, OTHER[name])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        yield "dropped term", node.left


def draw(rng):
    """A file in proportion to its lines, a kind of change, a place. -> file, what, new source"""
    path = rng.choices(FILES, [path.read_text().count("\n") for path in FILES])[0]
    tree = ast.parse(path.read_text())
    found = [(kind, node, new) for node in ast.walk(tree) for kind, new in changes(node)]
    kind = rng.choice(sorted({kind for kind, _, _ in found}))
    _, old, new = rng.choice([change for change in found if change[0] == kind])
    what = f"{path.relative_to(ROOT)}:{old.lineno}: {ast.unparse(old)} -> {ast.unparse(new)}"
    put = ast.NodeTransformer()
    put.visit = lambda node: new if node is old else put.generic_visit(node)
    return path, what, ast.unparse(put.visit(tree))


seed, first, end = map(int, sys.argv[1:])
rng = random.Random(seed)
drawn = {}
while len(drawn) < end:
    path, what, source = draw(rng)
    drawn[what] = path, source
n_noticed = 0
for what, (path, source) in [*drawn.items()][first:]:
    names = f"{path.stem} gaps {TESTS.get(path.stem)} {TESTS.get(path.parent.name, 'golden')}"
    tests = [test for name in names.split() for test in ROOT.glob(f"tests/test_{name}.py")]
    original = path.read_bytes()
    try:     # unparsed source has no comments, which test_house counts
        path.write_text(source)
        pytest = ["timeout", "3600", "pytest", "-x", "-q", "-n0", "-k", "not test_house or tables"]
        code = subprocess.run([*pytest, *tests], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    finally:
        path.write_bytes(original)
    n_noticed += code != 0
    print(what, "|", {0: "SURVIVED", 124: "out of time"}.get(code, "noticed"), flush=True)
print(f"{n_noticed} of {end - first} are noticed")

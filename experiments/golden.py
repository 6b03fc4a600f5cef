"""Golden digits: do losses, bounds, texts and pictures still come out as they were recorded?

    python -m experiments.golden                    # compare with tests/golden.json: 15 seconds
    python -m experiments.golden --record=bits.     # record anew the cases of this beginning
    python -m experiments.golden --record           # all of them; what changed is printed

The cases, with the arguments of each, are in tests/golden_cases.json: networks that train for 20
steps and then write or draw, and what generate.py writes with the checkpoints in results/. fp32 on
a CPU, one thread. Texts and pictures are seeded integers, so no corpus is needed.
"""
import contextlib
import copy
import io
import json
import shlex
import sys
from dataclasses import replace

import torch

import config

config.AMP = torch.float32
torch.set_num_threads(1)

import analog_bits  # noqa: E402
import embed_diffusion  # noqa: E402
import generate  # noqa: E402
import mnist_ddpm  # noqa: E402
import train  # noqa: E402
from data import CharTokenizer  # noqa: E402
from step import TrainingStep  # noqa: E402

PATH = config.HERE / "tests/golden.json"
CASES = json.loads((config.HERE / "tests/golden_cases.json").read_text(encoding="utf-8"))
SCRIPTS = {"masked": train, "ar": train, "bits": analog_bits, "embed": embed_diffusion,
           "mnist": mnist_ddpm}
RECIPES = {"embed": embed_diffusion.RECIPES, "mnist": config.MNIST_RECIPES}
# Muon computes in bf16, which every kind of CPU rounds in its own way: one case has it
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, warmup_iters=2,
            max_iters=20, compile=False, optimizer="adamw", learning_rate=6e-3,
            weight_decay=0.1)


class Walk:
    """A text of seeded integers: each is 1 to 3 more than the last, modulo the alphabet's size."""
    T = 32

    def __init__(self):
        chars = "\n abcdefghijklmnopqrst"
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 4, (3000,), generator=g).cumsum(0) % len(chars)
        self.train = ids[:2000].to(torch.uint8)
        self.val = ids[2000:2000 + 16 * self.T].view(16, self.T)
        self.tokenizer = CharTokenizer(chars)
        self.meta = {"alphabet": chars}

    def batch(self, n):
        start = torch.randint(len(self.train) - self.T + 1, (n, 1))
        return self.train[start + torch.arange(self.T)].long()


class Blots:
    """Pictures of seeded integers: a bright square somewhere on a dark page, noise on both."""
    meta = {"alphabet": ""}

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 60, (48, 28, 28), generator=g)
        places = torch.randint(0, 16, (48, 2), generator=g)
        for image, (row, column) in zip(images, places, strict=True):
            image[row:row + 12, column:column + 12] += 180
        self.train = images[:32].flatten(1)
        self.val = images[32:40].flatten(1)

    def batch(self, n):
        i = torch.randint(len(self.train), (n,))
        hidden = torch.rand(n, 1)[:, 0] < 0.1
        return self.train[i], (i % 10).masked_fill(hidden, -1)


WALK = Walk()
BLOTS = Blots()


def train_case(name):
    """The network `name` after training, and its losses and bound. What begins at zero is drawn, so
    that every weight matters from the first step on."""
    kind = name.split(".")[0]
    script = SCRIPTS[kind]
    data = BLOTS if kind == "mnist" else WALK
    typed = config.parse(CASES["networks"][name].split(), script.SETTINGS, RECIPES.get(kind))
    tiny = TINY
    if script is train:
        tiny = TINY | {"schedule": "linear"}
    elif kind in ("bits", "embed"):
        tiny = TINY | {"stagger": 3.0, "times": "uniform"}
    c = script.SETTINGS(**tiny | typed)
    train.reseed(c.seed)
    method = script.build(c, data.meta)
    if name == "embed.fluency":
        embed_diffusion.count_bigrams(method, data)
    if name == "embed.table":                    # which lacks c and the new line, and says so
        with contextlib.redirect_stdout(io.StringIO()):
            embed_diffusion.load_table(method, data, c)
    for p in method.train().parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)

    train_step = TrainingStep(method, copy.deepcopy(method).requires_grad_(False), data, c)
    losses = []
    for step in range(c.max_iters):
        loss, _ = train_step(step)
        losses.append(loss.item())
    levels = 2 if kind == "mnist" else 4
    bound = train.evaluate(method.eval(), data.val, levels)["bound"]
    return method, {"losses": losses, "bound": bound}


def sample_case(kind, method, args):
    """The texts that a Gaussian model of WALK writes, or the mean grey of the patches it draws."""
    sampler = SCRIPTS[kind].SAMPLER
    steps = 8 if kind == "mnist" else 16
    s = sampler(steps=steps, **config.parse(args.split(), sampler))
    if kind == "mnist":
        *_, (x, _) = mnist_ddpm.sample_images(method, torch.tensor([0, 7, -1]), s)
        return x.view(3, 7, 4, 7, 4).mean((2, 4)).flatten().tolist()

    pieces = generate.parse_prompt(s.prompt, WALK.tokenizer)
    ids, known = generate.lay_out(pieces, s.length, WALK.T, method.mask_id)
    frames = generate.write(method, ids, known, WALK.T, s)
    if isinstance(s, config.EmbedSampler):
        how = replace(s, mode="diffusion")       # else results/judge.pt would be read
        allowed, ar = embed_diffusion.control(method, WALK.tokenizer, how, len(ids), WALK.T)
        if s.mode == "guided":
            ar = train_case("ar")[0].logits
        frames = embed_diffusion.write_controlled(method, ids, known, WALK.T, s, allowed, ar)
    train.reseed(s.seed)
    *_, (x, _) = frames
    return [WALK.tokenizer.decode(row) for row in x.tolist()]


def print_case(*args):
    """What generate.py prints: the text, and the lengths of blanks."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        generate.main(list(args))
    return [out.getvalue(), *(line for line in err.getvalue().splitlines() if line[0] == "{")]


def cases():
    """(name, value) of every case."""
    samplers = {
        "bits": {"ancestral": ""}, "embed": {"ancestral": ""}, "mnist": CASES["images"],
        "bits.softmax": CASES["codes"], "embed.best": CASES["codes"] | CASES["control"]}
    for name in CASES["networks"]:
        method, losses = train_case(name)
        yield name, losses
        kind = name.split(".")[0]
        for how, args in samplers.get(name, samplers.get(kind, {})).items():
            yield f"{name}.{how}", sample_case(kind, method, args)
    for name, args in CASES["shipped"].items():
        out = f"--out={config.HERE}/results/{name.split('.')[0]}.pt"
        yield f"shipped.{name}", print_case(out, "--steps=16", *shlex.split(args))


def difference(old, new):
    """How far a case is from what is recorded: the largest relative difference of losses and bound,
    the largest difference of pixels; 1 where a text differs, or one of the two is None."""
    if None in (old, new) or isinstance(old, list) and isinstance(old[0], str):
        return float(old != new)
    if isinstance(old, dict):
        old = torch.tensor([*old["losses"], old["bound"]], dtype=torch.float64)
        new = torch.tensor([*new["losses"], new["bound"]], dtype=torch.float64)
        return ((new - old) / old).abs().max().item()
    return (torch.tensor(new) - torch.tensor(old)).abs().max().item()


def tolerance(name):
    if name == "masked.muon":
        return 1e-3
    if name.startswith("mnist.") and name not in ("mnist.v", "mnist.ddpm"):
        return 1e-4                # pictures, and 256 levels a pixel
    return 1e-5


def main(argv):
    beginnings = [arg.partition("=")[2] for arg in argv if arg.startswith("--record")]
    golden = json.loads(PATH.read_text(encoding="utf-8"))
    values = dict(cases())
    differ = []
    for name in golden | values:
        d = difference(golden.get(name), values.get(name))
        if not d <= tolerance(name):             # nor if a loss is no number
            print(f"{name}: differs by {d:.1e}")
            differ.append(name)
    if beginnings:
        chosen = {name: values.get(name) for name in differ if name.startswith(beginnings[0])}
        golden = {name: value for name, value in (golden | chosen).items() if value}
        PATH.write_text(json.dumps(golden, indent=0, ensure_ascii=False) + "\n")
        print(f"recorded in {PATH}")
    elif differ:
        raise SystemExit(f"{len(differ)} of {len(golden)} cases differ")
    else:
        print(f"all {len(golden)} cases are as recorded")


if __name__ == "__main__":
    main(sys.argv[1:])

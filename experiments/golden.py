"""Golden digits: do losses, bounds, texts and pictures still come out as they were recorded?

    python -m experiments.golden                    # compare with tests/golden.json: 15 seconds
    python -m experiments.golden --record=bits.     # record anew the cases of this beginning
    python -m experiments.golden --record           # all of them; what changed is printed

fp32 on a CPU, one thread. Networks are tiny and texts are seeded integers, so no corpus is needed;
results/masked.pt and results/judge.pt write as they ship.
"""
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import config

config.AMP = torch.float32
torch.set_num_threads(1)

import analog_bits  # noqa: E402
import embed_diffusion  # noqa: E402
import generate  # noqa: E402
import mnist_ddpm  # noqa: E402
import train  # noqa: E402
from config import (  # noqa: E402
    EMBED_RECIPES, HERE, MNIST_RECIPES, Bits, CodeSampler, Embed, EmbedSampler, ImageSampler,
    Masked, Mnist)
from data import CharTokenizer  # noqa: E402

PATH = HERE / "tests/golden.json"
CHARS = "\n abcdefghijklmnopqrst"
# Muon computes in bf16, which every kind of CPU rounds in its own way: one case has it
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, warmup_iters=2,
            max_iters=20, compile=False, optimizer="adamw")


class Walk:
    """A text of seeded integers: each is 1 to 3 more than the last, modulo the alphabet's size."""
    unit = "char"
    T = 32

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 4, (3000,), generator=g).cumsum(0) % len(CHARS)
        ids = ids.to(torch.uint8)
        self.train = ids[:2000]
        self.val = ids[2000:2000 + 16 * self.T].view(16, self.T)
        self.tokenizer = CharTokenizer(CHARS)
        self.meta = {"alphabet": CHARS, "is_bytes": False,
                     "data": {"name": "walk", "sha256": ""}}

    def batch(self, n):
        start = torch.randint(len(self.train) - self.T + 1, (n, 1))
        return self.train[start + torch.arange(self.T)].long()


class Blots:
    """Pictures of seeded integers: a bright square somewhere on a dark page, noise on both."""
    unit = "pixel"
    T = 784

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 60, (48, 28, 28), generator=g)
        places = torch.randint(0, 16, (48, 2), generator=g).tolist()
        for image, (row, column) in zip(images, places, strict=True):
            image[row:row + 12, column:column + 12] += 180
        images = images.flatten(1).to(torch.uint8)
        self.train = images[:32]
        self.val = images[32:40]
        self.labels = torch.arange(32) % 10
        self.meta = {"alphabet": "", "data": {"name": "blots", "sha256": ""}}

    def batch(self, n):
        i = torch.randint(len(self.train), (n,))
        hidden = torch.rand(n, 1)[:, 0] < 0.1
        return self.train[i].long(), self.labels[i].masked_fill(hidden, -1)


def train_tiny(method, data, c, levels=4):
    """The losses of c.max_iters steps and the bound after them; the method can then sample. What
    begins at zero is drawn, so that every weight matters from the first step on."""
    method.train()
    for p in method.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    opts = train.build_optimizers(method, c)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for step in range(c.max_iters):
        loss, _ = train.train_step(method, data, c, step, opts, scaler, False)
        losses.append(loss.item())
    method.eval()
    return {"losses": losses, "bound": train.evaluate(method, data.val, levels)["bound"]}


MASKED = {
    "masked.linear.pooled": {},
    "masked.linear.elbo": dict(loss="elbo"),
    "masked.square.pooled": dict(schedule="square"),
    "masked.square.elbo": dict(schedule="square", loss="elbo"),
    "masked.cosine.pooled": dict(schedule="cosine"),
    "masked.cosine.elbo": dict(schedule="cosine", loss="elbo"),
    "masked.time": dict(time=True),
    "masked.accum.dropout": dict(grad_accum=2, dropout=0.1),
    "masked.muon": dict(optimizer="muon"),
    "ar": dict(objective="ar"),
    "ar.time": dict(objective="ar", time=True),
}


def masked_model(change):
    """-> a tiny masked or autoregressive model, and its losses and bound."""
    data = Walk()
    c = Masked(**TINY | change)
    train.reseed(c.seed)
    method = train.build(c, data.meta)
    return method, train_tiny(method, data, c)


def masked_cases():
    for name, change in MASKED.items():
        yield name, masked_model(change)[1]


def written(method, data, s, sample=None):
    """The texts that generate.write ends with."""
    pieces = generate.parse_prompt(s.prompt, data.tokenizer)
    ids, known = generate.lay_out(pieces, s.length, data.T, method.mask_id)
    train.reseed(s.seed)
    if isinstance(s, EmbedSampler):
        allowed, _ = embed_diffusion.control(method, data.tokenizer, replace(s, mode="diffusion"),
                                             len(ids), data.T)
        ar = None
        if s.mode == "guided":
            ar = masked_model(MASKED["ar"])[0].logits
            train.reseed(s.seed)
        frames = embed_diffusion.write_controlled(method, ids, known, data.T, s, allowed, ar)
    else:
        frames = generate.write(method, ids, known, data.T, s)
    *_, (x, _) = frames
    return [data.tokenizer.decode(row) for row in x.tolist()]


CODES = {
    "ddim": dict(sampler="ddim"),
    "ancestral": {},
    "td": dict(sampler="ddim", td=1.0),
    "two_pass": dict(two_pass=True),
    "prompt": dict(prompt="abc{20}de"),
    "long": dict(length=80, prompt="abc"),
}
CONTROL = {
    "steer.no": dict(steer="no:e"),
    "steer.line": dict(steer="line:9"),
    "steer.at": dict(steer="at:5=t"),
    "blocks": dict(mode="blocks", block=8),
    "guided": dict(mode="guided"),
    "guided.steered": dict(mode="guided", steer="no:a"),
    "clamp": dict(rounding="clamp"),
}


def bits_cases():
    data = Walk()
    for head, samplers in ("softmax", CODES), ("bits", {"ancestral": {}}):
        c = Bits(**TINY, head=head)
        train.reseed(c.seed)
        method = analog_bits.build(c, data.meta)
        yield f"bits.{head}", train_tiny(method, data, c)
        for name, change in samplers.items():
            s = CodeSampler(**dict(steps=16) | change)
            yield f"bits.{head}.{name}", written(method, data, s)


EMBED = {
    "best": {},
    "baseline": EMBED_RECIPES["baseline"],
    "x0": EMBED_RECIPES["x0"],
    "diffusion-lm": EMBED_RECIPES["diffusion-lm"],
    "fluency": dict(fluency=0.3),
    "table": dict(table="file"),
    "elbo": dict(loss="elbo"),
    "frozen": dict(train_table=False),
}


def write_tiny_table(folder):
    """A table of embeddings as text, of seeded integers, without the letter c and the new line."""
    g = torch.Generator().manual_seed(1)
    path = Path(folder) / "table.txt"
    with path.open("w", encoding="utf-8") as f:
        for ch in CHARS.replace("c", "").replace("\n", ""):
            numbers = torch.randint(-9, 10, (24,), generator=g).tolist()
            print(ch.replace(" ", "\u2581"), *numbers, file=f)
    return str(path)


def embed_model(change, data):
    with tempfile.TemporaryDirectory() as folder:
        if "table" in change:
            change = dict(table=write_tiny_table(folder))
        c = Embed(**TINY | change)
        train.reseed(c.seed)
        method = embed_diffusion.build(c, data.meta)
        if c.fluency:
            embed_diffusion.count_bigrams(method, data)
        if c.table:
            with contextlib.redirect_stdout(io.StringIO()):
                embed_diffusion.load_table(method, data, c)
    return method, train_tiny(method, data, c)


def embed_cases():
    data = Walk()
    for arm, change in EMBED.items():
        method, losses = embed_model(change, data)
        yield f"embed.{arm}", losses
        samplers = {"ancestral": {}}
        if arm == "best":
            samplers = samplers | CODES | CONTROL
        for name, how in samplers.items():
            s = EmbedSampler(**dict(steps=16) | how)
            yield f"embed.{arm}.{name}", written(method, data, s)


IMAGES = {
    "guided": {},
    "ancestral": dict(sampler="ancestral", guidance=1.0),
    "td": dict(td=1.0, guidance=0.0),
}


def mnist_cases():
    data = Blots()
    for arm, recipe in ("v", "best"), ("ddpm", "ddpm"), ("levels", "levels"):
        c = Mnist(**TINY | dict(batch_size=4) | MNIST_RECIPES[recipe])
        train.reseed(c.seed)
        method = mnist_ddpm.build(c, data.meta)
        yield f"mnist.{arm}", train_tiny(method, data, c, levels=2)
        for name, how in IMAGES.items():
            s = ImageSampler(**dict(steps=8) | how)
            labels = torch.tensor([0, 7, -1])
            *_, (x, _) = mnist_ddpm.sample_images(method, labels, s)
            patches = x.view(3, 7, 4, 7, 4).mean((2, 4))
            yield f"mnist.{arm}.{name}", patches.flatten().tolist()


def typed(*args):
    """What generate.py prints: the text, and the lengths of blanks."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        generate.main(list(args))
    return [out.getvalue(), *(line for line in err.getvalue().splitlines() if line[0] == "{")]


SHIPPED = {
    "masked.default": [],
    "masked.order.random": ["--order=random"],
    "masked.order.confidence": ["--order=confidence"],
    "masked.order.entropy": ["--order=entropy"],
    "masked.counts.documents": ["--counts=documents"],
    "masked.counts.cosine": ["--counts=cosine"],
    "masked.counts.entropy": ["--counts=entropy"],
    "masked.temperature.0": ["--temperature=0"],
    "masked.temperature.0.5": ["--temperature=0.5"],
    "masked.temperature.1": ["--temperature=1"],
    "masked.top_k": ["--top_k=3"],
    "masked.remask.0": ["--remask=0"],
    "masked.remask.0.2": ["--remask=0.2"],
    "masked.min_distance.0": ["--min_distance=0", "--order=entropy"],
    "masked.exact": ["--order=random", "--temperature=1", "--remask=0", "--min_distance=0"],
    "masked.prompt": ["--prompt=ROMEO:"],
    "masked.blank": ["--prompt=To be, {12} that is the {8}:"],
    "masked.length": ["--prompt=ROMEO:{4-7}JULIET:"],
    "masked.nothing follows": ["--prompt=O {3-30}"],
    "masked.short": ["--length=40"],
    "masked.long": ["--length=200", "--prompt=KING"],
    "masked.two": ["--n=2"],
    "judge.default": [],
    "judge.prompt": ["--prompt=ROMEO:", "--n=2", "--top_k=4"],
    "judge.greedy": ["--temperature=0", "--prompt=First {5}"],
    "judge.long": ["--length=150"],
}


def shipped_cases():
    for name, args in SHIPPED.items():
        checkpoint = name.partition(".")[0]
        out = f"--out={HERE / 'results' / checkpoint}.pt"
        yield f"shipped.{name}", typed(out, "--steps=16", *args)


def cases():
    """(name, value) of every case."""
    yield from masked_cases()
    yield from bits_cases()
    yield from embed_cases()
    yield from mnist_cases()
    yield from shipped_cases()


def difference(old, new):
    """How far a case is from what is recorded: the largest relative difference of losses and bound,
    the largest difference of pixels; 1 where a text differs."""
    if isinstance(new, dict):
        old = [*old["losses"], old["bound"]]
        new = [*new["losses"], new["bound"]]
        return max(abs(a - b) / abs(a) for a, b in zip(old, new, strict=True))
    if isinstance(new[0], str):
        return float(old != new)
    return max(abs(a - b) for a, b in zip(old, new, strict=True))


def tolerance(name):
    if "muon" in name:
        return 1e-3
    is_picture = name.startswith("mnist.") and name.count(".") == 2
    if is_picture or name == "mnist.levels":
        return 1e-4
    return 1e-5


def main(argv):
    recording = [arg.partition("=")[2] for arg in argv if arg.startswith("--record")]
    golden = json.loads(PATH.read_text()) if PATH.exists() else {}
    n_wrong = 0
    for name, value in cases():
        if name in golden:
            d = difference(golden[name], value)
            if d <= tolerance(name):
                continue
            print(f"{name}: differs by {d:.1e}")
        else:
            print(f"{name}: new")
        n_wrong += 1
        if recording and name.startswith(recording[0]):
            golden[name] = value
    if recording:
        PATH.write_text(json.dumps(golden, indent=0, ensure_ascii=False) + "\n")
        print(f"recorded in {PATH}")
        return
    if n_wrong:
        raise SystemExit(f"{n_wrong} of {len(golden)} cases differ")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Golden digits: do losses, bounds, texts and pictures still come out as they were recorded?

    python -m experiments.golden                        # compare with tests/golden.json, half a minute
    python -m experiments.golden --record=bits.td       # record anew the cases of this beginning
    python -m experiments.golden --record               # all of them; what changed is printed

fp32 on a CPU, one thread. Networks are tiny, texts are seeded integers, so no corpus is needed; results/masked.pt
and results/judge.pt write as they ship.
"""
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import config

config.AMP = torch.float32
torch.set_num_threads(1)

import analog_bits  # noqa: E402
import embed_diffusion  # noqa: E402
import generate  # noqa: E402
import mnist_ddpm  # noqa: E402
import train  # noqa: E402
from config import EMBED, HERE, RECIPES, Bits, CodeSampler, Embed, EmbedSampler, Masked, Mnist, Picture  # noqa: E402
from data import Alphabet, patches  # noqa: E402

PATH = HERE / "tests/golden.json"
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, warmup_iters=2, max_iters=20, compile=False,
            optimizer="adamw")   # Muon computes in bf16, which every kind of CPU rounds in its own way
CHARS = "".join(map(chr, range(97, 117))) + "\n "   # 22 different


class Walk:
    """A text of seeded integers: each is 1 to 3 more than the last, modulo the size of the alphabet."""
    unit = "char"

    def __init__(self, T=32):
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 4, (3000,), generator=g).cumsum(0) % len(CHARS)
        self.T, self.train, self.val = T, ids[:2000].to(torch.uint8), ids[2000:2000 + 16 * T].view(16, T).to(torch.uint8)
        self.alphabet = Alphabet("".join(sorted(CHARS)))
        self.meta = {"alphabet": self.alphabet.chars, "data": {"name": "walk", "sha256": ""}}

    def batch(self, n):
        start = torch.randint(len(self.train) - self.T + 1, (n, 1))
        return self.train[start + torch.arange(self.T)].long()


class Blots:
    """Pictures of seeded integers: a bright square somewhere on a dark page, noise on both."""
    unit = "pixel"

    def __init__(self, patch=4):
        g = torch.Generator().manual_seed(0)
        images = torch.randint(0, 60, (48, 28, 28), generator=g)
        for image, place in zip(images, torch.randint(0, 16, (48, 2), generator=g).tolist()):
            image[place[0]:place[0] + 12, place[1]:place[1] + 12] += 180
        self.train, self.labels = patches(images[:32].to(torch.uint8), patch), torch.arange(32) % 10
        self.val = patches(images[32:40].to(torch.uint8), patch)
        self.meta = {"alphabet": "", "data": {"name": "blots", "sha256": ""}}

    def batch(self, n):
        i = torch.randint(len(self.train), (n,))
        return self.train[i].long(), self.labels[i]


def trained(method, data, c, levels=4):
    """The losses of c.max_iters steps and the bound after them; the method is then ready to sample. Weights that begin at zero are
    drawn, so that from the first step on all of them matter."""
    method.train()
    for p in method.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    opts, scaler, stop = train.optimizers(method, c), torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(asked=False)
    losses = [train.train_step(method, data, c, step, opts, scaler, stop)[0].item() for step in range(c.max_iters)]
    method.eval()
    return {"losses": losses, "bound": train.evaluate(method, data.val, levels)["bound"]}


def masked_cases():
    for name, change in (("masked.linear.pooled", {}), ("masked.linear.elbo", dict(weight="elbo")),
                         ("masked.square.pooled", dict(schedule="square")), ("masked.square.elbo", dict(schedule="square", weight="elbo")),
                         ("masked.cosine.pooled", dict(schedule="cosine")), ("masked.cosine.elbo", dict(schedule="cosine", weight="elbo")),
                         ("masked.time", dict(time=True)), ("masked.accum.dropout", dict(grad_accum=2, dropout=.1)),
                         ("masked.muon", dict(optimizer="muon")),
                         ("ar", dict(objective="ar")), ("ar.time", dict(objective="ar", time=True))):
        def case(change=change):
            data, c = Walk(), Masked(**TINY | change)
            train.reseed(c.seed)
            return trained(train.build(c, data.meta), data, c)
        yield name, case


def written(method, alphabet, T, how):
    """The text that generate.write ends with."""
    ids, known = generate.plan(alphabet, how, T)
    train.reseed(how.seed)
    *_, (x, _) = generate.write(method, ids, known, T, how)
    return [alphabet.decode(i) for i in x.tolist()]


BITS = {"ddim": dict(sampler="ddim"), "ancestral": {}, "td": dict(sampler="ddim", td=1.0), "two_pass": dict(twice=True),
        "prompt": dict(prompt="abc{20}de"), "long": dict(length=80, prompt="abc")}
STEERED = {"steer.no": dict(steer="no:e"), "steer.line": dict(steer="line:9"), "steer.at": dict(steer="at:5=t"),
           "blocks": dict(mode="blocks", block=8),
           "guided": dict(mode="guided"), "guided.steered": dict(mode="guided", steer="no:a"), "clamp": dict(rounding="clamp")}


def bits_cases():
    for head, sampled in ("softmax", BITS), ("bits", {"ancestral": {}}):
        def case(head=head):
            data, c = Walk(), Bits(**TINY, head=head)
            train.reseed(c.seed)
            method = analog_bits.build(c, data.meta)
            return trained(method, data, c), method, data
        made = []
        def losses(case=case, made=made):
            result, *rest = case()
            made[:] = rest
            return result
        yield f"bits.{head}", losses
        for name, change in sampled.items():
            def text(change=change, made=made):
                method, data = made
                return written(method, data.alphabet, 32, CodeSampler(**dict(steps=16) | change))
            yield f"bits.{head}.{name}", text


def table_file(folder):
    """A table of embeddings as text, of seeded integers, without the letter c."""
    g = torch.Generator().manual_seed(1)
    path = Path(folder) / "table.txt"
    rows = [(ch, torch.randint(-9, 10, (24,), generator=g).tolist()) for ch in sorted(CHARS.replace("c", "").replace("\n", ""))]
    path.write_text("".join(f"{ch} {' '.join(map(str, row))}\n" for ch, row in rows))
    return str(path)


def embed_cases():
    arms = {"best": {}, "baseline": EMBED["baseline"], "x0": EMBED["x0"], "diffusion-lm": EMBED["diffusion-lm"], "fluency": dict(fluency=.3),
            "table": dict(table="file"), "elbo": dict(weight="elbo"), "frozen": dict(learned=False)}
    for arm, change in arms.items():
        made = []
        def losses(change=change, made=made):
            data = Walk()
            with tempfile.TemporaryDirectory() as folder:
                if change.get("table"):
                    change = dict(table=table_file(folder))
                c = Embed(**TINY | change)
                train.reseed(c.seed)
                method = embed_diffusion.build(c, data.meta)
                with contextlib.redirect_stdout(io.StringIO()):
                    embed_diffusion.begin(method, data, c)
            made[:] = method, data
            return trained(method, data, c)
        yield f"embed.{arm}", losses
        for name, how in {"ancestral": {}, **(BITS | STEERED if arm == "best" else {})}.items():
            def text(how=how, made=made):
                method, data = made
                s = EmbedSampler(**dict(steps=16) | how)
                embed_diffusion.prepare(method, data.alphabet, replace(s, mode="diffusion") if s.mode == "guided" else s, 32)
                if s.mode == "guided":
                    method.twin = guide().logits
                return written(method, data.alphabet, 32, s)
            yield f"embed.{arm}.{name}", text


def guide():
    """A tiny autoregressive model of the walk."""
    data, c = Walk(), Masked(**TINY, objective="ar")
    train.reseed(c.seed)
    method = train.build(c, data.meta)
    trained(method, data, c)
    return method


def mnist_cases():
    for arm, change in ("v", RECIPES["best"]), ("ddpm", RECIPES["ddpm"]), ("levels", RECIPES["levels"]):
        made = []
        def losses(change=change, made=made):
            data, c = Blots(), Mnist(**TINY | dict(batch_size=4) | change)
            train.reseed(c.seed)
            method = mnist_ddpm.build(c, data.meta)
            made[:] = method, c
            return trained(method, data, c, 2)
        yield f"mnist.{arm}", losses
        for name, how in ("guided", {}), ("ancestral", dict(sampler="ancestral", guidance=1.0)), ("td", dict(td=1.0, guidance=0.0)):
            def picture(how=how, made=made):
                method, c = made
                *_, (x, _) = mnist_ddpm.draw(method, torch.tensor([0, 7, -1]), c, Picture(**dict(steps=8) | how))
                return x.view(3, 7, 4, 7, 4).mean((2, 4)).flatten().tolist()    # of patches
            yield f"mnist.{arm}.{name}", picture


def typed(*args):
    """What generate.py prints: the text, and the lengths of blanks."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        generate.main(list(args))
    return [out.getvalue(), *(line for line in err.getvalue().splitlines() if line.startswith("{"))]


def shipped_cases():
    masked = f"--out={HERE / 'results/masked.pt'}"
    ways = {"default": [], **{f"order.{o}": [f"--order={o}"] for o in ("random", "confidence", "entropy")},
            **{f"counts.{n}": [f"--counts={n}"] for n in ("documents", "cosine", "entropy")},
            **{f"temperature.{t}": [f"--temperature={t}"] for t in ("0", "0.5", "1")}, "top_k": ["--top_k=3"],
            "remask.0": ["--remask=0"], "remask.0.2": ["--remask=0.2"], "apart.0": ["--apart=0", "--order=entropy"],
            "exact": ["--order=random", "--temperature=1", "--remask=0", "--apart=0"],
            "prompt": ["--prompt=ROMEO:"], "blank": ["--prompt=To be, {12} that is the {8}:"], "length": ["--prompt=ROMEO:{4-7}JULIET:"],
            "nothing follows": ["--prompt=O {3-30}"], "short": ["--length=40"], "long": ["--length=200", "--prompt=KING"], "two": ["--n=2"]}
    for name, args in ways.items():
        yield f"shipped.masked.{name}", lambda args=args: typed(masked, "--steps=16", *args)
    judge = f"--out={HERE / 'results/judge.pt'}"
    for name, args in (("default", []), ("prompt", ["--prompt=ROMEO:", "--n=2", "--top_k=4"]), ("greedy", ["--temperature=0", "--prompt=First {5}"]),
                       ("long", ["--length=150"])):
        yield f"shipped.judge.{name}", lambda args=args: typed(judge, *args)


def cases():
    """(name, function that computes it) of all cases, in order: a text is written by the model of the case before."""
    yield from masked_cases()
    yield from bits_cases()
    yield from embed_cases()
    yield from mnist_cases()
    yield from shipped_cases()


def numbers(value):
    """All numbers and texts of a case in one list."""
    if isinstance(value, dict):
        return [*value["losses"], value["bound"]]
    return value


def difference(name, old, new):
    """How far a case is from what is recorded: the largest relative difference, or 1 where a text differs."""
    old, new = numbers(old), numbers(new)
    if len(old) != len(new):
        return 1.0
    if isinstance(new[0], str):
        return float(old != new)
    scale = 1.0 if name.count(".") > 1 else None   # pixels are in [-1, 1]
    return max(abs(a - b) / (scale or abs(a)) for a, b in zip(old, new))


def tolerance(name):
    if "muon" in name:
        return 1e-3
    picture = name.count(".") > 1
    return 1e-4 if picture or name == "mnist.levels" else 1e-5


def main(argv):
    record = [arg.partition("=")[2] for arg in argv if arg.startswith("--record")]
    old = json.loads(PATH.read_text()) if PATH.exists() else {}
    new, wrong = {}, 0
    for name, compute in cases():
        value = new[name] = compute()
        far = difference(name, old[name], value) if name in old else None
        if far is None or far > tolerance(name):
            print(f"{name}: {'new' if far is None else f'differs by {far:.1e}'}")
            wrong += 1
        if not (record and name.startswith(record[0])) and name in old:
            new[name] = old[name]
    if record:
        PATH.write_text(json.dumps(new, indent=0, ensure_ascii=False) + "\n")
        print(f"recorded in {PATH}")
    else:
        raise SystemExit(f"{wrong} of {len(new)} cases differ" if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1:])

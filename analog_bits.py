"""Analog bits (Chen, Zhang & Hinton 2022): Gaussian diffusion over the bits of characters.    settings: config.Bits, config.CodeSampler

    python analog_bits.py --dataset=warpeace                    # trains
    python analog_bits.py --code=bytes --head=bits              # the bits of UTF-8, each predicted alone
    python analog_bits.py sample --n=4 --steps=50 --td=1 --sampler=ddim
    python analog_bits.py sample --prompt="Prince {20} said" --watch"""
import sys
from pathlib import Path

import torch
from torch import nn

import generate
from config import HERE, Bits, CodeSampler, parse, run
from data import Alphabet, Text
from diffusion import CodeDiffusion
from model import Transformer
from train import load, show_text, start

ENDS = (-4.0, 8.0)   # gamma: at -4 a bit is wrong once in 10^13, at 8 all bits of a character together tell .001 nats


def bits(codes, width):
    """Integers (...) as +-1 bits (..., width), the lowest first."""
    return (codes[..., None] >> torch.arange(width, device=codes.device) & 1) * 2.0 - 1


def unbits(x):
    """The integers of numbers x (..., width), by their signs."""
    return ((x > 0).long() << torch.arange(x.size(-1), device=x.device)).sum(-1)


def table(code, alphabet):
    """The codes of an alphabet's characters, one row of +-1 each: (V, K)."""
    V = len(alphabet)
    width = max(1, (V - 1).bit_length())
    if code == "bytes":
        return bits(torch.tensor([ord(ch) for ch in alphabet.chars]), 8)
    if code == "random":
        return bits(torch.randperm(2 ** width, generator=torch.Generator().manual_seed(0))[:V], width)
    return bits(torch.arange(V), width)


class Characters(CodeDiffusion):
    """Tokens are characters: logits over the alphabet, so that no code is invalid (softmax factorisation)."""

    unit = "char"

    def __init__(self, net, codes, c):
        super().__init__(net, codes, c.schedule, c.weight, ENDS, c.selfcond, c.prior, c.prompts, c.spread, c.hint)
        self.mask = len(codes)                                                        # what `generate.write` puts where nothing is yet

    def forward(self, x0):
        """Training loss of characters x0 (B, T)."""
        return super().forward((x0[..., None], x0.new_zeros(*x0.shape, 0)))

    def bound(self, x0, u, seeds):
        """One draw of the bound for each row of x0 (B, T), as above: (nats per character (B,), u)."""
        return super().bound(x0[..., None], u, seeds)

    def sample(self, x, known, s):
        """Write x (B, T) where it is not known (B, T); yields (characters, confidence) after each step."""
        for y, p in super().sample(x.masked_fill(~known, 0)[..., None], known, s):
            yield y[..., 0], p[..., 0]


class LoneBits(Characters):
    """Tokens are bits, K to a character, each predicted alone: the ablation. A code that no character has reads as the nearest."""

    def __init__(self, net, codes, c):
        super().__init__(net, torch.tensor([[-1.0], [1.0]]), c)
        self.mask = len(codes)
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, x0):
        """Training loss of characters x0 (B, T): nats per bit."""
        return CodeDiffusion.forward(self, ((self.codes[x0] > 0).long(), x0.new_zeros(*x0.shape, 0)))

    def bound(self, x0, u, seeds):
        """As above: the nats of a character are those of its K bits."""
        nats, u = CodeDiffusion.bound(self, (self.codes[x0] > 0).long(), u, seeds)
        return nats * self.codes.size(1), u

    def sample(self, x, known, s):
        """As above; a character is as sure as its bits together."""
        for y, p in CodeDiffusion.sample(self, (self.codes[x.masked_fill(~known, 0)] > 0).long(), known, s):
            yield ((y * 2.0 - 1) @ self.codes.T - self.codes.square().sum(1) / 2).argmax(-1), p.prod(-1)


def build(c, meta):
    """The method of a run: c its Bits settings, meta its alphabet."""
    codes = table(c.code, Alphabet(meta["alphabet"]))
    V, K = codes.shape
    out = 2 * K if c.head == "bits" else V                                            # probabilities: given, and shown as the hint
    net = Transformer(c, nn.Linear(K * (1 + c.selfcond) + out * c.hint, c.n_embd), out)
    return (LoneBits if c.head == "bits" else Characters)(net, codes, c)


def train(argv):
    """python analog_bits.py: settings as in config.Bits."""
    start(argv, parse(argv, Bits()), "bits", lambda c: Text(c, raw=c.code == "bytes"), build, show_text(CodeSampler()))


def sample(argv):
    """python analog_bits.py sample: settings as in config.CodeSampler."""
    s = parse(argv, CodeSampler())
    path = Path(s.out) if s.out else HERE / "out/bits"
    method, c, meta = load(path, build, ("bits",))
    print(f"{path}: bits, trained on {meta['data']['name']} for {meta['step']:,} steps", file=sys.stderr)
    generate.show(method, Alphabet(meta["alphabet"], raw=c.code == "bytes" or meta["data"]["name"] == "enwik8"), s, c.block_size)


def main(argv):
    if argv[:1] == ["sample"]:
        sample(argv[1:])
    else:
        train(argv)


if __name__ == "__main__":
    run(main)

"""Analog bits (Chen, Zhang & Hinton 2022): Gaussian diffusion over the bits of characters.    settings: config.Bits, config.CodeSampler

    python analog_bits.py --dataset=warpeace                    # trains
    python analog_bits.py --code=bytes --head=bits              # the bits of UTF-8, each predicted alone
    python analog_bits.py sample --n=4 --steps=50 --td=1 --sampler=ddim
    python analog_bits.py sample --prompt="Prince {20} said" --watch"""
import torch
from torch import nn

import generate
from config import Bits, CodeSampler, parse, run
from data import Alphabet, Text
from diffusion import Characters
from model import Transformer
from train import show_text, start

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


class LoneBits(Characters):
    """Tokens are bits, K to a character, each predicted alone: the ablation. A code that no character has reads as the nearest."""

    mask = property(lambda self: len(self.codes))

    def __init__(self, net, codes, *how):
        super().__init__(net, torch.tensor([[-1.0], [1.0]]), *how)
        self.register_buffer("codes", codes, persistent=False)

    def spelled(self, x0):
        """The bits (B, T, K) of characters x0 (B, T)."""
        return (self.codes[x0] > 0).long()

    def read(self, tokens):
        """The characters (B, T) whose codes are nearest to the bits (B, T, K)."""
        return ((tokens * 2.0 - 1) @ self.codes.T - self.codes.square().sum(1) / 2).argmax(-1)


def build(c, meta):
    """The method of a run: c its Bits settings, meta its alphabet."""
    codes = table(c.code, Alphabet(meta["alphabet"]))
    V, K = codes.shape
    out = 2 * K if c.head == "bits" else V                                            # probabilities: given, and shown as the hint
    net = Transformer(c, nn.Linear(K * (1 + c.selfcond) + out * c.hint, c.n_embd), out)
    how = (c.schedule, c.weight, ENDS, c.selfcond, c.prior, c.prompts, c.spread, c.hint)
    method = (LoneBits if c.head == "bits" else Characters)(net, codes, *how)
    method.unit = "byte" if c.code == "bytes" else "char"
    return method


def main(argv):
    if argv[:1] == ["sample"]:
        generate.sample(argv[1:], CodeSampler(), "bits", build)
    else:
        start(argv, parse(argv, Bits()), "bits", lambda c: Text(c, raw=c.code == "bytes"), build, show_text(CodeSampler()))


if __name__ == "__main__":
    run(main)

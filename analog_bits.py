"""Analog bits (Chen, Zhang & Hinton 2022): Gaussian diffusion over the bits of characters.
settings: config.Bits, config.CodeSampler. Read with it: TokenDiffusion in gaussian.py, and of its
formulas q_sample, reverse_step, log_likelihood and position_times.

    python analog_bits.py --dataset=warpeace
    python analog_bits.py --code=bytes --head=bits        # the bits of UTF-8, each predicted alone
    python analog_bits.py sample --n=4 --steps=50 --td=1 --sampler=ddim
    python analog_bits.py sample --prompt="Prince {20} said" --watch
"""
import torch
from torch import nn

from checkpoint import find_checkpoint, load, start_or_resume
from config import Bits, CodeSampler, parse, print0, run
from data import CharTokenizer, Text
from gaussian import TokenDiffusion
from generate import lay_out, parse_prompt, print_source, show_texts, write
from model import Transformer
from train import fit, reseed, show_text

SETTINGS = Bits
SAMPLER = CodeSampler
GAMMA_MIN = -4.0    # a bit is wrong once in 10^13
GAMMA_MAX = 8.0     # all bits of a character together tell 0.001 nats


def bits(codes, width):
    """Integers (...) as +-1 bits (..., width), the lowest first."""
    return (codes[..., None] >> torch.arange(width, device=codes.device) & 1) * 2.0 - 1


def bit_table(code, alphabet):
    """The bits of the characters of an alphabet, a str: (V, K)."""
    if code == "bytes":
        return bits(torch.tensor([ord(ch) for ch in alphabet]), 8)
    V = len(alphabet)
    return bits(torch.arange(V), max(1, (V - 1).bit_length()))


class BitHead(nn.Module):
    """A network that predicts each bit alone, K numbers, as one that predicts V logits: a character
    is as likely as the product of its bits, among the codes that are characters."""

    def __init__(self, net, table):
        super().__init__()
        self.net = net
        self.table = nn.Buffer(table, persistent=False)

    def forward(self, x, t):
        bit_logits = self.net(x, t)                                    # (B, T, K)
        return bit_logits @ self.table.T                               # (B, T, V)


def build(c, meta):
    table = bit_table(c.code, meta["alphabet"])
    V, K = table.shape
    n_in = K + K * c.self_cond + V * c.feed_posterior
    n_out = K if c.head == "bits" else V
    net = Transformer(c, nn.Linear(n_in, c.n_embd), n_out)
    if c.head == "bits":
        net = BitHead(net, table)
    return TokenDiffusion(net, table, c.schedule, c.loss, GAMMA_MIN, GAMMA_MAX, c.self_cond,
                          c.output_prior, c.feed_posterior, c.prompts, c.stagger)


def sample(argv):
    s = CodeSampler(**parse(argv, CodeSampler))
    path = find_checkpoint(s.out, "bits")
    method, c, meta = load(path, Bits, build, ["bits"])
    tokenizer = CharTokenizer(meta["alphabet"], meta["is_bytes"])
    pieces = parse_prompt(s.prompt, tokenizer)
    ids, known = lay_out(pieces, s.length, c.block_size, method.mask_id)
    print_source(path, meta)

    reseed(s.seed)
    frames = write(method, ids, known, c.block_size, s)
    show_texts(frames, ids, known, tokenizer, s, calls_per_frame=1 + s.two_pass)


def main(argv):
    if argv[:1] == ["sample"]:
        return sample(argv[1:])
    c, state = start_or_resume(argv, Bits, ["bits"])
    data = Text(c, is_bytes=c.code == "bytes")
    reseed(c.seed)
    method = build(c, data.meta)

    def show_sample(ema, out):
        show_text(ema, data, c, CodeSampler())

    meta = {"method": "bits", "script": "analog_bits", **data.meta}
    out = fit(method, data, c, meta, show_sample, state)
    if out:
        print0(f"done: python analog_bits.py sample --out={out}")


if __name__ == "__main__":
    run(main)

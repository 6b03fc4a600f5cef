"""Analog bits (Chen, Zhang & Hinton 2022): Gaussian diffusion over the bits of characters.
settings: config.Bits, config.CodeSampler. Read with it, in gaussian.py: TokenDiffusion,
q_sample, reverse_step, log_likelihood, position_times and alpha_sigma.

    python analog_bits.py --dataset=warpeace
    python analog_bits.py --code=bytes --head=bits        # the bits of UTF-8, each predicted alone
    python analog_bits.py sample --n=4 --steps=50 --td=1 --sampler=ddim
    python analog_bits.py sample --prompt="Prince {20} said" --watch
"""
import torch
from torch import nn

from checkpoint import out_option, start_or_resume
from config import Bits, CodeSampler, check, parse, print0, run
from data import Text
from gaussian import TokenDiffusion
from generate import lay_out, open_model, parse_prompt, show_texts, write
from model import Transformer
from step import reseed
from train import fit_text

SETTINGS = Bits
SAMPLER = CodeSampler
GAMMA_MIN = -4.0    # -log SNR at the clean end: the sign of z is wrong once in 10^13
GAMMA_MAX = 8.0     # at the other: all bits of a character together tell 0.001 nats


def bits(ids, width):
    """Integers (...) as +-1 bits (..., width), the lowest first."""
    return ((ids[..., None] >> torch.arange(width, device=ids.device)) & 1) * 2.0 - 1


def bit_table(code, alphabet):
    """The bits of the characters of an alphabet, a str: (V, K)."""
    if code == "bytes":
        return bits(torch.tensor([ord(ch) for ch in alphabet]), 8)
    V = len(alphabet)
    return bits(torch.arange(V), max(1, (V - 1).bit_length()))


class BitHead(nn.Module):
    """Turns a network that predicts K bits into one that predicts V characters: a character is as
    likely as the product of its bits, normalized over the characters."""

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
                          c.output_prior, c.feed_posterior, c.prompts, c.stagger, c.times)


def sample(argv):
    s = CodeSampler(**parse(argv, CodeSampler))
    method, c, _, tokenizer = open_model(s.out, "bits", Bits, build, ["bits"])
    check(method.self_cond or not s.two_pass, "two_pass needs a network trained with self_cond")
    pieces = parse_prompt(s.prompt, tokenizer)
    ids, known = lay_out(pieces, s.length, c.block_size, method.mask_id)

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
    meta = {"method": "bits", "script": "analog_bits", **data.meta}
    out = fit_text(method, data, c, meta, CodeSampler(), state)
    if out:
        print0(f"done: python analog_bits.py sample {out_option(out)}")


if __name__ == "__main__":
    run(main)

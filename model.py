"""The transformer all four models share: RoPE, RMSNorm, QK-norm, squared-ReLU MLP, no biases, neighbour mixing, adaLN on the noise level.

It does not know what it is fed: the caller brings `inp`, which turns each position into n_embd numbers, and the width of the output."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import AMP, DEVICE, GPU, autocast


def norm(x):
    """RMSNorm without a gain: x / sqrt(mean(x^2))."""
    return F.rms_norm(x, (x.size(-1),))


def time_features(t, dim):
    """Sinusoidal features of the noise level t in [0, 1]: (...) -> (..., dim), periods from 2 pi / 1000 to 2 pi."""
    freq = 1000 ** torch.linspace(1, 0, dim // 2, device=t.device)
    angle = t[..., None] * freq
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotate(x, rope):
    """RoPE (Su et al. 2021): turn each pair of features by an angle proportional to the position. x (B, H, T, D)."""
    (cos, sin), (a, b) = rope, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D). Written out on the CPU, where for our short windows and in
    bf16 it is 5-6x as fast as the fused kernel, backward included (LOG.md)."""
    if GPU:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    score = q @ k.mT * q.size(-1) ** -0.5                                             # (B, H, T, T)
    if causal:
        score = score.masked_fill(~torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    return score.softmax(-1) @ v


def remember(past, key, x, dim):
    """x behind what past, a dict, holds under key, along dim; past then holds both. Where nothing is to be remembered (None), x."""
    if past is not None:
        x = past[key] = torch.cat([past[key], x], dim) if key in past else x
    return x


class Neighbours(nn.Module):
    """x_i + sum_d a_d x_{i-d} + b_d x_{i+d} for d = 1..reach, with a and b per channel, from zero; causal: without b.

    Attention has to learn from the rotations what "the character to the left" is; here each block is simply shown it. At 4 x 4 x 128 and
    1,000 steps this is worth .125 nats per character of the bound (LOG.md)."""

    def __init__(self, c, causal, reach=2):
        super().__init__()
        self.offsets = [d for d in range(-reach, 0 if causal else reach + 1) if d]
        self.mix = nn.Parameter(torch.zeros(len(self.offsets), c.n_embd))

    def forward(self, x, past=None):
        """(B, T, C) -> (B, T, C)"""
        T, reach = x.size(1), -self.offsets[0]
        wide = F.pad(remember(past, self, x, 1), (0, 0, reach, reach))[:, -T - 2 * reach:]   # (B, T + 2 reach, C)
        for a, d in zip(self.mix, self.offsets, strict=True):
            x = torch.addcmul(x, a, wide[:, reach + d:reach + d + T])
        return x


class Block(nn.Module):
    """x + (1 + g) f((1 + s) norm(x) + b), f first attention, then the MLP; s, b, g come from the noise level."""

    def __init__(self, c, causal, positions):
        super().__init__()
        self.n_head, self.causal = c.n_head, causal
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        self.near1, self.near2 = (Neighbours(c, causal), Neighbours(c, causal)) if positions else (lambda x, past: x,) * 2
        self.drop = nn.Dropout(c.dropout)

    def attend(self, x, rope, past):
        q, k, v = self.qkv(self.near1(x, past)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)   # (B, H, T, D) each
        k, v = remember(past, (self, "k"), rotate(norm(k), rope), 2), remember(past, (self, "v"), v, 2)
        y = attention(rotate(norm(q), rope), k, v, self.causal and q.size(2) == k.size(2))
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))                      # (B, T, C)

    def mlp(self, x, past):
        return self.drop(self.down(F.relu(self.up(self.near2(x, past))).square()))

    def forward(self, x, rope, mod, past=None):
        s1, b1, g1, s2, b2, g2 = mod
        x = x + (1 + g1) * self.attend((1 + s1) * norm(x) + b1, rope, past)
        return x + (1 + g2) * self.mlp((1 + s2) * norm(x) + b2, past)


class Transformer(nn.Module):
    """c: n_layer, n_head, n_embd, block_size, dropout, time. inp: module, (B, T) or (B, T, K) -> (B, T, n_embd).
    Without positions, no RoPE and no neighbours, it cannot tell the order of what it reads.

    Blocks and head start at zero output: an untrained network is uniform over its outputs, and each block is the identity.
    The noise level's projection starts at zero too and multiplies (1 + .): gating zero by zero would never train."""

    def __init__(self, c, inp, n_out, causal=False, positions=True):
        super().__init__()
        self.inp = inp
        self.blocks = nn.ModuleList(Block(c, causal, positions) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, n_out, bias=False)
        zero = [self.head, *(m for b in self.blocks for m in (b.out, b.down))]
        if c.time:
            self.time = nn.Sequential(nn.Linear(c.n_embd, c.n_embd, bias=False), nn.SiLU(),
                                      nn.Linear(c.n_embd, 6 * c.n_embd, bias=False))       # shared by all blocks
            zero.append(self.time[-1])
        for layer in zero:
            nn.init.zeros_(layer.weight)
        half = c.n_embd // c.n_head // 2
        angle = positions * torch.arange(c.block_size)[:, None] * 10000 ** -(torch.arange(half) / half)   # (block_size, D / 2)
        self.register_buffer("rope", torch.stack([angle.cos(), angle.sin()]).to(AMP), persistent=False)

    def forward(self, x, t, past=None):
        """x (B, T) or (B, T, K); t (B,) or (B, T), the noise level, 0 clean to 1 noise -> fp32 (B, T, n_out).

        past, for a causal network: a dict, empty at first, in which it remembers the positions it has seen; x then goes on after them,
        one position at a time (but for the first x)."""
        assert not past or x.size(1) == 1, "after the first x, one position at a time"
        seen = x.size(1) + (past["seen"] if past else 0)                              # positions, those of x included
        if past is not None:
            past["seen"] = seen
        with autocast():
            x = norm(self.inp(x))                                                     # (B, T, C)
            mod = [0.0] * 6
            if hasattr(self, "time"):
                t = t if t.dim() == 2 else t[:, None]                                 # (B, T) or (B, 1)
                mod = self.time(time_features(t, x.size(-1))).chunk(6, -1)
            for block in self.blocks:
                x = block(x, self.rope[:, seen - x.size(1):seen], mod, past)
            return self.head(norm(x)).float()


def compile_net(method, data, c):
    """Compile the network in place and warm it up; where that fails (no C++ compiler), one line and on without."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")    # else the compiled gradient of an embedding is summed in any order
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        method.net.compile(dynamic=False)
        method(data.batch(c.batch_size)).backward()
    except Exception as e:   # no C++ compiler, a broken one, a network it cannot read
        method.net._compiled_call_impl = None
        tqdm.write(f"going on without torch.compile, which failed here: {type(e).__name__}")
    method.zero_grad(set_to_none=True)
    return True

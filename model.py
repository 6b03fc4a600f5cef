"""The transformer that every script trains, as a list of what it is:

    norm        RMSNorm without a gain, also on queries and keys
    positions   RoPE, and before attention and before the MLP a depthwise convolution over 5
                positions, starting as the identity
    MLP         squared ReLU, four times as wide; no biases anywhere
    noise level adaLN with one projection for all blocks, if c.time
    start       output layers are zero: blocks are the identity, predictions uniform

The caller brings `embed`, a module (B, T) or (B, T, K) -> (B, T, n_embd), and the output width.
B batch, T positions, K numbers a position, C = n_embd channels, H heads, D = C / H.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import config
from config import GPU, autocast


def norm(x):
    """RMSNorm without a gain: x / sqrt(mean(x^2))."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, rope):
    """RoPE: rotate pairs of features by an angle proportional to the position. x (B, H, T, D)."""
    cos, sin = rope                                                    # (T, D / 2) each
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attention(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D)."""
    if GPU:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # On the CPU, for short windows in bf16, this is 5 times as fast as the fused kernel.
    scores = (q * q.size(-1) ** -0.5) @ k.mT                           # (B, H, T, T)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def extend_cache(cache, key, x, dim):
    """Append x to cache[key] along dim -> all that is stored there; without a cache, x."""
    if cache is None:
        return x
    if key in cache:
        x = torch.cat([cache[key], x], dim)
    cache[key] = x
    return x


class Attention(nn.Module):

    def __init__(self, c, causal):
        super().__init__()
        self.n_head = c.n_head
        self.causal = causal
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, rope, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (B, H, T, D) each
        q = rotate(norm(q), rope)
        k = rotate(norm(k), rope)
        k = extend_cache(cache, "k", k, dim=2)
        v = extend_cache(cache, "v", v, dim=2)
        # a single query that comes after the cached keys may see them all
        causal = self.causal and q.size(2) == k.size(2)
        y = attention(q, k, v, causal)                                 # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)                               # (B, T, C)
        return self.dropout(self.proj(y))


class MLP(nn.Module):

    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        x = F.relu(self.fc(x)).square()
        return self.dropout(self.proj(x))


class NeighbourConv(nn.Module):
    """A depthwise convolution over 5 positions, starting as the identity:
    x_i + sum_d weight_d x_{i+d} over the offsets d = -2, -1, 1, 2, or if causal d = -2, -1.

    Attention would have to learn from the rotations which character is "the one to the left";
    here every block is shown it."""

    def __init__(self, c, causal, reach=2):
        super().__init__()
        self.reach = reach
        self.offsets = [d for d in range(-reach, reach + 1) if d < 0 or d > 0 and not causal]
        self.weight = nn.Parameter(torch.zeros(len(self.offsets), c.n_embd))

    def forward(self, x, cache=None, key=None):
        T = x.size(1)
        context = extend_cache(cache, key, x, dim=1)
        padded = F.pad(context, (0, 0, self.reach, self.reach))
        padded = padded[:, -T - 2 * self.reach:]                       # (B, T + 2 reach, C)
        for weight, offset in zip(self.weight, self.offsets, strict=True):
            start = self.reach + offset
            x = torch.addcmul(x, weight, padded[:, start:start + T])
        return x


class Block(nn.Module):
    """x + (1 + gate) f(conv((1 + scale) norm(x) + shift)), with f attention and then the MLP.
    mod: scale, shift and gate of the one, then of the other; zeros without a noise level."""

    def __init__(self, c, causal, use_positions):
        super().__init__()
        self.attn = Attention(c, causal)
        self.mlp = MLP(c)
        self.use_positions = use_positions
        if use_positions:
            self.attn_conv = NeighbourConv(c, causal)
            self.mlp_conv = NeighbourConv(c, causal)

    def forward(self, x, rope, mod, cache=None):
        scale, shift, gate = mod[:3]
        h = (1 + scale) * norm(x) + shift
        if self.use_positions:
            h = self.attn_conv(h, cache, "attn_conv")
        x = x + (1 + gate) * self.attn(h, rope, cache)

        scale, shift, gate = mod[3:]
        h = (1 + scale) * norm(x) + shift
        if self.use_positions:
            h = self.mlp_conv(h, cache, "mlp_conv")
        return x + (1 + gate) * self.mlp(h)


class TimeEmbedding(nn.Module):
    """The noise level t (B,) or (B, T) -> mod, six tensors (B, 1, C) or (B, T, C)."""

    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, 6 * c.n_embd, bias=False)

    def forward(self, t):
        if t.dim() == 1:
            t = t[:, None]
        n_freq = self.fc.in_features // 2
        freq = 1000 ** torch.linspace(1, 0, n_freq, device=t.device)   # periods 2 pi / 1000 to 2 pi
        angle = t[..., None] * freq
        features = torch.cat([angle.cos(), angle.sin()], -1)
        return self.proj(F.silu(self.fc(features))).chunk(6, -1)


class Transformer(nn.Module):

    def __init__(self, c, embed, n_out, causal=False, use_positions=True, half=GPU):
        super().__init__()
        self.embed = embed
        self.half = half     # keep x, to which each block adds, in AMP: half the memory traffic
        self.blocks = nn.ModuleList(Block(c, causal, use_positions) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, n_out, bias=False)
        self.time = TimeEmbedding(c) if c.time else None

        # zero outputs; gates are 1 + gate, for a zero gate on a zero output would have no gradient
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)
        if c.time:
            nn.init.zeros_(self.time.proj.weight)

        # RoPE's table, (2, block_size, D / 2); without positions nothing is rotated
        n_pairs = c.n_embd // c.n_head // 2
        freq = 10000 ** -(torch.arange(n_pairs) / n_pairs)
        angle = torch.arange(c.block_size)[:, None] * freq * use_positions
        rope = torch.stack([angle.cos(), angle.sin()]).to(config.AMP)
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, x, t, kv_cache=None):
        """x (B, T) or (B, T, K), noise level t (B,) or (B, T) from 0 clean to 1 noise, which is
        ignored unless c.time -> fp32 (B, T, n_out).

        kv_cache: a dict, empty at first, where a causal network keeps what it has read. After the
        first call x goes on where the last one ended, one position at a time."""
        T = x.size(1)
        start = 0
        caches = [None] * len(self.blocks)
        if kv_cache is not None:
            start = kv_cache.get("length", 0)
            kv_cache["length"] = start + T
            caches = kv_cache.setdefault("blocks", [{} for _ in self.blocks])
        rope = self.rope[:, start:start + T]
        with autocast():
            x = norm(self.embed(x))                                    # (B, T, C)
            if self.half:
                x = x.to(config.AMP)
            mod = [0.0] * 6
            if self.time is not None:
                mod = self.time(t)
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, rope, mod, cache)
            return self.head(norm(x)).float()

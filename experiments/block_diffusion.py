"""Can autoregression and diffusion be blended? Block diffusion (BD3-LM, arXiv 2503.09573) writes
blocks of L characters in order, each by masked diffusion. L = 1 is autoregression, L = block_size
masked diffusion.   settings: Blocks and BlockSampler, below

    python -m experiments.block_diffusion --dataset=shakespeare    # 2.5 to 3.5 times train.py
    python -m experiments.block_diffusion sample --prompt="ROMEO:" --length=1000

B batch, T positions, n = T / L blocks, C channels, V vocabulary size; token V is MASK.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import out_option, start_or_resume
from config import GPU, Config, Sample, autocast, check, parse, print0, run
from data import Text
from diffusion import MaskedDiffusion, num_masked, per_row_noise, rank
from generate import lay_out, open_model, parse_prompt, show_texts, write
from model import Transformer, extend_cache, norm, rotate
from step import reseed
from train import fit_text


@dataclass(frozen=True)
class Blocks(Config):   # how the network is built and trained
    block: int = 8                 # L, characters of a block
    time = False                   # no setting: the network counts the MASKs


@dataclass(frozen=True)
class BlockSampler(Sample):   # python -m experiments.block_diffusion sample; exact by default
    steps: int = 0                 # network calls per block, at most; 0: two a character
    order: Literal["random", "left", "confidence", "margin", "entropy"] = "random"
    temperature: float = 1.0
    remask: float = 0.0


NAME = "block_diffusion"
SETTINGS = Blocks
SAMPLER = BlockSampler


class BlockTransformer(Transformer):
    """The weights of model.Transformer. A clean position sees the clean ones of its own and earlier
    blocks, a noisy one the noisy ones of its own block and the clean ones of earlier blocks. The
    cache has, of K clean positions, keys (not yet rotated), values and what convolutions read."""

    def forward(self, x, start, cache, noisy):
        """Blocks x (B, n, L), the first at position start of a window -> logits (B, n, L, V), fp32.
        Clean blocks are appended to the cache, a dict that is empty at first."""
        cache = dict(cache) if noisy else cache      # what is appended to a copy is forgotten
        K = cache[0, "k"].size(2) if cache else 0
        own = slice(start, start + x[0].numel())
        block = torch.arange(own.stop, device=x.device) // x.size(2)
        query = block[own, None]                                       # (Q, 1), Q = n L
        beside = block[own] == query if noisy else block[own] <= query
        visible = torch.cat([block[:K] < query, beside], 1)            # (Q, K + Q)
        rope = torch.cat([self.rope[:, :K], self.rope[:, own]], 1)
        with autocast():
            x = norm(self.embed(x))                                    # (B, n, L, C)
            for i, layer in enumerate(self.blocks):
                h = self.convolve(layer.attn_conv, norm(x), start, cache, (i, "attn_conv"))
                x = x + self.attend(layer.attn, h, rope, visible, cache, i)
                h = self.convolve(layer.mlp_conv, norm(x), start, cache, (i, "mlp_conv"))
                x = x + layer.mlp(h)
            return self.head(norm(x)).float()

    def convolve(self, conv, x, start, cache, key):
        """conv of each block of x (B, n, L, C), behind the clean positions before it."""
        clean = extend_cache(cache, key, x.flatten(1, 2), dim=1)
        clean = F.pad(clean, (0, 0, conv.reach, 0))
        before = clean[:, start:].unfold(1, conv.reach, x.size(2)).mT[:, :x.size(1)]
        return conv(x.flatten(0, 1), {"before": before.flatten(0, 1)}, "before").view_as(x)

    def attend(self, attn, x, rope, visible, cache, i):
        """Attention of x (B, n, L, C) to what is visible (Q, K + Q)."""
        qkv = attn.qkv(x.flatten(1, 2)).unflatten(2, (3, attn.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (B, heads, Q, C / heads)
        k = extend_cache(cache, (i, "k"), norm(k), dim=2)
        v = extend_cache(cache, (i, "v"), v, dim=2)
        q = rotate(norm(q), rope[:, -q.size(2):])
        k = rotate(k, rope)
        if GPU:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        else:                                # faster there, as in model.py
            scores = (q * q.size(-1) ** -0.5) @ k.mT
            y = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        return attn.dropout(attn.proj(y.transpose(1, 2).reshape(x.shape)))


class BlockDiffusion(nn.Module):
    """The chain rule over blocks, and of each block the bound of masked diffusion,

        -log p(x0) <= L sum_blocks mean_{k=1..L} E[mean CE over exactly k masked of the block]

    given the clean blocks before it. With L = 1 both sides are equal."""
    early_stopping = True
    noise_name = "share masked"

    def __init__(self, net, vocab_size, block, block_size):
        super().__init__()
        self.net = net
        self.mask_id = vocab_size
        self.block = block
        self.max_cached = block_size - block           # a window less the block to be written
        self.eval_levels = min(block, 16)

    def masked_ce(self, x0, k, rand):
        """CE (B, n, L) where the k (B, n) smallest rand (B, T) of a block are masked, else 0."""
        x0 = x0.unflatten(1, (-1, self.block))
        masked = rank(rand.view(-1, self.block)).view_as(x0) < k[..., None]
        cache = {}
        self.net(x0, 0, cache, False)
        logits = self.net(x0.masked_fill(masked, self.mask_id), 0, cache, True)
        return F.cross_entropy(logits.movedim(-1, 1), x0, reduction="none") * masked

    @torch.compiler.disable              # compiled, it would draw other numbers
    def draw(self, B, T, device):
        """What is random in a training step: k (B, n), in each block uniform and stratified over
        the rows, independent of other blocks; and uniform numbers (B, T)."""
        row = torch.arange(B, device=device)[:, None]
        rate = (row / B + torch.rand(T // self.block, device=device)) % 1
        return num_masked(rate, self.block), torch.rand(B, T, device=device)

    def forward(self, x0):
        """Mean cross-entropy of all masked characters. No bound, but trains better than it."""
        k, rand = self.draw(*x0.shape, x0.device)
        return self.masked_ce(x0, k, rand).sum() / k.sum()

    def bound(self, x0, u, seeds):
        """With k = ceil(L u) masked in all blocks of a row: nats per character (B,), k / L (B,).
        Unbiased for u (B,) uniform in (0, 1], stratified or not: no row needs another."""
        k = num_masked(u, self.block)
        share = k / self.block
        rand = per_row_noise(seeds, torch.rand, x0.shape[1:]).to(x0.device)
        return self.masked_ce(x0, k[:, None], rand).mean((1, 2)) / share, share

    @torch.no_grad()
    def sample(self, x, known, s, locked=None):
        """Write x (B, T) block by block, each as MaskedDiffusion does with the settings s. What is
        known after a block does not count for it. One more call reads a finished block."""
        if locked is None:
            locked = torch.zeros_like(known)
        x = torch.where(known, x, self.mask_id)
        confidence = known.float()
        cache = {}

        def net(xt, t):
            return self.net(xt[:, None], n_cached, cache, True)[:, 0]

        within = MaskedDiffusion(net, self.mask_id)
        for start in range(0, x.size(1), self.block):
            part = slice(start, start + self.block)
            n_cached = min(start, self.max_cached)
            for x_block, p in within.sample(x[:, part], known[:, part], s, locked[:, part]):
                x = x.slice_scatter(x_block, 1, start, part.stop)
                confidence = confidence.slice_scatter(p, 1, start, part.stop)
                yield x, confidence
            self.net(x[:, None, part], n_cached, cache, False)
            for key, value in cache.items():           # the oldest is forgotten
                excess = max(0, value.size(-2) - self.max_cached)
                cache[key] = value[..., excess:, :]


def build(c, meta):
    check(c.block_size % c.block == 0, f"block={c.block} must divide block_size={c.block_size}")
    V = len(meta["alphabet"])
    net = BlockTransformer(c, nn.Embedding(V + 1, c.n_embd), V)
    return BlockDiffusion(net, V, c.block, c.block_size)


def sample(argv):
    s = BlockSampler(**parse(argv, BlockSampler))
    method, c, _, tokenizer = open_model(s.out, NAME, Blocks, build, [NAME])
    pieces = parse_prompt(s.prompt, tokenizer)
    ids, known = lay_out(pieces, s.length, c.block_size, method.mask_id)
    check(known[:int(known.sum())].all(), "blocks are written in order: no text after a blank")
    reseed(s.seed)
    T = -(-len(ids) // c.block) * c.block              # whole blocks, all in one call of sample
    show_texts(write(method, ids, known, T, s), ids, known, tokenizer, s)


def main(argv):
    if argv[:1] == ["sample"]:
        return sample(argv[1:])
    c, state = start_or_resume(argv, Blocks, [NAME])
    data = Text(c)
    reseed(c.seed)
    method = build(c, data.meta)
    meta = {"method": NAME, "script": NAME, **data.meta}
    out = fit_text(method, data, c, meta, BlockSampler(), state)
    if out:
        print0(f"done: python -m experiments.block_diffusion sample {out_option(out)}")


if __name__ == "__main__":
    run(main)

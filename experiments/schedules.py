"""Does it help to train where the loss is large, or to learn which characters are masked first?
Both lost when they were tried, with loss=elbo and 1,400 steps (docs/LOG.md): loss-aware 1.923 ±
0.010 nats a character, learned 1.911 ± 0.005, neither 1.887 ± 0.009 (n = 3); learned with --time
1.928 (n = 1). A run takes some five minutes on two CPU cores.   settings: Schedules, below

    python -m experiments.schedules --dataset=shakespeare --max_iters=1400
    python -m experiments.schedules --dataset=shakespeare --max_iters=1400 --schedule=learned

loss-aware: importance sampling of noise levels, Nichol and Dhariwal 2021, arXiv 2102.09672
learned: GenMD4, Shi et al. 2024, arXiv 2406.04329
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from checkpoint import out_option, start_or_resume
from config import Config, Sample, check, print0, run
from data import Text
from diffusion import MaskedDiffusion, one_per_stratum, per_row_noise
from model import Transformer
from step import reseed
from train import fit_text


@dataclass(frozen=True)
class Schedules(Config):   # how the network is built and trained
    schedule: Literal["loss-aware", "learned"] = "loss-aware"   # of masking, in training
    loss: Literal["elbo", "pooled"] = "elbo"       # pooled: no bound, and no importance weights
    time: bool = False             # feed the network the share masked; learned: t, and no tilt

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "learned":
            check(self.loss == "elbo", "schedule=learned has loss=elbo")
            check(self.batch_size % 2 == 0, "schedule=learned needs an even batch_size")


SETTINGS = Schedules
SAMPLER = Sample


class LossAware(MaskedDiffusion):
    """Mask rates are drawn in proportion to the root mean square of the loss, a running mean in
    each of 20 buckets of the rate: that gives the estimated bound the least variance. (--resume is
    exact to the bit with --compile=0 only: compiling takes a batch, which the mean sees.)"""

    def __init__(self, net, vocab_size, loss="elbo"):
        super().__init__(net, vocab_size, loss=loss)
        self.register_buffer("mean_square", torch.ones(20))

    def sample_mask_rates(self, B, device):
        """One rate in each of B strata of equal probability -> rates (B,), importance weights (B,):
        B times the width of the stratum, so that the elbo stays unbiased."""
        density = self.mean_square.sqrt() + 1e-3                       # never 0
        mass = density / density.sum()                                 # of each bucket, (20,)
        start = mass.cumsum(0) - mass
        quantile = torch.linspace(0, 1, B + 1, device=device)[:, None]
        share_below = ((quantile - start) / mass).clamp(0, 1)          # of each bucket, (B + 1, 20)
        borders = share_below.mean(1)
        borders[-1:].fill_(1)                                          # undo the rounding
        return one_per_stratum(borders)

    def masked_ce(self, x0, k, rand):
        ce = super().masked_ce(x0, k, rand)
        if self.training:
            self.update(k / x0.size(1), ce.detach().sum(1) / k)
        return ce

    def update(self, rate, loss):
        """Move the mean squares of the buckets that have a rate (B,) towards its loss (B,)^2."""
        bucket = (20 * rate).ceil() - 1
        is_in = (bucket[:, None] == torch.arange(20, device=rate.device)).float()   # (B, 20)
        n = is_in.sum(0)
        mean_square = loss.square() @ is_in / n.clamp(min=1)
        self.mean_square.lerp_(torch.where(n > 0, mean_square, self.mean_square), 0.02)


class LearnedSchedule(MaskedDiffusion):
    """Character v is masked at time t with probability t^w_v, and w is learned. With p(v) what is
    predicted of a masked position, by the network or, with tilt, by t^w_v times the network,

        -log p(x0) <= int_0^1 E sum_{masked} [sum_v w_v p(v) - w_x0 (1 + log p(x0))] dt / t

    The texts shown during training are written as MaskedDiffusion writes, which knows no w."""
    noise_name = "square root of time"

    def __init__(self, net, vocab_size, tilt=True):
        super().__init__(net, vocab_size)
        self.log_w = nn.Parameter(torch.zeros(vocab_size))
        self.tilt = tilt

    @torch.compiler.disable
    def draw(self, B, T, device):
        """Times and weights (B,) and uniform (B, T), of two masks for each of B / 2 texts."""
        t, weight = self.sample_mask_rates(B // 2, device)
        return t.clamp(min=1e-4).repeat(2), weight.repeat(2), torch.rand(B, T, device=device)

    def integrand(self, x0, t, rand):
        """At times t (B,) -> nats per token (B,), log-probability (B,) of the mask drawn."""
        log_t = t.log()[:, None]
        w = self.log_w.exp()                                           # (V,)
        w_x0 = w[x0]                                                   # (B, T)
        mask_prob = (w_x0 * log_t).exp()
        masked = rand < mask_prob
        log_visible = torch.log1p(-mask_prob.clamp(max=1 - 1e-6))
        log_prob = torch.where(masked, w_x0 * log_t, log_visible).sum(1)

        logits = self.net(x0.masked_fill(masked, self.mask_id), t)
        if self.tilt:
            logits = logits + w * log_t[..., None]
        log_p = logits.log_softmax(-1)                                 # (B, T, V)
        log_p_x0 = log_p.gather(-1, x0[..., None]).squeeze(-1)
        nats = log_p.exp() @ w - w_x0 * (1 + log_p_x0)
        return (nats * masked).mean(1) / t, log_prob

    def forward(self, x0):
        """The bound. Its gradient knows that w decides what is masked (REINFORCE; the other mask of
        a text is the baseline). Half of the texts x0 are used."""
        t, weight, rand = self.draw(*x0.shape, x0.device)
        x0 = x0[:len(x0) // 2].repeat(2, 1)
        nats, log_prob = self.integrand(x0, t, rand)
        excess = nats - nats.roll(len(x0) // 2)
        through_masks = excess * (log_prob - log_prob.detach())        # 0, with a gradient
        return (weight * (nats + through_masks)).mean()

    def bound(self, x0, u, seeds):
        """At time u^2, of which a uniform u (B,) has less variance, dt = 2 u du."""
        u = u.clamp(min=1e-6)
        rand = per_row_noise(seeds, torch.rand, x0.shape[1:]).to(x0.device)
        nats, _ = self.integrand(x0, u.square(), rand)
        return 2 * u * nats, u


def build(c, meta):
    V = len(meta["alphabet"])
    net = Transformer(c, nn.Embedding(V + 1, c.n_embd), V)
    if c.schedule == "learned":
        return LearnedSchedule(net, V, tilt=not c.time)
    return LossAware(net, V, c.loss)


def main(argv):
    c, state = start_or_resume(argv, Schedules, ["schedules"])
    data = Text(c)
    reseed(c.seed)
    method = build(c, data.meta)
    meta = {"method": "schedules", "script": "schedules", **data.meta}
    out = fit_text(method, data, c, meta, Sample(steps=64), state)
    if out:
        print0(f"done: python -m evaluation --n=0 {out_option(out)}")


if __name__ == "__main__":
    run(main)

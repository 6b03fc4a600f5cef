"""Uniform-noise diffusion (D3PM, arXiv 2107.03006; UDLM, 2412.10193): characters are replaced by
ones drawn uniformly from the alphabet, and nothing shows which. A method in one script, as
docs/hacking.md describes them.   settings: Uniform and UniformSampler, below

    python -m experiments.uniform --dataset=shakespeare
    python -m experiments.uniform sample --prompt="ROMEO:{40}" --watch

t in [0, 1] is the time, float64, (B, T): known characters have time 0, all others the same.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import out_option, start_or_resume
from config import Config, Writing, parse, print0, run
from data import Text
from diffusion import per_row_noise, sample_tokens, token_log_probs
from gaussian import prompt_mask, stratified_times
from generate import lay_out, open_model, parse_prompt, show_texts, write
from model import Transformer
from step import reseed
from train import fit_text


@dataclass(frozen=True)
class Uniform(Config):   # how the network is built and trained
    n_levels: int = 1000           # N, the number of steps of the bound
    prompts: float = 0.25          # share of training windows with a known part
    time: bool = True              # feed the network t, which it could only estimate from xt


@dataclass(frozen=True)
class UniformSampler(Writing):   # python -m experiments.uniform sample
    steps: int = 128               # network calls per window
    temperature: float = 1.0       # 0: the likeliest character


SETTINGS = Uniform
SAMPLER = UniformSampler


def alpha(t):
    """The probability that a character has not been replaced at time t: 1 at 0, 0 at 1."""
    return 1 - t ** 2


def replace_characters(x0, t, rand, V):
    """The forward process: xt (B, T). rand (2, B, T) says what is replaced, and by what."""
    drawn = (rand[1] * V).long()
    return torch.where(rand[0] < alpha(t), x0, drawn)


def posterior(xt, x0_probs, t, s):
    """A step back from time t to s: p(xs | xt) ~ q(xt | xs) p(xs), by Bayes' rule, (B, T, V).
    x0_probs (B, T, V): the probabilities of x0 by all that is known but xt at the same position."""
    V = x0_probs.size(-1)
    alpha_s = alpha(s)[..., None]
    alpha_ts = alpha(t)[..., None] / alpha_s                           # not replaced from s to t
    likelihood = alpha_ts * F.one_hot(xt, V) + (1 - alpha_ts) / V
    prior = alpha_s * x0_probs + (1 - alpha_s) / V
    joint = likelihood * prior
    return joint / joint.sum(-1, keepdim=True)


class UniformDiffusion(nn.Module):
    """The network predicts x0 from the other characters; posterior adds what xt itself says. With
    N steps back, from t = i/N to s = (i-1)/N,

        -log p(x0) <= sum_{i=1..N} E KL(q(xs | xt, x0) || p(xs | xt))

    alpha(1) = 0, so the prior costs nothing; the last step, to s = 0, is the reconstruction."""
    eval_levels = 16
    early_stopping = True
    noise_name = "share of noise"

    def __init__(self, net, vocab_size, n_levels=1000, prompts=0.0):
        super().__init__()
        self.net = net
        self.mask_id = vocab_size      # shown where nothing is written yet, never read
        self.n_levels = n_levels
        self.prompts = prompts

    def x0_probs(self, xt, t):
        return self.net(xt, t.float()).double().softmax(-1)            # (B, T, V)

    def forward(self, x0):
        """Mean cross-entropy of p(x0 | xt), t uniform. No bound, but trains better than it."""
        B, T = x0.shape
        known = prompt_mask(B, T, self.prompts, x0.device)
        t, _ = stratified_times(B, x0.device)
        t = t.expand(B, T).masked_fill(known, 0)
        xt = replace_characters(x0, t, torch.rand(2, B, T, device=x0.device), self.mask_id)
        p = posterior(xt, self.x0_probs(xt, t), t, torch.zeros_like(t))
        nats = -p.gather(-1, x0[..., None]).log()                      # 0 where known
        return (nats.sum() / (~known).sum()).float()

    def step_kl(self, x0, xt, t, s):
        """KL(q(xs | xt, x0) || p(xs | xt)), nats (B, T)."""
        q = posterior(xt, F.one_hot(x0, self.mask_id).double(), t, s)
        p = posterior(xt, self.x0_probs(xt, t), t, s)
        return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)

    def bound(self, x0, u, seeds):
        """N times the step at time u (B,), rounded up -> nats per token (B,), share of noise."""
        B, T = x0.shape
        N = self.n_levels
        i = (u.double() * N).ceil().clamp(1, N)[:, None].expand(B, T)
        rand = per_row_noise(seeds, torch.rand, (2, T)).to(x0.device).unbind(1)
        xt = replace_characters(x0, i / N, rand, self.mask_id)
        kl = self.step_kl(x0, xt, i / N, (i - 1) / N)
        return N * kl.mean(1), 1 - alpha(i[:, 0] / N)

    @torch.no_grad()
    def sample(self, x, known, s, locked=None):
        """Write x (B, T) in s.steps steps back from noise; what is known (B, T) is kept, and locked
        positions, which nobody will see, are written too. Yields (x, age) as TokenDiffusion."""
        noise = torch.randint(self.mask_id, x.shape, device=x.device)
        x = torch.where(known, x, noise)
        age = torch.zeros_like(x)                                      # in steps
        times = torch.linspace(1, 0, s.steps + 1, dtype=torch.float64, device=x.device)
        times = times[:, None, None].expand(-1, *x.shape).masked_fill(known, 0)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            log_probs = token_log_probs(self.net(x, t.float()), s.temperature, 0).double()
            x0_probs = log_probs.exp().clamp(min=1e-30)                # a known token is possible
            tokens, _ = sample_tokens(posterior(x, x0_probs, t, t_next).log())
            age = (age + 1) * (tokens == x)
            x = tokens
            yield x, torch.where(known, 1.0, age / s.steps)


def build(c, meta):
    V = len(meta["alphabet"])
    net = Transformer(c, nn.Embedding(V, c.n_embd), V)
    return UniformDiffusion(net, V, c.n_levels, c.prompts)


def sample(argv):
    s = UniformSampler(**parse(argv, UniformSampler))
    method, c, _, tokenizer = open_model(s.out, "uniform", Uniform, build, ["uniform"])
    pieces = parse_prompt(s.prompt, tokenizer)
    ids, known = lay_out(pieces, s.length, c.block_size, method.mask_id)
    reseed(s.seed)
    show_texts(write(method, ids, known, c.block_size, s), ids, known, tokenizer, s)


def main(argv):
    if argv[:1] == ["sample"]:
        return sample(argv[1:])
    c, state = start_or_resume(argv, Uniform, ["uniform"])
    data = Text(c)
    reseed(c.seed)
    method = build(c, data.meta)
    meta = {"method": "uniform", "script": "uniform", **data.meta}
    out = fit_text(method, data, c, meta, UniformSampler(), state)
    if out:
        print0(f"done: python -m experiments.uniform sample {out_option(out)}")


if __name__ == "__main__":
    run(main)

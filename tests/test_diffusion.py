"""Masked diffusion and its baseline against known answers: enumeration, exact networks."""
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import config
import diffusion
import model
from config import Masked, Sample
from diffusion import Autoregressive, MaskedDiffusion
from train import build


class Says(nn.Module):
    """A network that says the same logits (V,) everywhere. calls: (x, t)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.calls = []

    def forward(self, x, t):
        self.calls.append((x, t))
        return self.logits.expand(*x.shape[:2], -1)


class Table(nn.Module):
    """Arbitrary but fixed logits for each visible pattern, over k/T, the share masked."""

    def __init__(self, V, T):
        super().__init__()
        self.T = T
        g = torch.Generator().manual_seed(0)
        self.logits = 2 * torch.randn((T + 1, *[V + 1] * T, T, V), generator=g)

    def forward(self, x, t):
        k = t * self.T
        assert torch.equal(k, k.round()), "the share is not k/T"
        return self.logits[(k.long(), *x.unbind(1))]


class Oracle(nn.Module):
    """The exact p(x_i | visible) of a joint distribution over V^T texts; causal: p(x_i | x_<i)."""

    def __init__(self, V, T, causal=False):
        super().__init__()
        self.V = V
        self.causal = causal
        self.states = torch.tensor(list(itertools.product(range(V), repeat=T)))   # (S, T)
        self.p = torch.rand(len(self.states), generator=torch.Generator().manual_seed(0)) ** 3
        self.p /= self.p.sum()

    def marginals(self, x, visible):
        fits = (x[:, None] == self.states) | ~visible[:, None]         # (B, S, T)
        p = fits.all(2) * self.p
        one_hot = F.one_hot(self.states, self.V).float()               # (S, T, V)
        return torch.einsum("bs,stv->btv", p / p.sum(1, keepdim=True), one_hot)

    def forward(self, x, t, kv_cache=None):
        if not self.causal:
            return self.marginals(x, x < self.V).clamp(1e-30).log()
        # x is shifted: position i is predicted from x[1..i]
        x = model.extend_cache(kv_cache, "x", x, dim=1)
        n = x.size(1)
        T = self.states.size(1)
        x = F.pad(x[:, 1:], (0, T + 1 - n))
        rows = [self.marginals(x, (torch.arange(T) < i).expand_as(x))[:, i] for i in range(n)]
        return torch.stack(rows, 1).clamp(1e-30).log()


def exact_bound(m, x0):
    """The bound of x0 (T,): mean over k of the mean over all subsets of k of their mean CE."""
    T = len(x0)
    total = 0.0
    for k in range(1, T + 1):
        for subset in itertools.combinations(range(T), k):
            rand = torch.ones(1, T)
            rand[0, list(subset)] = 0.0
            nats = m.masked_ce(x0[None], torch.tensor([k]), rand).sum().item()
            total += nats / k / math.comb(T, k) / T
    return total


def small(**k):
    """A masked model, or with objective=ar the baseline, none of whose weights are zero."""
    torch.manual_seed(0)
    c = Masked(**{**dict(time=True, block_size=12, n_layer=2, n_head=2, n_embd=16), **k})
    m = build(c, {"alphabet": "abcde"})
    for p in m.parameters():
        nn.init.normal_(p, std=0.3)
    return m.eval()


@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setattr(config, "AMP", torch.float32)


# ---- losses and bounds

def test_rows_of_a_batch_are_masked_independently():
    """Each row has a stratum of mask rates; where in it, and which positions, is its own draw."""
    torch.manual_seed(0)
    m = MaskedDiffusion(Says(torch.zeros(3)), 3)
    N = 1000
    for _ in range(N):
        m(torch.zeros(3, 200, dtype=torch.long))
    masked = torch.stack([x == 3 for x, _ in m.net.calls]).double()     # (N, 3, 200)
    rate = masked.mean(2)
    place = 3 * rate - torch.arange(3)                                 # of the rate in its stratum
    assert (place >= 0).all() and (place <= 1.02).all()
    assert torch.allclose(place.mean(0), torch.full((3,), 0.5).double(), atol=0.05)
    corr = torch.corrcoef(place.T) - torch.eye(3)
    assert corr.abs().max() < 5 / N ** 0.5
    both = (masked[:, 0] * masked[:, 1]).mean(1) - rate[:, 0] * rate[:, 1]   # 0 on average
    assert both.mean().abs() < 5 * both.std() / N ** 0.5
    share = masked.mean((0, 1))                                        # of each position
    assert (share - share.mean()).abs().max() < 5 * (0.25 / 3 / N) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", "square", "cosine", "logit-normal"])
def test_drawn_bound_and_elbo_loss_are_unbiased(schedule):
    torch.manual_seed(0)
    m = MaskedDiffusion(Table(3, 4), 3, schedule)
    x0 = torch.tensor([2, 0, 1, 2])
    exact = exact_bound(m, x0)
    loss = torch.stack([m(x0.expand(8, 4)) for _ in range(1500)])
    assert abs(loss.mean() - exact) < 4 * loss.std() / 1500 ** 0.5
    _, weight = m.sample_mask_rates(8, "cpu")
    assert weight.mean().item() == pytest.approx(1, abs=1e-6)
    nats, _ = m.bound(x0.expand(10000, 4), torch.rand(10000), range(10000))
    assert abs(nats.mean() - exact) < 4 * nats.std() / 10000 ** 0.5
    x0 = torch.randint(7, (16, 10))
    for kind in ("elbo", "pooled"):
        m = MaskedDiffusion(Says(torch.zeros(7)), 7, schedule, kind)
        assert m(x0).item() == pytest.approx(math.log(7), abs=1e-6)
    assert torch.allclose(m.bound(x0, torch.rand(16), range(16))[0], torch.tensor(7.0).log())


def test_pooled_is_the_documents_loss():
    """CE summed over all masked tokens of the batch, divided by their number."""
    torch.manual_seed(0)
    m = MaskedDiffusion(Table(3, 4), 3, "cosine", "pooled")
    x0 = torch.randint(3, (8, 4))
    torch.manual_seed(1)
    loss = m(x0)
    torch.manual_seed(1)
    rate, _ = m.sample_mask_rates(8, "cpu")
    ce = m.masked_ce(x0, diffusion.num_masked(rate, 4), torch.rand(8, 4))
    assert loss.item() == pytest.approx((ce.sum() / (ce > 0).sum()).item(), abs=1e-6)


def test_oracle_bound_is_the_exact_likelihood():
    oracle = Oracle(3, 3)
    m = MaskedDiffusion(oracle, 3)
    ar = Autoregressive(Oracle(3, 3, causal=True), 3)
    exact = -oracle.p.log() / 3
    assert torch.allclose(ar.bound(oracle.states)[0], exact, atol=1e-4)
    for i in (0, 7, 26):
        assert exact_bound(m, oracle.states[i]) == pytest.approx(exact[i].item(), abs=1e-4)


def test_logit_normal_schedule():
    """The logit of the mask rate is a normal number of deviation 0.8."""
    t = np.arange(1, 100) / 100
    ours = diffusion.mask_rate("logit-normal", torch.from_numpy(t)).numpy()
    quantiles = [NormalDist().inv_cdf(q) for q in t]
    assert np.abs(np.log(ours / (1 - ours)) - 0.8 * np.array(quantiles)).max() < 1e-9
    ends = diffusion.mask_rate("logit-normal", torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 1]


def test_cosine_schedule_is_the_documents():
    """With the clip of their own code."""
    ratio = np.arange(101) / 100
    numerator = np.cos((ratio + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
    alpha_bar = numerator / np.cos(0.008 / (1 + 0.008) * np.pi / 2) ** 2
    ours = diffusion.mask_rate("cosine", torch.from_numpy(ratio)).numpy()
    assert np.abs(ours - np.clip(1 - alpha_bar, 0.0, 0.999)).max() < 1e-14


# ---- the baseline

def test_baseline_is_causal_and_sees_all_that_came_before():
    m = small(objective="ar", block_size=8)
    x = torch.randint(5, (1, 8))
    before = m.logits(x)
    for j in range(8):
        y = x.clone()
        y[0, j] = (y[0, j] + 1) % 5
        changed = (m.logits(y) - before).abs().amax(-1)[0] > 0
        assert changed.tolist() == [i > j for i in range(8)]


def test_batch_rows_are_independent():
    m = small()
    x0 = torch.randint(5, (3, 12))
    known = torch.rand(3, 12) < 0.3
    other = x0.clone()
    other[1:] = (other[1:] + 1) % 5
    results = []
    for x in (x0, other):
        torch.manual_seed(0)
        *_, (x, _) = m.sample(x, known, Sample(steps=5, order="confidence"))
        results.append(x)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("given", ["............", "###.........", "..##.#..####", "#.#.#.#.#.#."])
def test_baseline_writes_what_it_would_without_a_cache(given, fp32):
    """Greedily, the same text as from whole passes; what is known is kept, and no call is made
    before the first blank or after the last."""
    m = small(objective="ar")
    x = torch.randint(5, (4, 12))
    known = torch.tensor([ch == "#" for ch in given]).expand(4, 12)
    frames = list(m.sample(x, known, Sample(temperature=0.0)))
    y, confidence = frames[-1]
    assert len(frames) == given.rfind(".") + 1 - given.find(".")
    assert torch.equal(y[known], x[known]) and (confidence[known] == 1).all()
    assert torch.equal(y[~known], m.logits(y).argmax(-1)[~known])


def descend(m, x0, monkeypatch):
    """Four steps in fp16 on x0; in the last all parameters have a gradient. -> the first loss"""
    monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.float16))
    scaler = torch.amp.GradScaler("cpu", 2.0 ** 10)
    opt = torch.optim.AdamW(m.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        loss = m(x0)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0 ** 10, "gradients overflowed"
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    return losses[0]


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("objective", ["masked", "ar"])
def test_untrained_it_scores_log_V_and_every_parameter_trains(objective, time, monkeypatch):
    c = Masked(objective=objective, time=time, block_size=8, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    m = build(c, {"alphabet": "abcde"})
    loss = descend(m, torch.randint(5, (16, 8)), monkeypatch)
    assert loss == pytest.approx(math.log(5), abs=1e-6)

"""Masked diffusion and its baseline against known answers: enumeration, exact networks."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import config
import diffusion
import generate
import model
from config import Masked, Sample
from diffusion import Autoregressive, MaskedDiffusion
from train import build

SCHEDULES = ["linear", "square", "cosine"]


class Uniform(nn.Module):
    """A network that knows nothing: zero logits over V. It remembers what it was called with."""

    def __init__(self, V):
        super().__init__()
        self.V = V
        self.calls = []

    def forward(self, x, t):
        self.calls.append((x, t))
        return torch.zeros(*x.shape, self.V)


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

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["elbo", "pooled"])
def test_uniform_network_scores_log_V(schedule, loss):
    m = MaskedDiffusion(Uniform(7), 7, schedule, loss)
    x0 = torch.randint(7, (16, 10))
    assert m(x0).item() == pytest.approx(math.log(7), abs=1e-6)
    nats, t = m.bound(x0, torch.rand(16), range(16))
    assert torch.allclose(nats, torch.full((16,), math.log(7)))
    assert ((t * 10).round() == t * 10).all()
    assert Autoregressive(Uniform(7), 7)(x0).item() == pytest.approx(math.log(7), abs=1e-6)


def test_rows_of_a_batch_are_masked_independently():
    """Each row has a stratum of mask rates; where in it, and which positions, is its own draw."""
    torch.manual_seed(0)
    m = MaskedDiffusion(Uniform(3), 3)
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


def test_bound_is_the_average_over_all_orders():
    """Mean over k of the mean over subsets = mean over 24 orders of the chain rule, k/T fed."""
    V, T = 3, 4
    m = MaskedDiffusion(Table(V, T), V)
    x0 = torch.tensor([2, 0, 1, 2])
    chains = []
    for order in itertools.permutations(range(T)):
        nats = 0.0
        for i, position in enumerate(order):
            x = x0.clone()
            x[list(order[i:])] = V
            log_probs = m.net(x[None], torch.tensor([(T - i) / T])).log_softmax(-1)
            nats -= log_probs[0, position, x0[position]].item()
        chains.append(nats / T)
    assert exact_bound(m, x0) == pytest.approx(np.mean(chains), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drawn_bound_and_elbo_loss_are_unbiased(schedule):
    torch.manual_seed(0)
    m = MaskedDiffusion(Table(3, 4), 3, schedule)
    x0 = torch.tensor([2, 0, 1, 2])
    exact = exact_bound(m, x0)
    loss = torch.stack([m(x0.expand(8, 4)) for _ in range(3000)])
    assert abs(loss.mean() - exact) < 5 * loss.std() / 3000 ** 0.5
    nats, _ = m.bound(x0.expand(20000, 4), torch.rand(20000), range(20000))
    assert abs(nats.mean() - exact) < 5 * nats.std() / 20000 ** 0.5


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


def test_cosine_schedule_is_the_documents():
    def documents(t, total_steps):                         # their own code, with the clip
        ratio = t / total_steps
        numerator = np.cos((ratio + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
        alpha_bar = numerator / np.cos(0.008 / (1 + 0.008) * np.pi / 2) ** 2
        return np.clip(1 - alpha_bar, 0.0, 0.999)

    t = torch.arange(101, dtype=torch.float64)
    ours = diffusion.mask_rate("cosine", t / 100).numpy()
    assert np.abs(ours - documents(t.numpy(), 100)).max() < 1e-14


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


def test_baseline_writes_a_long_text_window_by_window(fp32):
    m = small(objective="ar")
    frames = generate.write(m, torch.full((29,), 5), torch.arange(29) < 0, 12,
                            Sample(temperature=0.0, n=2))
    *_, (y, _) = frames
    assert torch.equal(y[:, :12], m.logits(y[:, :12]).argmax(-1))
    for start, new in ((6, 12), (12, 18), (17, 24)):
        greedy = m.logits(y[:, start:start + 12]).argmax(-1)
        assert torch.equal(y[:, new:start + 12], greedy[:, new - start:])


def descend(m, batch, n, half, monkeypatch, init_scale=2.0 ** 16):
    """n steps, if half in fp16 with a scaler; in the last all parameters have a gradient -> losses.
    """
    if half:
        monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.float16))
    scaler = torch.amp.GradScaler("cpu", init_scale, enabled=half)
    opt = torch.optim.AdamW(m.parameters(), 1e-2)
    losses = []
    for _ in range(n):
        opt.zero_grad()
        loss = m(batch())
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() >= min(init_scale, 2.0 ** 10) or not half, "gradients overflowed"
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    return losses


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("objective", ["masked", "ar"])
def test_untrained_it_scores_log_V_and_every_parameter_trains(objective, half, monkeypatch):
    c = Masked(objective=objective, time=not half, block_size=8, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    m = build(c, {"alphabet": "abcde"})
    losses = descend(m, lambda: torch.randint(5, (16, 8)), 4, half, monkeypatch, 2.0 ** 10)
    assert losses[0] == pytest.approx(math.log(5), abs=1e-6)

"""experiments/schedules.py: strata of mask rates, masks and times are enumerated, none is drawn."""
import itertools
import math
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, read_state, run
from test_diffusion import Table, exact_bound
from test_train import signal_at
from torch import nn

from diffusion import MaskedDiffusion
from evaluation.likelihood import open_checkpoint
from experiments import schedules
from experiments.schedules import LearnedSchedule, LossAware, Schedules
from step import reseed

# ---- mask rates by loss


class ByShare(nn.Module):
    """Says of character 0 that its cross-entropy is that of `nats`, at any share masked."""

    def nats(self, t):
        return torch.log1p((3 * t).exp())

    def forward(self, x, t):
        logits = torch.zeros(*x.shape, 2)
        logits[..., 1] = 3 * t[:, None]
        return logits


def strata(m, B, monkeypatch):
    """Low ends, high ends and importance weights of the B strata, each (B,)."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    low, weight = m.sample_mask_rates(B, "cpu")
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    high, _ = m.sample_mask_rates(B, "cpu")
    return low, high, weight


@pytest.mark.parametrize("B", [1, 3, 32])
def test_strata_have_equal_shares_of_the_loss(B, monkeypatch):
    """They are [0, 1] in pieces, over each of which the root mean square has the same integral."""
    m = LossAware(Table(3, 4), 3)
    m.mean_square.copy_(torch.arange(20.0) ** 4 / 100)                 # one is 0
    low, high, weight = strata(m, B, monkeypatch)
    assert low[0] == 0 and high[-1] == 1
    assert torch.allclose(low[1:], high[:-1])
    assert torch.allclose(weight, B * (high - low)) and (weight > 0).all()
    starts = torch.arange(20) / 20
    overlap = torch.minimum(high[:, None], starts + 1 / 20) - torch.maximum(low[:, None], starts)
    share = overlap.clamp(min=0) @ (torch.arange(20.0) ** 2 / 10 + 1e-3)
    assert torch.allclose(share / share.sum(), torch.full((B,), 1 / B), rtol=1e-3)


@pytest.mark.parametrize("mean_square", [torch.ones(20), torch.arange(20.0) ** 2])
def test_the_weighted_loss_is_on_average_the_bound_of_uniform_rates(mean_square, monkeypatch):
    """Averaged over every piece of the strata in which no count changes, and all orders of T."""
    B, T = 3, 4
    m = LossAware(Table(3, T), 3).eval()
    m.mean_square.copy_(mean_square)
    x0 = torch.tensor([2, 0, 1, 2])
    low, high, weight = strata(m, B, monkeypatch)
    width = high - low
    jumps = (torch.arange(T + 1)[:, None] / T - low) / width           # places in the strata
    jumps = [0.0, *sorted(jumps[(jumps > 0) & (jumps < 1)].tolist()), 1.0]
    orders = torch.tensor(list(itertools.permutations(range(T)))).float()
    mean = 0
    for start, end in itertools.pairwise(jumps):
        for order in orders:
            place = torch.full((B,), (start + end) / 2)
            monkeypatch.setattr(torch, "rand_like", lambda width, place=place: place)
            monkeypatch.setattr(torch, "rand", lambda *shape, order=order, **_: order.expand(shape))
            mean += (end - start) / len(orders) * m(x0.expand(B, T)).item()
    assert mean == pytest.approx(exact_bound(m, x0), abs=2e-5)
    assert mean == pytest.approx(exact_bound(MaskedDiffusion(m.net, 3), x0), abs=2e-5)
    assert len(weight.unique()) > 1 or (mean_square == 1).all()


def test_the_estimate_becomes_the_mean_square_of_the_loss():
    torch.manual_seed(0)
    m = LossAware(ByShare(), 2)
    x0 = torch.zeros(64, 20, dtype=torch.long)
    m.update(torch.tensor([0.05, 0.0501, 0.1, 1.0]), torch.tensor([3.0, 2.0, 4.0, 5.0]))
    assert torch.allclose(m.mean_square[[0, 1, -1]], torch.tensor([1.16, 1.18, 1.48]))
    assert (m.mean_square[2:-1] == 1).all()
    for _ in range(400):
        m(x0)
    expected = m.net.nats((torch.arange(20) + 1) / 20) ** 2
    assert torch.allclose(m.mean_square, expected, rtol=0.01)
    m.eval().bound(torch.ones_like(x0), torch.ones(64), range(64))     # an evaluation
    assert torch.allclose(m.mean_square, expected, rtol=0.01)


def test_pooled_is_the_masked_models_as_long_as_the_estimate_is_even():
    x0 = torch.randint(5, (8, 12))
    for loss in ("pooled", "elbo"):
        c = Schedules(loss=loss, n_layer=1, n_head=1, n_embd=16)
        m = schedules.build(c, {"alphabet": "abcde"})
        nn.init.normal_(m.net.head.weight)
        reseed(0)
        ours = m(x0)
        reseed(0)
        theirs = MaskedDiffusion(m.net, 5, "linear", loss)(x0)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


# ---- a schedule for each character

V, T = 3, 3
MASKS = torch.tensor(list(itertools.product([False, True], repeat=T)))
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=T)))
P = torch.linspace(1, 9, len(TEXTS)).double() ** 2
P /= P.sum()
W = torch.tensor([0.5, 1.0, 1.5]).double()
X, GAUSS = [torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40)]
U = (X + 1) / 2                                                        # in (0, 1)


class Oracle(nn.Module):
    """log p(v | what is seen at time t) + const, with or without the factor t^w_v of v itself."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x, t):
        masked = x == V
        fits = (x[:, None] == TEXTS) | masked[:, None]                 # (B, S, T)
        rate = t[:, None, None] ** W[TEXTS] * masked[:, None] + ~masked[:, None]
        joint = P * fits.all(2) * rate.prod(2)                         # (B, S)
        is_v = (TEXTS[..., None] == torch.arange(V)).double()          # (S, T, V)
        posterior = torch.einsum("bs,stv->btv", joint, is_v)
        if not self.own:
            posterior = posterior / t[:, None, None] ** W
        return posterior.clamp(min=1e-300).log()


class Arbitrary(nn.Module):
    """Different logits for each pattern, and time if it is to matter."""

    def __init__(self, timed=True):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.logits = torch.randn((*[V + 1] * T, T, V), generator=g, dtype=torch.float64)
        self.timed = timed

    def forward(self, x, t):
        logits = self.logits[tuple(x.unbind(1))]
        if self.timed:
            logits = logits * (1 + t[:, None, None]) + t[:, None, None] * torch.arange(V)
        return logits


def learned(net, w, tilt):
    m = LearnedSchedule(net, V, tilt).double()
    m.log_w.data.copy_(torch.as_tensor(w).log())
    return m


def masking(w, x0, t):
    """Noise (len(t) 2^T, T) that only just masks the positions of MASKS at times t, no other."""
    m = t[:, None, None] ** w[x0]
    return torch.where(MASKS, 0.999 * m, 1.001 * m).flatten(0, 1)


def mask_prob(w, x0, t):
    """The probability (len(t), 2^T) of each of MASKS at times t."""
    m = t[:, None, None] ** w[x0]                                      # (Q, 1, T)
    return torch.where(MASKS, m, 1 - m).prod(-1)


def enumerated(m, x0, monkeypatch):
    """m.bound of x0 (T,), nats a character, summed over all masks and integrated over u."""
    w = m.log_w.exp().detach()
    rand = masking(w, x0, U ** 2)
    monkeypatch.setattr(schedules, "per_row_noise", lambda seeds, draw, shape: rand)
    u = U.repeat_interleave(len(MASKS))
    nats, level = m.bound(x0.expand(len(rand), -1), u, range(len(rand)))
    assert torch.equal(level, u)
    p = mask_prob(w, x0, U ** 2)
    return (GAUSS / 2 * (p * nats.view(p.shape)).sum(1)).sum().item()


def in_steps(m, x0, N):
    """Of x0 (T,): the bound in N steps back, from t_i = (i / N)^4 to t_(i-1), nats a character."""
    w = m.log_w.exp().detach()
    times = (torch.arange(N + 1).double() / N) ** 4
    total = 0
    for s, t in itertools.pairwise(times):
        xt = torch.where(MASKS, V, x0)
        logits = m.net(xt, t.expand(len(xt)))
        if m.tilt:
            logits = logits + w * t.log()
        p = logits.softmax(-1)                                         # (2^T, T, V)
        leaves = 1 - (s / t) ** w                                      # a masked v, in this step
        q_v = leaves[x0]
        p_v = leaves[x0] * p[:, torch.arange(T), x0]
        stays = 1 - p @ leaves
        kl = torch.xlogy(q_v, q_v / p_v) + torch.xlogy(1 - q_v, 1 - q_v)
        kl = kl - torch.xlogy(1 - q_v, stays)                          # 0 where none stays
        total += (mask_prob(w, x0, t[None])[0] * (kl * MASKS).sum(1)).sum().item()
    return total / T


@pytest.mark.parametrize("tilt", [False, True])
def test_of_an_oracle_every_schedule_has_the_exact_likelihood(tilt, monkeypatch):
    m = learned(Oracle(own=not tilt), W, tilt)
    for i in (0, 5, 15, 26):
        assert T * enumerated(m, TEXTS[i], monkeypatch) == pytest.approx(-math.log(P[i]), abs=1e-4)


@pytest.mark.parametrize("tilt", [False, True])
def test_the_bound_is_that_of_many_small_steps(tilt, monkeypatch):
    """Of any network; what the steps differ by halves with twice as many."""
    m = learned(Arbitrary(), W, tilt)
    for i in (5, 21):
        coarse, fine = [in_steps(m, TEXTS[i], N) for N in (200, 400)]
        assert abs(coarse - fine) > 1e-4
        bound = enumerated(m, TEXTS[i], monkeypatch)
        assert 2 * fine - coarse == pytest.approx(bound, abs=2e-4)


@pytest.mark.parametrize("tilt", [False, True])
def test_with_exponents_of_one_it_is_the_masked_models(tilt, monkeypatch):
    m = LearnedSchedule(Arbitrary(timed=False), V, tilt).double()
    for x0 in TEXTS[[5, 21]]:
        exact = exact_bound(MaskedDiffusion(m.net, V), x0)
        assert enumerated(m, x0, monkeypatch) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("tilt", [False, True])
def test_loss_and_gradient_are_on_average_those_of_the_bound(tilt, monkeypatch):
    """All pairs of masks at all times, weighted, in one batch; the gradient by w against finite
    differences of the enumerated bound."""
    m = learned(Arbitrary(), W, tilt)
    x0 = TEXTS[5]
    n = len(MASKS)
    p = mask_prob(W, x0, U ** 2)                                       # (Q, n)
    pairs = p[:, :, None] * p[:, None, :] * (GAUSS * U)[:, None, None]   # dt = 2 u du
    rand = masking(W, x0, U ** 2).view(-1, n, T)
    first = rand[:, :, None].expand(-1, n, n, T).reshape(-1, T)
    second = rand[:, None].expand(-1, n, n, T).reshape(-1, T)
    t = (U ** 2).repeat_interleave(n * n)
    weight = pairs.flatten() * pairs.numel()
    drawn = t.repeat(2), weight.repeat(2), torch.cat([first, second])
    monkeypatch.setattr(m, "draw", lambda B, T, device: drawn)
    loss = m(torch.cat([x0.expand(len(t), T), TEXTS[:1].expand(len(t), T)]))
    loss.backward()
    assert loss.item() == pytest.approx(enumerated(m, x0, monkeypatch), abs=1e-9)
    for v in range(V):
        ends = []
        for step in (1e-4, -1e-4):
            log_w = W.log()
            log_w[v] += step
            ends.append(enumerated(learned(m.net, log_w.exp(), tilt), x0, monkeypatch))
        slope = (ends[0] - ends[1]) / 2e-4
        assert m.log_w.grad[v].item() == pytest.approx(slope, abs=1e-4)
    assert m.log_w.grad.abs().max() > 0.01


def test_two_equal_masks_have_nothing_to_learn_from_each_other(monkeypatch):
    """Each is the other's baseline: what is left is the gradient of the integrand. At t = 1, where
    all is masked, that is finite."""
    for time in (0.3, 1.0):
        m = learned(Arbitrary(), W, True)
        t = torch.full((10,), time).double()
        rand = torch.linspace(0, 0.99, 5 * T).double().view(5, T).repeat(2, 1)
        monkeypatch.setattr(m, "draw", lambda *shape, t=t, rand=rand: (t, torch.ones(10), rand))
        x0 = TEXTS[[3, 8, 11, 20, 22]].repeat(2, 1)
        expected, = torch.autograd.grad(m.integrand(x0, t, rand)[0].mean(), [m.log_w])
        grad, = torch.autograd.grad(m(x0), [m.log_w])
        assert torch.allclose(grad, expected) and grad.abs().max() > 0.01


def test_two_masks_of_a_text_share_a_time():
    t, weight, rand = LearnedSchedule(Arbitrary(), V).draw(8, 5, "cpu")
    assert torch.equal(t[:4], t[4:]) and (4 * t[:4]).long().tolist() == [0, 1, 2, 3]
    assert weight.tolist() == [1] * 8 and rand.shape == (8, 5) and len(rand.unique()) == 40
    assert LearnedSchedule(Arbitrary(), V).draw(200_000, 1, "cpu")[0].min() == torch.tensor(1e-4)
    nats, _ = learned(Arbitrary(), W, True).bound(TEXTS[:1], torch.zeros(1).double(), [0])
    assert nats.isfinite()


# ---- the script

def test_learned_in_a_process_of_its_own(corpus, tmp_path):
    """It trains w, and evaluation opens what it leaves."""
    out = tmp_path / "run"
    typed = ["-m", "experiments.schedules", "--schedule=learned", corpus, *TINY]
    said = run(*typed, "--max_iters=4", f"--out={out}").stdout.splitlines()
    assert said[-1] == f"done: python -m evaluation --n=0 --out={out}"
    assert "by square root of time up to" in said[-2]
    checkpoint = open_checkpoint(out)
    assert isinstance(checkpoint.method, LearnedSchedule) and checkpoint.method.tilt
    assert read_state(out)["model"]["log_w"].unique().numel() > 5


def test_loss_aware_resumes_to_the_bit(corpus, tmp_path, monkeypatch, capsys):
    """The running mean, too, which training has moved."""
    typed = [corpus, *TINY, "--max_iters=6", "--eval_interval=4"]
    schedules.main([*typed, f"--out={tmp_path}/straight"])
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        schedules.main([*typed, f"--out={tmp_path}/cut"])
    schedules.main(["--resume", f"--out={tmp_path}/cut"])
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    assert read_state(tmp_path / "cut")["model"]["mean_square"].max() > 1
    assert "by share masked up to" in capsys.readouterr().out


def test_what_the_learned_schedule_does_not_take():
    with pytest.raises(SystemExit, match="schedule=learned has loss=elbo"):
        Schedules(schedule="learned", loss="pooled")
    with pytest.raises(SystemExit, match="schedule=learned needs an even batch_size"):
        Schedules(schedule="learned", batch_size=3)
    assert Schedules(loss="pooled", batch_size=3).schedule == "loss-aware"

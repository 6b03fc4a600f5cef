"""Gaussian diffusion of numbers against closed forms: schedules, the papers' losses, Gaussian data,
and the draws that must be independent."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gaussian import (
    GaussianDiffusion, TokenDiffusion, alpha_sigma, log_likelihood, reverse_step)

SCHEDULES = ["linear", "cosine", "sqrt"]
PREDICT = ["x0", "eps", "v"]
GREY = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
MU = 0.3         # of Gaussian data
VAR = 0.2


def sampler(**k):
    return SimpleNamespace(**{**dict(steps=10, sampler="ddim", td=0, two_pass=False), **k})


class Denoiser(nn.Module):
    """A network that gives xhat(z, gamma) as the output of any prediction, and remembers (z, gamma,
    its output)."""

    def __init__(self, xhat, predict, gamma_min, gamma_max):
        super().__init__()
        self.xhat = xhat
        self.predict = predict
        self.ends = gamma_min, gamma_max
        self.calls = []

    def forward(self, z, t):
        gamma = self.ends[0] + t.double() * (self.ends[1] - self.ends[0])
        z = z.double()
        a, s = alpha_sigma(gamma)
        x = self.xhat(z, gamma)
        out = {"x0": x, "eps": (z - a * x) / s, "v": (a * z - x) / s}[self.predict]
        self.calls.append((z, gamma, out))
        return out


def method(xhat, predict="x0", gamma_min=-13.3, gamma_max=10.0, cls=GaussianDiffusion, **k):
    net = Denoiser(xhat, predict, gamma_min, gamma_max)
    return cls(net, GREY, predict=predict, gamma_min=gamma_min, gamma_max=gamma_max, **k)


def zero(z, gamma):
    return torch.zeros_like(z)


def tanh(z, gamma):
    return torch.tanh(z)


def exact(z, gamma):
    """E[x | z] for x ~ N(MU, VAR)."""
    a, s = alpha_sigma(gamma)
    return (MU * s ** 2 + VAR * a * z) / (a ** 2 * VAR + s ** 2)


def at(m, t):
    """alpha and sigma at t, floats."""
    gamma, _ = m.gamma(torch.full((1, 1), t, dtype=torch.float64))
    return [v.item() for v in alpha_sigma(gamma)]


# ---- the forward process

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_only_adds_noise(schedule):
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    m = method(None, schedule=schedule)
    gamma, _ = m.gamma(t)
    assert gamma[0] == -13.3 and gamma[-1] == 10 and (gamma.diff() >= 0).all()
    _, slope = m.gamma((t[1:] + t[:-1]) / 2)
    assert torch.allclose(slope, gamma.diff() / t.diff(), rtol=1e-4, atol=1e-4)
    a, s = alpha_sigma(gamma)
    assert torch.allclose(a ** 2 + s ** 2, torch.ones_like(a)) and (s > 0).all() and (a > 0).all()
    assert torch.allclose((a / s).log(), -gamma[:, None] / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_are_the_papers(schedule):
    """linear: alpha_bar_k = prod (1 - beta_i), beta from 1e-4 to 0.02 (Ho et al. 2020)."""
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    f_0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    truth = {"linear": (1 - beta).cumprod(0)[:-1], "cosine": f / f_0, "sqrt": 1 - (t + 1e-4).sqrt()}
    gamma, _ = method(None, schedule=schedule, gamma_min=-20.0, gamma_max=20.0).gamma(t)
    assert torch.allclose((-gamma).sigmoid(), truth[schedule], rtol=1e-8)


@pytest.mark.parametrize("schedule, B", [("linear", 1), ("sqrt", 5)])
def test_what_training_shows_the_network(schedule, B):
    """alpha x + sigma eps, at times uniform in each B-th of [0, 1]; all draws are independent, of
    times between rows, of eps between rows, positions and from the times."""
    m = method(zero, schedule=schedule, gamma_max=30.0)
    torch.manual_seed(0)
    N = 2000
    for _ in range(N):
        m(torch.full((B, 2), 255))                                     # x = 1
    z = torch.stack([z for z, _, _ in m.net.calls])[..., 0]            # (N, B, 2)
    gamma = torch.stack([gamma for _, gamma, _ in m.net.calls])        # (N, B, 1)
    a, s = alpha_sigma(gamma[..., 0])
    eps = (z - a) / s
    t = np.interp(gamma[..., 0], m.knots, np.linspace(0, 1, 1001))
    place = B * torch.from_numpy(t) - torch.arange(B)                  # in its stratum
    uniform = (torch.arange(N) + 0.5) / N
    assert (place.sort(0).values - uniform[:, None]).abs().max() < 2.2 / N ** 0.5
    assert torch.allclose(eps.std(0), torch.ones_like(eps[0]), atol=0.08)
    draws = torch.cat([place, eps.flatten(1)], 1)
    corr = torch.corrcoef(draws.T) - torch.eye(3 * B)
    assert corr.abs().max() < 5 / N ** 0.5 and eps.mean(0).abs().max() < 5 / N ** 0.5


# ---- losses

@pytest.mark.parametrize("loss", ["simple", "min-snr"])
@pytest.mark.parametrize("predict", PREDICT)
def test_simple_and_min_snr_are_the_papers(predict, loss):
    """simple: the mean squared error of what is predicted, x0, eps or v = alpha eps - sigma x0;
    min-snr: min(snr, 5) |x0 - xhat|^2."""
    x0 = torch.randint(256, (64, 9))
    m = method(tanh, predict, -6.0, 6.0, loss=loss)
    value = m(x0).item()
    (z, gamma, out), = m.net.calls
    x = GREY[x0]
    a, s = alpha_sigma(gamma)
    eps = (z - a * x) / s
    target = {"x0": x, "eps": eps, "v": a * eps - s * x}[predict]
    truth = (target - out).square()
    if loss == "min-snr":
        truth = ((a / s) ** 2).clamp(max=5) * (x - torch.tanh(z)).square()
    assert value == pytest.approx(truth.mean().item(), rel=1e-3)


@pytest.mark.parametrize("schedule, predict", [*zip(SCHEDULES, PREDICT, strict=True)])
def test_the_elbo_loss_is_the_integral_of_the_bound(schedule, predict):
    """1/2 int e^-gamma (x - xhat)^2 dgamma, here with xhat = c: (x - c)^2 (e^-g0 - e^-g1) / 2."""
    def half(z, gamma):
        return torch.full_like(z, 0.5)

    m = method(half, predict, -2.0, 3.0, loss="elbo", schedule=schedule)
    torch.manual_seed(0)
    x0 = torch.tensor([0, 255]).expand(2000, 2)
    mean = np.mean([m(x0).item() for _ in range(30)])
    truth = (1.5 ** 2 + 0.5 ** 2) / 2 * (math.exp(2) - math.exp(-3)) / 2
    assert mean == pytest.approx(truth, rel=0.001)


# ---- sampling

def recursion(m, steps, kind):
    """Mean and variance of what is sampled, for every step is affine in z: an ancestral one by
    equations 6 and 7 of DDPM."""
    mean = 0.0
    var = 1.0
    for i in range(steps, 0, -1):
        a, s = at(m, i / steps)
        b, s_next = at(m, (i - 1) / steps)
        slope = VAR * a / (a ** 2 * VAR + s ** 2)                      # xhat = slope z + shift
        shift = MU * s ** 2 / (a ** 2 * VAR + s ** 2)
        noise = 0.0
        if kind == "ddim":
            k = b * slope + s_next / s * (1 - a * slope)
            d = (b - s_next * a / s) * shift
        else:
            c = 1 - (a * s_next / (b * s)) ** 2
            k = (1 - c) * b / a + c * b * slope
            d = c * b * shift
            noise = c * s_next ** 2
        if i == 1:
            k, d, noise = slope, shift, 0.0
        mean = k * mean + d
        var = k ** 2 * var + noise
    return mean, var


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["ddim", "ancestral"])
def test_samples_of_gaussian_data_follow_the_recursion_which_tends_to_the_truth(kind, schedule):
    m = method(exact, "eps", -9.0, 9.0, schedule=schedule)
    torch.manual_seed(0)
    for steps in (1, 3, 20):
        *_, (y, _) = m.sample(torch.randn(1, 100_000, 1), sampler(steps=steps, sampler=kind))
        mean, var = recursion(m, steps, kind)
        assert y.mean().item() == pytest.approx(mean, abs=6 * (var / 1e5) ** 0.5 + 1e-6)
        assert y.var().item() == pytest.approx(var, rel=0.03)
    # sqrt spends few steps near the clean end: slow
    (_, few), (mean, many) = (recursion(m, steps, kind) for steps in (30, 300))
    assert mean == pytest.approx(MU, abs=0.02)
    assert abs(many - VAR) < min(0.1 if schedule == "sqrt" else 0.02, abs(few - VAR) / 1.5)


@pytest.mark.parametrize("td", [0.5, 10])
def test_asymmetric_intervals_multiply_the_noise_as_derived(td):
    """With xhat = 0 DDIM leaves prod sigma(max(t - (1 + td) / steps, 0)) / sigma(t) of z."""
    m = method(zero, schedule="cosine")
    left = 1.0
    frames = list(m.sample(torch.ones(1, 1, 1), sampler(steps=20, td=td)))
    for i, (z, _) in zip(range(20, 1, -1), frames[:-1], strict=True):
        left *= at(m, max((i - 1 - td) / 20, 0))[1] / at(m, i / 20)[1]
        assert z.item() == pytest.approx(left, rel=1e-6, abs=1e-9)


# ---- the bound

class Continuous(GaussianDiffusion):
    """x0 (B, T) are numbers; p(x | z_0) = N(x; z_0 / alpha_0, sigma_0^2 / alpha_0^2)."""

    def embed_tokens(self, x0):
        return x0[..., None].double()

    def reconstruction(self, x0, z, gamma):
        a, s = alpha_sigma(gamma)
        square = ((x0[..., None] - z / a) * a / s).square()
        return (square / 2 + (s / a).log() + math.log(2 * math.pi) / 2).sum((1, 2))


@pytest.mark.parametrize("high", [10.0, 1.0])
def test_the_bound_of_gaussian_data_is_their_entropy(high):
    """Where the noise stops early, plus KL(q(z_1) || N(0, 1)). The tolerance is for draws that are
    stratified; half of them with noise that is not independent would miss it."""
    torch.manual_seed(0)
    m = method(exact, "v", gamma_max=high, cls=Continuous)
    x = MU + VAR ** 0.5 * torch.randn(4000, 8, dtype=torch.float64)
    rows = []
    for j in range(4):
        u = (torch.randperm(4000) + 0.5) / 4000
        rows.append(m.bound(x, u, range(4000 * j, 4000 * j + 4000))[0])
    a, s = at(m, 1.0)
    mean = a * MU
    var = a ** 2 * VAR + s ** 2
    truth = 0.5 * math.log(2 * math.pi * math.e * VAR) + (var + mean ** 2 - 1 - math.log(var)) / 2
    assert torch.stack(rows).mean().item() == pytest.approx(truth, abs=0.01)


def test_the_draws_of_a_row_do_not_depend_on_the_batch():
    m = method(tanh)
    x0 = torch.randint(256, (6, 9))
    u = torch.rand(6)
    whole = m.bound(x0, u, range(6))[0]
    assert torch.allclose(whole[2:4], m.bound(x0[2:4], u[2:4], [2, 3])[0])
    assert not torch.allclose(whole[2:4], m.bound(x0[2:4], u[2:4], [2, 4])[0])


@pytest.mark.parametrize("way", ["bound", "forward", "sample"])
def test_the_draws_of_tokens_are_independent(way):
    """Of the noise, in the bound of the integral and of the reconstruction, and of the order in
    which positions are clean: from each other, between positions, and from those of the next row.
    """
    class Spy(TokenDiffusion):
        def reconstruction(self, x0, z, gamma):
            eps.append(z / alpha_sigma(gamma)[1])
            return torch.zeros(len(x0))

    class Net(nn.Module):
        def forward(self, x, t):
            calls.append((x.double(), t.double()))
            return torch.zeros(*x.shape[:2], 1)

    torch.manual_seed(0)
    N = 4000
    calls = []
    eps = []
    x0 = torch.zeros(N, 3, dtype=torch.long)               # of one token, whose code is 0
    m = Spy(Net(), torch.zeros(1, 2), gamma_min=-3.0, gamma_max=3.0, stagger=3.0)
    if way == "bound":
        m.bound(x0, torch.rand(N), torch.randint(2 ** 32, (N,)).tolist())
    elif way == "forward":
        m(x0)
    else:
        list(m.sample(x0, x0 > 0, sampler(steps=2)))
    z, t = calls[0]
    eps.append(z / alpha_sigma(6 * t - 3)[1])
    eps = torch.cat(eps, 2).flatten(1)                     # (N, 12), or (N, 6)
    place = calls[-1][1] - calls[-1][1].mean(1, keepdim=True)          # (N, 3), early or late
    n = eps.size(1)
    assert (eps.std(0) - 1).abs().max() < 0.08 and eps.mean(0).abs().max() < 5 / N ** 0.5
    assert place.mean(0).abs().max() < 0.03 and place.std() > 0.1
    draws = torch.cat([eps, place], 1)
    corr = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], 1).T)
    assert corr[:n + 3, n + 3:].abs().max() < 5 / N ** 0.5             # with the next row
    assert (corr[:n + 3, :n] - torch.eye(n + 3)[:, :n]).abs().max() < 5 / N ** 0.5


@pytest.mark.parametrize("end, low, high", [(-13.3, 0.0, 0.02), (-9.2, 0.5, 2.5)])
def test_grey_levels_reconstruct_at_the_clean_end(end, low, high):
    """At gamma_0 = -13.3 a level is six sigma from the next: -log p is nearly 0 bits. At -9.2,
    DDPM's own end, it costs over a bit."""
    x0 = torch.randint(256, (8, 784))
    m = method(None, gamma_min=end)
    gamma = torch.full((8, 1), end, dtype=torch.float64)
    a, s = alpha_sigma(gamma)
    z = a * m.embed_tokens(x0) + s * torch.randn(8, 784, 1)
    bits = m.reconstruction(x0, z, gamma).mean().item() / 784 / math.log(2)
    assert low <= bits <= high


@pytest.mark.parametrize("table", [GREY, torch.randn(27, 6).double() * 2], ids=["grey", "codes"])
def test_log_likelihood_is_the_normal_density(table):
    """log N(z; alpha x, sigma^2), up to a constant of each position: of every row of the table,
    rows of any length, levels above z and below, at one noise level or one a position."""
    torch.manual_seed(0)
    z = torch.randn(3, 7, table.size(1), dtype=torch.float64).clamp(-1, 1)
    for end in (-13.3, -5.0, 0.0, 8.0):
        for shape in ((3, 1), (3, 7)):
            gamma = end + torch.rand(shape).double()
            a, s = alpha_sigma(gamma)
            normal = torch.distributions.Normal(a[..., None] * table, s[..., None])
            truth = normal.log_prob(z[:, :, None]).sum(-1)             # (3, 7, V)
            ours = log_likelihood(z, gamma, table).double()
            truth = truth - truth.amax(-1, keepdim=True)
            ours = ours - ours.amax(-1, keepdim=True)
            near = truth > -30
            assert torch.allclose(ours[near], truth[near], atol=0.05)
            assert (ours[~near] < -25).all()
            assert torch.allclose(ours.softmax(-1), truth.softmax(-1), atol=1e-3)


# ---- steps

@pytest.mark.parametrize("predict", PREDICT)
def test_ddim_goes_straight_to_the_datum_of_an_oracle(predict):
    """On any sub-grid z = alpha x + sigma eps, with the eps of the start."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 2, dtype=torch.float64) * 2 - 1
    m = method(lambda z, gamma: x, predict)
    a, s = at(m, 1.0)
    start = torch.randn(4, 3, 2)
    for steps in (1, 2, 7, 50):
        *frames, (y, _) = m.sample(start, sampler(steps=steps))
        assert len(frames) == steps - 1 and torch.allclose(y, x, atol=1e-3)
        for i, (z, _) in zip(range(steps - 1, 0, -1), frames, strict=True):
            b, s_next = at(m, i / steps)
            assert torch.allclose((z - b * x) / s_next, (start - a * x) / s, atol=0.01)


@pytest.mark.parametrize("k", [1, 300])
def test_the_ancestral_step_is_the_posterior_of_ddpm(k):
    """q(x_{t-1} | x_t, x0): mean and variance in the paper's equations 6 and 7."""
    torch.manual_seed(0)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    z = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    x = torch.full((1, 1, 1), -0.4, dtype=torch.float64)
    mean = bar[k - 1].sqrt() * beta[k] * x + (1 - beta[k]).sqrt() * (1 - bar[k - 1]) * z
    mean = mean / (1 - bar[k])
    var = (1 - bar[k - 1]) / (1 - bar[k]) * beta[k]
    gamma, gamma_next = [-(v / (1 - v)).log().view(1, 1) for v in (bar[k], bar[k - 1])]
    y = reverse_step(z.expand(2, 20000, 1), x, gamma, gamma_next, "ancestral")
    assert (y.mean() - mean).abs() < 5 * (var / 40000) ** 0.5
    assert (y.var() / var - 1).abs() < 0.04

"""Gaussian diffusion against closed forms: the forward process, DDPM's posterior, oracles, Gaussian data, a discrete source."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion import ALPHA_BAR, XHAT, CodeDiffusion, GaussianDiffusion, clean_part, scales
from mnist_ddpm import LevelDigits
from train import evaluate


def sampler(**k):
    return SimpleNamespace(**{"steps": 10, "sampler": "ddim", "td": 0, "guidance": 1, "clip": False, **k})


class Denoiser(nn.Module):
    """A network that gives xhat(z, gamma) as the output of any prediction. x is z: there are no conditions."""

    def __init__(self, xhat, predict, ends):
        super().__init__()
        self.xhat, self.predict, self.ends = xhat, predict, ends

    def forward(self, z, t):
        gamma = self.ends[0] + t.double() * (self.ends[1] - self.ends[0])
        (a, s), z = scales(gamma), z.double()
        x = self.xhat(z, gamma)
        return {"x0": x, "eps": (z - a * x) / s, "v": (a * z - x) / s}[self.predict]


def method(xhat, predict="x0", ends=(-13.3, 10.0), **k):
    return GaussianDiffusion(Denoiser(xhat, predict, ends), predict=predict, ends=ends, **k)


def ts(n=1001):
    return torch.linspace(0, 1, n, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ALPHA_BAR)
def test_no_schedule_is_ever_not_a_number_and_all_only_add_noise(schedule):
    gamma, slope = method(None, schedule=schedule).gamma(ts(100_001))
    assert gamma.isfinite().all() and (gamma.diff() >= 0).all() and slope.isfinite().all() and (gamma[0], gamma[-1]) == (-13.3, 10)
    a, s = scales(gamma)
    assert torch.allclose(a ** 2 + s ** 2, torch.ones(1, dtype=torch.float64)) and (s > 0).all() and (a > 0).all()


def test_linear_is_ddpm_at_its_thousand_steps():
    """alpha_bar_k = prod (1 - beta_i), beta from 1e-4 to .02 (Ho et al. 2020)."""
    truth = (1 - torch.linspace(1e-4, .02, 1000, dtype=torch.float64)).cumprod(0)
    assert truth[-1].item() == pytest.approx(4.04e-5, rel=.01)
    a, _ = scales(method(None, schedule="linear", ends=(-20., 20.)).gamma(ts()[1:-1])[0])
    assert torch.allclose(a.flatten() ** 2, truth[:-1], rtol=1e-8)


@pytest.mark.parametrize("schedule", ALPHA_BAR)
def test_where_training_looks_does_not_depend_on_the_batch(schedule):
    """The share of draws below gamma = -9 and -3 is that of uniform t, for batches of 1 and of 64."""
    seen = {}

    class Spy(nn.Module):
        def forward(self, z, t):
            seen.setdefault(B, []).append(t.flatten())
            return z * 0

    m = GaussianDiffusion(Spy(), schedule=schedule)
    torch.manual_seed(0)
    for B, times in ((1, 6400), (64, 100)):
        for _ in range(times):
            m((torch.zeros(B, 1, 1, dtype=torch.long), torch.zeros(B, 1, 0)))
    for level in (-9., -3.):
        truth = (m.gamma(ts(100_001))[0] < level).double().mean().item()
        for B in (1, 64):
            share = (torch.cat(seen[B]) * 23.3 - 13.3 < level).float().mean().item()
            assert abs(share - truth) < 4 * (truth * (1 - truth) / 6400) ** .5 + 1e-3, (B, share, truth)


def test_the_ancestral_step_is_ddpms_posterior():
    """q(x_{t-1} | x_t, x0): mean and variance in the paper's equations 6 and 7."""
    m, betas = method(None), torch.linspace(1e-4, .02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    torch.manual_seed(0)
    for k in (1, 7, 300, 999):
        z, x = torch.tensor([[[.7]]], dtype=torch.float64), torch.tensor([[[-.4]]], dtype=torch.float64)
        mean = bar[k - 1].sqrt() * betas[k] / (1 - bar[k]) * x + (1 - betas[k]).sqrt() * (1 - bar[k - 1]) / (1 - bar[k]) * z
        var = (1 - bar[k - 1]) / (1 - bar[k]) * betas[k]
        gamma, to = (-(v / (1 - v)).log().view(1, 1) for v in (bar[k], bar[k - 1]))
        draws = m.step(z.expand(40000, 1, 1), x, gamma, to, sampler(sampler="ancestral"))
        assert draws.mean().item() == pytest.approx(mean.item(), abs=5 * (var / 40000).sqrt().item())
        assert draws.var().item() == pytest.approx(var.item(), rel=.04)


def test_training_sees_q_of_zt_given_x0():
    """What reaches the network is alpha x + sigma eps: its mean and variance at every level, for a constant image."""
    seen = []

    class Spy(nn.Module):
        def forward(self, z, t):
            seen.append((z[:, 0, 0], t[:, 0]))
            return z * 0

    m = GaussianDiffusion(Spy())
    torch.manual_seed(0)
    for _ in range(2000):
        m((torch.full((16, 1, 1), 255), torch.zeros(16, 1, 0)))
    z, t = (torch.stack(v) for v in zip(*seen, strict=True))
    a, s = (v.view(t.shape) for v in scales((-13.3 + t.double() * 23.3).view(-1, 1)))
    r = (z - a) / s                                                                   # standard normal if the process is right
    assert (r.mean(0).abs() < 5 / 2000 ** .5).all() and ((r.var(0) - 1).abs() < .2).all()


@pytest.mark.parametrize("schedule", ALPHA_BAR)
@pytest.mark.parametrize("predict", XHAT)
def test_ddim_with_an_oracle_returns_the_datum(schedule, predict):
    """On any sub-grid, from any start; ancestral steps too, since the last one returns xhat."""
    x = torch.rand(4, 3, 2, dtype=torch.float64) * 2 - 1
    m = method(lambda z, g: x, predict, schedule=schedule)
    for steps in (1, 2, 7, 50):
        for kind in ("ddim", "ancestral"):
            start = torch.randn(4, 3, 2)
            *frames, (y, xhat) = m.sample(start, torch.zeros(4, 3, 0), sampler(steps=steps, sampler=kind))
            assert len(frames) == steps - 1 and torch.allclose(y, x, atol=1e-3) and torch.equal(y, xhat)
            (a, s), eps = scales(m.gamma(torch.ones(1, 1))[0]), None
            for i, (z, _) in zip(range(steps - 1, 0, -1), frames, strict=True):       # all the way z = alpha x + sigma eps, eps that of the start
                b, s_to = scales(m.gamma(torch.full((1, 1), i / steps).double())[0])
                eps = (z - b * x) / s_to
                assert kind == "ancestral" or torch.allclose(eps, (start - a * x) / s, atol=1e-2)
            assert kind == "ddim" or eps is None or not torch.allclose(eps, (start - a * x) / s, atol=.1)


def test_the_three_predictions_give_the_same_step():
    xhat = lambda z, g: torch.tanh(z) * .8                                            # any denoiser
    z, out = torch.randn(5, 3, 2), {}
    for predict in XHAT:
        out[predict] = [f[0] for f in method(xhat, predict, ends=(-8., 8.)).sample(z, torch.zeros(5, 3, 0), sampler(steps=6))]
    for a, b, c in zip(*out.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize("predict", XHAT)
def test_losses_are_one_squared_error_in_other_units(predict):
    """With weight=elbo every prediction has the same loss for the same denoiser; min-SNR is min(snr, 5) (x - xhat)^2 for all three."""
    xhat = lambda z, g: torch.tanh(z)
    batch = torch.randint(256, (64, 9, 4)), torch.zeros(64, 9, 0)
    for weight in ("elbo", "min-snr"):
        losses = []
        for p in (predict, "x0"):
            torch.manual_seed(0)
            losses.append(method(xhat, p, ends=(-6., 6.), weight=weight)(batch).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("predict", XHAT)
def test_simple_and_min_snr_are_the_papers(predict):
    """simple: the mean squared error of what the network predicts, x0, eps or v = alpha eps - sigma x0; min-snr: min(snr, 5) |x0 - xhat|^2."""
    seen, x0 = [], torch.randint(256, (64, 9, 4))

    class Net(nn.Module):
        def forward(self, z, t):
            seen.append((z.double(), t.double() * 12 - 6, torch.tanh(z)))
            return seen[-1][2]

    for weight in ("simple", "min-snr"):
        m = GaussianDiffusion(Net(), predict, "cosine", weight, ends=(-6., 6.))
        loss = m((x0, torch.zeros(64, 9, 0))).item()
        (z, gamma, out), x = seen[-1], m.clean(x0)
        a, s = scales(gamma)
        eps = (z - a * x) / s
        target = {"x0": x, "eps": eps, "v": a * eps - s * x}[predict]
        error = (target - out).square()
        per_x = {"x0": error, "eps": error * s ** 2 / a ** 2, "v": error * s ** 2}[predict]                     # |x0 - xhat|^2
        truth = error if weight == "simple" else ((a / s) ** 2).clamp(max=5) * per_x
        assert loss == pytest.approx(truth.mean().item(), rel=1e-3)


@pytest.mark.parametrize("ends", [(-2., 3.), (-6., 4.)])
@pytest.mark.parametrize("schedule", ALPHA_BAR)
def test_the_elbo_loss_is_the_integral_of_the_bound_under_any_schedule(schedule, ends):
    """Its mean over draws is 1/2 int e^-gamma (x - xhat)^2 dgamma, here in closed form: xhat = c, so (x - c)^2 (e^-g0 - e^-g1) / 2."""
    x0 = torch.tensor([[[0, 255]]])
    m = method(lambda z, g: torch.full_like(z, .5), weight="elbo", schedule=schedule, ends=ends)
    torch.manual_seed(0)
    mean = sum(m((x0.expand(2000, 1, 2), torch.zeros(2000, 1, 0))).item() for _ in range(30)) / 30
    truth = (1.5 ** 2 + .5 ** 2) / 2 * (math.exp(-ends[0]) - math.exp(-ends[1])) / 2
    assert mean == pytest.approx(truth, rel=.2 if schedule == "sqrt" else .03)      # sqrt has a thousandth of its draws below -4.6


# ---- Gaussian data: x ~ N(mu, var), whose exact denoiser and every marginal of the samplers are known

MU, VAR = .3, .2


def exact(z, gamma):
    a, s = scales(gamma)
    return (MU * s ** 2 + VAR * a * z) / (a ** 2 * VAR + s ** 2)


def recursion(m, steps, kind):
    """Mean and variance of the sampler's result, step by step: every step is affine in z."""
    mean, var = torch.zeros(()).double(), torch.ones(()).double()
    for i in range(steps, 0, -1):
        gamma, to = (m.gamma(torch.tensor([[v / steps]]).double())[0] for v in (i, i - 1))
        (a, s), (b, s_to) = ([v.flatten() for v in scales(g)] for g in (gamma, to))
        slope, shift = VAR * a / (a ** 2 * VAR + s ** 2), MU * s ** 2 / (a ** 2 * VAR + s ** 2)      # xhat = slope z + shift
        c = -torch.expm1(to - gamma).flatten()
        if i == 1:
            k, d, extra = slope, shift, 0
        elif kind == "ddim":
            k, d, extra = b * slope + s_to / s * (1 - a * slope), (b - s_to * a / s) * shift, 0
        else:
            k, d, extra = (1 - c) * b / a + c * b * slope, c * b * shift, c * s_to ** 2
        mean, var = k * mean + d, k ** 2 * var + extra
    return mean.item(), var.item()


@pytest.mark.parametrize("schedule", ALPHA_BAR)
@pytest.mark.parametrize("kind", ["ddim", "ancestral"])
def test_samples_of_gaussian_data_follow_the_recursion_which_tends_to_the_truth(kind, schedule):
    m = method(exact, "eps", schedule=schedule, ends=(-9., 9.))
    torch.manual_seed(0)
    for steps in (1, 3, 20):
        *_, (y, _) = m.sample(torch.randn(100_000, 1, 1), torch.zeros(100_000, 1, 0), sampler(steps=steps, sampler=kind))
        mean, var = recursion(m, steps, kind)
        assert y.mean().item() == pytest.approx(mean, abs=6 * (var / 1e5) ** .5 + 1e-6) and y.var().item() == pytest.approx(var, rel=.03)
    errors = [abs(recursion(m, steps, kind)[1] - VAR) for steps in (30, 300, 3000)]   # sqrt spends few steps near the clean end: slow
    assert recursion(m, 3000, kind)[0] == pytest.approx(MU, abs=.01) and errors[2] < (.03 if schedule == "sqrt" else .002)
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


class Continuous(GaussianDiffusion):
    """x0 are numbers; p(x | z_0) = N(x; z_0 / alpha_0, sigma_0^2 / alpha_0^2)."""

    def clean(self, x0):
        return x0.double()

    def reconstruction(self, x0, z):
        a, s = scales(z.new_tensor([self.ends[0]]))
        return (((x0 - z / a) * a / s).square() / 2 + (s / a).log() + math.log(2 * math.pi) / 2).sum((1, 2))


@pytest.mark.parametrize("high", [10., 1.])
def test_the_bound_of_gaussian_data_under_its_exact_denoiser_is_its_entropy(high):
    """And where the noise stops early, the entropy plus KL(q(z_1) || N(0, 1)). Tolerance .01: the draws are stratified."""
    m = Continuous(Denoiser(exact, "v", (-13.3, high)), predict="v", ends=(-13.3, high))
    x = MU + VAR ** .5 * torch.randn(4000, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [m.bound(x, (torch.randperm(4000, generator=torch.Generator().manual_seed(j)) + .5) / 4000, [4000 * j + i for i in range(4000)])[0]
            for j in range(4)]
    a, s = (v.item() for v in scales(torch.tensor([high]).double()))
    mean, var = a * MU, a ** 2 * VAR + s ** 2
    truth = .5 * math.log(2 * math.pi * math.e * VAR) + (var + mean ** 2 - 1 - math.log(var)) / 2
    assert torch.stack(rows).mean().item() == pytest.approx(truth, abs=.01)


# ---- a discrete source: 27 symbols after Zipf, independent; entropy 3.969 bits

P = 1 / torch.arange(1, 28, dtype=torch.float64)
P /= P.sum()
TABLES = {"bits": torch.tensor([[1. if i >> k & 1 else -1. for k in range(5)] for i in range(27)]), "one-hot": torch.eye(27),
          "unit": nn.functional.normalize(torch.randn(27, 16, generator=torch.Generator().manual_seed(0)), dim=1)}


class Codes(GaussianDiffusion):
    """x0 (B, T) are symbols, clean gives their codes, denoise is Bayes' rule: p(i | z) in proportion to p_i exp(-|z - a C_i|^2 / 2 s^2)."""

    def __init__(self, table, **k):
        super().__init__(None, **k)
        self.table = table.double()

    def clean(self, x0):
        return self.table[x0]

    def posterior(self, z, gamma):
        a, s = scales(gamma)
        return ((a * (z @ self.table.T) - a ** 2 * self.table.square().sum(1) / 2) / s ** 2 + P.log()).log_softmax(-1)

    def denoise(self, z, gamma, extra):
        return self.posterior(z, gamma).exp() @ self.table

    def reconstruction(self, x0, z):
        logp = self.posterior(z, z.new_tensor([self.ends[0]]))
        return -logp.gather(-1, x0[..., None]).sum((1, 2))


@pytest.mark.parametrize("code", TABLES)
def test_the_bound_of_a_known_source_under_bayes_is_its_entropy(code):
    """3.969 bits for every code; and with weight=elbo the training loss under every schedule is the bound's integral."""
    H = -(P * P.log()).sum().item()
    assert H / math.log(2) == pytest.approx(3.969, abs=.001)
    x0 = torch.multinomial(P, 3000 * 16, replacement=True, generator=torch.Generator().manual_seed(0)).view(3000, 16)
    surprise = -P.log()[x0].mean().item()                                             # of this draw; its mean is the entropy
    m, dims = Codes(TABLES[code], ends=(-6., 8.)), TABLES[code].size(1)
    bound = evaluate(m, x0, 8, batch_size=2000)["bound"]
    assert bound == pytest.approx(surprise, abs=.04) and abs(surprise - H) < .02      # .04 nats: four Monte Carlo errors
    torch.manual_seed(0)
    a, s = scales(torch.full((3000, 1), -6.).double())
    x = m.clean(x0)
    ends = m.reconstruction(x0, a * x + s * torch.randn(x.shape)).mean().item() / 16
    for schedule in ALPHA_BAR:
        m = Codes(TABLES[code], schedule=schedule, weight="elbo", ends=(-6., 8.))
        integral = dims * sum(m((x0, torch.zeros(3000, 16, 0))).item() for _ in range(8)) / 8
        assert integral + ends == pytest.approx(surprise, abs=.15 if schedule == "sqrt" else .06), schedule


def test_grey_levels_reconstruct_at_the_clean_end():
    """At gamma_0 = -13.3 a level is six sigma from the next: log p is nearly 0; at -9.2, DDPM's own end, it costs over a bit (design)."""
    x0 = torch.randint(256, (8, 49, 16))
    m = method(None)
    for end, low, high in ((-13.3, 0, .02), (-9.2, .5, 2.5)):
        m.ends = (end, 10.)
        a, s = scales(torch.full((8, 1), end, dtype=torch.float64))
        bits = m.reconstruction(x0, a * m.clean(x0) + s * torch.randn(x0.shape)).mean().item() / 784 / math.log(2)
        assert low <= bits <= high


def test_asymmetric_intervals_multiply_the_noise_as_derived():
    """With xhat held fixed, DDIM leaves the noise prod sigma(max(t - (1 + td) d, 0)) / sigma(t) of the first; td = 0 is the plain step."""
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    m = method(lambda z, g: x, schedule="cosine")
    sigma = lambda t: scales(m.gamma(torch.tensor([t]).double())[0])[1].item()
    z0 = torch.ones(1, 1, 1)
    plain, by_hand = z0.double(), []
    for i in range(20, 0, -1):
        gamma, to = (m.gamma(torch.tensor([[at / 20]], dtype=torch.float64))[0] for at in (i, i - 1))
        plain = m.step(plain, x, gamma, to, sampler()) if i > 1 else x
        by_hand.append(plain.item())
    for td in (0, .5, 2, 10):
        frames, left = [f[0].item() for f in m.sample(z0, torch.zeros(1, 1, 0), sampler(steps=20, td=td))], 1.0
        for i, z in zip(range(20, 1, -1), frames[:-1], strict=True):
            left *= sigma(max((i - 1 - td) / 20, 0)) / sigma(i / 20)
            assert z == pytest.approx(left, rel=1e-6, abs=1e-9)
        assert td or frames == by_hand


def test_guidance_goes_from_unconditional_through_conditional_and_on():
    class Conditional(nn.Module):
        def forward(self, z, t):
            return z[..., -1:] * .5                                                   # xhat = half the condition

    m = GaussianDiffusion(Conditional(), predict="x0")
    for w, truth in ((0, 0), (1, .5), (1.5, .75), (4, 1)):                            # 4: clipped
        *_, (y, _) = m.sample(torch.randn(3, 5, 1), torch.ones(3, 5, 1), sampler(guidance=w, clip=True))
        assert torch.allclose(y, torch.full_like(y, truth))


def test_the_draws_of_a_row_do_not_depend_on_the_batch():
    m, x0 = method(lambda z, g: torch.tanh(z)), torch.randint(256, (6, 9, 4))
    u, seeds = torch.rand(6), list(range(6))
    whole = m.bound(x0, u, seeds)[0]
    assert torch.allclose(whole[2:4], m.bound(x0[2:4], u[2:4], seeds[2:4])[0])


# ---- tokens through codes

PLAIN = dict(sampler="ddim", td=0, twice=False, replace=False)


class Says(nn.Module):
    """A network that says the same logits (n,) at every position; fed nothing but what CodeDiffusion feeds."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, t):
        return self.logits.expand(*x.shape[:2], -1)


CODES = {**TABLES, "unequal": torch.randn(27, 6, generator=torch.Generator().manual_seed(1)) * torch.linspace(.5, 3, 27)[:, None],
         "grey": torch.linspace(-1, 1, 256)[:, None]}


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("code", CODES)
def test_a_silent_network_has_the_bound_log_V(code, spread):
    """The analytic prior alone: -log p of any token is log V, several tokens to a position too, all together or in turns."""
    table = CODES[code]
    V, ends = len(table), (-13.3 if code == "grey" else -8., 10.)
    m = CodeDiffusion(Says(torch.zeros(2 * V)), table, ends=ends, spread=spread)
    x0 = torch.randint(V, (1000, 8, 2), generator=torch.Generator().manual_seed(0))
    e = evaluate(m, x0, 8)
    assert e["bound"] == pytest.approx(math.log(V), abs=max(.015 * math.log(V), 4 * e["stderr"]))


@pytest.mark.parametrize("code", TABLES)
def test_a_network_that_knows_the_source_has_its_entropy(code):
    x0 = torch.multinomial(P, 3000 * 16, replacement=True, generator=torch.Generator().manual_seed(0)).view(3000, 16, 1)
    m = CodeDiffusion(Says(P.log().float()), TABLES[code], ends=(-6., 8.))
    assert evaluate(m, x0, 8)["bound"] == pytest.approx(-P.log()[x0].mean().item(), abs=.04)


JOINT = torch.tensor([.3, .02, .1, .01, .05, .2, .02, .3])                             # of three tokens 0 and 1 that depend on each other
STATES = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])


class Bayes(nn.Module):
    """The exact denoiser of three tokens drawn from JOINT, each at a noise level of its own: logits of what the other two tell."""

    def __init__(self, table, ends):
        super().__init__()
        self.table, self.ends = table.double(), ends

    def forward(self, x, t):
        z, gamma = x.double(), (self.ends[0] + t.double() * (self.ends[1] - self.ends[0])).expand(len(x), 3)
        a, s = scales(gamma)
        told = -(z[:, :, None] - a[..., None] * self.table).square().sum(-1) / (2 * s ** 2)               # (B, 3, 2)
        state = (JOINT.double().log() + sum(told[:, i, STATES[:, i]] for i in range(3))).softmax(-1)     # (B, 8)
        one = torch.stack([state[:, STATES[:, i] == 1].sum(1) for i in range(3)], 1).clamp(1e-30, 1)
        zero = torch.stack([state[:, STATES[:, i] == 0].sum(1) for i in range(3)], 1).clamp(1e-30, 1)
        return (torch.stack([zero, one], -1).log() - told.log_softmax(-1)).float()


@pytest.mark.parametrize("spread", [0, 1, 6])
def test_in_any_order_the_bound_of_a_known_joint_source_is_its_entropy_and_samples_follow_it(spread):
    ends, table = (-4., 6.), torch.tensor([[-1., 1.], [1., 1.]])
    m = CodeDiffusion(Bayes(table, ends), table, ends=ends, spread=spread)
    x0 = STATES[torch.multinomial(JOINT, 12000, replacement=True, generator=torch.Generator().manual_seed(0))][..., None]
    code = (x0[..., 0] * torch.tensor([4, 2, 1])).sum(1)
    e = evaluate(m, x0, 8, batch_size=4000)
    assert e["bound"] == pytest.approx(-JOINT.log()[code].mean().item() / 3, abs=.03)
    torch.manual_seed(0)
    how = sampler(**PLAIN | {"steps": 25 * (1 + spread), "sampler": "ancestral"})
    *_, (y, _) = m.sample(torch.zeros(3000, 3, 1, dtype=torch.long), torch.zeros(3000, 3).bool(), how)
    share = (y[..., 0] * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8) / 3000
    assert (share - JOINT).abs().sum() / 2 < .05


def test_turns():
    """All begin as noise and end clean, each in a 1 / (1 + spread)-th of the time, evenly in random order; without spread all at once."""
    m, times = CodeDiffusion(Says(torch.zeros(27)), TABLES["unit"], spread=3.), torch.linspace(0, 1, 2001).double()
    u = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    own, speed = (torch.stack(parts) for parts in zip(*(m.turns(t.expand(5, 1), lambda: u) for t in times), strict=True))   # (2001, 5, 40)
    assert (own[0] == 0).all() and (own[-1] == 1).all() and (own.diff(dim=0) >= 0).all()
    assert set(speed.unique().tolist()) == {0, 4} and torch.allclose((speed > 0).double().mean(0), torch.full((5, 40), .25).double(), atol=1e-3)
    clean_at = (own == 0).sum(0).double() / 2001                                      # the least of the order is clean last, on the way back
    assert torch.allclose(clean_at.sort(1).values, .75 * (torch.arange(40) + .5).expand(5, 40).double() / 40, atol=2e-3)
    assert len({tuple(row.argsort().tolist()) for row in clean_at}) == 5
    together = CodeDiffusion(Says(torch.zeros(27)), TABLES["unit"])
    assert together.turns(times[:, None], None)[0].equal(times[:, None]) and together.turns(times[:, None], None)[1] == 1


def test_tokens_that_are_clean_do_not_count_and_all_others_do():
    """spread: tokens whose turn is yet to come (pure noise) train the network too; those that are clean would only flatter the loss."""
    m, seen = CodeDiffusion(Says(torch.zeros(27)), TABLES["unit"], ends=(-6., 8.), spread=5.), []
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    x0 = torch.randint(27, (64, 30, 1))
    wrong = nn.functional.one_hot((x0[..., 0] + 1) % 27, 27)
    m.net.logits = 1e6 * wrong                                                        # whatever z says
    noisy = lambda: seen[-1] > 0
    assert m((x0, torch.zeros(64, 30, 0))).item() > 9e5 and .3 < noisy().float().mean() < .7   # the mean over the noisy ones alone
    torch.manual_seed(0)
    m((x0, torch.zeros(64, 30, 0)))
    m.net.logits = 1e6 * wrong * ~noisy()[..., None]
    torch.manual_seed(0)
    assert m((x0, torch.zeros(64, 30, 0))).item() < 4


def test_the_hint_is_what_z_says():
    m, seen = CodeDiffusion(Says(torch.zeros(27)), CODES["unequal"], selfcond=True, hint=True), []
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z, gamma = torch.randn(2, 5, 6).double(), torch.tensor([[-1.], [1.]]).double()
    m.logits(z, gamma, z.new_zeros(2, 5, 0), z * 0 + .5)
    shown, hint, before = seen[0].split([6, 27, 6], -1)
    assert torch.equal(shown, z.float()) and (before == .5).all()
    assert torch.allclose(hint.double(), m.told(z, gamma)[:, :, 0].softmax(-1), atol=1e-6)


def test_an_oracle_returns_the_tokens_and_its_bound_is_the_prior_kl():
    table = TABLES["unit"]
    x0 = torch.randint(27, (4, 9, 1))

    class Oracle(nn.Module):
        def forward(self, x, t):
            return 1e4 * nn.functional.one_hot(x0[:, :, 0], 27).float()

    m = CodeDiffusion(Oracle(), table, ends=(-8., 5.))
    nats, _ = m.bound(x0, torch.tensor([.1, .3, .6, .9]), [0, 1, 2, 3])
    a, s = (v.item() for v in scales(torch.tensor([[5.]]).double()))
    kl = (a ** 2 + 16 * (s ** 2 - 1 - 2 * math.log(s))) / 2                           # |C| = 1, 16 dimensions
    assert torch.allclose(nats, torch.full_like(nats, kl), atol=1e-6)
    nothing = torch.zeros(4, 9, dtype=torch.bool)
    for s in (sampler(steps=1, **PLAIN), sampler(steps=7, **PLAIN), sampler(steps=5, **PLAIN | {"sampler": "ancestral"})):
        *_, (y, p) = m.sample(torch.zeros_like(x0), nothing, s)
        assert torch.equal(y, x0) and (p == 1).all()


def test_what_z_says_is_bayes_rule_and_grey_levels_take_the_short_way():
    m = CodeDiffusion(Says(torch.zeros(27)), CODES["unequal"])
    z, gamma = torch.randn(2, 5, 6).double(), torch.tensor([[-3.], [1.]]).double()
    a, s = scales(gamma)
    direct = (-(z[..., None, :] - a[..., None] * m.table.double()).square().sum(-1) / (2 * s ** 2)).log_softmax(-1)
    assert torch.allclose(m.told(z, gamma)[:, :, 0].log_softmax(-1), direct, atol=1e-9)
    table, z = CODES["grey"], torch.randn(3, 7, 4).double().clamp(-1, 1)
    for end in (-13.3, -5., 0., 8.):
        gamma = torch.full((3, 1), end).double()
        long, short = (k(Says(torch.zeros(1024)), table).told(z, gamma).double().softmax(-1) for k in (CodeDiffusion, LevelDigits))
        assert torch.allclose(long, short, atol=1e-3)


def test_ce_is_the_cross_entropy_of_the_tokens():
    torch.manual_seed(0)
    m, x0 = CodeDiffusion(Says(torch.zeros(54)), TABLES["unit"], ends=(8., 9.)), torch.randint(27, (64, 10, 2))
    assert m((x0, torch.zeros(64, 10, 0))).item() == pytest.approx(math.log(27), abs=.05)     # all but noise: nothing is told
    for spread in (0., 3.):
        elbo = CodeDiffusion(Says(torch.zeros(54)), TABLES["unit"], weight="elbo", ends=(-6., 8.), spread=spread, prompts=.3)
        nats = sum(elbo((x0, torch.zeros(64, 10, 0))).item() for _ in range(80)) / 80
        assert nats == pytest.approx(math.log(27), abs=.2)


class Context(nn.Module):
    """A small network with parameters: two layers over the window, so that positions see each other."""

    def __init__(self, width, n_out, T):
        super().__init__()
        self.a, self.b, self.t = nn.Linear(width * T, 32), nn.Linear(32, n_out * T), nn.Linear(T, 32)

    def forward(self, x, t):
        h = (self.a(x.flatten(1)) + self.t(t.expand(len(x), x.size(1)))).tanh()
        return self.b(h).view(*x.shape[:2], -1)


def test_clean_parts():
    torch.manual_seed(0)
    known = clean_part(20_000, 12, .6, "cpu")
    rows = known.any(1)
    assert not known.all(1).any() and .5 < rows.float().mean() < .6                   # some beginnings have length 0
    change, start, end = known.diff(dim=1).sum(1), known[:, 0], known[:, -1]
    assert (change <= 3).all()
    for shape in ((1, True, False), (2, True, True), (1, False, True), (3, True, False), (2, False, False)):   # beginnings, surroundings, both
        assert ((change == shape[0]) & (start == shape[1]) & (end == shape[2])).float().mean() > .005, shape
    assert not clean_part(100, 12, 0, "cpu").any()


def test_self_conditioning_sees_its_own_estimate_and_never_x0():
    """The bound of a self-conditioned network is what two passes by hand give; nothing but z reaches either."""
    torch.manual_seed(0)
    table, seen = TABLES["unit"], []
    m = CodeDiffusion(Context(32, 27, 5), table, ends=(-6., 8.), selfcond=True)
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    x0 = torch.randint(27, (3, 5, 1))
    u = torch.tensor([.2, .5, .9])
    nats, _ = m.bound(x0, u, [0, 1, 2])
    first, second = seen
    assert (first[..., 16:] == 0).all() and torch.equal(first[..., :16], second[..., :16])
    gamma = -6 + 14 * u.double()[:, None]
    xhat = m.mean(m.net(first, u[:, None]).unsqueeze(2) + m.told(first[..., :16].double(), gamma).float())
    assert torch.allclose(second[..., 16:].double(), xhat, atol=1e-5)


def test_every_parameter_gets_a_gradient_with_self_conditioning():
    for seed in range(4):                                                             # both sides of the coin
        torch.manual_seed(seed)
        m = CodeDiffusion(Context(32, 27, 5), TABLES["unit"], selfcond=True, prompts=.5, ends=(-6., 8.))
        m((torch.randint(27, (8, 5, 1)), torch.zeros(8, 5, 0))).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("weight", ["ce", "elbo"])
def test_only_unknown_tokens_count_and_known_ones_are_shown_clean(weight, monkeypatch):
    torch.manual_seed(0)
    table, seen = TABLES["unit"], []
    m = CodeDiffusion(Context(16, 27, 6), table, weight=weight, ends=(-6., 8.))
    known = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1], [0] * 6]).bool()
    monkeypatch.setattr("diffusion.clean_part", lambda *_: known)
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args))
    x0 = torch.randint(27, (3, 6, 1))
    grads = []
    for _ in range(2):
        torch.manual_seed(1)
        m.zero_grad()
        m((x0, torch.zeros(3, 6, 0))).backward()
        grads.append(m.net.b.bias.grad.view(6, 27).clone())
    x, t = seen[0]
    assert torch.allclose(x[known], table[x0[:, :, 0]][known]) and (t[known] == 0).all() and (t[~known] > 0).any()
    assert grads[0].abs().sum(1)[0] > 0 and torch.equal(*grads)
    silent = CodeDiffusion(Says(torch.zeros(27)), table, prior=False, ends=(-6., 8.))
    assert silent((x0, torch.zeros(3, 6, 0))).item() == pytest.approx(math.log(27), abs=1e-4)   # a mean over what is unknown alone


@pytest.mark.parametrize("kind", ["ddim", "ancestral"])
def test_samples_of_a_known_source_have_its_distribution(kind):
    """A network that says log p, with what z says, is the Bayes denoiser: many steps draw from the source, few do not; td narrows it, more
    under DDIM, where it compounds."""
    p = torch.tensor([.5, .25, .15, .1])
    m = CodeDiffusion(Says(p.log()), nn.functional.one_hot(torch.arange(4)).float() * 2 - 1, ends=(-6., 8.))
    far = {}
    for steps, td in ((1, 0), (100, 0), (100, 2)):
        torch.manual_seed(0)
        x, how = torch.zeros(2000, 10, 1, dtype=torch.long), sampler(**PLAIN | dict(steps=steps, td=td, sampler=kind))
        *_, (y, _) = m.sample(x, x[..., 0] > 0, how)
        far[steps, td] = (y.flatten().bincount(minlength=4) / y.numel() - p).abs().sum().item() / 2
    assert far[100, 0] < .02 and far[1, 0] > .1 and far[100, 2] > (.2 if kind == "ddim" else .08), far


def test_the_sampler_walks_by_hand():
    """DDIM with td, self-conditioned on the step before: every input of the network as derived here, known positions replaced."""
    torch.manual_seed(0)
    m, seen, out = CodeDiffusion(Context(32, 27, 5), TABLES["unit"], selfcond=True, ends=(-6., 8.)), [], []
    m.net.register_forward_hook(lambda _, args, y: seen.append(args[0].double()) or out.append(y))
    x, known = torch.randint(27, (2, 5, 1)), torch.tensor([[1, 0, 0, 0, 0], [0] * 5]).bool()
    list(m.sample(x, known, sampler(**PLAIN | dict(steps=4, td=.5, replace=True))))
    at = lambda t: m.gamma(torch.full((2, 1), t, dtype=torch.float64))[0]
    codes, free = m.table[x[..., 0]].double(), ~known[..., None]
    z, here = seen[0][..., :16], at(1.)
    eps = ((z - scales(here)[0] * codes) / scales(here)[1])[0, 0]
    assert len(seen) == 4 and (seen[0][..., 16:] == 0).all()
    for i in range(4):
        assert torch.allclose(seen[i][..., :16] * free, z * free, atol=1e-5)
        a, s = scales(here)
        assert torch.allclose(seen[i][0, 0, :16], a[0, 0] * codes[0, 0] + s[0, 0] * eps, atol=1e-5)
        gamma, to = at((4 - i) / 4), at(max(3 - i - .5, 0) / 4)
        xhat = m.mean(out[i].unsqueeze(2) + m.told(seen[i][..., :16], gamma).float())
        if i < 3:
            assert torch.allclose(seen[i + 1][..., 16:], xhat, atol=1e-5)
        (a, s), (b, sd) = scales(gamma), scales(to)
        z, here = b * xhat + sd * (seen[i][..., :16] - a * xhat) / s, to


def test_the_coin_of_self_conditioning():
    """Half the batches see an estimate, made without gradients; the others zeros."""
    m, calls, shown = CodeDiffusion(Context(32, 27, 5), TABLES["unit"], selfcond=True, ends=(-6., 8.)), [], []
    m.net.register_forward_hook(lambda _, args, y: calls.append(y.requires_grad) or shown.append(args[0]))
    two = 0
    for seed in range(60):
        torch.manual_seed(seed)
        calls.clear()
        m((torch.randint(27, (2, 5, 1)), torch.zeros(2, 5, 0)))
        assert calls in ([True], [False, True]) and not shown[-1].requires_grad
        assert (shown[-1][..., 16:] != 0).any() == (len(calls) == 2)
        two += len(calls) == 2
    assert 15 < two < 45


@pytest.mark.parametrize("spread", [0, 3])
def test_what_is_known_takes_no_turns_and_the_rest_follows_from_it(spread):
    """Two of three tokens drawn from JOINT under the exact denoiser, the first given: their distribution given it; clean by itself."""
    ends, table = (-5., 7.), torch.tensor([[-1., 1.], [1., 1.]])
    m, n = CodeDiffusion(Bayes(table, ends), table, ends=ends, spread=spread), 3000
    x, known, seen = torch.ones(n, 3, 1, dtype=torch.long), torch.tensor([True, False, False]).expand(n, 3), []
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    torch.manual_seed(0)
    *_, (y, _) = m.sample(x, known, sampler(**PLAIN | {"steps": 25 * (1 + spread), "sampler": "ancestral"}))
    share = (y[:, 1:, 0] * torch.tensor([2, 1])).sum(1).bincount(minlength=4) / n
    assert (share - JOINT[4:] / JOINT[4:].sum()).abs().sum() / 2 < .04
    assert all((t[:, 0] == 0).all() for t in seen)
    turns = m.turns(torch.full((n, 1), .5).double(), lambda: torch.rand(n, 3), known)[0]
    assert not spread or (turns[:, 0] == 0).all() and len(turns[:, 1:].unique()) == 2   # two places for two unknown, not three


@pytest.mark.parametrize("how", [{}, {"replace": True}, {"twice": True}, {"sampler": "ancestral", "td": 1}])
def test_prompts_stay_and_replacement_is_noised_correctly(how):
    torch.manual_seed(0)
    m, seen = CodeDiffusion(Context(32, 27, 200), TABLES["unit"], selfcond=True, ends=(-6., 8.)), []
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args))
    x, known = torch.randint(27, (20, 200, 1)), torch.rand(20, 200) < .5
    frames = list(m.sample(x, known, sampler(**PLAIN | {"steps": 4} | how)))
    assert len(frames) == 4 and len(seen) == 4 * (1 + how.get("twice", False))
    assert not how.get("twice") or all((shown[..., 16:] == 0).all() for shown, _ in seen[::2])   # first passes see nothing
    assert all(torch.equal(y[known], x[known]) and (p[known] == 1).all() and (p > 0).all() for y, p in frames)
    z, t = seen[0][0][..., :16], seen[0][1].expand(20, 200)
    codes = m.table[x[..., 0]]
    if how.get("replace"):
        a, s = (v.item() for v in scales(torch.tensor([[8.]]).double()))
        assert (t == 1).all() and ((z - a * codes)[known].std().item() == pytest.approx(s, rel=.02))
    else:
        assert torch.allclose(z[known], codes[known]) and (t[known] == 0).all() and (t[~known] == 1).all()

"""Gaussian diffusion of tokens against known sources: what z says, self-conditioning, prompts and
positions that start and end one after another."""
import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from test_diffusion import Says
from test_gaussian import GREY, SCHEDULES, sampler
from torch import nn

import gaussian
from gaussian import TokenDiffusion, alpha_sigma, log_likelihood, position_times, q_sample
from train import evaluate

P = 1 / torch.arange(1, 28, dtype=torch.float64)           # 27 symbols after Zipf, 3.969 bits
P /= P.sum()
BITS = torch.tensor([[1.0 if i >> k & 1 else -1.0 for k in range(5)] for i in range(27)])
UNIT = F.normalize(torch.randn(27, 16, generator=torch.Generator().manual_seed(0)), dim=1)
UNEQUAL = torch.randn(27, 6, generator=torch.Generator().manual_seed(1))
UNEQUAL *= torch.linspace(0.5, 3, 27)[:, None]
WIDE = dict(gamma_min=-6.0, gamma_max=8.0)

# three tokens, 0 and 1, that depend on each other
JOINT = torch.tensor([0.3, 0.02, 0.1, 0.01, 0.05, 0.2, 0.02, 0.3], dtype=torch.float64)
STATES = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
PAIR = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])


class Context(nn.Module):
    """A small network with parameters in which positions see each other. calls: (x, t, output)."""

    def __init__(self, width, n_out, T):
        super().__init__()
        self.a = nn.Linear(width * T, 32)
        self.b = nn.Linear(32, n_out * T)
        self.t = nn.Linear(T, 32)
        self.calls = []

    def forward(self, x, t):
        t = t.expand(x.shape[:2])
        h = (self.a(x.flatten(1)) + self.t(t)).tanh()
        out = self.b(h).view(*x.shape[:2], -1)
        self.calls.append((x, t, out))
        return out


class Bayes(nn.Module):
    """Of tokens drawn from JOINT, each at a noise level of its own: what the other two tell."""

    def forward(self, x, t):
        gamma = -4 + 10 * t.double().expand(len(x), 3)
        told = log_likelihood(x.double(), gamma, PAIR.double())        # (B, 3, 2)
        state = JOINT.log() + sum(told[:, i, STATES[:, i]] for i in range(3))
        state = state.softmax(-1)                                      # (B, 8)
        one = state @ STATES.double()                                  # (B, 3)
        probs = torch.stack([1 - one, one], -1).clamp(1e-30, 1)
        return (probs.log() - told.log_softmax(-1)).float()


def distance(y, p):
    """Total variation between tokens y (N, T) of 0 and 1, and p (2^T,)."""
    index = (y * 2 ** torch.arange(y.size(1) - 1, -1, -1)).sum(1)
    return (index.bincount(minlength=len(p)) / len(y) - p).abs().sum().item() / 2


# ---- bounds and losses

@pytest.mark.parametrize("table, end", [(UNEQUAL, -8.0), (GREY, -13.3)], ids=["unequal", "grey"])
def test_a_silent_network_has_the_bound_log_V(table, end):
    V = len(table)
    m = TokenDiffusion(Says(torch.zeros(V)), table, gamma_min=end)
    e = evaluate(m, torch.randint(V, (500, 8), generator=torch.Generator().manual_seed(0)), 8)
    error = max(0.015 * math.log(V), 4 * e["stderr"])
    assert e["bound"] == pytest.approx(math.log(V), abs=error)


@pytest.mark.parametrize("table", [BITS, torch.eye(27), UNIT, UNEQUAL],
                         ids=["bits", "one-hot", "unit", "unequal"])
def test_a_network_that_knows_the_source_has_its_entropy(table):
    """And with loss=elbo the training loss of every schedule is the integral of the bound."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.multinomial(P, 1500 * 16, replacement=True, generator=g).view(1500, 16)
    surprise = -P.log()[x0].mean().item()
    m = TokenDiffusion(Says(P.log().float()), table, **WIDE)
    assert evaluate(m, x0, 8)["bound"] == pytest.approx(surprise, abs=0.08)
    torch.manual_seed(0)
    gamma = torch.full((1500, 1), -6.0, dtype=torch.float64)
    x = m.embed_tokens(x0)
    ends = m.reconstruction(x0, q_sample(x, gamma, torch.randn(x.shape)), gamma).mean().item() / 16
    for schedule in SCHEDULES:
        m = TokenDiffusion(m.net, table, schedule, "elbo", **WIDE)
        integral = sum(m(x0).item() for _ in range(8)) / 8
        assert integral + ends == pytest.approx(surprise, abs=0.1), schedule


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_times_have_the_density_asked_for_and_weights_that_undo_it(times):
    """With the weights, the means of 1, t and t^2 are those of a uniform t."""
    torch.manual_seed(0)
    draws = [gaussian.stratified_times(64, "cpu", times) for _ in range(2000)]
    t = torch.cat([t for t, _ in draws], 1).T                          # (2000, 64)
    weight = torch.cat([weight for _, weight in draws], 1).T
    share_below_fifth = {"uniform": 0.2, "logit-normal": NormalDist(0, 0.8).cdf(math.log(0.25))}
    assert (t < 0.2).double().mean() == pytest.approx(share_below_fifth[times], abs=0.02)
    for power in (0, 1, 2):
        mean = (weight * t ** power).mean(1)
        assert abs(mean.mean() - 1 / (power + 1)) < 4 * mean.std() / 2000 ** 0.5 + 1e-12


@pytest.mark.parametrize("stagger", [0, 3])
def test_of_a_joint_source_the_bound_is_the_entropy_and_samples_follow_it(stagger):
    """In any order; and with the first token given, the others follow p(x_1, x_2 | x_0 = 1)."""
    m = TokenDiffusion(Bayes(), PAIR, gamma_min=-4.0, gamma_max=6.0, stagger=stagger)
    g = torch.Generator().manual_seed(0)
    code = torch.multinomial(JOINT, 6000, replacement=True, generator=g)
    e = evaluate(m, STATES[code], 8, batch_size=2000)
    assert e["bound"] == pytest.approx(-JOINT.log()[code].mean().item() / 3, abs=0.05)
    torch.manual_seed(0)
    s = sampler(steps=25 * (1 + stagger), sampler="ancestral")
    x = torch.ones(2000, 3, dtype=torch.long)
    *_, (y, _) = m.sample(x, x < 0, s)
    assert distance(y, JOINT) < 0.05
    known = torch.tensor([True, False, False]).expand(2000, 3)
    *_, (y, _) = m.sample(x, known, s)
    assert (y[:, 0] == 1).all() and distance(y[:, 1:], JOINT[4:] / JOINT[4:].sum()) < 0.04


@pytest.mark.parametrize("table, stagger", [(UNIT, 0), (BITS, 3)], ids=["unit", "bits"])
def test_an_oracle_returns_the_tokens_and_its_bound_is_the_kl_of_the_end(table, stagger):
    x0 = torch.randint(27, (4, 9))
    m = TokenDiffusion(Says(1e4 * F.one_hot(x0, 27).float()), table, gamma_min=-8.0,
                       gamma_max=5.0, stagger=stagger)
    nats, _ = m.bound(x0, torch.tensor([0.1, 0.3, 0.6, 0.9]), range(4))
    a, s = alpha_sigma(torch.tensor(5.0).double())
    K = table.size(1)
    kl = (a ** 2 * table[0].square().sum() + K * (s ** 2 - 1 - 2 * s.log())) / 2
    assert torch.allclose(nats, kl.expand(4), atol=1e-6)
    for steps, kind in ((1, "ddim"), (7, "ddim"), (5, "ancestral")):
        *_, (y, age) = m.sample(x0 * 0, x0 < 0, sampler(steps=steps, sampler=kind))
        assert torch.equal(y, x0) and age.eq((steps - 1) / steps).all()


@pytest.mark.parametrize("stagger", [0, 3])
def test_losses_are_means_over_the_tokens_that_are_not_known(stagger):
    torch.manual_seed(0)
    x0 = torch.randint(27, (64, 10))
    silent = Says(torch.zeros(27))
    ce = TokenDiffusion(silent, UNIT, gamma_min=8.0, gamma_max=9.0)    # nothing but noise
    assert ce(x0).item() == pytest.approx(math.log(27), abs=0.05)
    ce = TokenDiffusion(silent, UNIT, output_prior=False, prompts=0.9, stagger=stagger, **WIDE)
    assert ce(x0).item() == pytest.approx(math.log(27), abs=1e-4)
    elbo = TokenDiffusion(silent, UNIT, loss="elbo", stagger=stagger, prompts=0.3, **WIDE)
    nats = sum(elbo(x0).item() for _ in range(150)) / 150
    assert nats == pytest.approx(math.log(27), abs=0.2)


def test_tokens_that_are_clean_do_not_count_and_all_others_do():
    """Tokens whose turn is yet to come, pure noise, train the network too; those that are clean
    would only flatter the loss."""
    x0 = torch.randint(27, (64, 30))
    wrong = 1e6 * F.one_hot((x0 + 1) % 27, 27)                         # whatever z says
    m = TokenDiffusion(Says(wrong), UNIT, stagger=5.0, **WIDE)
    torch.manual_seed(0)
    assert m(x0).item() > 9e5
    noisy = m.net.calls[-1][1] > 0
    assert 0.3 < noisy.float().mean() < 0.7
    m.net.logits = wrong * ~noisy[..., None]
    torch.manual_seed(0)
    assert m(x0).item() < 4


@pytest.mark.parametrize("loss", ["ce", "elbo"])
def test_known_tokens_are_shown_clean_and_give_no_gradient(loss, monkeypatch):
    torch.manual_seed(0)
    m = TokenDiffusion(Context(16, 27, 6), UNIT, loss=loss)
    known = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    monkeypatch.setattr(gaussian, "prompt_mask", lambda *_: known)
    x0 = torch.randint(27, (3, 6))
    m(x0).backward()
    (x, t, _), = m.net.calls
    assert torch.allclose(x[known], UNIT[x0][known]) and (t[known] == 0).all()
    assert (t[~known] > 0).all()
    grad = m.net.b.bias.grad.view(6, 27).abs().sum(1)
    assert grad[0] == 0 and (grad[1:] > 0).all()                       # known in every row


# ---- positions and prompts

def test_position_times():
    """All begin as noise and end clean, each in a 1 / (1 + stagger)-th of the time, evenly
    spaced in the order of rand; what is known has no place in it."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    rand = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(5, 40, dtype=torch.bool)
    for n_known in (0, 10):
        known[:, :n_known] = True
        n = 40 - n_known
        parts = [position_times(now.expand(5, 1), rand, 3.0, known) for now in t]
        t_pos, dt_pos = (torch.stack(part)[:, ~known].view(1001, 5, n)
                         for part in zip(*parts, strict=True))
        assert (t_pos[0] == 0).all() and (t_pos[-1] == 1).all() and (t_pos.diff(dim=0) >= 0).all()
        assert set(dt_pos.unique().tolist()) == {0, 4}
        assert torch.allclose((dt_pos > 0).double().mean(0), torch.tensor(0.25).double(), atol=2e-3)
        clean_until = (t_pos == 0).sum(0).double() / 1001
        evenly = 0.75 * (torch.arange(n) + 0.5).double() / n
        assert torch.allclose(clean_until.sort(1).values, evenly.expand(5, n), atol=4e-3)
        assert torch.equal(clean_until.argsort(1), rand[~known].view(5, n).argsort(1))
    together, speed = position_times(t[:, None], None, 0, None)
    assert torch.equal(together, t[:, None]) and (speed == 1).all()


def test_prompt_masks():
    """Beginnings, surroundings and both; never a whole row, none with share 0."""
    torch.manual_seed(0)
    known = gaussian.prompt_mask(20_000, 12, 0.6, "cpu")
    assert not known.all(1).any() and 0.5 < known.any(1).float().mean() < 0.6   # some have length 0
    changes = known.int().diff(dim=1).abs().sum(1)
    assert (changes <= 3).all()
    for n, start, end in ((1, True, False), (2, True, True), (1, False, True), (3, True, False),
                          (2, False, False)):
        shape = (changes == n) & (known[:, 0] == start) & (known[:, -1] == end)
        assert shape.float().mean() > 0.005, (n, start, end)
    assert not gaussian.prompt_mask(100, 12, 0, "cpu").any()


# ---- what the network is shown

def test_the_posterior_is_fed_and_added():
    m = TokenDiffusion(Says(P.log().float()), UNEQUAL, self_cond=True, feed_posterior=True)
    z = torch.randn(2, 5, 6).double()
    gamma = torch.tensor([[-1.0], [1.0]]).double()
    logits = m.logits(z, gamma, None, z * 0 + 0.5)
    told = log_likelihood(z, gamma, UNEQUAL.double()).log_softmax(-1)
    shown, posterior, before = m.net.calls[0][0].split([6, 27, 6], -1)
    assert torch.equal(shown, z.float()) and (before == 0.5).all()
    assert torch.allclose(posterior.double(), told.exp(), atol=1e-6)
    assert torch.allclose(logits.double().softmax(-1), (P.log() + told).softmax(-1), atol=1e-6)
    m.output_prior = False
    assert torch.equal(m.logits(z, gamma), m.net.logits.expand(2, 5, 27))


def test_the_posterior_is_added_without_rounding():
    """Where the likeliest of 256 codes is thousands of nats above the least likely."""
    table = torch.cat([GREY, torch.ones_like(GREY)], 1)
    m = TokenDiffusion(Says(torch.randn(256)), table)
    z = torch.rand(2, 5, 2).double()
    gamma = torch.full((2, 1), -8.0, dtype=torch.float64)
    told = log_likelihood(z, gamma, table)
    assert (told.amax(-1) - told.amin(-1)).min() > 1000
    truth = (m.net.logits + told).log_softmax(-1)
    ours = m.logits(z, gamma).double().log_softmax(-1)
    near = truth > -10
    assert torch.allclose(ours[near], truth[near], atol=1e-5)


def own_estimate(m, z, gamma, out):
    """xhat of a network of UNIT that said out at z."""
    logits = out.double() + log_likelihood(z, gamma, UNIT.double())
    return logits.softmax(-1) @ UNIT.double()


def test_the_bound_of_a_self_conditioned_network_is_of_two_passes():
    """The first is shown zeros, the second the first's estimate; nothing but z reaches either."""
    torch.manual_seed(0)
    m = TokenDiffusion(Context(32, 27, 5), UNIT, self_cond=True, **WIDE)
    u = torch.tensor([0.2, 0.5, 0.9])
    m.bound(torch.randint(27, (3, 5)), u, range(3))
    (first, t, out), (second, _, _) = m.net.calls
    assert torch.allclose(t, u[:, None].expand(3, 5))
    z = first[..., :16]
    assert (first[..., 16:] == 0).all() and torch.equal(z, second[..., :16])
    xhat = own_estimate(m, z.double(), -6 + 14 * u.double()[:, None], out)
    assert torch.allclose(second[..., 16:].double(), xhat, atol=1e-5)


def test_every_second_row_is_self_conditioned():
    """It sees an estimate of its own, made without gradients; the others see zeros."""
    m = TokenDiffusion(Context(32, 27, 5), UNIT, self_cond=True, **WIDE)
    first_rows = set()
    for seed in range(20):
        torch.manual_seed(seed)
        m.net.calls.clear()
        m(torch.randint(27, (4, 5)))
        (first, _, out), (shown, t, second_out) = m.net.calls
        assert second_out.requires_grad and not out.requires_grad and not shown.requires_grad
        conditioned = (shown[..., 16:] != 0).flatten(1).any(1)
        assert conditioned.tolist() in ([True, False] * 2, [False, True] * 2)
        assert torch.equal(first[..., :16], shown[conditioned][..., :16])
        gamma = -6 + 14 * t[conditioned].double()
        xhat = own_estimate(m, first[..., :16].double(), gamma, out)
        assert torch.allclose(shown[conditioned][..., 16:].double(), xhat, atol=1e-4)
        first_rows.add(conditioned[0].item())
    assert first_rows == {True, False}


@pytest.mark.parametrize("two_pass", [False, True])
def test_the_sampler_walks_by_hand(two_pass):
    """DDIM with td, self-conditioned on the step before or on a first pass: every input of the
    network as derived here; what is known stays clean."""
    torch.manual_seed(0)
    m = TokenDiffusion(Context(32, 27, 5), UNIT, self_cond=True, **WIDE)
    x = torch.randint(27, (2, 5))
    known = torch.tensor([[True] + [False] * 4, [False] * 5])
    frames = list(m.sample(x, known, sampler(steps=4, td=0.5, two_pass=two_pass)))
    assert all((t[known] == 0).all() for _, t, _ in m.net.calls)
    calls = [(shown.double(), out) for shown, _, out in m.net.calls]
    z = calls[0][0][..., :16]
    before = torch.zeros(2, 5, 16).double()
    texts = [y for y, _ in frames]
    for i, (y, age) in zip(range(4, 0, -1), frames, strict=True):
        gamma, gamma_next = (
            m.gamma(torch.full((2, 1), max(step, 0) / 4, dtype=torch.float64))[0]
            .expand(2, 5).masked_fill(known, -6) for step in (i, i - 1.5))
        if two_pass:
            shown, out = calls.pop(0)
            assert torch.allclose(shown[..., :16], z, atol=1e-5) and (shown[..., 16:] == 0).all()
            before = own_estimate(m, shown[..., :16], gamma, out)
        shown, out = calls.pop(0)
        assert torch.allclose(shown, torch.cat([z, before], -1), atol=1e-5)
        assert torch.allclose(shown[0, 0, :16], UNIT[x[0, 0]].double())
        before = own_estimate(m, shown[..., :16], gamma, out)
        told = log_likelihood(shown[..., :16], gamma, UNIT.double())
        tokens = (out + told).argmax(-1)
        assert torch.equal(y, torch.where(known, x, tokens))
        # age: so many of the last frames in a row are the same, as a share of all four
        same = torch.stack([earlier == y for earlier in texts[:4 - i][::-1] + [y * 0 - 1]])
        truth = same.long().cumprod(0).sum(0) / 4
        assert torch.equal(age, truth.masked_fill(known, 1)) and 0 <= age.min() < age.max()
        a, s = alpha_sigma(gamma)
        b, s_next = alpha_sigma(gamma_next)
        z = b * before + s_next * (shown[..., :16] - a * before) / s
        z = torch.where(known[..., None], shown[..., :16], z)
    assert not calls

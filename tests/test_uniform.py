"""experiments/uniform.py: uniform-noise diffusion of texts of three characters out of three, where
the oracle, the bound and what the sampler writes are enumerated."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from experiments import uniform
from experiments.uniform import UniformDiffusion, UniformSampler, alpha, posterior
from step import reseed
from train import evaluate

V = 3
T = 3
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=T)))      # all there are: (27, 3)
S = len(TEXTS)
NOTHING = torch.zeros(T, dtype=torch.bool)                             # is known
reseed(0)
P = torch.rand(S, dtype=torch.float64) ** 2 + 0.05                     # how probable each is
P = P / P.sum()


def oracle(x, t):
    """log p(x0 | xt at the other positions), by enumeration: (B, T, V)."""
    a = alpha(t.double())[:, None]
    likelihood = a * (x[:, None] == TEXTS) + (1 - a) / V               # (B, S, T)
    columns = []
    for i in range(T):
        others = [j for j in range(T) if j != i]
        joint = P * likelihood[:, :, others].prod(-1)
        columns.append(joint @ F.one_hot(TEXTS[:, i], V).double())
    return torch.stack(columns, 1).log()


def arbitrary(x, t):
    return torch.stack([x.flip(1), x * t, x ** 2 - 2 * t], -1).float()


def bound_of_each_text(m):
    """The expectation over xt of the sum over all steps: nats (S,)."""
    x0 = TEXTS.repeat_interleave(S, 0)
    xt = TEXTS.repeat(S, 1)
    nats = 0
    for i in range(1, m.n_levels + 1):
        t = torch.full(x0.shape, i / m.n_levels, dtype=torch.float64)
        q = (alpha(t) * (x0 == xt) + (1 - alpha(t)) / V).prod(1)
        kl = m.step_kl(x0, xt, t, t - 1 / m.n_levels).sum(1)
        nats = nats + (q * kl).view(S, S).sum(1)
    return nats


def written(m, steps, known):
    """How probable each text is as what m writes in so many steps; known (T,) are kept: (S, S), a
    row for each text that it starts from."""
    chain = torch.eye(S, dtype=torch.float64)
    for i in range(steps, 0, -1):
        t = torch.full((S, T), i / steps, dtype=torch.float64).masked_fill(known, 0)
        s = torch.full((S, T), (i - 1) / steps, dtype=torch.float64).masked_fill(known, 0)
        p = posterior(TEXTS, m.x0_probs(TEXTS, t), t, s)               # (S, T, V)
        chain = chain @ p[:, torch.arange(T), TEXTS].prod(-1)
    return chain


@pytest.mark.parametrize("net", [oracle, arbitrary])
def test_the_bound_is_one_of_what_is_written(net):
    """Of each text, in as many steps, for any network. An oracle's single step is exact."""
    for steps in (1, 2, 20):
        m = UniformDiffusion(net, V, steps)
        gap = bound_of_each_text(m) + written(m, steps, NOTHING).mean(0).log()
        assert (gap > -1e-9).all()
        if steps == 1 and net is oracle:
            assert gap.abs().max() < 1e-6


def test_the_bound_of_an_oracle_tends_to_minus_log_p():
    """Of each text; what is missing halves with twice the steps."""
    coarse, fine = [bound_of_each_text(UniformDiffusion(oracle, V, N)) for N in (100, 200)]
    assert (P * fine).sum() > -(P * P.log()).sum()
    assert torch.allclose(2 * fine - coarse, -P.log(), atol=1e-3)


def test_a_network_that_says_nothing():
    """Its bound is log V, its loss what xt itself leaves open, whatever is known."""
    m = UniformDiffusion(lambda x, t: torch.zeros(*x.shape, V), V, n_levels=7, prompts=1.0)
    assert torch.allclose(bound_of_each_text(m), torch.tensor(T * math.log(V)).double())
    t = (torch.arange(1000) + 0.5) / 1000
    right = alpha(t) + (1 - alpha(t)) / V
    wrong = (1 - alpha(t)) / V
    expected = torch.special.entr(right) + (V - 1) * torch.special.entr(wrong)
    loss = m(torch.zeros(4000, 32, dtype=torch.long))
    assert loss == pytest.approx(expected.mean().item(), rel=0.01)


def test_draws_average_to_the_bound():
    m = UniformDiffusion(oracle, V, 3)
    e = evaluate(m, TEXTS[4].expand(500, -1), 8)
    assert T * e["bound"] == pytest.approx(bound_of_each_text(m)[4].item(), abs=4 * T * e["stderr"])
    _, level = m.bound(TEXTS[:3], torch.tensor([0.3, 0.5, 1.0]), range(3))
    assert torch.allclose(level, torch.tensor([1, 4, 9]).double() / 9, atol=1e-6)


@pytest.mark.parametrize("known", [NOTHING, torch.arange(T) == 1])
@pytest.mark.parametrize("net", [oracle, arbitrary])
def test_samples_are_distributed_as_enumerated(net, known):
    n = 10_000
    reseed(1)
    m = UniformDiffusion(net, V)
    x = TEXTS[5].expand(n, -1)
    frames = list(m.sample(x, known.expand(n, -1), UniformSampler(steps=2)))
    (x_1, age_1), (x_0, age) = frames
    assert ((age == 0) == ((x_0 != x_1) & ~known)).all() and age[:, known].eq(1).all()
    assert torch.equal(age == 1, known | ((x_0 == x_1) & (age_1 == 0.5)))
    possible = (TEXTS[:, known] == TEXTS[5, known]).all(1)
    p = written(m, 2, known)[possible].mean(0)[possible]
    counts = torch.bincount(x_0 @ torch.tensor([9, 3, 1]), minlength=S)[possible]
    assert counts.sum() == n
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    df = len(p) - 1
    assert chi2 < df + 5 * math.sqrt(2 * df)


def test_it_trains_and_writes(corpus, tmp_path, capsys):
    uniform.main([corpus, *TINY, "--max_iters=2", f"--out={tmp_path}/run"])
    assert capsys.readouterr().out.splitlines()[-1].startswith(
        "done: python -m experiments.uniform sample --out=")
    uniform.main(["sample", f"--out={tmp_path}/run", "--length=20", "--steps=3"])
    said = capsys.readouterr()
    assert len(said.out) == 21 and "\n6 network calls" in said.err         # of two windows

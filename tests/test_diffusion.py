"""The masked process and its twin against known answers: uniform networks, exact enumeration, oracle networks."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import diffusion
import model
from config import Masked, Sample
from diffusion import COUNTS, ORDERS, SCHEDULES, Autoregressive, MaskedDiffusion
from train import build


class Uniform(nn.Module):
    """A network that knows nothing: zero logits over V."""

    def __init__(self, V):
        super().__init__()
        self.V = V

    def forward(self, x, t):
        return torch.zeros(*x.shape, self.V)


class Table(nn.Module):
    """Arbitrary but fixed logits for each (visible pattern, fed t): a network that uses everything it is shown."""

    def __init__(self, V, T):
        super().__init__()
        self.T = T
        self.logits = torch.randn((T + 1, *[V + 1] * T, T, V), generator=torch.Generator().manual_seed(0))

    def forward(self, x, t):
        k = t * self.T
        assert torch.equal(k, k.round()), "the fraction fed is not k/T"
        return self.logits[(k.long(), *x.unbind(1))]


class Oracle(nn.Module):
    """The exact conditional marginals p(x_i | visible) of a joint distribution over V^T states; causal: p(x_i | x_<i)."""

    def __init__(self, V, T, seed=0, causal=False):
        super().__init__()
        self.V, self.causal = V, causal
        self.states = torch.tensor(list(itertools.product(range(V), repeat=T)))       # (S, T)
        self.p = torch.rand(len(self.states), generator=torch.Generator().manual_seed(seed)) ** 3
        self.p /= self.p.sum()

    def marginals(self, x, visible):
        fits = ((x[:, None] == self.states) | ~visible[:, None]).all(2) * self.p      # (B, S)
        one_hot = torch.nn.functional.one_hot(self.states, self.V).float()            # (S, T, V)
        return torch.einsum("bs,stv->btv", fits / fits.sum(1, keepdim=True), one_hot)

    def forward(self, x, t, past=None):
        if not self.causal:
            return self.marginals(x, x < self.V).clamp(1e-30).log()
        x = model.remember(past, self, x, 1)                                          # x is shifted: position i shows x_<i as x[1..i]
        seen, T = x.size(1), self.states.size(1)
        x = torch.nn.functional.pad(x[:, 1:], (0, T + 1 - seen))
        return torch.stack([self.marginals(x, (torch.arange(T) < i).expand_as(x))[:, i] for i in range(seen)], 1).clamp(1e-30).log()


def chi_square(x, oracle):
    """(statistic, a bound that a correct sampler exceeds about once in 10^6 runs) for samples x (N, T)."""
    index = (x * oracle.V ** torch.arange(x.size(1) - 1, -1, -1)).sum(1)
    expected = oracle.p * len(x)
    df = len(oracle.p) - 1
    return ((index.bincount(minlength=len(oracle.p)) - expected) ** 2 / expected).sum().item(), df + 6 * math.sqrt(2 * df)


def exact_bound(m, x0):
    """Mean over k of the mean over all subsets of size k of the mean CE over the subset: the bound of x0 (T,), enumerated."""
    T, total = len(x0), 0.0
    for k in range(1, T + 1):
        for subset in itertools.combinations(range(T), k):
            rand = torch.ones(1, T)
            rand[0, list(subset)] = 0.
            total += m.masked_ce(x0[None], torch.tensor([k]), rand).sum().item() / k / math.comb(T, k) / T
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", ["elbo", "pooled"])
def test_uniform_network_scores_log_V(schedule, weight):
    m = MaskedDiffusion(Uniform(7), 7, schedule, weight)
    x0 = torch.randint(7, (16, 10))
    assert m(x0).item() == pytest.approx(math.log(7), abs=1e-6)
    nats, t = m.bound(x0, torch.rand(16), range(16))
    assert torch.allclose(nats, torch.full((16,), math.log(7)))
    assert ((t * 10).round() == t * 10).all()


def test_uniform_twin_scores_log_V():
    assert Autoregressive(Uniform(7), 7)(torch.randint(7, (16, 10))).item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("objective", ["masked", "ar"])
@pytest.mark.parametrize("time", [False, True])
def test_untrained_transformer_scores_log_V(objective, time):
    c = Masked(objective=objective, time=time, block_size=12, n_layer=2, n_head=2, n_embd=16)
    m = build(c, {"alphabet": "abcde"})
    assert m(torch.randint(5, (8, 12))).item() == pytest.approx(math.log(5), abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_average_one_and_k_is_uniform(schedule):
    """Weighted by the mass of its stratum, k is uniform on 1..T whatever the schedule; the weights average exactly 1."""
    torch.manual_seed(0)
    m, T, B, N = MaskedDiffusion(Uniform(3), 3, schedule), 6, 8, 4000
    freq = np.zeros((N, T))
    for n in range(N):
        mu, mass = m.levels_of(B, "cpu")
        assert mass.mean().item() == pytest.approx(1, abs=1e-6)
        np.add.at(freq[n], (mu * T).ceil().clamp(1, T).long().numpy() - 1, mass.numpy() / B)
    error = (freq.mean(0) - 1 / T) / (freq.std(0) / N ** .5 + 1e-9)
    assert abs(error).max() < 5, freq.mean(0)


def test_exactly_k_are_masked():
    k = torch.tensor([1, 3, 8])
    assert torch.equal(diffusion.exactly(k, 8, torch.rand(3, 8)).sum(1), k)


def test_bound_is_the_average_over_all_orders():
    """On 4 positions: mean over k of the mean over subsets = the mean over all 24 orders of the chain rule, with k/T fed."""
    V, T = 3, 4
    m, x0 = MaskedDiffusion(Table(V, T), V), torch.tensor([2, 0, 1, 2])
    chains = []
    for order in itertools.permutations(range(T)):
        nats = 0.0
        for i, position in enumerate(order):
            x = x0.clone()
            x[list(order[i:])] = V
            nats -= m.net(x[None], torch.tensor([(T - i) / T])).log_softmax(-1)[0, position, x0[position]].item()
        chains.append(nats / T)
    assert len(chains) == 24
    assert exact_bound(m, x0) == pytest.approx(np.mean(chains), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drawn_bound_and_elbo_loss_are_unbiased(schedule):
    torch.manual_seed(0)
    V, T = 3, 4
    m, x0 = MaskedDiffusion(Table(V, T), V, schedule), torch.tensor([2, 0, 1, 2])
    exact = exact_bound(m, x0)
    loss = torch.stack([m(x0.expand(8, T)) for _ in range(3000)])
    assert abs(loss.mean() - exact) < 5 * loss.std() / 3000 ** .5
    nats, _ = m.bound(x0.expand(20000, T), torch.rand(20000), range(20000))
    assert abs(nats.mean() - exact) < 5 * nats.std() / 20000 ** .5


def test_pooled_is_the_documents_loss():
    """CE summed over all masked tokens of the batch, divided by their number."""
    torch.manual_seed(0)
    V, T = 3, 4
    m, x0 = MaskedDiffusion(Table(V, T), V, "cosine", "pooled"), torch.randint(3, (8, 4))
    torch.manual_seed(1)
    loss = m(x0)
    torch.manual_seed(1)
    mu, _ = m.levels_of(8, "cpu")
    k = (mu * T).ceil().clamp(1, T)
    ce = m.masked_ce(x0, k, torch.rand(8, T))
    assert loss.item() == pytest.approx((ce.sum() / (ce > 0).sum()).item(), abs=1e-6)


def test_oracle_bound_is_the_exact_likelihood():
    oracle = Oracle(3, 3)
    m, twin = MaskedDiffusion(oracle, 3), Autoregressive(Oracle(3, 3, causal=True), 3)
    exact = -oracle.p.log() / 3
    assert torch.allclose(twin.bound(oracle.states)[0], exact, atol=1e-4)
    for i in (0, 7, 26):
        assert exact_bound(m, oracle.states[i]) == pytest.approx(exact[i].item(), abs=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_oracle_sampler_reproduces_the_joint(order):
    """One character a call: every honest order samples exactly the joint."""
    torch.manual_seed(0)
    oracle, nothing = Oracle(3, 3), torch.zeros(20000, 3, dtype=torch.long)
    *_, (x, _) = MaskedDiffusion(oracle, 3).sample(nothing, nothing > 0, Sample(order=order, steps=3, temperature=1., remask=0.))
    statistic, bound = chi_square(x, oracle)
    assert statistic < bound


@pytest.mark.parametrize("order", ["margin", "entropy"])
def test_characters_of_one_call_stay_apart(order):
    """From an empty page, where all positions tie, and with scores of their own: while there is room, none within `apart` of another."""
    class Rough(Uniform):
        def forward(self, x, t):
            return torch.randn(*x.shape, 3, generator=torch.Generator().manual_seed(0))

    nothing, s = torch.zeros(20, 64, dtype=torch.long), Sample(order=order, apart=4, steps=16, remask=0.)
    for net in (Uniform(3), Rough(3)):
        before = torch.full_like(nothing, 3)
        for i, (x, _) in enumerate(MaskedDiffusion(net, 3).sample(nothing, nothing > 0, s)):
            at = (x != before).nonzero().tolist()
            gaps = [b - a for (r, a), (q, b) in itertools.pairwise(at) if r == q]
            assert len(at) == 80 and (i > 3 or min(gaps) > 4), (i, min(gaps))
            before = x


def test_spread_is_greedy():
    """Against the definition: the best; of those farther than `apart` the best; ... then the rest by score; -inf last; ties at random."""
    torch.manual_seed(0)
    for apart in (1, 3):
        score = torch.rand(50, 20)
        score[:, [3, 11]] = -math.inf
        order = diffusion.spread(score, apart).argsort(1, descending=True)
        for row, got in zip(score, order.tolist(), strict=True):
            best = [i for i in row.argsort(descending=True).tolist() if row[i] > -math.inf]
            chosen = []
            for i in best:
                if all(abs(i - j) > apart for j in chosen):
                    chosen.append(i)
            assert got[:18] == chosen + [i for i in best if i not in chosen] and set(got[18:]) == {3, 11}
    first = diffusion.spread(torch.full((4000, 9), -4.17), 2).argmax(1).bincount(minlength=9)
    assert first.min() > 350 and first.max() < 550                    # each of nine equal ones leads a ninth of the time


def test_scoring_by_the_drawn_token_samples_something_else(monkeypatch):
    """The dishonest sampler, in the same loop: draw first, reveal the tokens that turned out most probable."""
    torch.manual_seed(0)
    drawn = {}

    def score(p):
        drawn["now"] = honest(p)
        return drawn["now"][1]

    honest = diffusion.draw
    monkeypatch.setitem(ORDERS, "confidence", score)
    monkeypatch.setattr(diffusion, "draw", lambda p: drawn["now"])
    oracle, nothing = Oracle(3, 3), torch.zeros(20000, 3, dtype=torch.long)
    *_, (x, _) = MaskedDiffusion(oracle, 3).sample(nothing, nothing > 0, Sample(order="confidence", steps=3, temperature=1., remask=0.))
    statistic, bound = chi_square(x, oracle)
    assert statistic > 3 * bound


def test_oracle_twin_reproduces_the_joint():
    torch.manual_seed(0)
    oracle, nothing = Oracle(3, 3, causal=True), torch.zeros(20000, 3, dtype=torch.long)
    *_, (x, _) = Autoregressive(oracle, 3).sample(nothing, nothing > 0, Sample(temperature=1.))
    statistic, bound = chi_square(x, oracle)
    assert statistic < bound


@pytest.mark.parametrize("prompt", [0, 3])
def test_the_twin_remembers_what_it_would_compute_again(monkeypatch, prompt):
    """Writing with remembered keys, values and neighbours: greedily, the same text as from whole passes, whatever is known at the start."""
    monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", enabled=False))
    torch.manual_seed(0)
    m = randomised(build(Masked(objective="ar", block_size=12, n_layer=2, n_head=2, n_embd=16, time=True), {"alphabet": "abcde"})).eval()
    x, known = torch.randint(5, (4, 12)), (torch.arange(12) < prompt).expand(4, 12)
    frames = list(m.sample(x, known, Sample(temperature=0.)))
    y, _ = frames[-1]
    assert len(frames) == 12 - prompt and torch.equal(y[:, :prompt], x[:, :prompt])
    assert torch.equal(y[:, prompt:], m.logits(y).argmax(-1)[:, prompt:])
    past, shifted = {}, torch.nn.functional.pad(y[:, :-1], (1, 0), value=m.mask)
    parts = [m.net(shifted[:, :5], torch.ones(4), past), *(m.net(shifted[:, i:i + 1], torch.ones(4), past) for i in range(5, 12))]
    assert torch.allclose(torch.cat(parts, 1), m.logits(y), atol=1e-5)


def test_infilling_samples_the_conditional():
    """With the middle of three positions given, the other two follow p(x_0, x_2 | x_1)."""
    torch.manual_seed(0)
    oracle = Oracle(3, 3)
    x = torch.tensor([[0, 2, 0]]).expand(20000, 3)
    known = torch.tensor([[False, True, False]]).expand(20000, 3)
    *_, (x, _) = MaskedDiffusion(oracle, 3).sample(x, known, Sample(steps=2, temperature=1., remask=0.))
    given = Oracle(3, 3)
    given.p = torch.where(given.states[:, 1] == 2, given.p, 0)
    given.p = (given.p / given.p.sum()).clamp(1e-12)
    statistic, bound = chi_square(x, given)
    assert (x[:, 1] == 2).all() and statistic < bound


def test_twin_is_causal_and_sees_all_that_came_before(monkeypatch):
    torch.manual_seed(0)
    c = Masked(objective="ar", block_size=8, n_layer=2, n_head=2, n_embd=16)
    m = randomised(build(c, {"alphabet": "abcde"}))
    x = torch.randint(5, (1, 8))
    before = m.logits(x)
    for j in range(8):
        y = x.clone()
        y[0, j] = (y[0, j] + 1) % 5
        changed = (m.logits(y) - before).abs().amax(-1)[0] > 0
        assert changed.tolist() == [i > j for i in range(8)]


def randomised(m):
    """Random weights everywhere, zero-initialised layers included."""
    for p in m.parameters():
        nn.init.normal_(p, std=.3)
    return m.eval()


def small(time=True, **k):
    torch.manual_seed(0)
    c = Masked(time=time, block_size=10, n_layer=2, n_head=2, n_embd=16, **k)
    return randomised(build(c, {"alphabet": "abcde"}))


def test_rows_with_different_k_equal_the_rows_alone(monkeypatch):
    monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", enabled=False))
    m = small()
    x0, k, rand = torch.randint(5, (4, 10)), torch.tensor([1, 4, 9, 10]), torch.rand(4, 10)
    together = m.masked_ce(x0, k, rand)
    for i in range(4):
        assert torch.allclose(m.masked_ce(x0[i:i + 1], k[i:i + 1], rand[i:i + 1])[0], together[i], atol=1e-5)


def test_cosine_schedule_is_the_documents():
    def documents(t, total_steps):   # document's own code, with the clip
        ratio = t / total_steps
        numerator = np.cos((ratio + .008) / (1 + .008) * np.pi / 2) ** 2
        return np.clip(1 - numerator / np.cos(.008 / (1 + .008) * np.pi / 2) ** 2, 0.0, 0.999)

    t = torch.arange(101, dtype=torch.float64)
    assert np.abs(SCHEDULES["cosine"](t / 100).numpy() - documents(t.numpy(), 100)).max() < 1e-14


@pytest.mark.parametrize("T, steps", [(128, 100), (128, 300), (256, 100), (10, 3)])
def test_counts(T, steps):
    """The documents' formula to the digit (never more than 3 at once here: their 'final jump' does not follow from it), and even counts."""
    def revealed(counts):
        k, out = T, []
        for left in range(steps, 0, -1):
            n = int(COUNTS[counts](torch.tensor([k]), torch.tensor([T]), left, steps).clamp(1, k)) if k else 0
            k, out = k - n, out + [n]
        return out, k

    masked, theirs = T, []
    for t in reversed(range(steps)):
        n = max(1, int(masked / (t + 1))) if masked else 0
        masked, theirs = masked - n, theirs + [n]
    assert revealed("documents") == (theirs, 0)
    if T > 10:
        assert max(theirs) <= 3
    quotient, remainder = divmod(T, steps)
    even, left = revealed("even")
    assert left == 0 and (even == [quotient + (i < remainder) for i in range(steps)] if T >= steps else even[:T] == [1] * T)
    cosine, left = revealed("cosine")
    assert left == 0 and sum(cosine) == T


@pytest.mark.parametrize("counts", [*COUNTS, "entropy"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_sampler_finishes_and_keeps_the_prompt(order, counts):
    m = small()
    torch.manual_seed(0)
    for steps in (1, 2, 3, 7, 10, 25):
        for remask in (0., .3, 1.):
            x0, known = torch.randint(5, (4, 10)), torch.rand(4, 10) < torch.tensor([[0.], [.3], [.6], [.9]])
            frames = list(m.sample(x0, known, Sample(steps=steps, order=order, counts=counts, remask=remask, remask_by="random")))
            assert len(frames) <= steps
            assert (frames[-1][0] < 5).all(), "MASK is left"
            assert all(torch.equal(x[known], x0[known]) for x, _ in frames), "the prompt changed"
            if not remask:
                assert all(((a == b) | (a == 5)).all() for (a, _), (b, _) in itertools.pairwise(frames)), "a revealed character changed"


def test_batch_rows_are_independent():
    m = small()
    x0, known = torch.randint(5, (3, 10)), torch.rand(3, 10) < .3
    other = x0.clone()
    other[1:] = (other[1:] + 1) % 5
    results = []
    for x in (x0, other):
        torch.manual_seed(0)
        *_, (x, _) = m.sample(x, known, Sample(steps=5, order="confidence"))
        results.append(x)
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0], results[1])


def test_k_over_T_is_what_the_sampler_feeds():
    fed = []

    class Spy(Uniform):
        def forward(self, x, t):
            fed.append((t * 8 - (x == self.V).sum(1)).abs().max().item())
            return super().forward(x, t)

    known = torch.tensor([[True] * 3 + [False] * 5, [False] * 8])
    list(MaskedDiffusion(Spy(3), 3).sample(torch.zeros(2, 8, dtype=torch.long), known, Sample(steps=5, remask=0.)))
    assert max(fed[:-1]) == 0 and len(fed) == 5


def test_entropy_bound_against_brute_force():
    torch.manual_seed(0)
    p = (torch.randn(6, 9, 4) * 3).softmax(-1)
    masked = torch.rand(6, 9) < .8
    score = ORDERS["entropy"](p).masked_fill(~masked, -math.inf)
    for gamma in (0., .1, 1., 100.):
        for row, n in enumerate(diffusion.bounded(p, score, gamma).tolist()):
            H = sorted(diffusion.entropy(p[row, masked[row]]).tolist())
            assert n == max([i for i in range(1, len(H) + 1) if sum(H[:i]) - H[i - 1] <= gamma + 1e-6], default=0)


def test_scores_against_their_definitions():
    p = torch.tensor([[[.5, .3, .2], [.4, .4, .2]]])
    assert torch.allclose(ORDERS["confidence"](p), torch.tensor([[.5, .4]]))
    assert torch.allclose(ORDERS["margin"](p), torch.tensor([[.2, 0.]]), atol=1e-6)
    assert ORDERS["entropy"](p)[0, 0].item() == pytest.approx(.5 * math.log(.5) + .3 * math.log(.3) + .2 * math.log(.2))


def test_temperature_zero_and_top_k_one_are_the_argmax():
    logits = torch.randn(2, 3, 5)
    argmax = torch.nn.functional.one_hot(logits.argmax(-1), 5).float()
    assert torch.allclose(diffusion.predicted(logits, Sample(temperature=0.)), argmax)
    assert torch.allclose(diffusion.predicted(logits, Sample(top_k=1)), argmax)
    assert torch.allclose(diffusion.predicted(logits, Sample(temperature=1., top_k=99)), logits.softmax(-1))


def test_remasking_takes_the_least_probable_when_revealed_and_never_the_prompt():
    m = MaskedDiffusion(Uniform(5), 5)
    x = torch.tensor([[0, 1, 2, 3, 4, 5]])
    sure, known = torch.tensor([[.9, .1, .5, .2, .01, 0.]]), torch.tensor([[False, False, False, False, True, False]])
    y, p = m.again(x, sure, known, Sample(remask=.5))
    assert y.tolist() == [[0, 5, 2, 5, 4, 5]] and p.tolist()[0][:2] == pytest.approx([.9, 0])
    full, given = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0]]), known | torch.tensor([[False], [True]])
    y, _ = m.again(full, sure.expand(2, 6), given, Sample(remask=.01))
    assert y.tolist() == [[0, 1, 2, 3, 4, 5], full[1].tolist()]       # at least one, once nothing is masked, unless all is given


@pytest.mark.parametrize("objective", ["masked", "ar"])
@pytest.mark.parametrize("half", [False, True])
def test_every_parameter_gets_a_gradient(objective, half, monkeypatch):
    """Everything starts from zero outputs; after three steps no parameter is without one, in fp16 with a scaler too."""
    if half:
        monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.float16))
    c = Masked(objective=objective, time=True, block_size=8, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    m = build(c, {"alphabet": "abcde"})
    scaler = torch.amp.GradScaler("cpu", init_scale=2. ** 10, enabled=half)
    opt = torch.optim.AdamW(m.parameters(), 1e-2)
    for _ in range(4):
        opt.zero_grad()
        scaler.scale(m(torch.randint(5, (16, 8)))).backward()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() >= (2. ** 10 if half else 1), "gradients overflowed"
    without = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without

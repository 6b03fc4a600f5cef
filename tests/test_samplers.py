"""How masked diffusion writes: one call by its definition, whole texts by enumeration."""
import itertools
import math

import numpy as np
import pytest
import torch
from test_diffusion import Oracle, Table, Uniform, small

import diffusion
from config import Sample
from diffusion import Autoregressive, MaskedDiffusion

ORDERS = ["random", "left", "confidence", "margin", "entropy"]
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=4)))      # all of V=3, T=4
ALL_COUNTS = ["even", "documents", "cosine", "entropy"]
EXACT = dict(order="random", temperature=1.0, remask=0.0, min_distance=0)


def draw(method, n, s, x=(0, 0, 0), known=(False, False, False)):
    """n texts (n, 3) at s, after the prompt x where known."""
    torch.manual_seed(0)
    x = torch.tensor(x).expand(n, -1)
    *_, (x, _) = method.sample(x, torch.tensor(known).expand(n, -1), s)
    return x


def check_distribution(x, V, p):
    """Chi-square of texts x (N, T) against p (V^T,), which a correct sampler fails once in 10^6."""
    index = (x * V ** torch.arange(x.size(1) - 1, -1, -1)).sum(1)
    found = index.bincount(minlength=len(p))
    assert not found[p == 0].any(), "a text that cannot be"
    expected = p * len(x)
    rare = expected < 5                                    # counted together
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None] + 1e-9])
    statistic = ((found - expected) ** 2 / expected).sum()
    df = len(expected) - 1
    assert statistic < df + 6 * math.sqrt(2 * df)


def one_call(logits, masked, n_total, steps_left, s):
    """By definition, for one text: in which order its positions are revealed, how many of them, and
    the probabilities (T, V) their tokens are drawn from. logits (T, V), masked a list."""
    logits = logits.double().numpy()
    own = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    drawn = np.zeros_like(own)
    for i, row in enumerate(logits):
        best = np.argsort(-row)[:s.top_k or None]
        if s.temperature == 0:
            best = best[:1]
        p = np.exp((row[best] - row.max()) / (s.temperature or 1))
        drawn[i, best] = p / p.sum()

    def entropy(p):
        return -sum(q * math.log(q) for q in p if q > 0)

    def score(i):
        if s.counts == "entropy":
            return -entropy(drawn[i])
        low, high = sorted(own[i])[-2:]
        return {"confidence": high, "margin": high - low, "entropy": -entropy(own[i]),
                "left": -i}[s.order]

    # the best; the best farther than min_distance from those before; ...; then the others
    ranked = sorted(masked, key=score, reverse=True)
    first = []
    for i in ranked:
        if all(abs(i - j) > s.min_distance for j in first):
            first.append(i)
    order = first + [i for i in ranked if i not in first]

    k = len(masked)
    n = {"even": math.ceil(k / steps_left), "documents": k // steps_left, "entropy": 0,
         "cosine": k - int(n_total * math.sin(math.pi / 2 * (steps_left - 1) / s.steps))}[s.counts]
    H = [entropy(drawn[i]) for i in order]
    while s.counts == "entropy" and n < k and sum(H[:n + 1]) - max(H[:n + 1]) <= s.entropy_bound:
        n += 1
    if steps_left == 1:
        n = k
    return order, min(max(n, 1), k), drawn


def enumerate_texts(net, x, n_total, steps_left, s, p=1.0, total=None):
    """The probability of every text that s writes from x, a list with MASK = 3."""
    total = {} if total is None else total
    masked = [i for i, token in enumerate(x) if token == 3]
    if not masked:
        total[tuple(x)] = total.get(tuple(x), 0) + p
        return total
    logits = net(torch.tensor([x]), torch.tensor([len(masked) / len(x)]))[0]
    if s.order == "random" and s.counts != "entropy":
        order, n, drawn = one_call(logits, masked, n_total, steps_left,
                                   Sample(**{**vars(s), "order": "margin"}))
        subsets = list(itertools.combinations(masked, n))
    else:
        order, n, drawn = one_call(logits, masked, n_total, steps_left, s)
        subsets = [order[:n]]
    for subset in subsets:
        for tokens in itertools.product(range(3), repeat=n):
            y = list(x)
            q = p / len(subsets)
            for i, token in zip(subset, tokens, strict=True):
                y[i] = token
                q *= drawn[i, token]
            if q:
                enumerate_texts(net, y, n_total, steps_left - 1, s, q, total)
    return total


DRAWS = [dict(temperature=1.0), dict(temperature=0.5, top_k=2), dict(temperature=0.0),
         dict(temperature=0.9, top_k=1), dict(temperature=2.0, top_k=99)]


@pytest.mark.parametrize("counts", ALL_COUNTS)
@pytest.mark.parametrize("order", ORDERS[1:])
def test_what_one_call_reveals(order, counts):
    """Of every text of V=3, T=4, at every step: which positions, and from which probabilities. The
    network's own decide the order; those after temperature and top_k decide what is drawn, and with
    counts=entropy how many."""
    net = Table(3, 4)
    m = MaskedDiffusion(net, 3)
    texts = [x for x in itertools.product(range(4), repeat=4) if 3 in x]
    k = torch.tensor([x.count(3) for x in texts])
    logits = net(torch.tensor(texts), k / 4)
    for how, distance, bound in itertools.product(DRAWS, (0, 1), (0.0, 0.1, 0.5, 100.0)):
        if counts != "entropy" and bound:
            continue
        s = Sample(order=order, counts=counts, steps=4, min_distance=distance,
                   entropy_bound=bound, **how)
        for steps_left in (1, 2, 3, 4):
            n_total = torch.full_like(k, 4)
            got, log_probs = m.reveal(torch.tensor(texts), n_total, steps_left, s)
            for i, x in enumerate(texts):
                masked = [j for j in range(4) if x[j] == 3]
                ranked, n, drawn = one_call(logits[i], masked, 4, steps_left, s)
                assert np.abs(log_probs[i].exp().numpy() - drawn).max() < 1e-5
                assert set(got[i].nonzero().flatten().tolist()) == set(ranked[:n])


@pytest.mark.parametrize("how, x", [
    (dict(order="random", steps=4), [3, 3, 3, 3]),
    (dict(order="random", steps=2, temperature=0.5, top_k=2), [3, 3, 3, 3]),
    (dict(order="confidence", steps=2), [3, 3, 3, 3]),
    (dict(order="margin", steps=3, temperature=0.5, top_k=2), [3, 3, 3, 3]),
    (dict(order="entropy", steps=3, counts="documents", temperature=0.6), [3, 1, 3, 3]),
    (dict(order="margin", steps=2, counts="cosine", min_distance=1), [3, 3, 3, 3]),
    (dict(order="left", steps=2, min_distance=1), [3, 3, 3, 3]),
    (dict(counts="entropy", steps=3, entropy_bound=0.5, temperature=0.7), [3, 3, 3, 3]),
    (dict(order="confidence", steps=9), [3, 0, 2, 3])], ids=str)
def test_texts_are_distributed_as_enumerated(how, x):
    s = Sample(**{**dict(temperature=1.0, remask=0.0, min_distance=0), **how})
    net = Table(3, 4)
    p = torch.zeros(81)
    texts = enumerate_texts(net, x, x.count(3), s.steps, s)
    for text, q in texts.items():
        p[sum(token * 3 ** (3 - i) for i, token in enumerate(text))] = q
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    known = [token < 3 for token in x]
    if s.order != "random" or s.counts == "entropy":
        may_be = (TEXTS == torch.tensor(x)) | ~torch.tensor(known)
        nats = MaskedDiffusion(net, 3).sampler_nll(TEXTS, torch.tensor(known).expand(81, 4), s)
        assert torch.allclose((-nats).exp()[may_be.all(1)], p[may_be.all(1)].double(), atol=1e-6)
    check_distribution(draw(MaskedDiffusion(net, 3), 20000, s, x, known), 3, p)


# -------------------------------------------------------------------------------------------------
# the likelihood of a sampler

def total(method, known, s):
    """The sum of the probabilities of all texts that have 2 where known, as known (4,) says."""
    x = TEXTS[(TEXTS == 2)[:, known].all(1)]
    return (-method.sampler_nll(x, known.expand(len(x), 4), s)).exp().sum().item()


@pytest.mark.parametrize("counts", ALL_COUNTS)
@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("known", [[], [1], [0, 3]], ids=str)
def test_the_probabilities_of_all_texts_sum_to_one(known, order, counts):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[known] = True
    for how, distance, steps in itertools.product(DRAWS, (0, 1, 2), (0, 1, 2, 3, 4)):
        s = Sample(order=order, counts=counts, steps=steps, min_distance=distance, remask=0.0,
                   **how)
        assert total(MaskedDiffusion(Table(3, 4), 3), mask, s) == pytest.approx(1, abs=1e-5)


def test_of_a_random_order_each_order_sums_to_one_and_their_mean_is_the_bound(monkeypatch):
    method = MaskedDiffusion(Table(3, 4), 3)
    nothing_known = torch.zeros(81, 4, dtype=torch.bool)
    s = Sample(**EXACT, steps=4)
    nats = []
    for order in itertools.permutations(range(4)):
        score = -torch.tensor(order).argsort().float().expand(81, 4)
        monkeypatch.setattr(diffusion, "position_scores", lambda *_, score=score: score)
        nats.append(method.sampler_nll(TEXTS, nothing_known, s))
        assert (-nats[-1]).exp().sum().item() == pytest.approx(1, abs=1e-5)
    # the bound, for each text: the mean over all ways to mask k of its 4 tokens, k = 1 .. 4
    bound = torch.zeros(81, dtype=torch.float64)
    for k in range(1, 5):
        patterns = list(itertools.combinations(range(4), k))
        for pattern in patterns:
            hidden = torch.zeros(4, dtype=torch.bool)
            hidden[list(pattern)] = True
            logits = method.net(TEXTS.masked_fill(hidden, 3), torch.full((81,), k / 4))
            ce = torch.nn.functional.cross_entropy(logits.mT, TEXTS, reduction="none")
            bound += ce[:, hidden].sum(1).double() / k / len(patterns)
    assert torch.allclose(torch.stack(nats).mean(0), bound, atol=1e-5)


def test_from_left_to_right_it_is_the_chain_rule():
    net = Table(3, 4)
    nats = torch.zeros(81, dtype=torch.float64)
    for i in range(4):
        x = TEXTS.clone()
        x[:, i:] = 3
        log_probs = net(x, torch.full((81,), 1 - i / 4)).log_softmax(-1)
        nats -= log_probs[torch.arange(81), i, TEXTS[:, i]]
    s = Sample(**{**EXACT, "order": "left"}, steps=4)
    found = MaskedDiffusion(net, 3).sampler_nll(TEXTS, TEXTS < 0, s)
    assert torch.allclose(found, nats, atol=1e-6)


def test_to_order_by_the_true_token_is_no_likelihood():
    """The mistake that suggests itself: a position's score is the probability of its true token."""
    class Peeks(MaskedDiffusion):
        def reveal(self, x, n_total, steps_left, s):
            logits = self.net(x, (x == 3).sum(1) / 4)
            score = logits.softmax(-1).gather(-1, TEXTS[..., None])[..., 0]
            return (x == 3) & (score == score.masked_fill(x != 3, -1).amax(1, True)), \
                logits.log_softmax(-1)
    nothing_known = torch.zeros(4, dtype=torch.bool)
    s = Sample(**{**EXACT, "order": "confidence"}, steps=4)
    assert abs(total(Peeks(Table(3, 4), 3), nothing_known, s) - 1) > 0.1
    assert abs(total(MaskedDiffusion(Table(3, 4), 3), nothing_known, s) - 1) < 1e-5


def test_what_cannot_be_written_costs_infinity_and_remasking_has_no_likelihood():
    method = MaskedDiffusion(Table(3, 4), 3)
    s = Sample(**{**EXACT, "order": "left", "temperature": 0.0}, steps=4)
    nats = method.sampler_nll(TEXTS, TEXTS < 0, s)
    assert (nats == 0).sum() == 1 and (nats == math.inf).sum() == 80
    with pytest.raises(SystemExit, match="remask > 0 has no likelihood"):
        method.sampler_nll(TEXTS, TEXTS < 0, Sample())


def test_confidence_is_the_probability_each_token_was_drawn_with():
    s = Sample(**{**EXACT, "temperature": 0.5}, steps=1, top_k=2)
    net = Table(3, 4)
    x = torch.full((50, 4), 3)
    (y, confidence), = MaskedDiffusion(net, 3).sample(x, x < 3, s)
    _, _, drawn = one_call(net(x[:1], torch.ones(1))[0], [0, 1, 2, 3], 4, 1, Sample(
        order="margin", temperature=0.5, top_k=2, steps=1))
    truth = torch.from_numpy(drawn)[torch.arange(4), y].float()
    assert torch.allclose(confidence, truth, atol=1e-5) and truth.min() < 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_oracle_sampler_reproduces_the_joint(order):
    """One character a call: every honest order samples exactly the joint distribution."""
    oracle = Oracle(3, 3)
    s = Sample(**{**EXACT, "order": order}, steps=3)
    check_distribution(draw(MaskedDiffusion(oracle, 3), 20000, s), 3, oracle.p)


def test_what_is_locked_stays_unwritten_and_the_rest_has_its_marginal():
    """The last of three is locked: the first two are written in four calls, as they are likely."""
    oracle = Oracle(3, 3)
    x = torch.zeros(20000, 3, dtype=torch.long)
    nothing_known = x < 0
    locked = nothing_known | torch.tensor([False, False, True])
    torch.manual_seed(0)
    for method in (MaskedDiffusion(oracle, 3), Autoregressive(Oracle(3, 3, causal=True), 3)):
        frames = list(method.sample(x, nothing_known, Sample(**EXACT), locked))
        assert len(frames) == 2                            # remask=0: done after one call each
        y, confidence = frames[-1]
        assert (y[:, 2] == 3).all() and not confidence[:, 2].any()
        check_distribution(y[:, :2], 3, oracle.p.view(3, 3, 3).sum(2).flatten())
    s = Sample(**{**EXACT, "remask": 0.5})
    frames = list(MaskedDiffusion(oracle, 3).sample(x, nothing_known, s, locked))
    assert len(frames) == 4                                # steps=0: two calls a position
    assert all((y[:, 2] == 3).all() for y, _ in frames) and (frames[-1][0][:, :2] < 3).all()


def test_infilling_samples_the_conditional():
    """Given the middle of three, the masked model writes p(x_0, x_2 | x_1), the baseline, which
    cannot look ahead, p(x_0) p(x_2 | x_0, x_1); neither touches the middle."""
    oracle = Oracle(3, 3)
    p = oracle.p.view(3, 3, 3)
    prompt = dict(x=(0, 2, 0), known=(False, True, False))
    masked = torch.zeros(3, 3, 3)
    masked[:, 2] = p[:, 2] / p[:, 2].sum()
    x = draw(MaskedDiffusion(oracle, 3), 20000, Sample(**EXACT, steps=2), **prompt)
    check_distribution(x, 3, masked.flatten())
    ar = torch.zeros(3, 3, 3)
    ar[:, 2] = p.sum((1, 2))[:, None] * p[:, 2] / p[:, 2].sum(1, keepdim=True)
    baseline = Autoregressive(Oracle(3, 3, causal=True), 3)
    check_distribution(draw(baseline, 20000, Sample(**EXACT), **prompt), 3, ar.flatten())
    check_distribution(draw(baseline, 20000, Sample(**EXACT)), 3, oracle.p)


@pytest.mark.parametrize("min_distance", [1, 3])
def test_keep_apart_is_greedy(min_distance):
    """The best; of those farther away the best; ...; the rest by score; -inf last. Of equals the
    leftmost."""
    torch.manual_seed(0)
    score = torch.rand(50, 20)
    score[25:] = (3 * score[25:]).round()                              # many ties
    score[:, [3, 11]] = -math.inf
    ranked = diffusion.keep_apart(score, min_distance).argsort(1, descending=True).tolist()
    for row, order in zip(score.tolist(), ranked, strict=True):
        assert set(order[18:]) == {3, 11}
        free = set(order[:18])
        rest = set(order[:18])
        for i in order[:18]:
            pool = free or rest
            assert i == max(sorted(pool), key=row.__getitem__)
            rest.remove(i)
            free = {j for j in free if abs(i - j) > min_distance}


@pytest.mark.parametrize("counts", ALL_COUNTS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_sampler_finishes_and_keeps_the_prompt(order, counts):
    m = small()
    calls = []
    m.net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    for steps, remask in itertools.product((1, 2, 3, 7, 12, 25), (0.0, 0.3, 1.0)):
        x0 = torch.randint(5, (4, 12))
        known = torch.rand(4, 12) < torch.tensor([[0.5], [0.6], [0.8], [0.9]])
        s = Sample(steps=steps, order=order, counts=counts, remask=remask)
        calls.clear()
        frames = list(m.sample(x0, known, s))
        assert len(frames) == len(calls) <= steps
        assert (frames[-1][0] < 5).all(), "MASK is left"
        for x, confidence in frames:
            assert torch.equal(x[known], x0[known]) and (confidence[known] == 1).all()
            assert ((confidence > 0) == (x < 5)).all() and (confidence <= 1 + 1e-6).all()
        if not remask:
            assert len(calls) <= (~known).sum(1).max(), "calls after all is written"
            for (a, _), (b, _) in itertools.pairwise(frames):
                assert ((a == b) | (a == 5)).all(), "a revealed character changed"


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


def test_remasking_takes_the_least_probable_when_revealed_and_never_the_prompt():
    m = MaskedDiffusion(Uniform(5), 5)
    x = torch.tensor([[0, 1, 2, 3, 4, 5]])
    confidence = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.01, 0.0]])
    known = torch.tensor([[False, False, False, False, True, False]])
    again = m.least_confident(x, confidence, known, 0.5)
    assert again.tolist() == [[False, True, False, True, False, False]]
    # at least one, once nothing is masked, unless all is given
    full = torch.tensor([[0, 1, 2, 3, 4, 0]])
    again = m.least_confident(full, confidence, known, 0.01)
    assert again.tolist() == [[False] * 5 + [True]]
    assert not m.least_confident(full, confidence, known | True, 0.01).any()

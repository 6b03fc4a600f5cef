"""How masked diffusion writes: one call and whole texts by definition, the exact joint."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from test_diffusion import Oracle, Table, exact_bound, small

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


def probability(net, text, x, s):
    """By definition: of writing this text from x, a list with MASK = 3."""
    x = list(x)
    n_total = x.count(3)
    p = float(all(token in (3, wanted) for token, wanted in zip(x, text, strict=True)))
    for steps_left in range(s.steps, 0, -1):
        masked = [i for i, token in enumerate(x) if token == 3]
        if not masked or not p:
            break
        logits = net(torch.tensor([x]), torch.tensor([len(masked) / len(x)]))[0]
        order, n, drawn = one_call(logits, masked, n_total, steps_left, s)
        for i in order[:n]:
            p *= drawn[i, text[i]]
            x[i] = text[i]
    return p


DRAWS = [dict(temperature=1.0), dict(temperature=0.5, top_k=2), dict(temperature=0.0),
         dict(temperature=0.9, top_k=1), dict(temperature=2.0, top_k=99)]


@pytest.mark.parametrize("order, counts", [
    ("left", "even"), ("confidence", "documents"), ("margin", "cosine"), ("entropy", "even"),
    ("left", "entropy")])
def test_what_one_call_reveals(order, counts):
    """Of texts of V=3, T=4, at every step: which positions, and from which probabilities. The
    network's own decide the order; those after temperature and top_k decide what is drawn, and with
    counts=entropy, whatever the order, how many."""
    net = Table(3, 4)
    m = MaskedDiffusion(net, 3)
    texts = [x for x in itertools.product(range(4), repeat=4) if 3 in x][::4]
    k = torch.tensor([x.count(3) for x in texts])
    n_total = torch.full_like(k, 4)
    logits = net(torch.tensor(texts), k / 4)
    bounds = (0.0, 0.1, 0.5, 100.0) if counts == "entropy" else (0.1,)
    for how, distance, bound in itertools.product(DRAWS, (0, 1), bounds):
        s = Sample(order=order, counts=counts, steps=4, min_distance=distance,
                   entropy_bound=bound, **how)
        for steps_left in (1, 2, 3, 4):
            got, log_probs = m.reveal(torch.tensor(texts), n_total, steps_left, s)
            for i, x in enumerate(texts):
                masked = [j for j in range(4) if x[j] == 3]
                ranked, n, drawn = one_call(logits[i], masked, 4, steps_left, s)
                assert np.abs(log_probs[i].exp().numpy() - drawn).max() < 1e-5
                assert set(got[i].nonzero().flatten().tolist()) == set(ranked[:n])


@pytest.mark.parametrize("how, x", [
    (dict(order="confidence", steps=2), [3, 3, 3, 3]),
    (dict(order="margin", steps=3, temperature=0.5, top_k=2), [3, 3, 3, 3]),
    (dict(order="entropy", steps=3, counts="documents", temperature=0.6), [3, 1, 3, 3]),
    (dict(order="margin", steps=2, counts="cosine", min_distance=1), [3, 3, 3, 3]),
    (dict(order="left", steps=2, min_distance=1), [3, 3, 3, 3]),
    (dict(counts="entropy", steps=3, entropy_bound=0.5, temperature=0.7), [3, 3, 3, 3]),
    (dict(order="confidence", steps=9), [3, 0, 2, 3])], ids=str)
def test_texts_have_the_probabilities_of_the_definition(how, x):
    """Those that are written, and those that are scored."""
    s = Sample(**{**dict(temperature=1.0, remask=0.0, min_distance=0), **how})
    net = Table(3, 4)
    p = torch.tensor([probability(net, text, x, s) for text in TEXTS.tolist()])
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    known = torch.tensor(x) < 3
    may_be = ((TEXTS == torch.tensor(x)) | ~known).all(1)
    nats = MaskedDiffusion(net, 3).sampler_nll(TEXTS, known.expand(81, 4), s)
    assert torch.allclose((-nats).exp()[may_be], p[may_be].double(), atol=1e-6)
    check_distribution(draw(MaskedDiffusion(net, 3), 20000, s, x, known.tolist()), 3, p)


# -------------------------------------------------------------------------------------------------
# the likelihood of a sampler

@pytest.mark.parametrize("given", [[], [1], [0, 3]], ids=str)
def test_the_probabilities_of_all_texts_sum_to_one(given):
    """Of those that have 2 where it is known, for every setting."""
    method = MaskedDiffusion(Table(3, 4), 3)
    known = torch.zeros(4, dtype=torch.bool)
    known[given] = True
    x = TEXTS[(TEXTS == 2)[:, known].all(1)]
    every = itertools.product(ORDERS[1:], ALL_COUNTS, DRAWS, (0, 1, 2), range(5))
    for order, counts, how, distance, steps in every:
        s = Sample(order=order, counts=counts, steps=steps, min_distance=distance, remask=0.0,
                   **how)
        p = (-method.sampler_nll(x, known.expand(len(x), 4), s)).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-5), s
    with pytest.raises(SystemExit, match="remask > 0 has no likelihood"):
        method.sampler_nll(x, x < 0, Sample())


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
    likeliest = Sample(**{**EXACT, "order": "left", "temperature": 0.0}, steps=4)
    nats = MaskedDiffusion(net, 3).sampler_nll(TEXTS, TEXTS < 0, likeliest)
    assert (nats == 0).sum() == 1 and (nats == math.inf).sum() == 80


def test_to_order_by_the_true_token_is_no_likelihood():
    """The mistake that suggests itself: a position's score is the probability of its true token."""
    class Peeks(MaskedDiffusion):
        def reveal(self, x, n_total, steps_left, s):
            logits = self.net(x, (x == 3).sum(1) / 4)
            score = logits.softmax(-1).gather(-1, TEXTS[..., None])[..., 0]
            score = score.masked_fill(x != 3, -1)
            return (x == 3) & (score == score.amax(1, True)), logits.log_softmax(-1)
    s = Sample(**{**EXACT, "order": "confidence"}, steps=4)
    p = (-Peeks(Table(3, 4), 3).sampler_nll(TEXTS, TEXTS < 0, s)).exp()
    assert abs(p.sum().item() - 1) > 0.1


def test_of_a_random_order_each_order_sums_to_one_and_their_mean_is_the_bound(monkeypatch):
    """From left to right and in the 23 other orders."""
    method = MaskedDiffusion(Table(3, 4), 3)
    s = Sample(**EXACT, steps=4)
    nats = []
    for order in itertools.permutations(range(4)):
        score = -torch.tensor(order).argsort().float().expand(81, 4)
        monkeypatch.setattr(diffusion, "position_scores", lambda *_, score=score: score)
        nats.append(method.sampler_nll(TEXTS, TEXTS < 0, s))
        assert (-nats[-1]).exp().sum().item() == pytest.approx(1, abs=1e-5)
    mean = torch.stack(nats).mean(0) / 4
    for i in range(0, 81, 8):
        assert mean[i].item() == pytest.approx(exact_bound(method, TEXTS[i]), abs=1e-5)


def test_confidence_is_the_probability_each_token_was_drawn_with():
    s = Sample(**{**EXACT, "temperature": 0.5}, steps=1, top_k=2)
    net = Table(3, 4)
    x = torch.full((50, 4), 3)
    (y, confidence), = MaskedDiffusion(net, 3).sample(x, x < 3, s)
    _, _, drawn = one_call(net(x[:1], torch.ones(1))[0], [0, 1, 2, 3], 4, 1, Sample(
        order="margin", temperature=0.5, top_k=2, steps=1))
    truth = torch.from_numpy(drawn)[torch.arange(4), y].float()
    assert torch.allclose(confidence, truth, atol=1e-5) and truth.min() < 0.5


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


def test_oracles_write_the_joint_and_in_a_gap_the_conditional():
    """Given the middle of three, the masked model writes p(x_0, x_2 | x_1), the baseline, which
    cannot look ahead, p(x_0) p(x_2 | x_0, x_1); neither touches the middle."""
    oracle = Oracle(3, 3)
    p = oracle.p.view(3, 3, 3)
    for order in ORDERS:
        s = Sample(**{**EXACT, "order": order}, steps=3)
        check_distribution(draw(MaskedDiffusion(oracle, 3), 20000, s), 3, oracle.p)
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


def test_every_sampler_finishes_and_keeps_the_prompt():
    """Sixty of all settings, drawn."""
    m = small()
    calls = []
    m.net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    every = itertools.product(ORDERS, ALL_COUNTS, (1, 2, 3, 7, 12, 25), (0.0, 0.3, 1.0))
    for order, counts, steps, remask in random.Random(0).sample([*every], 60):
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


def test_remasking_takes_the_least_probable_when_revealed_and_never_the_prompt():
    m = MaskedDiffusion(None, 5)
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

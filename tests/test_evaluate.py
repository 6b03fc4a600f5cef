"""The evaluation: the same digits at any batch size, the truth within its error about 95% of the time."""
import math
import random
import runpy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analog_bits
import embed_diffusion
import model
import train
from config import Bits, Embed, Masked, Sampler
from diffusion import Autoregressive, MaskedDiffusion
from evaluation.evaluate import infilling, judged, left_to_right, likelihood, written
from evaluation.metrics import mean, overlap, text_metrics, vocabulary
from train import build, evaluate, glance


class Fixed(nn.Module):
    """The same distribution p (V,) at every position, whatever is seen."""

    def __init__(self, p):
        super().__init__()
        self.logits = p.log()

    def forward(self, x, t):
        return self.logits.expand(*x.shape, -1)


def test_any_batch_size_gives_the_same_digits(monkeypatch):
    monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", enabled=False))
    torch.manual_seed(0)
    m = build(Masked(block_size=16, n_layer=2, n_head=2, n_embd=16), {"alphabet": "abcde"}).eval()
    for p in m.parameters():
        nn.init.normal_(p, std=.3)
    val = torch.randint(5, (60, 16), dtype=torch.uint8)
    a, b, again = (evaluate(m, val, 4, n) for n in (7, 128, 7))
    assert a["bound"] == again["bound"] and torch.equal(a["windows"], again["windows"])
    for k in ("bound", "stderr", "masked_ce"):
        assert a[k] == pytest.approx(b[k], abs=1e-6)
    assert a["buckets"] == pytest.approx(b["buckets"], abs=1e-6)


def test_every_noise_level_is_drawn_equally_often():
    seen = []

    class Spy(Fixed):
        def forward(self, x, t):
            seen.extend((t * 10).round().int().tolist())
            return super().forward(x, t)

    evaluate(MaskedDiffusion(Spy(torch.ones(3) / 3), 3), torch.randint(3, (50, 10)), 4)
    assert torch.tensor(seen).bincount(minlength=11).tolist() == [0] + [20] * 10


def test_masked_ce_is_total_over_number():
    """CE that grows with the share masked: bound = int CE, masked CE = int m CE / int m, always larger."""
    class Grows(nn.Module):
        def forward(self, x, t):
            return torch.stack([torch.zeros_like(x), 3 * t[:, None].expand(x.shape)], -1)     # p(0) falls with t

    e = evaluate(MaskedDiffusion(Grows(), 2), torch.zeros(100, 20, dtype=torch.long), 4)
    ce = [math.log1p(math.exp(3 * k / 20)) for k in range(1, 21)]
    assert e["bound"] == pytest.approx(sum(ce) / 20, abs=1e-5)
    assert e["masked_ce"] == pytest.approx(sum(k * c for k, c in enumerate(ce, 1)) / 210, abs=1e-5)
    assert e["buckets"] == pytest.approx([sum(ce[4 * i:4 * i + 4]) / 4 for i in range(5)], abs=1e-5)


@pytest.mark.parametrize("kind", ["masked", "twin"])
@pytest.mark.parametrize("sticky", [False, True])
def test_standard_error_covers_the_truth(kind, sticky):
    """300 fresh texts of a known source: the truth lies within 1.96 stderr about 95% of the time, also when neighbouring windows are alike
    (a source that switches every 60 characters or so between an easy and a hard mood, scored by the mean distribution). An error taken from
    single windows fails the second."""
    torch.manual_seed(0)
    W, T, reps = 800, 8, 300
    a, b = torch.tensor([.98, .01, .01]), torch.ones(3) / 3
    p = (a + b) / 2 if sticky else b * torch.tensor([1.5, .9, .6])
    m = (MaskedDiffusion if kind == "masked" else Autoregressive)(Fixed(p), 3)
    truth, covered = -(p * p.log()).sum().item(), 0
    for _ in range(reps):
        if sticky:
            mood = ((torch.rand(W * T) < 1 / 60).cumsum(0) + torch.randint(2, ())) % 2
            text = torch.multinomial(torch.stack([a, b])[mood], 1).view(W, T)
        else:
            text = torch.multinomial(p.expand(W, -1), T, replacement=True)
        e = evaluate(m, text, 1, 1000)
        covered += abs(e["bound"] - truth) < 1.96 * e["stderr"]
    assert .90 <= covered / reps <= .98, covered / reps


def test_a_glance_is_at_most_a_twentieth_of_training():
    c = Masked(eval_interval=100, batch_size=32)
    m = MaskedDiffusion(Fixed(torch.ones(3) / 3), 3)
    windows, levels = glance(torch.arange(5000)[:, None], c, m)
    assert len(windows) * levels <= .05 * 3 * 100 * 32 and windows[0] == 0 and windows[-1] == 4999   # a step is three forward passes


# ---- evaluate.py

SOURCE = "the cat sat on the mat, and the dog sat on the cat; it was nobody's fault, and the mat had seen worse than a dog or a cat. "


def test_metrics_of_one_repeated_character():
    m = text_metrics(["a" * 64] * 4, SOURCE, vocabulary(SOURCE))
    assert m["entropy"] == (0, 0) and m["fourgrams"] == 1 / (4 * 61)
    assert m["longest"] == 1 and m["overlap"] == (1, 0)
    assert math.isnan(m["words"][0]) and m["names"] == (0, 0)       # one word, cut at both ends: none to judge


def test_metrics_of_uniform_noise():
    rng = random.Random(0)
    m = text_metrics(["".join(rng.choices("abcdefghijklmnop ", k=128)) for _ in range(400)], SOURCE, vocabulary(SOURCE))
    assert abs(m["entropy"][0] - math.log2(17)) < .005 and m["words"][0] < .1 and m["fourgrams"] > .7 and m["longest"] <= 6


def test_metrics_of_the_training_text_itself():
    texts = [SOURCE[i:i + 40] for i in range(0, 80, 8)]
    m = text_metrics(texts, SOURCE, vocabulary(SOURCE))
    assert m["words"] == (1, 0) and m["longest"] == 40 and m["overlap"] == (40, 0)


def test_a_memorised_passage_is_found_inside_a_text():
    assert overlap("zzzz" + SOURCE[10:47] + "zzzz" + SOURCE[:9], SOURCE) == 37
    assert text_metrics(["q" * 30, "zz" + SOURCE[10:47]], SOURCE, set())["longest"] == 37
    assert overlap("", SOURCE) == overlap("QQ", SOURCE) == 0


def test_names_are_whole_lines():
    m = text_metrics(["ROMEO:\nAy me: no\n\nFirst Citizen:\nSo: it\n"] * 2, SOURCE, set())
    assert m["names"] == (pytest.approx(2000 / 40), 0)


def test_mean_is_the_ratio_with_its_spread():
    """Against 4,000 repetitions of the same draw: words known of words written, where texts differ in length."""
    g = torch.Generator().manual_seed(0)

    def parts():
        n = torch.randint(5, 30, (60,), generator=g)
        return [(torch.rand(k, generator=g).lt(.3).sum().item(), k) for k in n.tolist()]

    ratios, errors = zip(*(mean(parts()) for _ in range(4000)), strict=True)
    assert abs(sum(ratios) / 4000 - .3) < .002
    assert sum(errors) / 4000 == pytest.approx(torch.tensor(ratios).std().item(), rel=.05)


def test_left_to_right_is_the_chain_rule():
    """A network that knows only how many are masked: -log p = the sum over i of its entropy at T - i masked, T calls."""
    class Counts(nn.Module):
        def forward(self, x, t):
            assert torch.equal(t, (x == 2).float().mean(1))
            return torch.stack([torch.zeros(x.shape), 3 * t[:, None].expand(x.shape)], -1)

    x = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]])
    nats = left_to_right(MaskedDiffusion(Counts(), 2), x)
    logp = [torch.tensor([0, 3 * k / 4]).log_softmax(0) for k in (4, 3, 2, 1)]
    truth = [-sum(p[i].item() for p, i in zip(logp, row, strict=True)) / 4 for row in x.tolist()]
    assert nats.tolist() == pytest.approx(truth, abs=1e-6)


def test_left_to_right_of_a_network_that_knows_the_joint_distribution_equals_every_other_order():
    """Exact conditionals of a distribution on {0, 1}^3: every order has the same likelihood, the bound is tight."""
    joint = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(1))
    joint /= joint.sum()

    class Knows(nn.Module):
        def forward(self, x, t):
            out = torch.zeros(*x.shape, 2)
            for b, row in enumerate(x.tolist()):
                for i in range(3):
                    for v in (0, 1):
                        given = [v if j == i else w for j, w in enumerate(row)]
                        out[b, i, v] = joint[tuple(slice(None) if w == 2 else w for w in given)].sum()
            return out.log()

    x = torch.cartesian_prod(*[torch.arange(2)] * 3)
    assert torch.allclose(left_to_right(MaskedDiffusion(Knows(), 2), x), -joint.flatten().log().double() / 3, atol=1e-6)


@pytest.mark.parametrize("kind, draws", [("masked", 2), ("masked", 5), ("bits", 2), ("embeddings", 2)])
def test_the_error_of_the_draws_is_that_of_repeated_evaluations(monkeypatch, kind, draws):
    """mc against the spread of the bound over 60 sets of seeds: on a network whose loss depends on what is masked, and on untrained ones, which know
    what the noisy codes themselves say."""
    class Left(nn.Module):   # knows a character from its left neighbour, if that is to be seen
        def forward(self, x, t):
            left = F.pad(x, (1, 0))[:, :-1]
            return 4 * F.one_hot(torch.where(left == 3, 0, left), 3).float()

    tiny, abc = dict(n_layer=1, n_head=1, n_embd=8, block_size=16), {"alphabet": "abc"}
    m = {"masked": lambda: MaskedDiffusion(Left(), 3), "bits": lambda: analog_bits.build(Bits(**tiny), abc).eval(),
         "embeddings": lambda: embed_diffusion.build(Embed(**tiny), abc).eval()}[kind]()
    x = (torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) < .3).cumsum(1) % 3
    m.levels, found, many = 4, [], 0
    whole = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda method, val, levels, seed=0: whole(method, val, levels, seed=draws * many + seed))
    for many in range(60):   # noqa: B007
        found.append(likelihood(m, x, draws))
    spread = torch.tensor([e["bound"] for e in found]).std().item()
    assert .8 < sum(e["mc"] for e in found) / 60 / spread < (1.3 if kind == "masked" else 1.8)     # what it leaves out makes it larger
    assert found[0]["bound"] != found[1]["bound"]


def test_masked_ce_under_a_schedule():
    """CE(m) = m: int m^2 / int m is 2/3 where all shares are alike, and 3/4 under m = sin^2(pi t / 2)."""
    clock = runpy.run_module("experiments.clock")
    m = SimpleNamespace(bound=lambda x, u, seeds: (u, u))
    found = [clock["masked_ce"](m, torch.zeros(300, 8), schedule) for schedule in (lambda t: t, lambda t: (math.pi / 2 * t).sin() ** 2)]
    assert found == [pytest.approx(2 / 3, abs=1e-3), pytest.approx(3 / 4, abs=1e-3)]


def test_judged_scores_long_texts_in_pieces():
    p = torch.tensor([.5, .25, .25])
    judge = SimpleNamespace(method=Autoregressive(Fixed(p), 3), c=SimpleNamespace(block_size=4))
    x = torch.tensor([[0] * 10, [1] * 10])
    nats, error = judged(judge, x)
    assert nats == pytest.approx(1.5 * math.log(2), abs=1e-6) and error == pytest.approx(.5 * math.log(2), abs=1e-6)
    assert judged(judge, x[:1].repeat(2, 1)) == (pytest.approx(math.log(2)), 0)


def test_infilling_of_an_oracle_and_of_a_constant():
    """An oracle finds the whole span, a network that always says 0 finds the zeros; what is outside the span stays."""
    x = torch.randint(3, (40, 64), generator=torch.Generator().manual_seed(0))

    class Oracle(nn.Module):
        def forward(self, y, t):
            assert torch.equal(y[:, :24], x[:, :24]) and torch.equal(y[:, 40:], x[:, 40:])
            return 9 * F.one_hot(x, 3).float()

    found = infilling(SimpleNamespace(name="masked", method=MaskedDiffusion(Oracle(), 3)), x)
    assert found == (1, 0)
    zeros, _ = infilling(SimpleNamespace(name="masked", method=MaskedDiffusion(Fixed(torch.tensor([.8, .1, .1])), 3)), x)
    assert zeros == pytest.approx((x[:, 24:40] == 0).float().mean().item(), abs=1e-6)


def test_network_calls_are_counted_for_each_text():
    """Entropy-bounded: texts of one batch finish at different times; a text that is done costs nothing."""
    class Mixed(nn.Module):   # row 0 is certain of everything, row 1 of nothing
        def forward(self, y, t):
            return torch.stack([torch.tensor([60., 0.]).expand(y.size(1), 2), torch.zeros(y.size(1), 2)])

    nothing = torch.zeros(2, 8, dtype=torch.long)
    _, calls, _ = written(MaskedDiffusion(Mixed(), 2), nothing, nothing > 0, Sampler(counts="entropy", gamma=.1, remask=0.))
    assert calls == (1 + 8) / 2

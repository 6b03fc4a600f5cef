"""What the evaluation computes: the same digits at any batch size, its errors, scores of texts by a
known model, and the digits of the code before this one."""
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analog_bits
import config
import embed_diffusion
import mnist_ddpm
import train
from config import Bits, CodeSampler, Embed, EmbedSampler, ImageSampler, Masked, Sample
from data import Text
from diffusion import Autoregressive, MaskedDiffusion
from evaluation.likelihood import (Checkpoint, Evaluate, cross_entropy_by_noise, left_to_right,
                                   likelihood, spaced_rows)
from evaluation.samples import eval_nll, fill, infilling, sample_row, sample_texts, sampler_settings


class Fixed(nn.Module):
    """The same distribution p (V,) at every position, whatever is seen."""

    def __init__(self, p):
        super().__init__()
        self.logits = p.log()

    def forward(self, x, t):
        return self.logits.expand(*x.shape, -1)


class Grows(nn.Module):
    """Certainty that falls with the share masked: token 0 is as likely as 1 / (1 + e^3t)."""

    def forward(self, x, t):
        return torch.stack([torch.zeros(x.shape), 3 * t[:, None].expand(x.shape)], -1)


def checkpoint_of(method, c=None, name="masked", script=train):
    return Checkpoint("a", name, c, {}, method, script)


def text_file(folder):
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "so"]
    lines = []
    for _ in range(700):
        lines.append(" ".join(rng.choices(words, k=rng.randint(3, 7))) + ".\n")
        if rng.random() < 0.2:
            lines.append(rng.choice(["Tom", "Ann", "First Cat"]) + ":\n")
    path = folder / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def drawn(script, c, meta):
    """A method as its script builds it, with weights that are drawn, so that it says something."""
    torch.manual_seed(0)
    method = script.build(c, meta).eval()
    torch.manual_seed(1)
    for name, p in method.named_parameters():
        if p.dim() > 1 and "table" not in name:
            nn.init.normal_(p, std=0.15)
    return method


def save(out, name, script, c, meta, method):
    """The folder of a run of the method `name`, as if its script had trained it. -> its path"""
    out.mkdir(parents=True)
    torch.save({"method": name, "script": script.__name__, "config": vars(c), "step": 7,
                "ema": method.state_dict(), **meta}, out / "best.pt")
    return str(out)


def tables_of(out):
    """Markdown -> [(title, [cells of each row])]"""
    found = re.findall(r"\n(.+)\n\n\|.*\n\|---.*\n((?:\|.*\n)+)", out)
    return [(title, [line[2:-2].split(" | ") for line in rows.splitlines()])
            for title, rows in found]


@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setattr(config, "AMP", torch.float32)


# train.evaluate

def test_any_batch_size_gives_the_same_digits(fp32):
    meta = {"alphabet": "abcde"}
    method = drawn(train, Masked(block_size=16, n_layer=2, n_head=2, n_embd=16), meta)
    val = torch.randint(5, (60, 16), dtype=torch.uint8)
    a, b = [train.evaluate(method, val, 4, batch_size) for batch_size in (7, 128)]
    for key in ("bound", "masked_ce", "fifths"):
        assert a[key] == pytest.approx(b[key], abs=1e-6)
    assert a["stderr"] == train.block_stderr(a["windows"]) > 0
    assert a["bits"] == pytest.approx(a["bound"] / math.log(2))


def test_masked_ce_is_total_over_number():
    """bound = int CE, masked CE = int m CE / int m, which is larger where CE grows with m. Of 400
    draws each of 20 noise levels has 20."""
    e = train.evaluate(MaskedDiffusion(Grows(), 2), torch.zeros(100, 20, dtype=torch.long), 4)
    ce = [math.log1p(math.exp(3 * k / 20)) for k in range(1, 21)]
    assert e["bound"] == pytest.approx(sum(ce) / 20, abs=1e-5)
    pooled = sum(k * nats for k, nats in enumerate(ce, 1)) / 210
    assert e["masked_ce"] == pytest.approx(pooled, abs=1e-5)
    assert e["fifths"] == pytest.approx([sum(ce[i:i + 4]) / 4 for i in range(0, 20, 4)], abs=1e-5)


def test_standard_error_of_windows_that_are_known():
    """Quarters with means 0, 2, 4, 6: their standard deviation / 2, times half of Student's t."""
    quarters = torch.arange(4.0).repeat_interleave(5) * 2
    assert train.block_stderr(quarters) == pytest.approx(3.182 / 2 * (20 / 3) ** 0.5 / 2)
    assert train.block_stderr(torch.tensor([1.0, 3.0])) == pytest.approx(12.706 / 2)
    assert math.isnan(train.block_stderr(torch.ones(1)))


def test_standard_error_covers_the_truth():
    """Of 300 fresh texts of a known source the truth is within 2 errors about 95% of the time."""
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2])
    truth = -(p * p.log()).sum().item()
    method = MaskedDiffusion(Fixed(p), 3)
    covered = 0
    for _ in range(300):
        text = torch.multinomial(p.expand(200, -1), 8, replacement=True)
        e = train.evaluate(method, text, 1, 1000)
        covered += abs(e["bound"] - truth) < 2 * e["stderr"]
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("n", [871, 100])
def test_standard_error_covers_the_truth_where_plays_differ(n):
    """Windows as alike as those of tiny Shakespeare under the AR baseline, 0.52 at lag 1, 0.16 at
    lag 60: white noise and two memories. All 871, or 100 spaced evenly."""
    torch.manual_seed(0)
    texts = 0.42 ** 0.5 * torch.randn(871, 1000, dtype=torch.float64)
    for variance, phi in ((0.28, 0.8), (0.30, 0.99)):
        x = torch.randn(1000, dtype=torch.float64)
        for window in texts:
            window += variance ** 0.5 * x
            x = phi * x + (1 - phi ** 2) ** 0.5 * torch.randn(1000, dtype=torch.float64)
    covered = 0
    for windows in spaced_rows(texts, n).T:
        covered += abs(windows.mean().item()) < 2 * train.block_stderr(windows)
    assert 0.88 <= covered / 1000 <= 0.97


class Left(nn.Module):
    """Knows a character from its left neighbour, if that is to be seen."""

    def forward(self, x, t):
        left = F.pad(x, (1, 0))[:, :-1]
        return 4 * F.one_hot(torch.where(left == 3, 0, left), 3).float()


def test_the_error_of_the_draws_is_that_of_repeated_evaluations(monkeypatch):
    """mc against the spread of the bound over 60 sets of seeds."""
    method = MaskedDiffusion(Left(), 3)
    method.eval_levels = 4
    x = (torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) < 0.3).cumsum(1) % 3
    honest = train.evaluate
    found = []
    for i in range(60):
        monkeypatch.setattr(train, "evaluate", lambda method, val, levels, seed, i=i:
                            honest(method, val, levels, seed=2 * i + seed))
        found.append(likelihood(method, x, 2))
    spread = torch.tensor([e["bound"] for e in found]).std().item()
    assert 0.8 < sum(e["mc"] for e in found) / 60 / spread < 1.3


def test_an_evaluation_in_training_takes_at_most_a_twentieth_of_its_time():
    c = Masked(eval_interval=100, batch_size=32)
    method = MaskedDiffusion(Fixed(torch.ones(3) / 3), 3)
    windows, levels = train.eval_subset(torch.arange(5000)[:, None], c, method)
    # a step is three forward passes
    assert 0.04 * 3 * 100 * 32 < len(windows) * levels * 2 <= 0.1 * 3 * 100 * 32
    assert windows[0] == 0 and windows[-1] == 4999


# samples

def test_the_evaluation_model_scores_long_texts_in_pieces():
    p = torch.tensor([0.5, 0.25, 0.25])
    scorer = checkpoint_of(Autoregressive(Fixed(p), 3), Masked(block_size=4), "ar")
    x = torch.tensor([[0] * 10, [1] * 10])
    nats, error = eval_nll(scorer, x)
    assert nats == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert error == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert eval_nll(scorer, x[:1].repeat(2, 1)) == (pytest.approx(math.log(2)), 0)


def test_infilling_of_an_oracle_and_of_a_constant():
    """An oracle finds the whole span, a network that always says 0 finds the zeros; what is outside
    the span stays."""
    x = torch.randint(3, (40, 64), generator=torch.Generator().manual_seed(0))

    class Oracle(nn.Module):
        def forward(self, y, t):
            assert torch.equal(y[:, :24], x[:, :24]) and torch.equal(y[:, 40:], x[:, 40:])
            return 9 * F.one_hot(x, 3).float()

    assert infilling(checkpoint_of(MaskedDiffusion(Oracle(), 3)), x) == (1, 0)
    constant = MaskedDiffusion(Fixed(torch.tensor([0.8, 0.1, 0.1])), 3)
    zeros, _ = infilling(checkpoint_of(constant), x)
    assert zeros == pytest.approx((x[:, 24:40] == 0).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("stagger, prompts", [(3.0, 0.25), (0.0, 0.25), (3.0, 0.0), (0.0, 0.0)])
def test_a_gaussian_model_that_never_saw_known_characters_is_not_asked_to_infill(stagger, prompts):
    c = Bits(n_layer=1, n_head=1, n_embd=8, block_size=16, stagger=stagger, prompts=prompts)
    method = analog_bits.build(c, {"alphabet": "abc"}).eval()
    x = torch.randint(3, (4, 16))
    found = infilling(checkpoint_of(method, c, "bits", analog_bits), x)
    assert (found is not None) == (stagger + prompts > 0)


def test_network_calls_are_counted_for_each_text():
    """Entropy-bounded: texts of one batch finish at different times; one that is done costs
    nothing. Row 0 is certain of everything, row 1 of nothing."""
    class Mixed(nn.Module):
        def forward(self, y, t):
            certain = torch.tensor([60.0, 0.0]).expand(y.size(1), 2)
            return torch.stack([certain, torch.zeros(y.size(1), 2)])

    x = torch.zeros(2, 8, dtype=torch.long)
    how = Sample(counts="entropy", entropy_bound=0.1, remask=0.0)
    _, n_calls, _ = fill(MaskedDiffusion(Mixed(), 2), x, x > 0, how)
    assert n_calls == (1 + 8) / 2


@pytest.mark.parametrize("script, expected", [
    (train, Sample(seed=3, steps=9, temperature=0.7, min_distance=2)),
    (analog_bits, CodeSampler(seed=3, steps=11, td=0.5)),
    (embed_diffusion, EmbedSampler(seed=3, steps=11, td=0.5, rounding="clamp")),
    (mnist_ddpm, ImageSampler(seed=3, steps=11, td=0.5, guidance=2.0))])
def test_a_sampler_takes_the_settings_that_it_has(script, expected):
    s = Evaluate(n=7, out="x", seed=3, steps=9, gaussian_steps=11, td=0.5, temperature=0.7,
                 rounding="clamp", min_distance=2, guidance=2.0)
    assert sampler_settings(checkpoint_of(None, script=script), s) == expected
    if hasattr(expected, "sampler"):
        for sampler in ("ddim", "ancestral"):
            how = sampler_settings(checkpoint_of(None, script=script), replace(s, sampler=sampler))
            assert how == replace(expected, sampler=sampler)


# the same digits as ever

def test_the_same_digits_as_of_commit_3118222(fp32, tmp_path):
    """What evaluate.py of that commit computes for the same four networks on the same text. Samples
    of bits and embeddings are left out: their samplers draw less noise now. The
    errors of the text, second of each, are of today's estimator."""
    tiny = dict(dataset=str(text_file(tmp_path)), block_size=24, n_layer=2, n_head=2, n_embd=16)
    data = Text(Masked(**tiny))
    masked = drawn(train, Masked(**tiny), data.meta)
    ar = drawn(train, Masked(**tiny, objective="ar"), data.meta)
    bits = drawn(analog_bits, Bits(**tiny, stagger=3.0), data.meta)
    embed = drawn(embed_diffusion, Embed(**tiny, stagger=3.0), data.meta)
    recorded = [
        (masked, [3.3994085, 0.0278344, 0.0047683], 3.4122945,
         [3.3672538, 3.3704963, 3.4094996, 3.4145181, 3.4287727]),
        (ar, [3.4810656, 0.024635, 0.0], math.nan, [math.nan] * 4 + [3.4810656]),
        (bits, [3.5769313, 0.1020686, 0.1329883], math.nan,
         [2.7777615, 4.8435411, 4.6836863, 4.6711402, 0.9321962]),
        (embed, [3.4298553, 0.09287, 0.1109702], math.nan,
         [2.3252163, 4.9484501, 4.4962797, 4.3449154, 1.0576831]),
    ]
    for method, numbers, masked_ce, fifths in recorded:
        e = likelihood(method, data.val, 2)
        found = [e["bound"], e["stderr"], e["mc"]]
        assert found == pytest.approx(numbers, abs=1e-5)
        assert e["fifths"] == pytest.approx(fifths, abs=1e-5, nan_ok=True)
        assert e["masked_ce"] == pytest.approx(masked_ce, abs=1e-5, nan_ok=True)
    nats = left_to_right(masked, data.val[:4].long()).tolist()
    assert nats == pytest.approx([3.2768684, 3.4247598, 3.3126904, 3.2518117], abs=1e-5)
    assert cross_entropy_by_noise(bits, data, 16) == pytest.approx(
        [0.0139593, 1.4851587, 2.8696358, 3.3135858, 3.4114649], abs=1e-5)
    assert cross_entropy_by_noise(embed, data, 16) == pytest.approx(
        [0.0005095, 0.8985477, 2.9762268, 3.4032884, 3.4173260], abs=1e-5)

    scorer = checkpoint_of(ar, Masked(**tiny), "ar")
    blocks = spaced_rows(data.val, 12).long()
    rows = [
        # the masked model's since keep_apart draws nothing
        (masked, [3.3658864, 0.0349018], [4.4022857, 0.0616253], 1.0, [2.4166667, 0.1486471], 3,
         [0.046875, 0.0135998], 9.0),
        (ar, [3.0118232, 0.0347453], [4.5000795, 0.0269490], 0.9960317, [2.4166667, 0.1929960], 4,
         [0.0677083, 0.0143068], 24.0),
    ]
    for method, nll, entropy, fourgrams, overlap, longest, infilled, n_calls in rows:
        checkpoint = checkpoint_of(method, Masked(**tiny))
        x, found_calls, _ = sample_texts(checkpoint, 12, Sample(steps=9))
        row = sample_row("a", x, data, scorer, infilling(checkpoint, blocks), found_calls)
        found = [*row[2], *row[3], row[6], *row[7], row[8], *row[9], row[10]]
        expected = [*nll, *entropy, fourgrams, *overlap, longest, *infilled, n_calls]
        assert found == pytest.approx(expected, abs=1e-5)
    row = sample_row("a", blocks, data, scorer)
    assert row[:2] == ("a", 12) and row[9:] == (None, None, None)
    found = [*row[2], *row[3], *row[4], *row[5], row[6], *row[7], row[8]]
    assert found == pytest.approx([3.5819289, 0.0455923, 3.7223596, 0.0840480, 1, 0, 3.4722222,
                                   3.4722222, 0.5793651, 13.6666667, 0.5817077, 18], abs=1e-5)

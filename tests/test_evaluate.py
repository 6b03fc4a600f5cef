"""The evaluation: the same digits at any batch size, the truth within its error about 95% of the time."""
import math

import pytest
import torch
from torch import nn

import model
from config import Masked
from diffusion import Autoregressive, MaskedDiffusion
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

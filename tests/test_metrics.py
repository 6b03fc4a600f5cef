"""Scores of pictures where the answer is known: Gaussians, sets on a line, digits that are replayed, blurred or noise."""
import math

import pytest
import torch

from data import digits
from evaluation import metrics
from evaluation.metrics import blurred, covered, digit_metrics, frechet, jackknife, nearest, noise_like, shifted, train_reader


def test_frechet_of_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for axes in common, whatever the rotation; 0 for a set and itself."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    s1, s2, shift = torch.tensor([1., 2, .5, 1, 3]), torch.tensor([2., 1, .5, 1, 1]), torch.tensor([1., 0, 0, 2, 0])
    a, b = torch.randn(2, 200_000, 5)
    assert frechet((a * s1) @ turn, (b * s2 + shift) @ turn) == pytest.approx(5 + (s1 - s2).square().sum().item(), rel=.02)
    assert frechet(a[:100], a[:100]) == pytest.approx(0, abs=1e-6)
    few = a[:3]                                                                       # fewer than dimensions: no not-a-number
    assert frechet(few, a) > 0


def test_precision_and_recall_on_a_line():
    """Real ones at 0..9, samples at 0..4: all samples are covered, of the real ones those near a sample."""
    real, some = torch.arange(10.)[:, None], torch.arange(5.)[:, None]
    assert covered(some, real, k=1).all()
    assert covered(real, some, k=1).tolist() == [True] * 6 + [False] * 4              # 5 is 1 from 4, whose neighbour is at 1
    assert not covered(real + 100, real).any()
    assert nearest(some + .25, real, 2).tolist() == pytest.approx([.75] * 5)


def test_the_jackknife_is_the_error_of_a_mean():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    assert jackknife(lambda i: x[i].mean().item(), len(x), draws=400) == pytest.approx(1 / 2000 ** .5, rel=.15)


def test_garbage_is_garbage():
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:25, 3, 4] = 200
    noise = noise_like(images, 4000)
    assert 0 < (noise[:, 3, 4] == 200).float().mean() - .45 < .1 and noise.sum() == noise[:, 3, 4].sum()
    spot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    spot[0, 14, 14] = 255
    x = blurred(spot, 1.5)[0]
    assert x.argmax() == 14 * 28 + 14 and x.sum() == pytest.approx(255, abs=12) and x[14, 14] == round(255 / (2 * math.pi * 1.5 ** 2))


def test_shifts_move_whole_pictures():
    x = torch.zeros(200, 28, 28)
    x[:, 10, 20] = 1
    y = shifted(x)
    assert (y.sum((1, 2)) == 1).all() and {tuple(p) for p in y.nonzero()[:, 1:].tolist()} == {(r, c) for r in range(8, 13) for c in range(18, 23)}


def test_digits_replayed_blurred_noise():
    """Real digits are read right, cover and are covered; training digits replayed are found out by their nearest neighbour alone; noise and
    blur by the Frechet distance and by precision or recall."""
    parts = {k: torch.from_numpy(v) for k, v in digits(4000, 600).items()}
    train, label, test, _ = parts.values()
    judge, other = (train_reader(train, label, seed, epochs=2) for seed in (0, 1))
    real = (train, test, metrics.read(judge, test)[0], judge, other)
    assert (metrics.read(other, test)[1] == parts["test labels"]).float().mean() > .95
    m = {"real": digit_metrics(train[:300], label[:300], real, itself=1), "replayed": digit_metrics(train[:300], label[:300], real),
         "noise": digit_metrics(noise_like(train, 300), None, real), "blur": digit_metrics(blurred(train[:300], 2), label[:300], real)}
    assert m["real"]["right"][0] > .95 and math.isnan(m["noise"]["right"][0]) and m["real"]["read"] == m["replayed"]["read"]
    assert m["replayed"]["near"][0] == pytest.approx(0, abs=.01) and m["real"]["near"][0] == pytest.approx(1, abs=.1)
    assert m["real"]["precision"][0] > .8 and m["real"]["recall"][0] > .8
    for bad in ("noise", "blur"):
        assert m[bad]["frechet"][0] > 5 * m["real"]["frechet"][0] and min(m[bad]["precision"][0], m[bad]["recall"][0]) < .5, bad
    many = digit_metrics(train[:1500], label[:1500], real, itself=1)                  # more than there are test digits
    assert many["precision"][0] > .8 and many["recall"][0] > .8
    wrong = digit_metrics(train[:300], 9 - label[:300], real)
    assert wrong["right"][0] < .1

"""Scores where the answer is known: texts that repeat, are noise or are the training text;
Gaussians, points on a line; digits that are replayed, blurred or noise."""
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch

from evaluation.digits import (RealDigits, blurred, covered, digit_metrics, frechet, jackknife,
                               nearest, noise_like, shifted, train_classifier)
from evaluation.samples import mean, overlap, text_metrics, vocabulary
from mnist_ddpm import draw_digits

SOURCE = ("the cat sat on the mat, and the dog sat on the cat; it was nobody's fault, and the mat "
          "had seen worse than a dog or a cat. ")


def test_metrics_of_one_repeated_character():
    m = text_metrics(["a" * 64] * 4, SOURCE, vocabulary(SOURCE))
    assert m["entropy"] == (0, 0)
    assert m["fourgrams"] == 1 / (4 * 61)
    assert m["longest"] == 1 and m["overlap"] == (1, 0)
    assert math.isnan(m["words"][0])          # one word, cut at both ends: none counts
    assert m["names"] == (0, 0)


def test_metrics_of_uniform_noise():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=128)) for _ in range(400)]
    m = text_metrics(texts, SOURCE, vocabulary(SOURCE))
    assert abs(m["entropy"][0] - math.log2(17)) < 0.005
    assert m["words"][0] < 0.1
    assert m["fourgrams"] > 0.7 and m["longest"] <= 6


def test_metrics_of_the_training_text_itself():
    texts = [SOURCE[i:i + 40] for i in range(0, 80, 8)]
    m = text_metrics(texts, SOURCE, vocabulary(SOURCE))
    assert m["words"] == (1, 0)
    assert m["longest"] == 40 and m["overlap"] == (40, 0)


def test_a_memorised_passage_is_found_inside_a_text():
    assert overlap("zzzz" + SOURCE[10:47] + "zzzz" + SOURCE[:9], SOURCE) == 37
    m = text_metrics(["q" * 30, "zz" + SOURCE[10:47]], SOURCE, set())
    assert m["longest"] == 37 and m["overlap"] == (18.5, pytest.approx(18.5))
    assert overlap("", SOURCE) == overlap("QQ", SOURCE) == 0


def test_names_are_whole_lines():
    m = text_metrics(["ROMEO:\nAy me: no\n\nFirst Citizen:\nSo: it\n"] * 2, SOURCE, set())
    assert m["names"] == (pytest.approx(2000 / 40), 0)


def test_mean_is_the_ratio_with_its_spread():
    """Against 4,000 repetitions: words known of words written, where texts differ in length."""
    g = torch.Generator().manual_seed(0)

    def draw():
        lengths = torch.randint(5, 30, (60,), generator=g).tolist()
        return [((torch.rand(n, generator=g) < 0.3).sum().item(), n) for n in lengths]

    ratios, errors = zip(*(mean(draw()) for _ in range(4000)), strict=True)
    assert abs(sum(ratios) / 4000 - 0.3) < 0.002
    assert sum(errors) / 4000 == pytest.approx(torch.tensor(ratios).std().item(), rel=0.05)


# images of digits

def test_frechet_of_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for axes in common, whatever the rotation; 0 for a set and
    itself."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    s1 = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    s2 = torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0])
    shift = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])
    a, b = torch.randn(2, 200_000, 5)
    truth = 5 + (s1 - s2).square().sum().item()
    assert frechet((a * s1) @ rotation, (b * s2 + shift) @ rotation) == pytest.approx(truth, 0.02)
    assert frechet(a[:100], a[:100]) == pytest.approx(0, abs=1e-6)
    assert frechet(a[:3], a) > 0              # fewer than dimensions: still a number


def test_precision_and_recall_on_a_line():
    """Real ones at 0..9, samples at 0..4: all samples are covered, of the real ones those near a
    sample: 5 is 1 from 4, whose own neighbour is at 1."""
    real = torch.arange(10.0)[:, None]
    some = torch.arange(5.0)[:, None]
    assert covered(some, real, k=1).all()
    assert covered(real, some, k=1).tolist() == [True] * 6 + [False] * 4
    assert not covered(real + 100, real).any()
    assert nearest(some + 0.25, real, 2).tolist() == pytest.approx([0.75] * 5)


def test_the_jackknife_is_the_error_of_a_mean():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))

    def score(i):
        return x[i].mean().item()

    assert jackknife(score, len(x), draws=400) == pytest.approx(1 / 2000 ** 0.5, rel=0.15)


def test_noise_and_blur():
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:25, 3, 4] = 200
    noise = noise_like(images, 4000)
    assert 0 < (noise[:, 3, 4] == 200).float().mean() - 0.45 < 0.1
    assert noise.sum() == noise[:, 3, 4].sum()
    spot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    spot[0, 14, 14] = 255
    x = blurred(spot, 1.5)[0]
    assert x.argmax() == 14 * 28 + 14 and x.sum() == pytest.approx(255, abs=12)
    assert x[14, 14] == round(255 / (2 * math.pi * 1.5 ** 2))


def test_shifts_move_whole_images():
    x = torch.zeros(200, 28, 28)
    x[:, 10, 20] = 1
    y = shifted(x)
    assert (y.sum((1, 2)) == 1).all()
    found = {tuple(place) for place in y.nonzero()[:, 1:].tolist()}
    assert found == {(row, column) for row in range(8, 13) for column in range(18, 23)}


def test_digits_replayed_blurred_noise():
    """Real digits are read right, cover and are covered; training digits replayed are found out by
    their nearest neighbour alone; noise and blur by the Frechet distance, and by precision or
    recall."""
    train, label, test, test_label = [torch.from_numpy(a) for a in draw_digits(4000, 600)]
    classifiers = [train_classifier(train, label, seed, epochs=2) for seed in (0, 1)]
    data = SimpleNamespace(name="digits", train=train, labels=label, val=test,
                           val_labels=test_label)
    real = RealDigits(data, *classifiers)
    shares = re.findall(r"reads ([\d.]+)%|other ([\d.]+)%", real.about)
    assert len(shares) == 2 and all(float(a or b) > 95 for a, b in shares)

    own = digit_metrics(train[:300], label[:300], real, itself=1)
    assert own["right"][0] > 0.95 and own["precision"][0] > 0.8 and own["recall"][0] > 0.8
    assert own["near"][0] == pytest.approx(1, abs=0.1)
    replayed = digit_metrics(train[:300], label[:300], real)
    assert replayed["near"][0] == pytest.approx(0, abs=0.01)
    assert replayed["read"] == own["read"] and sum(own["read"]) == 300
    noise = digit_metrics(noise_like(train, 300), None, real)
    assert noise["right"] is None
    for bad in (noise, digit_metrics(blurred(train[:300], 2), label[:300], real)):
        assert bad["frechet"][0] > 5 * own["frechet"][0]
        assert min(bad["precision"][0], bad["recall"][0]) < 0.5
    many = digit_metrics(train[:1500], label[:1500], real, itself=1)   # more than test digits
    assert many["precision"][0] > 0.8 and many["recall"][0] > 0.8
    wrong = digit_metrics(train[:300], 9 - label[:300], real)
    assert wrong["right"][0] < 0.1

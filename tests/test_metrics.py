"""Scores where the answer is known: texts that repeat, are noise or are the training text;
Gaussians, points on a line; digits that are replayed, blurred or noise. The table of digits."""
import functools
import math
import random
import re

import pytest
import torch
from test_evaluate import drawn, save, tables_of

import mnist_ddpm
from config import MNIST_RECIPES, Mnist
from evaluation import __main__ as command
from evaluation import digits, likelihood
from evaluation.digits import (blurred, covered, digit_metrics, frechet, jackknife, nearest,
                               noise_like, shifted, train_classifier)
from evaluation.samples import text_metrics, vocabulary
from experiments import samplers

SOURCE = ("the cat sat on the mat, and the dog sat on the cat; it was nobody's fault, and the mat "
          "had seen worse than a dog or a cat. ")


@pytest.mark.parametrize("texts, expected", [
    # one word, cut at both ends: none counts
    (["a" * 64] * 4, {"entropy": (0, 0), "fourgrams": 1 / (4 * 61), "longest": 1,
                      "overlap": (1, 0), "names": (0, 0), "words": (math.nan, math.nan)}),
    (["etaX" * 16] * 2, {"entropy": (2, 0), "fourgrams": 4 / (2 * 61), "overlap": (1, 0)}),
    # the training text itself, and a passage of it inside a text
    ([SOURCE[i:i + 40] for i in range(0, 80, 8)], {"words": (1, 0), "longest": 40,
                                                   "overlap": (40, 0)}),
    (["q" * 30, f"z{SOURCE[10:47]}z{SOURCE[:9]}"], {"longest": 37, "overlap": (18.5, 18.5)}),
    # 2 of 4 and 0 of 1: deviations 0.4 and -0.4 from what 2 of 5 would be, by the delta method
    (["dog xyz cat cat zog mat", "dog xyz zog"], {"words": (0.4, 0.16)}),
    # names are whole lines: two in 40 characters
    (["ROMEO:\nAy me: no\n\nFirst Citizen:\nSo: it\n"] * 2, {"names": (50, 0)})])
def test_metrics_of_texts(texts, expected):
    m = text_metrics(texts, SOURCE, vocabulary(SOURCE))
    for key, value in expected.items():
        assert m[key] == pytest.approx(value, nan_ok=True), key


def test_metrics_of_uniform_noise():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=128)) for _ in range(400)]
    m = text_metrics(texts, SOURCE, vocabulary(SOURCE))
    assert abs(m["entropy"][0] - math.log2(17)) < 0.005 and m["words"][0] < 0.1
    assert m["fourgrams"] > 0.7 and m["longest"] <= 6


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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    x = torch.zeros(200, 28, 28)
    x[:, 10, 20] = 1
    y = shifted(x)
    assert (y.sum((1, 2)) == 1).all()
    found = {tuple(place) for place in y.nonzero()[:, 1:].tolist()}
    assert found == {(row, column) for row in range(8, 13) for column in range(18, 23)}


# digits

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """2,500 drawn digits to train, 500 to test; their two classifiers, trained for two epochs, are
    kept in a folder of these tests."""
    folder = tmp_path_factory.mktemp("digits")
    arrays = mnist_ddpm.draw_digits(2500, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_ddpm, "draw_digits", lambda: arrays)
        patch.setattr(digits, "HERE", folder)
        patch.setattr(digits, "train_classifier", functools.partial(train_classifier, epochs=2))
        patch.setattr(likelihood, "read_images", functools.cache(mnist_ddpm.Images))
        yield digits.real_digits(likelihood.read_images(Mnist(dataset="digits")))


def test_digits_replayed_blurred_noise(real):
    """Real digits are read right, cover and are covered; training digits replayed are found out by
    their nearest neighbour alone; noise and blur by the Frechet distance, and by precision or
    recall."""
    torch.manual_seed(0)
    shares = re.findall(r"reads ([\d.]+)%|other ([\d.]+)%", real.about)
    assert len(shares) == 2 and all(float(a or b) > 95 for a, b in shares)
    x = real.train[:300]
    asked = real.labels[:300]
    own = digit_metrics(x, asked, real, itself=1)
    assert own["right"][0] > 0.95 and own["precision"][0] > 0.8 and own["recall"][0] > 0.8
    assert own["near"][0] == pytest.approx(1, abs=0.1)
    features, _ = digits.classify(real.for_features, x)
    seen = covered(real.features[torch.linspace(0, len(real.test) - 1, 300).long()], features)
    assert own["recall"][0] == pytest.approx(seen.double().mean().item())
    replayed = digit_metrics(x, asked, real)
    assert replayed["near"][0] == pytest.approx(0, abs=0.01)
    assert replayed["read"] == own["read"] and sum(own["read"]) == 300
    noise = digit_metrics(noise_like(real.train, 300), None, real)
    assert noise["right"] is None
    for bad in (noise, digit_metrics(blurred(x, 2), asked, real)):
        assert bad["frechet"][0] > 5 * own["frechet"][0]
        assert min(bad["precision"][0], bad["recall"][0]) < 0.5
    more_than_test_digits = real.train[:600]
    many = digit_metrics(more_than_test_digits, real.labels[:600], real, itself=1)
    assert many["precision"][0] > 0.8 and many["recall"][0] > 0.8
    ones = digit_metrics(real.train[real.labels == 1][:150], None, real, itself=1)
    assert ones["precision"][0] > 0.8 and ones["recall"][0] < 0.4
    wrong = digit_metrics(x, 9 - asked, real)
    assert wrong["right"][0] < 0.1


def test_the_floor_is_the_mean_of_ten_draws(real, monkeypatch, capsys):
    """Of distances 0 to 9: 4.5, with their deviation, 3.028."""
    distances = iter(map(float, range(10)))
    monkeypatch.setattr(digits, "frechet", lambda a, b: next(distances, 0.0))
    _, floor = digits.digit_floor(real, 100, 0)
    assert floor == 4.5 and "| 4.500 ± 3.028 | 1.0 |" in capsys.readouterr().out


def test_the_table_of_digits(real, tmp_path, monkeypatch, capsys):
    """Two recipes below the floors; classifiers are trained once; other digits are refused."""
    meta = likelihood.read_images(Mnist(dataset="digits")).meta
    outs = []
    for recipe in ("best", "levels"):
        c = Mnist(n_layer=1, n_head=1, n_embd=16, patch=14, **MNIST_RECIPES[recipe])
        method = drawn(mnist_ddpm, c, meta)
        outs.append(save(tmp_path / recipe, "mnist", mnist_ddpm, c, meta, method))
    digits.real_digits.cache_clear()
    monkeypatch.setattr(digits, "train_classifier", None)
    command.main([f"--out={','.join(outs)}", "--digits=20", "--gaussian_steps=3",
                  "--guidance=1.5", "--windows=4"])
    out = capsys.readouterr().out
    (title, bounds), (_, fifths), (_, images) = tables_of(out)
    assert title == "digits, held out: 4 of 500 windows of 784 pixels"
    assert [row[0] for row in bounds] == [row[0] for row in fifths] == outs
    assert all(float(cell) > 0 for row in bounds for cell in row[4:7])
    assert "ImageSampler(" in out and "steps=3, sampler='ddim'" in out and "guidance=1.5" in out
    assert [row[1] for row in images] == ["20"] * 5
    assert images[0][4] == "1.0"                           # the floor
    assert [row[2] == "" for row in images] == [False, True, False, False, False]
    command.main([f"--out={outs[0]}", "--digits=0", "--windows=4"])
    out = capsys.readouterr().out
    assert "bits/pixel" in out and "Frechet" not in out

    # a row for each setting
    samplers.main([f"--out={outs[0]}", "--digits=20", "--gaussian_steps=3", "--guidance=0,2"])
    (_, rows), = tables_of(capsys.readouterr().out)
    titles = ["guidance=0", "guidance=2"]
    assert [row[0] for row in rows[3:]] == titles and rows[3][3] != rows[4][3]
    assert rows[:3] == images[:3]

    # others than the checkpoint was trained on
    monkeypatch.setattr(mnist_ddpm, "FONT", ("another",))
    monkeypatch.setattr(likelihood, "read_images", functools.cache(mnist_ddpm.Images))
    with pytest.raises(SystemExit, match="no checkpoint to measure"):
        command.main([f"--out={outs[0]}"])
    assert "was trained on other data (digits) than this digits\n" in capsys.readouterr().err

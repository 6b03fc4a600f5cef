"""The table of digits: two recipes below the floors, classifiers that are kept, other digits."""
import pytest
import torch

import mnist_ddpm
from evaluation import __main__ as command
from evaluation import digits
from evaluation.digits import train_classifier
from evaluation.likelihood import Evaluate, corpus, open_checkpoint, read_images

TINY = ["--dataset=digits", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8",
        "--max_iters=10", "--eval_interval=60", "--train_size=100"]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """1,500 digits to train, 200 to test; classifiers are trained for one epoch, and kept in a
    folder of this test."""
    arrays = mnist_ddpm.draw_digits(1500, 200)
    monkeypatch.setattr(mnist_ddpm, "draw_digits", lambda: arrays)
    monkeypatch.setattr(digits, "HERE", tmp_path)
    monkeypatch.setattr(digits, "train_classifier", lambda images, labels, seed:
                        train_classifier(images, labels, seed, epochs=1))
    read_images.cache_clear()
    digits.real_digits.cache_clear()
    yield tmp_path
    read_images.cache_clear()
    digits.real_digits.cache_clear()


def rows_of(markdown):
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:2] == "| "]
    return rows[1:]                                        # below the head


def test_the_table_of_digits(few, monkeypatch, capsys):
    for recipe in ("best", "levels"):
        mnist_ddpm.main([*TINY, f"--recipe={recipe}", f"--out={few}/{recipe}"])
    capsys.readouterr()
    for _ in range(2):
        digits.real_digits.cache_clear()
        command.main([f"--out={few}/best,{few}/levels", "--digits=20", "--gaussian_steps=3",
                      "--guidance=1.5", "--windows=50"])
        told = capsys.readouterr()
        bounds, images = told.out.split("\n\nImageSampler(")
        bounds, fifths = bounds.split("nats by noise level")
        assert "digits, held out: 50 of 200 windows of 784 pixels" in bounds
        rows = rows_of(bounds)
        assert [row[0] for row in rows] == [row[0] for row in rows_of(fifths)] == [
            f"{few}/best", f"{few}/levels"]
        assert all(float(cell) > 0 for row in rows for cell in row[4:7])
        assert "steps=3, sampler='ddim'" in images and "guidance=1.5" in images
        rows = rows_of(images)
        assert len(rows) == 5 and [row[1] for row in rows] == ["20"] * 5
        assert rows[0][4] == "1.0"                         # the floor
        assert [row[2] == "" for row in rows] == [False, True, False, False, False]
    assert "training two classifiers" not in told.err      # the second time
    assert len(list((few / "out").glob("readers-*"))) == 1
    command.main([f"--out={few}/best", "--digits=0", "--windows=50"])
    told = capsys.readouterr().out
    assert "bits/pixel" in told and "Frechet" not in told

    # others than the checkpoint was trained on
    monkeypatch.setattr(mnist_ddpm, "FONT", ("another",))
    read_images.cache_clear()
    with pytest.raises(SystemExit, match="no checkpoint to measure"):
        command.main([f"--out={few}/best"])
    assert "was trained on another digits" in capsys.readouterr().err


def test_the_floor_is_the_mean_of_ten_draws(few, monkeypatch, capsys):
    """Of distances 0 to 9: 4.5, with their deviation, 3.028."""
    mnist_ddpm.main([*TINY, f"--out={few}/best"])
    checkpoint = open_checkpoint(few / "best")
    data = corpus(checkpoint, Evaluate())
    real = digits.real_digits(data)
    assert real.test.shape == (200, 28, 28) and len(real.labels) == 1500
    assert torch.equal(real.train[3].flatten(), data.train[3])
    distances = iter(map(float, range(10)))
    monkeypatch.setattr(digits, "frechet", lambda a, b: next(distances, 0.0))
    capsys.readouterr()
    _, floor = digits.digit_floor(real, 100, 0)
    assert floor == 4.5 and "| 4.500 ± 3.028 | 1.0 |" in capsys.readouterr().out

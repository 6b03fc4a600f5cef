"""What pictures of digits are worth: read by two small networks, beside real digits, noise and blur."""
import functools
import sys
import time
from types import SimpleNamespace

import torch

import train
from config import DEVICE, HERE, Mnist, Picture
from data import Images, whole
from evaluation.metrics import Reader, blurred, digit_metrics, frechet, noise_like, read, train_reader
from evaluation.report import Table
from mnist_ddpm import grey, many


@functools.cache
def pictures(name, data_dir, sha256):
    """The digits a checkpoint was trained on, in patches of 4 x 4; one line and exit 1 if they are not to be had."""
    data = Images(Mnist(dataset=name, data_dir=data_dir))
    if data.meta["data"]["sha256"] != sha256:
        raise SystemExit(f"these {name} are others than the checkpoint was trained on")
    return data


@functools.cache
def real_digits(name, data_dir, sha256):
    """Real digits as `metrics.digit_metrics` wants them: train and test images (n, 28, 28), features of the test images, and two Readers:
    those in results/ if they were trained on this data, else trained once, for some minutes, and kept in out/."""
    data = pictures(name, data_dir, sha256)
    images, test = whole(data.train, 4), whole(data.val, 4)
    kept = [HERE / folder / f"readers-{sha256[:8]}.pt" for folder in ("results", "out")]
    path = next((p for p in kept if p.exists()), kept[1])
    if not path.exists():
        print(f"training two readers of {name}, once, some minutes: {path}", file=sys.stderr)
        path.parent.mkdir(exist_ok=True)
        train.save(path, [{k: v.half() for k, v in train_reader(images, data.labels, seed).state_dict().items()} for seed in (0, 1)])
    readers = []
    for weights in torch.load(path, map_location=DEVICE, weights_only=True):
        readers.append(Reader().to(DEVICE).eval())
        readers[-1].load_state_dict(weights)
    features, digit = read(readers[0], test)
    right = [(d == data.val_labels).double().mean().item() for d in (digit, read(readers[1], test)[1])]
    about = f"{name}; the judge reads {right[0]:.2%} of its {len(test):,} test images right, the other reader {right[1]:.2%}"
    return SimpleNamespace(about=about, sets=(images, test, features, *readers), labels=data.labels)


DIGITS = {"digits": 0, "n": 0, "read as asked": 3, "Frechet distance": 3, "times the floor": 1, "precision": 3, "recall": 3,
          "nearest training digit, of a test digit's": 3, "read as 0, 1 ... 9, %": 0, "digits/s": 1}


def digit_row(title, m, floor, speed=None):
    """A row of the table DIGITS, m from `metrics.digit_metrics`."""
    return (title, sum(m["read"]), m["right"], m["frechet"], m["frechet"][0] / floor, m["precision"], m["recall"], m["near"],
            " ".join(f"{100 * n / sum(m['read']):.0f}" for n in m["read"]), speed)


def digit_floor(real, n, seed):
    """A table that begins with what n real digits, noise and blurred digits score, and the Frechet distance of the real ones: the mean of up
    to ten draws, since one may be half as much again; its error is the deviation of one draw."""
    table = Table(f"pictures of {real.about}", DIGITS)
    train.reseed(seed)
    draws = [i.to(DEVICE) for i in torch.randperm(len(real.labels)).split(n)[:10]]
    images, labels = real.sets[0][draws[0]], real.labels[draws[0]]
    m = digit_metrics(images, labels, real.sets, itself=1)
    each = torch.tensor([frechet(read(real.sets[3], real.sets[0][i])[0], real.sets[2]) for i in draws if len(i) == n])
    floor = each.mean().item()
    m["frechet"] = (floor, each.std(correction=min(1, len(each) - 1)).item())
    table.add(*digit_row("real, from the training set", m, floor))
    table.add(*digit_row("noise, pixel by pixel as in real ones", digit_metrics(noise_like(real.sets[0], n), None, real.sets), floor))
    table.add(*digit_row("real, blurred", digit_metrics(blurred(images), labels, real.sets), floor))
    return table, floor


def picture(s):
    """How digits are sampled by the settings s of evaluate.py."""
    return Picture(guidance=s.guidance, steps=s.gaussian_steps, sampler=s.sampler or Picture.sampler, td=s.td, seed=s.seed)


def digit_sample(k, real, s):
    """Pictures of s.digits digits, all ten in turn, by checkpoint k. -> (their metrics, pictures a second)"""
    asked, begun = torch.arange(s.digits) % 10, time.time()
    x = grey(many(k.method, asked, k.c, picture(s))).to(DEVICE)
    speed = s.digits / (time.time() - begun)
    return digit_metrics(x, asked, real.sets), speed

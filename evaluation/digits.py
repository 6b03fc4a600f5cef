"""What images of digits are worth: two classifiers see them, beside real digits, noise and blur."""
import functools
import math
import os
import sys
import time

import torch

from config import DEVICE, HERE, Mnist, check
from evaluation.likelihood import FIFTH_COLUMNS, likelihood, n_parameters, spaced_rows
from evaluation.metrics import (DigitClassifier, RealDigits, blurred, classify, digit_metrics,
                                frechet, noise_like, train_classifier)
from evaluation.report import Table
from evaluation.samples import describe_sampler, sampler_settings
from mnist_ddpm import Images, sample_batches, to_bytes
from train import reseed

BOUND_COLUMNS = {"checkpoint": 0, "parameters": 0, "steps": 0, "bits/dim": 3, "± images": 3,
                 "± draws": 3}
DIGIT_COLUMNS = {
    "digits": 0, "n": 0, "read as asked": 3, "Frechet distance": 3, "times the floor": 1,
    "precision": 3, "recall": 3, "nearest training digit, of a test digit's": 3,
    "read as 0, 1 ... 9, %": 0, "digits/s": 1}


@functools.cache
def read_images(name, data_dir, sha256):
    data = Images(Mnist(dataset=name, data_dir=data_dir))
    check(data.meta["data"]["sha256"] == sha256,
          f"these {name} are others than the checkpoint was trained on")
    return data


def images_of(checkpoint, s):
    """The Images a checkpoint was trained on, read once; one line and exit 1 if it is not there."""
    data = checkpoint.meta["data"]
    return read_images(data["name"], s.data_dir, data["sha256"])


@functools.cache
def real_digits(data):
    """The RealDigits of Images. The classifiers are those in results/ if they were trained on these
    data, else they are trained once, for some minutes, and kept in out/."""
    train = data.train.view(-1, 28, 28)
    test = data.val.view(-1, 28, 28)
    file = f"readers-{data.meta['data']['sha256'][:8]}.pt"
    path = HERE / "results" / file
    if not path.exists():
        path = HERE / "out" / file
    if not path.exists():
        print(f"training two classifiers of {data.name}, once, some minutes: {path}",
              file=sys.stderr)
        save_classifiers(path, [train_classifier(train, data.labels, seed) for seed in (0, 1)])
    classifiers = []
    for weights in torch.load(path, map_location=DEVICE, weights_only=True):
        classifier = DigitClassifier().to(DEVICE).eval()
        classifier.load_state_dict(weights)
        classifiers.append(classifier)
    features, digit = classify(classifiers[0], test)
    _, other_digit = classify(classifiers[1], test)
    right = (digit == data.val_labels).double().mean().item()
    other_right = (other_digit == data.val_labels).double().mean().item()
    about = (f"{data.name}; the classifier of the features reads {right:.2%} of its {len(test):,} "
             f"test images right, the other {other_right:.2%}")
    return RealDigits(about, train, data.labels, test, features, *classifiers)


def save_classifiers(path, classifiers):
    """Write their weights in fp16; the file appears when it is complete."""
    states = []
    for classifier in classifiers:
        states.append({key: p.half() for key, p in classifier.state_dict().items()})
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(states, part)
    os.replace(part, path)


def digit_row(title, m, floor, speed=None):
    """A row of DIGIT_COLUMNS, m from metrics.digit_metrics."""
    n = sum(m["read"])
    percent = " ".join(f"{100 * count / n:.0f}" for count in m["read"])
    return (title, n, m["right"], m["frechet"], m["frechet"][0] / floor, m["precision"],
            m["recall"], m["near"], percent, speed)


def digit_floor(real, n, seed):
    """A table that begins with what n real digits, noise and blurred digits score, and the Frechet
    distance of the real ones: the mean of up to ten draws, since one may be half as much again; its
    error is the deviation of one draw."""
    table = Table(f"images of {real.about}", DIGIT_COLUMNS)
    reseed(seed)
    draws = torch.randperm(len(real.labels)).to(DEVICE).split(n)[:10]
    distances = []
    for i in draws:
        if len(i) == n:
            features, _ = classify(real.for_features, real.train[i])
            distances.append(frechet(features, real.features))
    distances = torch.tensor(distances)
    floor = distances.mean().item()
    deviation = distances.std(correction=min(1, len(distances) - 1)).item()

    images = real.train[draws[0]]
    labels = real.labels[draws[0]]
    m = digit_metrics(images, labels, real, itself=1)
    m["frechet"] = (floor, deviation)
    table.add(*digit_row("real, from the training set", m, floor))
    m = digit_metrics(noise_like(real.train, n), None, real)
    table.add(*digit_row("noise, pixel by pixel as in real ones", m, floor))
    m = digit_metrics(blurred(images), labels, real)
    table.add(*digit_row("real, blurred", m, floor))
    return table, floor


def sample_digits(checkpoint, real, n, how):
    """n images, all ten digits in turn. -> their metrics, images a second"""
    asked = torch.arange(n) % 10
    start_time = time.perf_counter()
    x = to_bytes(sample_batches(checkpoint.method, asked, how)).to(DEVICE)
    speed = n / (time.perf_counter() - start_time)
    return digit_metrics(x, asked, real), speed


def bound_tables(checkpoints, s):
    table = Table("digits, held out, without labels or guidance", BOUND_COLUMNS)
    rows = []
    for checkpoint in checkpoints:
        data = images_of(checkpoint, s)
        title = f"{checkpoint.path}, {data.name}"
        if s.windows < len(data.val):
            title += f", {s.windows:,} of {len(data.val):,} images"
        e = likelihood(checkpoint.method, spaced_rows(data.val, s.windows), s.draws)
        bits = [e[name] / math.log(2) for name in ("bound", "stderr", "mc")]
        table.add(title, n_parameters(checkpoint.method), checkpoint.meta["step"], *bits)
        rows.append([checkpoint.path, *e["fifths"]])
    return [table, Table("nats by noise level, digits", FIFTH_COLUMNS, rows)]


def digit_tables(checkpoints, s):
    """The bounds of checkpoints of digits, and what images by them are like, a table for each set
    of digits, below its floors. -> tables"""
    tables = []
    if s.bound:
        tables += bound_tables(checkpoints, s)
    if not s.digits:
        return tables
    groups = {}
    for checkpoint in checkpoints:
        groups.setdefault(images_of(checkpoint, s), []).append(checkpoint)
    for data, group in groups.items():
        print(f"\nsampler: {describe_sampler(sampler_settings(group[0], s), s)}")
        real = real_digits(data)
        table, floor = digit_floor(real, s.digits, s.seed)
        tables.append(table)
        for checkpoint in group:
            how = sampler_settings(checkpoint, s)
            m, speed = sample_digits(checkpoint, real, s.digits, how)
            table.add(*digit_row(checkpoint.path, m, floor, speed))
    return tables

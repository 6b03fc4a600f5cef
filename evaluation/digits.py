"""What images of digits are worth, beside real digits, noise and blur. Images are (n, 28, 28) of
bytes; every score has its error.

They are seen by two small networks, trained here on real digits, so that no weights from outside
are needed: one gives the features in which samples and real digits are compared; the other, which
had no part in that, says which digits they are."""
import functools
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from config import AMP, DEVICE, HERE, autocast
from evaluation.report import Table
from evaluation.samples import mean, sampler_settings
from mnist_ddpm import sample_batches, to_bytes
from step import reseed

DIGIT_COLUMNS = {
    "digits": 0, "n": 0, "read as asked": 3, "Frechet distance": 3, "times the floor": 1,
    "precision": 3, "recall": 3, "nearest training digit, of a test digit's": 3,
    "read as 0, 1 ... 9, %": 0, "digits/s": 1}


# classifiers

class DigitClassifier(nn.Module):
    """95,000 weights: images (n, 28, 28) of bytes -> logits (n, 10); features (n, 128) are what its
    last layer sees."""

    def __init__(self):
        super().__init__()
        layers = []
        for n_in, n_out, size, stride in [(1, 32, 5, 2), (32, 64, 3, 1), (64, 128, 3, 2)]:
            conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def features(self, x):
        with autocast():
            return self.body(x[:, None] / 127.5 - 1.0).float()

    def forward(self, x):
        return self.head(self.features(x))


def shifted(x, most=2):
    """Images x (n, 28, 28), each moved by up to `most` pixels in both directions."""
    n = len(x)
    pixel = torch.arange(28, device=x.device)
    dy, dx = torch.randint(2 * most + 1, (2, n, 1), device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, [most] * 4)[image, (pixel + dy)[:, :, None], (pixel + dx)[:, None]]


def train_classifier(images, labels, seed, epochs=8, batch_size=100):
    """A DigitClassifier of images (N, 28, 28) and labels (N,), shifted by up to 2 pixels."""
    torch.manual_seed(seed)
    classifier = DigitClassifier().to(DEVICE)
    opt = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    n_batches = len(images) // batch_size
    scaler = torch.amp.GradScaler(DEVICE, enabled=AMP == torch.float16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.01, epochs * n_batches)
    for _ in range(epochs):
        order = torch.randperm(len(images)).to(images.device)
        for i in order.split(batch_size)[:n_batches]:
            logits = classifier(shifted(images[i]))
            loss = F.cross_entropy(logits, labels[i].long(), label_smoothing=0.1)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier, images):
    """-> features (n, 128), digits (n,)"""
    features = torch.cat([classifier.features(x) for x in images.split(500)])
    return features, classifier.head(features).argmax(1)


def trained_classifiers(data):
    """Two DigitClassifiers of Images: those in results/ if they were trained on these data, else
    they are trained once, for some minutes, and kept in out/."""
    file = f"readers-{data.meta['data']['sha256'][:8]}.pt"
    path = HERE / "results" / file
    if not path.exists():
        path = HERE / "out" / file
    if not path.exists():
        print(f"training two classifiers of {data.name}, once, some minutes: {path}",
              file=sys.stderr)
        images = data.train.view(-1, 28, 28)
        trained = [train_classifier(images, data.labels, seed).half() for seed in (0, 1)]
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")    # the file appears when it is complete
        torch.save([classifier.state_dict() for classifier in trained], part)
        os.replace(part, path)
    classifiers = []
    for weights in torch.load(path, map_location=DEVICE, weights_only=True):
        classifier = DigitClassifier().to(DEVICE).eval()
        classifier.load_state_dict(weights)
        classifiers.append(classifier)
    return classifiers


class RealDigits:
    """Images, and what two classifiers see in them."""

    def __init__(self, data, for_features, for_digits):
        self.train = data.train.view(-1, 28, 28)                       # (N, 28, 28) uint8
        self.labels = data.labels                                      # (N,)
        self.test = data.val.view(-1, 28, 28)                          # (M, 28, 28)
        self.for_features = for_features
        self.for_digits = for_digits
        self.features, digit = classify(for_features, self.test)       # (M, 128)
        _, other = classify(for_digits, self.test)
        right = [(read == data.val_labels).double().mean().item() for read in (digit, other)]
        self.about = (f"{data.name}; the classifier of the features reads {right[0]:.2%} of its "
                      f"{len(self.test):,} test images right, the other {right[1]:.2%}")


@functools.cache
def real_digits(data):
    return RealDigits(data, *trained_classifiers(data))


# scores

def frechet(a, b):
    """Frechet distance of two sets of features (n, d), (m, d), as if both were Gaussian:
    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)). (A B)^(1/2) has the trace of
    (A^(1/2) B A^(1/2))^(1/2), which is symmetric."""
    a = a.double()
    b = b.double()
    A = a.T.cov()
    B = b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + A.trace() + B.trace() - 2 * cross).item()


def jackknife(score, n, draws=20, seed=0):
    """The standard error of score(indices) of n samples: its deviation over random halves of them
    (the delete-half jackknife). Drawn with repeats, as is usual, they would look like a narrower
    set to a Frechet distance."""
    g = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(n, generator=g)[:n // 2] for _ in range(draws)]
    return torch.tensor([score(half) for half in halves]).std().item()


def nearest(a, b, k=1):
    """Distance of each row of a (n, d) to its k-th nearest row of b (m, d): (n,)."""
    return torch.cat([torch.cdist(x, b).kthvalue(k).values for x in a.split(1000)])


def covered(a, b, k=3):
    """Whether each row of a (n, d) lies within the k-th neighbour's distance of some row of
    b (m, d): (n,) bool (Kynkaanniemi et al. 2019). Precision is the share of samples covered by
    real ones, recall the share of real ones covered by samples."""
    reach = nearest(b, b, k + 1)                       # the nearest of each is itself
    return torch.cat([(torch.cdist(x, b) <= reach).any(1) for x in a.split(1000)])


def noise_like(images, n):
    """n images where each pixel is drawn, alone, from what images (N, 28, 28) have there."""
    i = torch.randint(len(images), (n, 28, 28), device=images.device)
    return images.gather(0, i)


def blurred(images, sigma=1.5):
    """Images (n, 28, 28) under a Gaussian blur of sigma pixels."""
    offset = torch.arange(-6, 7, device=images.device)
    g = torch.exp(-offset ** 2 / (2 * sigma ** 2))
    kernel = (g[:, None] * g / g.sum() ** 2)[None, None]
    return F.conv2d(images[:, None].float(), kernel, padding=6)[:, 0].round().byte()


def digit_metrics(x, asked, real, itself=0):
    """What images x (n, 28, 28) are like, beside RealDigits. asked (n,): the digits they should be,
    or None. itself=1: x are training digits, each of which is its own nearest. -> dict, pairs are
    (value, standard error): right, the share that are as asked; frechet, to all test digits;
    precision and recall, against n test digits or all; near, the distance to the nearest training
    digit, in units of that of a test digit; read, how many of each digit."""
    features, _ = classify(real.for_features, x)
    _, digit = classify(real.for_digits, x)
    some = torch.linspace(0, len(real.test) - 1, min(len(x), len(real.test))).long()

    def share(values):
        return mean([(value, 1) for value in values.tolist()])

    def distance_to_test(i):
        return frechet(features[i], real.features)

    def distance_to_train(images, k):
        return nearest(images.flatten(1).float() / 255, real.train.flatten(1).float() / 255, k)

    usual = distance_to_train(real.test[some], 1).mean().item()
    return {
        "right": None if asked is None else share(digit.cpu() == asked.cpu()),
        "frechet": (frechet(features, real.features), jackknife(distance_to_test, len(x))),
        "precision": share(covered(features, real.features[some])),
        "recall": share(covered(real.features[some], features)),
        "near": share(distance_to_train(x, 1 + itself) / usual),
        "read": digit.bincount(minlength=10).tolist(),
    }


# tables

def digit_row(title, m, floor, speed=None):
    """A row of DIGIT_COLUMNS, m from digit_metrics."""
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
    distances = [frechet(classify(real.for_features, real.train[i])[0], real.features)
                 for i in draws if len(i) == n]
    floor = statistics.mean(distances)
    deviation = statistics.stdev(distances) if len(distances) > 1 else 0.0

    images = real.train[draws[0]]
    labels = real.labels[draws[0]]
    noise = noise_like(real.train, n)
    for title, x, asked, itself in [
            ("real, from the training set", images, labels, 1),
            ("noise, pixel by pixel as in real ones", noise, None, 0),
            ("real, blurred", blurred(images), labels, 0)]:
        m = digit_metrics(x, asked, real, itself)
        if itself:
            m["frechet"] = (floor, deviation)
        table.add(*digit_row(title, m, floor))
    return table, floor


def sample_digits(checkpoint, real, n, how):
    """n images, all ten digits in turn. -> their metrics, images a second"""
    asked = torch.arange(n) % 10
    start_time = time.perf_counter()
    x = to_bytes(sample_batches(checkpoint.method, asked, how)).to(DEVICE)
    speed = n / (time.perf_counter() - start_time)
    return digit_metrics(x, asked, real), speed


def digit_tables(checkpoints, data, s):
    """What images by checkpoints of the same data are like. -> tables"""
    real = real_digits(data)
    samplers = [sampler_settings(checkpoint, s) for checkpoint in checkpoints]
    print(f"\n{samplers[0]}")
    table, floor = digit_floor(real, s.digits, s.seed)
    for checkpoint, how in zip(checkpoints, samplers, strict=True):
        m, speed = sample_digits(checkpoint, real, s.digits, how)
        table.add(*digit_row(checkpoint.path, m, floor, speed))
    return [table]

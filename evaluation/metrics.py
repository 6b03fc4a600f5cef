"""What samples are worth: texts against their training text, images of digits against real ones.
Every score has its error.

Images are seen by two small networks, trained here on real digits, so that no weights from outside
are needed: one gives the features in which samples and real digits are compared; the other, which
had no part in that, says which digits they are."""
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from config import AMP, DEVICE, autocast

WORD = re.compile(r"(?:[^\W\d_]|')+")
NAME = re.compile(r"^[A-Z][A-Za-z ]*:$", re.M)       # a line that names a speaker


# texts

def mean(parts):
    """Sum of a / sum of b over parts (a, b), with its standard error by the delta method."""
    a, b = torch.tensor(parts, dtype=torch.float64).unbind(1)
    ratio = a.sum() / b.sum()
    stderr = (a - ratio * b).std() * len(a) ** 0.5 / b.sum()
    return ratio.item(), stderr.item()


def vocabulary(text):
    """The words of a text, in lower case: a word is a run of letters and apostrophes."""
    return {word.lower() for word in WORD.findall(text)}


def overlap(text, source):
    """Length of the longest piece of text that is in source, to the letter."""
    longest = 0
    for i in range(len(text)):
        while i + longest < len(text) and text[i:i + longest + 1] in source:
            longest += 1
    return longest


def text_metrics(texts, source, known_words):
    """What a list of texts is like, beside the training text `source`. -> dict, pairs are (mean,
    standard error over texts): words, the share of words that are known, of those strictly inside a
    text, whose ends are cut; names, lines that name a speaker, in 1,000 characters; entropy of the
    characters in bits; fourgrams, different 4-grams as a share of all; overlap, the longest piece
    of each text that stands in source; longest, the longest of all."""
    counts = Counter("".join(texts))
    bits = {ch: -math.log2(n / counts.total()) for ch, n in counts.items()}
    fourgrams = Counter()
    words = []
    names = []
    surprise = []
    overlaps = []
    for text in texts:
        fourgrams.update(text[i:i + 4] for i in range(len(text) - 3))
        known = [word.lower() in known_words for word in WORD.findall(text)[1:-1]]
        words.append((sum(known), len(known)))
        names.append((1000 * len(NAME.findall(text)), len(text)))
        surprise.append((sum(bits[ch] for ch in text), len(text)))
        overlaps.append((overlap(text, source), 1))
    return {
        "words": mean(words),
        "names": mean(names),
        "entropy": mean(surprise),
        "fourgrams": len(fourgrams) / max(1, fourgrams.total()),
        "overlap": mean(overlaps),
        "longest": max(overlaps)[0],
    }


# images of digits: (n, 28, 28) uint8

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


@dataclass
class RealDigits:
    about: str                     # a line
    train: torch.Tensor            # (N, 28, 28) uint8
    labels: torch.Tensor           # (N,)
    test: torch.Tensor             # (M, 28, 28)
    features: torch.Tensor         # of test, (M, 128)
    for_features: DigitClassifier
    for_digits: DigitClassifier


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
        "right": (math.nan, math.nan) if asked is None else share(digit.cpu() == asked.cpu()),
        "frechet": (frechet(features, real.features), jackknife(distance_to_test, len(x))),
        "precision": share(covered(features, real.features[some])),
        "recall": share(covered(real.features[some], features)),
        "near": share(distance_to_train(x, 1 + itself) / usual),
        "read": digit.bincount(minlength=10).tolist(),
    }

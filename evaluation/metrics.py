"""What samples are worth: texts against their training text, pictures of digits against real ones. Every score has its error.

The pictures are read by two small networks, trained here on the real digits, so that no outside weights are needed: one gives the
features in which samples and real digits are compared, the other, which had no part in that, reads which digits they are."""
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from config import AMP, DEVICE, autocast

WORD, NAME = re.compile(r"(?:[^\W\d_]|')+"), re.compile(r"^[A-Z][A-Za-z ]*:$", re.M)   # words; lines that name a speaker


# ---- texts

def mean(parts):
    """Sum of a / sum of b over parts (a, b), with its standard error by the delta method."""
    a, b = torch.tensor(parts, dtype=torch.float64).unbind(1)
    ratio = a.sum() / b.sum()
    return ratio.item(), ((a - ratio * b).std() * len(a) ** .5 / b.sum()).item()


def vocabulary(text):
    """The words of a text, in lower case: a word is a run of letters and apostrophes."""
    return {w.lower() for w in WORD.findall(text)}


def overlap(text, source):
    """Length of the longest piece of text that is in source, to the letter."""
    longest = 0
    for i in range(len(text)):
        while i + longest < len(text) and text[i:i + longest + 1] in source:
            longest += 1
    return longest


def text_metrics(texts, source, known):
    """What a list of texts is like, beside the training text `source` with the words `known`. -> dict, pairs are (mean, standard error
    over texts): words, the share of words that are known, of those strictly inside a text (its ends are cut); names, lines that name a
    speaker, in 1,000 characters; entropy of the characters in bits; fourgrams, different 4-grams as a share of all; overlap, the longest
    piece of each text that stands in source; longest, the longest of all."""
    counts = Counter("".join(texts))
    surprise = {ch: -math.log2(n / counts.total()) for ch, n in counts.items()}
    grams = Counter("".join(g) for t in texts for g in zip(t, t[1:], t[2:], t[3:], strict=False))
    overlaps = [overlap(t, source) for t in texts]
    words = [[w.lower() in known for w in WORD.findall(t)[1:-1]] for t in texts]
    return dict(words=mean([(sum(w), len(w)) for w in words]), names=mean([(1000 * len(NAME.findall(t)), len(t)) for t in texts]),
                entropy=mean([(sum(surprise[ch] for ch in t), len(t)) for t in texts]), fourgrams=len(grams) / max(1, grams.total()),
                overlap=mean([(o, 1) for o in overlaps]), longest=max(overlaps))


# ---- pictures of digits: (n, 28, 28) bytes

class Reader(nn.Module):
    """A classifier of digits, 95,000 weights: a page (n, 28, 28) of bytes -> logits (n, 10); features (n, 128) are what its last layer sees."""

    def __init__(self):
        super().__init__()
        layer = lambda a, b, size, stride: [nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layer(1, 32, 5, 2), *layer(32, 64, 3, 1), *layer(64, 128, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def features(self, x):
        with autocast():
            return self.body(x[:, None] / 127.5 - 1.0).float()

    def forward(self, x):
        return self.head(self.features(x))


def shifted(x, by=2):
    """Pages x (n, 28, 28), each moved by up to `by` pixels in both directions."""
    n, g = len(x), torch.arange(28, device=x.device)
    dy, dx = torch.randint(2 * by + 1, (2, n, 1), device=x.device)
    return F.pad(x, [by] * 4)[torch.arange(n, device=x.device)[:, None, None], (g + dy)[:, :, None], (g + dx)[:, None]]


def train_reader(images, labels, seed, epochs=8, batch_size=100):
    """A Reader trained on images (N, 28, 28) and labels (N,) of digits, shifted by up to 2 pixels."""
    torch.manual_seed(seed)
    reader = Reader().to(DEVICE)
    opt, steps = torch.optim.AdamW(reader.parameters(), weight_decay=.01), epochs * (len(images) // batch_size)
    scaler = torch.amp.GradScaler(DEVICE, enabled=AMP == torch.float16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, .01, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(images)).to(images.device).split(batch_size)[:steps // epochs]:
            loss = F.cross_entropy(reader(shifted(images[i])), labels[i].long(), label_smoothing=.1)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            schedule.step()
    return reader.eval()


@torch.no_grad()
def read(reader, images):
    """-> features (n, 128) and the digits read (n,)"""
    features = torch.cat([reader.features(x) for x in images.split(500)])
    return features, reader.head(features).argmax(1)


def frechet(a, b):
    """Frechet distance of two sets of features (n, d), (m, d), as if both were Gaussian: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric."""
    (ma, A), (mb, B) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((ma - mb).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def jackknife(score, n, draws=20, seed=0):
    """The standard error of score(indices) of n samples: its deviation over random halves of them (the delete-half jackknife). Drawn with
    repeats, as is usual, they would look like a narrower set to a Frechet distance."""
    g = torch.Generator().manual_seed(seed)
    return torch.tensor([score(torch.randperm(n, generator=g)[:n // 2]) for _ in range(draws)]).std().item()


def nearest(a, b, k=1, chunk=1000):
    """Distance of each row of a (n, d) to its k-th nearest row of b (m, d): (n,)."""
    return torch.cat([torch.cdist(x, b).kthvalue(k).values for x in a.split(chunk)])


def covered(a, b, k=3):
    """Whether each row of a (n, d) lies within the k-th neighbour's distance of some row of b (m, d): (n,) bool (Kynkaanniemi et al.
    2019). Precision is the share of samples covered by real ones; recall the share of real ones covered by samples."""
    reach = nearest(b, b, k + 1)                                                      # its nearest is itself
    return torch.cat([(torch.cdist(x, b) <= reach).any(1) for x in a.split(1000)])


def noise_like(images, n):
    """n pages where each pixel is drawn, alone, from what images (N, 28, 28) have there."""
    i = torch.randint(len(images), (n, 28, 28), device=images.device)
    return images.gather(0, i)


def blurred(images, sigma=1.5):
    """Images (n, 28, 28) under a Gaussian blur of sigma pixels."""
    g = torch.exp(-torch.arange(-6, 7, device=images.device) ** 2 / (2 * sigma ** 2))
    kernel = (g[:, None] * g / g.sum() ** 2)[None, None]
    return F.conv2d(images[:, None].float(), kernel, padding=6)[:, 0].round().byte()


def digit_metrics(x, asked, real, itself=0):
    """What pictures x (n, 28, 28) are like, beside real = (train, test, test features (N, 128), judge, other): real digits and two Readers.
    asked (n,): the digits they should be, or None. itself=1: x are training digits, each of which is its own nearest. -> dict, pairs are
    (value, standard error): right, the share that `other` reads as asked; frechet, to all test digits; precision and recall against n
    test digits, at most all; near, the distance to the nearest training digit, in units of what it is for a test digit; read, how many of
    each digit."""
    train, test, truth, judge, other = real
    features, (_, digit) = read(judge, x)[0], read(other, x)
    some = torch.linspace(0, len(test) - 1, min(len(x), len(test))).long()
    share = lambda hits: mean([(h, 1) for h in hits.tolist()])
    flat = lambda images: images.flatten(1).float() / 255
    near, usual = nearest(flat(x), flat(train), 1 + itself), nearest(flat(test[some]), flat(train)).mean().item()
    return dict(right=(math.nan, math.nan) if asked is None else share(digit.cpu() == asked.cpu()),
                frechet=(frechet(features, truth), jackknife(lambda i: frechet(features[i], truth), len(x))),
                precision=share(covered(features, truth[some])), recall=share(covered(truth[some], features)),
                near=share(near / usual), read=digit.bincount(minlength=10).tolist())

"""Gaussian diffusion over the pixels of digits, on the transformer and the loop of the text models. settings: config.Mnist, config.Picture

    python mnist_ddpm.py                                        # MNIST if it can be had, else digits drawn by this program
    python mnist_ddpm.py --recipe=ddpm                          # the paper as it stands: predict eps, linear schedule, plain loss
    python mnist_ddpm.py sample --n=64                          # out/mnist/samples.png
    python mnist_ddpm.py sample --digit=7 --guidance=2 --steps=50 --sampler=ddim
    python mnist_ddpm.py sample --trace                         # a strip from noise to digit, and the same moving"""
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import DEVICE, HERE, Mnist, Picture, parse, run
from data import Images, whole
from diffusion import CodeDiffusion, GaussianDiffusion, scales
from model import Transformer
from train import folder, load, reseed, start

DIGITS = 10


class Patches(nn.Module):
    """What the transformer is fed: each patch with the label beside it, and a learned place, since the page has two dimensions."""

    def __init__(self, width, places, n_embd):
        super().__init__()
        self.value, self.place = nn.Linear(width, n_embd), nn.Parameter(torch.zeros(places, n_embd))

    def forward(self, x):
        """(B, T, patch^2 + 10) -> (B, T, n_embd); in fp32, since at the clean end half precision cannot hold the noise."""
        with torch.autocast(x.device.type, enabled=False):
            return self.value(x) + self.place


class Labelled:
    """Images with a label, one-hot beside every patch; a hidden label is all zeros. The bound is without labels."""

    unit, extra, drop_label = "pixel", DIGITS, 0.1

    def forward(self, batch):
        """Training loss of images (B, T, patch^2) and labels (B,), a share drop_label of them hidden."""
        x0, label = batch
        keep = torch.rand(len(x0), 1, device=x0.device) >= self.drop_label
        return super().forward((x0, (F.one_hot(label, DIGITS) * keep)[:, None].expand(-1, x0.size(1), -1)))


class Digits(Labelled, GaussianDiffusion):
    """The network predicts one number for each pixel: its grey level, the noise, or v."""


class LevelDigits(Labelled, CodeDiffusion):
    """The network predicts the probability of each grey level of each pixel: a network whose output is one number cannot tell
    level 200 from 201 once the noise is as fine as that, and the bound pays for it (LOG.md)."""

    sample = GaussianDiffusion.sample   # numbers, not tokens
    levels = 2                          # draws per image when the whole split is evaluated: 256 numbers a pixel take their time

    def told(self, z, gamma):
        """As above, in less memory: with one number a code the differences themselves fit, and fp32 holds them."""
        a, _ = scales(gamma)
        return ((z / a)[..., None].float() - self.table[:, 0]).square_().mul_(((-gamma).exp() / -2)[..., None, None].float())


def build(c, meta):
    """The method of a run: c its Mnist settings."""
    T, K, levels = (28 // c.patch) ** 2, c.patch ** 2, c.predict == "levels"
    net = Transformer(replace(c, block_size=T), Patches(K + DIGITS, T, c.n_embd), K * 256 if levels else K)
    how = (c.schedule, c.weight)
    method = LevelDigits(net, torch.linspace(-1, 1, 256)[:, None], *how) if levels else Digits(net, c.predict, *how)
    method.drop_label = c.drop_label
    return method


def draw(method, labels, c, s, seed=0):
    """Pictures of labels (n,), -1 without one: a generator of (state, guess) as images (n, 28, 28) in [-1, 1], one for each call."""
    reseed(s.seed, seed)
    noise = torch.randn(len(labels), (28 // c.patch) ** 2, c.patch ** 2).to(DEVICE)
    label = (labels[:, None] == torch.arange(DIGITS)).float().to(DEVICE)[:, None].expand(-1, noise.size(1), -1)
    for z, xhat in method.sample(noise, label, s):
        yield whole(z, c.patch).float().cpu(), whole(xhat, c.patch).float().cpu()


def many(method, labels, c, s, batch_size=250):
    """As many pictures (n, 28, 28) as wanted, a batch at a time."""
    parts = []
    for i, some in enumerate(tqdm(labels.split(batch_size), disable=None, leave=False)):
        for z, _ in draw(method, some, c, s, i):                                      # noqa: B007
            pass
        parts.append(z)
    return torch.cat(parts)


# ---- pictures

def grey(x):
    """Images in [-1, 1] as bytes."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


def grid(images, columns):
    """Images (n, 28, 28) as one (rows * 28, columns * 28), row by row; what is missing is black."""
    rows = -(-len(images) // columns)
    images = F.pad(images, (0, 0, 0, 0, 0, rows * columns - len(images)), value=-1)
    return images.view(rows, columns, 28, 28).transpose(1, 2).reshape(rows * 28, columns * 28)


def png(frames, seconds=0.05, hold=1.0):
    """The bytes of a grey PNG of frames (F, height, width) uint8; with more than one frame it moves, the last held for `hold` seconds."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    n, height, width = frames.shape
    parts, order = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))], 0
    parts += [chunk(b"acTL", struct.pack(">II", n, 0))] if n > 1 else []
    for i, frame in enumerate(frames):
        body = zlib.compress(F.pad(frame, (1, 0)).numpy().tobytes(), 9)                 # each row behind a zero: no filter
        if n > 1:
            delay = int(1000 * (hold if i == n - 1 else seconds))
            parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", order, width, height, 0, 0, delay, 1000, 0, 0)))
            order += 1
        parts.append(chunk(b"fdAT", struct.pack(">I", order) + body) if i else chunk(b"IDAT", body))
        order += i > 0
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


# ---- what training shows, and sampling

def show(ema, data, c):
    """A hundred digits of a network in training, ten of each."""
    *_, (x, _) = draw(ema, torch.arange(100) % DIGITS, c, Picture(steps=25))
    to = folder(c, "mnist") / "samples.png"
    to.write_bytes(png(grey(grid(x, DIGITS))[None]))
    tqdm.write(f"a hundred digits, guidance {Picture.guidance:g}: {to}")


def sample(argv):
    """python mnist_ddpm.py sample: settings as in config.Picture."""
    s = parse(argv, Picture())
    path = Path(s.out) if s.out else HERE / "out/mnist"
    method, c, meta = load(path, build, ("mnist",))
    labels = torch.arange(s.n) % DIGITS if s.digit < 0 else torch.full((s.n,), s.digit)
    x = many(method, labels, c, s)
    to = Path(s.png) if s.png else (path if path.is_dir() else path.parent) / "samples.png"
    columns = min(s.n, DIGITS if s.digit < 0 else 8)
    to.write_bytes(png(grey(grid(x, columns))[None]))
    print(f"{path}: trained on {meta['data']['name']} for {meta['step']:,} steps; {s.n} digits, {s.steps} {s.sampler} steps, guidance {s.guidance:g}")
    print(f"wrote {to}")
    if s.trace:
        frames = list(draw(method, labels[:100], c, s))
        every = torch.linspace(0, s.steps - 1, min(s.steps, 12)).round().int().tolist()
        strip = torch.stack([frames[i][0][0] for i in every])
        to.with_name("strip.png").write_bytes(png(grey(grid(strip, len(strip)))[None]))
        to.with_name("moving.png").write_bytes(png(torch.stack([grey(grid(z, columns)) for z, _ in frames])))
        print(f"wrote {to.with_name('strip.png')} and {to.with_name('moving.png')}, which moves")


def main(argv):
    if argv[:1] == ["sample"]:
        sample(argv[1:])
    else:
        start(argv, parse(argv, Mnist()), "mnist", Images, build, show)


if __name__ == "__main__":
    run(main)

"""Gaussian diffusion over the pixels of digits, on the transformer and the loop of the text models.
settings: config.Mnist, config.ImageSampler. Read with it: GaussianDiffusion in gaussian.py, for
--recipe=levels TokenDiffusion, and the formulas.

    python mnist_ddpm.py                          # MNIST, or digits drawn by this program
    python mnist_ddpm.py --recipe=ddpm            # the paper: predict eps, linear schedule
    python mnist_ddpm.py sample --n=64            # replaces samples.png of the run, else of out/
    python mnist_ddpm.py sample --digit=7 --guidance=2 --steps=50 --sampler=ddim
    python mnist_ddpm.py sample --trace           # also a strip from noise to digit
"""
import hashlib
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import find_checkpoint, load, out_option, start_or_resume
from config import DEVICE, HERE, MNIST_RECIPES, ImageSampler, Mnist, check, parse, print0, run
from data import find, unzip
from gaussian import GaussianDiffusion, TokenDiffusion
from model import Transformer
from step import reseed
from train import fit

SETTINGS = Mnist
SAMPLER = ImageSampler
N_CLASSES = 10
N_PIXELS = 28 * 28


class PatchEmbedding(nn.Module):
    """Patches beside their label, by a linear layer, plus a learned position: RoPE knows the order
    of patches, not rows and columns. fp32, for fp16 rounds away the noise at the clean end."""

    def __init__(self, n_in, n_patches, n_embd):
        super().__init__()
        self.value = nn.Linear(n_in, n_embd)
        self.position = nn.Parameter(torch.zeros(n_patches, n_embd))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.value(x) + self.position


class PatchTransformer(nn.Module):
    """The transformer for images: pixels in and out, row by row; inside, a position is a patch."""

    def __init__(self, c, n_out):
        super().__init__()
        self.patch = c.patch                       # pixels on a side
        self.side = 28 // c.patch                  # patches on a side
        self.n_out = n_out                         # outputs per pixel
        n_patches = self.side ** 2
        size = c.patch ** 2
        embed = PatchEmbedding(size + N_CLASSES, n_patches, c.n_embd)
        # pixels are read and kept exactly, for the bound depends on the finest noise
        self.transformer = Transformer(replace(c, block_size=n_patches), embed, size * n_out,
                                       half=False)

    def forward(self, x, t, label=None):
        """x (B, 784, 1); t (B, 1), or (B, 784) where all pixels have the same; label (B,), -1 where
        there is none -> (B, 784, n_out)."""
        B = len(x)
        side = self.side
        patch = self.patch
        x = x.view(B, side, patch, side, patch).transpose(2, 3).reshape(B, side ** 2, patch ** 2)
        one_hot = x.new_zeros(B, side ** 2, N_CLASSES)
        if label is not None:
            one_hot += (label[:, None] == torch.arange(N_CLASSES, device=x.device))[:, None]
        out = self.transformer(torch.cat([x, one_hot], -1), t[:, :1])
        out = out.view(B, side, side, patch, patch, self.n_out).transpose(2, 3)
        return out.reshape(B, N_PIXELS, self.n_out)


class PixelDiffusion(GaussianDiffusion):
    """The network predicts a number for each pixel: its grey level, the noise, or v."""

    def forward(self, batch):             # tokens (B, 784), labels (B,)
        return super().forward(*batch)


class LevelDiffusion(TokenDiffusion):
    """The tokens are grey levels: the network predicts the probabilities of 256 at each pixel. One
    number a pixel is not exact enough where noise is finer than a level (LOG.md)."""
    eval_levels = 2                       # 256 logits a pixel are slow
    sample = GaussianDiffusion.sample     # numbers, not tokens

    def forward(self, batch):             # tokens (B, 784), labels (B,)
        return super().forward(*batch)


def build(c, meta):
    grey_levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    if c.predict == "levels":
        return LevelDiffusion(PatchTransformer(c, 256), grey_levels, c.schedule, c.loss)
    return PixelDiffusion(PatchTransformer(c, 1), grey_levels, c.predict, c.schedule, c.loss)


def sample_images(method, labels, s, batch_index=0):
    """Digits of labels (n,), -1 for none; yields (z, xhat), images (n, 28, 28), after each step.
    s.guidance: classifier-free (Ho & Salimans 2022), 0 without labels, 1 with, more exaggerates."""
    reseed(s.seed, batch_index)
    noise = torch.randn(len(labels), N_PIXELS, 1).to(DEVICE)
    asked = labels.to(DEVICE) if s.guidance else None

    def predict_guided(z, gamma):
        xhat = method.predict_x0(z, gamma, asked)
        if s.guidance not in (0, 1):
            without = method.predict_x0(z, gamma)
            xhat = without + s.guidance * (xhat - without)
        if s.clip:
            xhat = xhat.clamp(-1, 1)
        return xhat

    for z, xhat in method.sample(noise, s, predict_guided):
        yield z.view(-1, 28, 28).float().cpu(), xhat.view(-1, 28, 28).float().cpu()


def sample_batches(method, labels, s, batch_size=250):
    images = []
    batches = labels.split(batch_size)
    with tqdm(total=len(batches) * s.steps, desc="drawing", leave=False, disable=None) as bar:
        for i, batch in enumerate(batches):
            for x, _ in sample_images(method, batch, s, i):
                bar.update()
            images.append(x)
    return torch.cat(images)


def sample(argv):
    s = ImageSampler(**parse(argv, ImageSampler))
    path = find_checkpoint(s.out, "mnist")
    method, _, meta = load(path, Mnist, build, ["mnist"])
    labels = torch.arange(s.n) % N_CLASSES
    if s.digit >= 0:
        labels = torch.full((s.n,), s.digit)
    x = sample_batches(method, labels, s)
    out = path if path.is_dir() else path.parent
    if out.resolve() == HERE / "results":          # that of the checkpoint in the repository
        out = HERE / "out"
    to = Path(s.png) if s.png else out / "samples.png"
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(png(grid(x, min(s.n, N_CLASSES))))
    print(f"{path}: trained on {meta['data']['name']} for {meta['step']:,} steps; {s.n} digits, "
          f"{s.steps} {s.sampler} steps, guidance {s.guidance:g}\nwrote {to}")
    if s.trace:
        strip = to.with_name("strip.png")
        strip.write_bytes(png(noise_to_digit(method, labels[:1], s)))
        print(f"wrote {strip}")


def main(argv):
    if argv[:1] == ["sample"]:
        return sample(argv[1:])
    c, state = start_or_resume(argv, Mnist, ["mnist"], MNIST_RECIPES)
    data = Images(c)
    reseed(c.seed)
    method = build(c, data.meta)

    def show_sample(ema, out, step):
        x = sample_batches(ema, torch.arange(100) % N_CLASSES, ImageSampler(steps=25))
        (out / "samples.png").write_bytes(png(grid(x, N_CLASSES)))
        print0(f"a hundred digits: {out / 'samples.png'}")
        add_below(out / "progress.png", grid(x[:N_CLASSES], N_CLASSES))

    meta = {"method": "mnist", "script": "mnist_ddpm", **data.meta}
    out = fit(method, data, c, meta, show_sample, state)
    if out:
        print0(f"done: python mnist_ddpm.py sample {out_option(out)}")


# -------------------------------------------------------------------------------------------------
# data

HOSTS = ["https://ossci-datasets.s3.amazonaws.com/mnist",
         "https://storage.googleapis.com/cvdf-datasets/mnist"]
MNIST = [   # file, and the sha256 of what is in it
    ("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    ("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    ("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
]
FONT = (" ### |  #  | ### | ### |   # |#####| ### |#####| ### | ### ",   # 5 x 7 a digit, 0 to 9
        "#   #| ##  |#   #|#   #|  ## |#    |#   #|    #|#   #|#   #",
        "#   #|  #  |    #|    #| # # |#### |#    |   # |#   #|#   #",
        "#   #|  #  |   # |  ## |#  # |    #|#### |   # | ### | ####",
        "#   #|  #  |  #  |    #|#####|    #|#   #|  #  |#   #|    #",
        "#   #|  #  | #   |#   #|   # |#   #|#   #|  #  |#   #|#   #",
        " ### | ### |#####| ### |   # | ### | ### |  #  | ### | ### ")


def load_mnist(data_dir):
    """train images (N, 28, 28), train labels (N,), test images, test labels: uint8 arrays."""
    arrays = []
    for name, sha256 in MNIST:
        path = data_dir / f"mnist/{name}.gz"
        find(path, [f"{host}/{name}.gz" for host in HOSTS], sha256)
        raw = unzip(path.read_bytes())
        if "images" in name:
            arrays.append(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28))
        else:
            arrays.append(np.frombuffer(raw, np.uint8, offset=8))
    return arrays


def draw_digits(n_train=20_000, n_test=2_000, seed=0):
    """MNIST's stand-in: the font under random rotation, shear, scale, shift, thickness and blur."""
    g = torch.Generator().manual_seed(seed)
    n = n_train + n_test

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=g)

    glyphs = [[[ch == "#" for ch in row.split("|")[d]] for row in FONT] for d in range(10)]
    glyphs = F.pad(torch.tensor(glyphs).float(), (1, 1, 1, 1))
    label = torch.randint(10, (n,), generator=g)
    angle = uniform(-0.25, 0.25)
    shear = uniform(-0.3, 0.3)
    width = uniform(1.15, 1.7)
    height = uniform(0.95, 1.25)
    threshold = uniform(0.25, 0.55)[:, None, None]
    sharpness = uniform(4, 12)[:, None, None]
    x_row = [width * angle.cos(), width * (shear - angle.sin()), uniform(-0.3, 0.3)]
    y_row = [height * angle.sin(), height * angle.cos(), uniform(-0.2, 0.2)]
    affine = torch.stack([torch.stack(x_row, 1), torch.stack(y_row, 1)], 1)  # (n, 2, 3)
    images = []
    for m, y in zip(affine.split(2000), label.split(2000)):
        where = F.affine_grid(m, (len(y), 1, 28, 28), align_corners=False)
        images.append(F.grid_sample(glyphs[y][:, None], where, align_corners=False)[:, 0])
    ink = torch.cat(images)                                            # (n, 28, 28)
    ink = torch.sigmoid((ink - threshold) * sharpness) * (ink > 0.02)
    ink = (255 * ink).byte().numpy()
    label = label.byte().numpy()
    return ink[:n_train], label[:n_train], ink[n_train:], label[n_train:]


class Images:
    """MNIST or its stand-in. batch(n) -> pixels (n, 784) and labels (n,), int64; a share drop_label
    of the labels is hidden, -1, for classifier-free guidance. val (W, 784) uint8, for the bound."""

    def __init__(self, c):
        check(c.dataset in ("auto", "mnist", "digits"),
              f"no images {c.dataset!r}: one of auto, mnist, digits")
        self.name = c.dataset
        if c.dataset != "digits":
            try:
                arrays = load_mnist(Path(c.data_dir or HERE / "data"))
                self.name = "mnist"
            except SystemExit as error:
                if c.dataset == "mnist":
                    raise
                self.name = "digits"
                print0(f"NO MNIST, TRAINING ON DIGITS DRAWN BY THIS PROGRAM: {error}")
        if self.name == "digits":
            arrays = draw_digits()
            source = "".join(FONT).encode()       # not the pixels, which CPUs round differently
        else:
            source = arrays[0].tobytes()
        train, labels, val, val_labels = [torch.from_numpy(a.copy()).to(DEVICE) for a in arrays]
        self.train = train.flatten(1)[:c.train_size or None]
        self.labels = labels[:c.train_size or None]
        self.val = val.flatten(1)
        self.val_labels = val_labels
        self.drop_label = c.drop_label
        self.T = N_PIXELS
        self.unit = "pixel"
        sha256 = hashlib.sha256(source).hexdigest()
        self.meta = {"alphabet": "", "data": {"name": self.name, "sha256": sha256}}

    def __str__(self):
        return f"{self.name}: {len(self.train):,} images to train, {len(self.val):,} to validate"

    def batch(self, n):
        i = torch.randint(len(self.train), (n,), device=DEVICE)
        hidden = torch.rand(n, device=DEVICE) < self.drop_label
        return self.train[i].long(), self.labels[i].long().masked_fill(hidden, -1)


# pictures

def to_bytes(x):
    """Images in [-1, 1] -> uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


def grid(images, columns):
    """Images (n, 28, 28) -> one (rows * 28, columns * 28), row by row; what is missing is black."""
    rows = -(-len(images) // columns)
    images = F.pad(images, (0, 0, 0, 0, 0, rows * columns - len(images)), value=-1)
    images = images.view(rows, columns, 28, 28).transpose(1, 2)
    return images.reshape(rows * 28, columns * 28)


def png_chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(image):
    """The bytes of a grey PNG of an image (height, width) in [-1, 1]."""
    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = F.pad(to_bytes(image), (1, 0))           # a zero before each: no filter
    body = zlib.compress(rows.numpy().tobytes(), 9)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body)
            + png_chunk(b"IEND", b""))


def add_below(path, image):
    """Add an image (height, width) in [-1, 1] below the picture at path, which png made, if any."""
    if path.exists():
        # behind signature, IHDR and IDAT's name; before its CRC and IEND
        body = path.read_bytes()[41:-16]
        try:
            rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(-1, image.shape[1] + 1)
            if rows[:, 0].any():
                raise ValueError("filters, which png does not use")
        except (ValueError, zlib.error):
            raise OSError(f"{path} was changed or cut; it stays as it is") from None
        above = torch.from_numpy(rows[:, 1:] / np.float32(127.5) - 1)
        image = torch.cat([above, image])
    part = path.with_suffix(".part")
    part.write_bytes(png(image))
    os.replace(part, path)


def noise_to_digit(method, label, s, n=12):
    """n looks at one digit while it is drawn, side by side: (28, n * 28)."""
    frames = [z[0] for z, _ in sample_images(method, label, s)]
    looks = torch.linspace(0, s.steps - 1, min(s.steps, n)).round().int().tolist()
    return grid(torch.stack([frames[i] for i in looks]), len(looks))


if __name__ == "__main__":
    run(main)

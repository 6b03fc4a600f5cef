"""The README's strips, from noise to digits and from blanks to text, each in eight looks. A minute.

    python -m experiments.strips out/mnist     # writes results/digits.png and strip.png, and prints
"""
import torch

import mnist_ddpm
import train
from checkpoint import find_checkpoint, load
from config import HERE, ImageSampler, Masked, Mnist, Sample, run
from data import CharTokenizer
from generate import lay_out, write
from mnist_ddpm import N_CLASSES, grid, png, sample_images

N_LOOKS = 8


def numbered(frames):
    """N_LOOKS of frames, evenly spaced, the first and the last among them, with their numbers."""
    every = torch.linspace(0, len(frames) - 1, N_LOOKS).round().int().tolist()
    return [(i, frames[i]) for i in every]


def main(argv):
    path = find_checkpoint("".join(argv), "mnist")
    method, _, _ = load(path, Mnist, mnist_ddpm.build, ["mnist"])
    frames = list(sample_images(method, torch.arange(100) % N_CLASSES, ImageSampler()))
    last, _ = frames[-1]
    (HERE / "results/digits.png").write_bytes(png(grid(last, 20)))
    strip = [z[digit] for digit in (7, 2) for _, (z, _) in numbered(frames)]
    (HERE / "results/strip.png").write_bytes(png(grid(torch.stack(strip), N_LOOKS)))

    method, c, meta = load(HERE / "results/masked.pt", Masked, train.build, ["masked"])
    tokenizer = CharTokenizer(meta["alphabet"], meta["is_bytes"])
    s = Sample(length=60, steps=64)
    ids, known = lay_out([], s.length, c.block_size, method.mask_id)
    train.reseed(s.seed)
    texts = [ids, *(x[0] for x, _ in write(method, ids, known, c.block_size, s))]
    for i, x in numbered(texts):
        text = tokenizer.decode(x.tolist()).replace("\n", "/")
        print(f"{i:3} calls   {text}")


if __name__ == "__main__":
    run(main)

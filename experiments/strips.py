"""What does it look like when digits are drawn? The pictures of docs/digits.md: a hundred digits,
and two of them in eight looks from noise on. A minute on one CPU core.

    python -m experiments.strips out/mnist     # writes results/digits.png and results/strip.png
"""
import torch

from checkpoint import find_checkpoint, load
from config import HERE, ImageSampler, Mnist, run
from mnist_ddpm import N_CLASSES, build, grid, png, sample_images

N_LOOKS = 8


def main(argv):
    path = find_checkpoint("".join(argv), "mnist")
    method, _, _ = load(path, Mnist, build, ["mnist"])
    labels = torch.arange(100) % N_CLASSES
    frames = [z for z, _ in sample_images(method, labels, ImageSampler())]
    (HERE / "results/digits.png").write_bytes(png(grid(frames[-1], 20)))

    looks = torch.linspace(0, len(frames) - 1, N_LOOKS).round().int().tolist()
    strip = [frames[i][digit] for digit in (7, 2) for i in looks]
    (HERE / "results/strip.png").write_bytes(png(grid(torch.stack(strip), N_LOOKS)))


if __name__ == "__main__":
    run(main)

"""The two strips of the README, from noise to a digit and from blanks to text, each in eight looks:

    python -m experiments.strips out/mnist        # writes results/digits.png and results/strip.png, prints the text"""

import torch

import mnist_ddpm
import train
from config import HERE, Picture, Sample, run
from data import Alphabet
from generate import plan, write
from mnist_ddpm import draw, grey, grid, png

LOOKS = 8


def main(argv):
    method, c, _ = train.load(argv[0] if argv else HERE / "out/mnist", mnist_ddpm.build, ("mnist",))
    frames = list(draw(method, torch.arange(100) % 10, c, Picture()))
    every = torch.linspace(0, len(frames) - 1, LOOKS).round().int().tolist()
    (HERE / "results/digits.png").write_bytes(png(grey(grid(frames[-1][0], 20))[None]))
    strip = torch.stack([frames[i][0][d] for d in (7, 2) for i in every])
    (HERE / "results/strip.png").write_bytes(png(grey(grid(strip, LOOKS))[None]))

    method, c, meta = train.load(HERE / "results/masked.pt", train.build)
    alphabet, s = Alphabet(meta["alphabet"]), Sample(length=60, steps=64)
    ids, known = plan(alphabet, s, c.block_size)
    train.reseed(s.seed)
    texts = [torch.full((1, 60), method.mask), *(x for x, _ in write(method, ids, known, c.block_size, s))]
    for i in torch.linspace(0, len(texts) - 1, LOOKS).round().int().tolist():
        print(f"{i:3} calls   {alphabet.decode(texts[i][0].tolist()).replace(chr(10), '/')}")


if __name__ == "__main__":
    run(main)

"""Share of known words and speaker-name lines in samples, beside real text: python results/words.py out/masked [data_dir] [blocks]

A word is a run of letters and apostrophes strictly inside a block (its ends are cut); known if the training text has it, in any case.
A name line is a whole line of letters and spaces, capital first, that ends in a colon. ± is the standard error over blocks."""
import re
import sys
from collections import Counter
from math import log2
from pathlib import Path
from statistics import stdev

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import DEVICE, Masked, Sample  # noqa: E402
from data import Text  # noqa: E402
from train import build, load, reseed  # noqa: E402

WORD, NAME = re.compile(r"[A-Za-z']+"), re.compile(r"^[A-Z][A-Za-z ]*:$", re.M)


def ratio(parts):
    """Sum of a / sum of b over (a, b), with its standard error by the delta method."""
    a, b = map(sum, zip(*parts, strict=True))
    return a / b, stdev(x - a / b * y for x, y in parts) * len(parts) ** .5 / b


def row(name, blocks, vocabulary):
    """Print one row of the table for a list of texts."""
    words = [[w.lower() in vocabulary for w in WORD.findall(b)[1:-1]] for b in blocks]
    known, known_error = ratio([(sum(w), len(w)) for w in words])
    names, names_error = ratio([(1000 * len(NAME.findall(b)), len(b)) for b in blocks])
    counts = Counter("".join(blocks))
    entropy = -sum(n / counts.total() * log2(n / counts.total()) for n in counts.values())
    print(f"| {name} | {len(blocks)} | {known:.3f} ± {known_error:.3f} | {names:.1f} ± {names_error:.1f} | {entropy:.2f} |", flush=True)


if __name__ == "__main__":
    path, folder, n = (*sys.argv[1:], *["", "", "200"][len(sys.argv) - 1:])
    name, c, meta, weights = load(path)
    data = Text(Masked(dataset=meta["data"]["name"], data_dir=folder, block_size=c.block_size))
    method = build(c, meta).to(DEVICE).eval()
    method.load_state_dict(weights)
    vocabulary = {w.lower() for w in WORD.findall(data.alphabet.decode(data.train.tolist()))}
    print("| text | blocks | known words | name lines in 1,000 characters | entropy, bits |\n|---|---:|---:|---:|---:|")
    row("real, held out", [data.alphabet.decode(w) for w in data.val.tolist()], vocabulary)
    nothing = torch.zeros(int(n), c.block_size, dtype=torch.long, device=DEVICE)
    for title, s in {"default": Sample(), "exact: random, 1, no remasking": Sample(order="random", temperature=1.0, remask=0.0, steps=128)}.items():
        reseed(s.seed)
        *_, (x, _) = method.sample(nothing, nothing > 0, s)
        row(title, [data.alphabet.decode(w) for w in x.tolist()], vocabulary)

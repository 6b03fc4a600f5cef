"""Do pretrained embeddings help where tokens have a meaning? This makes tokens of the words of a
text and, with --ppmi=64, an embedding of each from which words are near it (PPMI and SVD: Levy &
Goldberg 2014): tokens.npy, vocab.json, table.txt. Seconds.

    python -m experiments.words --dataset=warpeace --ppmi=64
    python train.py --dataset=data/words/tokens.npy
    python generate.py --prompt=" prince andrew{10}."             # words begin with a space
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import HERE, Settings, parse, run
from data import load_text

NEAR = 5    # so many words before and after a word are near it


@dataclass(frozen=True)
class Words(Settings):   # of which text, how many, and where they go
    dataset: str = "shakespeare"   # or warpeace, text8, pydoc, the path of a text file
    data_dir: str = ""             # where corpora are kept; empty: data/
    out: str = "data/words"        # a folder
    n: int = 2000                  # the most frequent words; all others are <unk>
    ppmi: int = 0                  # numbers of an embedding; 0: no table


def ppmi_table(ids, V, dim):
    """An embedding (V, dim) of each id, from the text ids (N,): the singular vectors of the matrix
    of max(0, log p(a, b) / (p(a) p(b))) for a and b near each other."""
    counts = torch.zeros(V * V)
    for distance in range(1, NEAR + 1):
        pairs = ids[:-distance] * V + ids[distance:]
        counts += torch.bincount(pairs, minlength=V * V)
    counts = counts.view(V, V) + counts.view(V, V).T
    p = counts.sum(1, keepdim=True) / counts.sum()
    pmi = (counts / counts.sum() / (p * p.T)).log()
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(pmi.nan_to_num(0).clamp(min=0), min(dim, V), niter=4)
    return u * s.sqrt()


def main(argv):
    s = Words(**parse(argv, Words))
    text, name = load_text(s.dataset, Path(s.data_dir or HERE / "data"))
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)

    # words in lower case, with a space before each; other characters; empty lines
    tokens = re.findall(r"\n\n|[^\W_]+(?:'[^\W_]+)*|\S", text.lower())
    tokens = [f" {token}" if token[0].isalnum() else token for token in tokens]
    vocabulary = [" <unk>", *(token for token, _ in Counter(tokens).most_common(s.n))]
    index = {token: i for i, token in enumerate(vocabulary)}
    ids = np.array([index.get(token, 0) for token in tokens], np.uint16)
    np.save(out / "tokens.npy", ids)
    (out / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    print(f"{out / 'tokens.npy'}: {len(ids):,} words of {name}, {(ids == 0).mean():.1%} <unk>")

    # a table for embed_diffusion.py, from the part that it trains on
    if s.ppmi:
        training = torch.from_numpy(ids[:int(0.9 * len(ids))].astype(np.int64))
        with (out / "table.txt").open("w", encoding="utf-8") as f:
            for token, row in zip(vocabulary, ppmi_table(training, len(vocabulary), s.ppmi)):
                spelling = token.replace("\n", "\\n").replace(" ", "\u2581")
                print(spelling, *row.tolist(), file=f)


if __name__ == "__main__":
    run(main)

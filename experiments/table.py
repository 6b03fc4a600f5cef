"""How does a pretrained embedding get into embed_diffusion.py --table? This writes the rows that
the characters of a text need: of GloVe, word2vec or fastText as text, of a .safetensors file beside
its tokenizer.json, or of a checkpoint of train.py. Seconds; a minute for a large text file.

    python -m experiments.table glove.txt --out=table.txt                 # for tiny Shakespeare
    python -m experiments.table model.safetensors --dataset=my.txt
"""
import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from checkpoint import load
from config import HERE, Masked, Settings, check, parse, run
from data import load_text
from train import build

# what vocabularies write for a character; the last name of the tensor, before .weight; its dtype
SPELLINGS = {" ": [" ", "\u2581", "Ġ"], "\n": ["\n", "\\n", "<0x0A>", "Ċ"]}
NAMES = ["wte", "shared", "embed_tokens", "tok_embeddings", "embed_in", "embedding", "embeddings",
         "word_embedding", "word_embeddings"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TableSettings(Settings):   # for whom the table is, and where it goes
    out: str = "table.txt"
    dataset: str = "shakespeare"   # or auto, warpeace, text8, pydoc, the path of a text file
    data_dir: str = ""             # where corpora are kept; empty: data/


def pick(vocabulary, alphabet):
    """{character: what vocabulary, a dict, has for the first of its spellings that it has}."""
    picked = {}
    for ch in alphabet:
        for token in SPELLINGS.get(ch, ch):
            if token in vocabulary:
                picked.setdefault(ch, vocabulary[token])
    return picked


def checkpoint_rows(path, alphabet):
    """Of a masked model, or of the autoregressive baseline; its last row, MASK, is nobody's."""
    method, _, meta = load(path, Masked, build, ["masked", "ar"])
    table = method.net.embed.weight.tolist()
    return pick(dict(zip(meta["alphabet"], table, strict=False)), alphabet)


def text_rows(path, alphabet):
    """Of lines `token number number ...`, perhaps below a line `rows numbers`. There are as many
    numbers in each line as in the first, so that a token may have spaces."""
    wanted = {token for ch in alphabet for token in SPELLINGS.get(ch, ch)}
    rows = {}
    with path.open(encoding="utf-8", errors="replace", newline="\n") as f:
        first = f.readline()
        dim = len(first.split()) - 1
        header = re.fullmatch(r"\d+ (\d+)\s*", first)
        if header:
            dim = int(header[1])
            first = f.readline()
        for line in chain([first], f):
            token, *numbers = line.rstrip().rsplit(" ", dim)
            if token in wanted and token not in rows:
                rows[token] = [float(x) for x in numbers]
    return pick(rows, alphabet)


def safetensors_rows(path, alphabet):
    """Of a .safetensors file with its tokenizer.json beside it. No other row is read."""
    tokenizer = json.loads(path.with_name("tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):             # [[token, score], ...]
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    if "Ġ" in vocabulary:                        # as GPT-2, where é stands for a byte
        alphabet = filter(str.isascii, alphabet)

    # the length of the header, the header, the data
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:start].numpy().tobytes())
    names = [name for name in header if name.removesuffix(".weight").split(".")[-1] in NAMES]
    check(len(names) == 1, f"{path}: which is its embedding, {', '.join(names or header)}?")
    tensor = header[names[0]]
    dtype = DTYPES[tensor["dtype"]]
    n_rows, dim = tensor["shape"]
    begin, end = tensor["data_offsets"]
    table = raw[start + begin:start + end].view(n_rows, dim * dtype.itemsize)
    ids = pick(vocabulary, alphabet)
    return {ch: table[i].clone().view(dtype).tolist() for ch, i in ids.items()}


def main(argv):
    check(argv and not argv[0].startswith("--"), __doc__.strip())
    path = Path(argv[0])
    s = TableSettings(**parse(argv[1:], TableSettings))
    out = Path(s.out)
    check(out.resolve() != path.resolve(), f"{out} would replace the table that is read")
    text, _ = load_text(s.dataset, Path(s.data_dir or HERE / "data"))
    alphabet = "".join(sorted(set(text)))

    read = text_rows
    if path.is_dir() or path.suffix == ".pt":
        read = checkpoint_rows
    elif path.suffix == ".safetensors":
        read = safetensors_rows
    # a carriage return would end a line, and \u2581 be read as a space
    writable = [ch for ch in alphabet if ch not in "\r\u2581"]
    try:
        rows = read(path, writable)
        has_numbers = torch.tensor([*rows.values()]).numel() > 0       # as many in each row
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise SystemExit(f"{path} is damaged, or no table of embeddings, or its tokenizer.json is: "
                         f"{error!r}") from None
    check(has_numbers, f"{path} has no embedding of any character of {alphabet[:80]!r}")

    lines = []
    for ch, row in rows.items():
        token = {"\n": "\\n", " ": "\u2581"}.get(ch, ch)
        lines.append(" ".join([token, *map(str, row)]) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{out}: {len(rows)} of {len(alphabet)} characters")
    missing = "".join(ch for ch in alphabet if ch not in rows)
    if missing:
        print(f"{path} lacks {missing[:80]!r}")


if __name__ == "__main__":
    run(main)

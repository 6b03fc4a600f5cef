"""How does a pretrained embedding get into embed_diffusion.py --table? This writes the rows that
the characters of a text need: of GloVe, word2vec or fastText as text, of a .safetensors file beside
its tokenizer.json, or of a checkpoint of train.py. A few seconds; a minute for a large text file.

    python -m experiments.table glove.txt --out=table.txt                 # for tiny Shakespeare
    python -m experiments.table model.safetensors --dataset=my.txt
    python -m experiments.table out/warpeace-ar --alphabet=abc
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from checkpoint import load
from config import HERE, Masked, Settings, check, parse, run
from data import load_text
from train import build


@dataclass(frozen=True)
class TableSettings(Settings):   # for whom the table is, and where it goes
    out: str = "table.txt"
    alphabet: str = ""             # the characters wanted; empty: those of the dataset
    dataset: str = "shakespeare"   # or auto, warpeace, text8, pydoc, the path of a text file
    data_dir: str = ""             # where corpora are kept; empty: data/


def read_rows(path, alphabet):
    """{character of the alphabet: its numbers} of any of the files above."""
    if path.is_dir() or path.suffix == ".pt":
        return checkpoint_rows(path, alphabet)
    if path.suffix == ".safetensors":
        return safetensors_rows(path, alphabet)
    return text_rows(path, alphabet)


def is_writable(ch):
    """Whether write_table can write a character: no carriage return, which ends a line, not the
    sign for a space, no half of a surrogate pair."""
    return ch not in "\r\u2581" and not "\ud800" <= ch <= "\udfff"


def write_table(path, rows):
    """Write {character: its numbers} as embed_diffusion.read_table reads it."""
    spelling = {"\n": "\\n", " ": "\u2581"}
    lines = []
    for ch, row in rows.items():
        numbers = " ".join(str(float(x)) for x in row)
        lines.append(f"{spelling.get(ch, ch)} {numbers}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(argv):
    check(argv and not argv[0].startswith("--"), __doc__.strip())
    path = Path(argv[0])
    s = TableSettings(**parse(argv[1:], TableSettings))
    out = Path(s.out)
    check(out.resolve() != path.resolve(), f"{out} would replace the table that is read")
    alphabet = s.alphabet
    if not alphabet:
        text, _ = load_text(s.dataset, Path(s.data_dir or HERE / "data"))
        alphabet = "".join(sorted(set(text)))

    rows = read_rows(path, [ch for ch in alphabet if is_writable(ch)])
    check(rows, f"{path} has no embedding of any character of {alphabet[:80]!r}")
    finite = all(np.isfinite(np.array(row, np.float32)).all() for row in rows.values())
    check(finite, f"{path} has numbers that are not finite, or too large")
    write_table(out, rows)
    print(f"{out}: {len(rows)} of {len(alphabet)} characters")
    missing = "".join(ch for ch in alphabet if ch not in rows)
    if missing:
        print(f"{path} lacks {missing[:80]!r}")


# -------------------------------------------------------------------------------------------------
# how vocabularies write a character
# the readers

# names of input tables
USUAL = re.compile(r"(^|\.)(wte|shared|embed_tokens|tok_embeddings|embed_in|"
                   r"(word_|token_)?embeddings?)\.weight$")
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}     # dtypes of safetensors


def gpt2_bytes():
    """How byte-level vocabularies write each of the 256 bytes: those that cannot be seen as the
    characters from 256 on."""
    signs = []
    n_unseen = 0
    for b in range(256):
        if b < 33 or 126 < b < 161 or b == 173:
            signs.append(chr(256 + n_unseen))
            n_unseen += 1
        else:
            signs.append(chr(b))
    return signs


GPT2 = gpt2_bytes()


def spellings(ch, byte_level=False):
    """How vocabularies may write a character, the surest first. byte_level, as GPT-2: only by its
    bytes, for there é is two signs, and the sign é is a byte."""
    signs = "".join(GPT2[b] for b in ch.encode())
    if byte_level:
        return [signs]
    usual = {" ": "\u2581", "\n": "\\n"}.get(ch, ch)
    if ord(ch) < 128:
        return [ch, usual, f"<0x{ord(ch):02X}>", signs]
    return [ch, usual]


def pick(table, alphabet, byte_level=False):
    """{character: what table, a dict, has under the surest of its spellings}."""
    picked = {}
    for ch in alphabet:
        has = [spelling for spelling in spellings(ch, byte_level) if spelling in table]
        if has:
            picked[ch] = table[has[0]]
    return picked


# files

def checkpoint_rows(path, alphabet):
    """{character: its numbers} of a masked model, or of the autoregressive baseline."""
    method, _, meta = load(path, Masked, build, ["masked", "ar"])
    table = method.net.embed.weight.detach().cpu().numpy()             # the last row is MASK
    return {ch: table[meta["alphabet"].index(ch)] for ch in alphabet if ch in meta["alphabet"]}


def to_floats(words):
    """A list of bytes as floats, or None where one is no number."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return None


def count_numbers(line):
    """How many numbers end a line, the first word not counted: it is a token."""
    n = 0
    for word in line.rstrip().split(b" ")[:0:-1]:
        if to_floats([word]) is None:
            break
        n += 1
    return n


def text_rows(path, alphabet):
    """{character: its numbers} of a text file, `token number number ...` a line (GloVe), perhaps
    below a line `rows numbers` (word2vec, fastText). Read line by line, whatever its bytes; tokens
    may have spaces."""
    wanted = {}
    for ch in alphabet:
        for spelling in spellings(ch):
            wanted[spelling.encode()] = spelling
    found = {}
    with path.open("rb") as f:
        # how many numbers a row has: as the header says, or as most of the first lines have
        head = list(islice(f, 100))
        header = re.fullmatch(rb"\d{1,10} (\d{1,5})\s*", b"".join(head[:1]))
        first_row = 0
        dim = 0
        if header:
            dim = int(header[1])
            first_row = 1
        elif head:
            (dim, _), = Counter(count_numbers(line) for line in head).most_common(1)
        check(dim, f"{path} is no table of embeddings: a token and its numbers on each line")

        for i, line in enumerate(chain(head[first_row:], f), 1 + first_row):
            # a line that begins with a space has the token space
            first = line[:max(line.find(b" "), 1)]
            if first not in wanted:
                continue
            token, *words = line.rstrip().rsplit(b" ", dim)
            numbers = to_floats(words)
            if token == first and len(words) == dim and numbers:
                found[wanted.pop(first)] = numbers                     # the first of two counts
                continue
            # else a longer token with spaces, unless a number follows
            longer = token != first and not to_floats(token[len(first):].split())
            check(longer, f"{path}, line {i}: {first.decode()!r} is not followed by {dim} numbers, "
                          "as the other tokens are")
    return pick(found, alphabet)


def read_vocabulary(path):
    """{token: id} of a tokenizer.json, and whether its tokens are written by their bytes."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]                                     # or [[token, score], ...]
    if not isinstance(vocab, dict):
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ValueError
    return vocab, "ByteLevel" in str([spec.get("pre_tokenizer"), spec.get("decoder")])


def read_header(path):
    """Of a safetensors file: {name: {dtype, shape, data_offsets}}, and where the data begin."""
    size = path.stat().st_size
    with path.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if start > size:
            raise ValueError
        return json.loads(f.read(start - 8)), start


def safetensors_rows(path, alphabet):
    """{character: its numbers} of a .safetensors file with its tokenizer.json beside it; no row but
    these is read."""
    tokenizer = path.with_name("tokenizer.json")
    path.stat()
    try:
        vocab, byte_level = read_vocabulary(tokenizer)
        n_tokens = max(vocab.values()) + 1
    except FileNotFoundError:
        raise SystemExit(f"{path} needs its tokenizer.json in the same folder, which says what row "
                         "is what character") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{tokenizer} is damaged, or has no vocabulary (model: vocab)") from None

    try:
        tensors, start = read_header(path)
        large = [name for name, t in tensors.items()
                 if len(t.get("shape", ())) == 2 and t["shape"][0] >= n_tokens]
        names = [name for name in large if USUAL.search(name)] or large
        check(len(names) == 1, f"{path}: which tensor has a row for each of {n_tokens:,} tokens? "
                               f"It has {', '.join([*(names or tensors)][:9])}")
        tensor = tensors[names[0]]
        dtype = tensor["dtype"]
        shape = tensor["shape"]
        begin, end = tensor["data_offsets"]
        check(dtype in FLOATS, f"{path}: {names[0]} is {dtype}, not one of {', '.join(FLOATS)}")
        n_bytes = math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize
        if begin < 0 or end - begin != n_bytes or start + end > path.stat().st_size:
            raise ValueError
        ids = pick(vocab, alphabet, byte_level)
        table = np.memmap(path, FLOATS[dtype], "r", start + begin, tuple(shape))
        rows = table[list(ids.values())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path} is cut, damaged, or no safetensors file") from None
    if dtype == "BF16":                                                # the upper half of an F32
        rows = (rows.astype("<u4") << 16).view("<f4")
    return dict(zip(ids, rows, strict=True))


if __name__ == "__main__":
    run(main)

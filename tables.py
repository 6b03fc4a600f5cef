"""Pretrained tables of embeddings, of which only the rows of an alphabet's characters are read: text as GloVe, word2vec and fastText have it,
or a .safetensors file beside its tokenizer.json."""
import json
import math
import re
from collections import Counter
from itertools import chain, islice, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ODD = [b for b in range(256) if b < 33 or 126 < b < 161 or b == 173]                  # bytes that cannot be seen, and
GPT2 = [chr(256 + ODD.index(b)) if b in ODD else chr(b) for b in range(256)]          # how byte-level vocabularies write all 256
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}                    # of safetensors; bf16 is the upper half of an F32
USUAL = re.compile(r"(^|\.)(wte|shared|embed_tokens|tok_embeddings|embed_in|(word_|token_)?embeddings?)\.weight$")   # names of input tables


def spellings(ch, byte_level=False):
    """How vocabularies may write a character, the surest first. byte_level, as GPT-2: only by its bytes; there é is two signs, and é a byte."""
    signs = "".join(GPT2[b] for b in ch.encode())
    return [signs] if byte_level else [ch, {" ": "\u2581", "\n": "\\n"}.get(ch, ch), *[f"<0x{ord(ch):02X}>", signs] * (ord(ch) < 128)]


def pick(table, alphabet, byte_level=False):
    """{character: what table, a dict, has under the surest of its spellings}, of the characters that it has."""
    return {ch: table[s] for ch in alphabet for s in reversed(spellings(ch, byte_level)) if s in table}   # the last one stays


def numbers(fields):
    """A list of bytes as floats, or None where one is no number."""
    try:
        return [float(x) for x in fields]
    except ValueError:
        return None


def text_rows(path, alphabet):
    """{character: its numbers} of a text file, `token number number ...` a line (GloVe), perhaps below a line `rows numbers` (word2vec, fastText).

    Read line by line, whatever its bytes; tokens may have spaces. One line and exit 1 where a character has no row of the right length."""
    wanted, found = {s.encode(): s for ch in alphabet for s in spellings(ch)}, {}
    with path.open("rb") as f:
        head = list(islice(f, 100))
        header = re.fullmatch(rb"\d{1,10} (\d{1,5})\s*", head[0]) if head else None
        lengths = Counter(sum(1 for _ in takewhile(lambda x: numbers([x]), line.rstrip().split(b" ")[:0:-1])) for line in head)
        d = int(header[1]) if header else max(lengths, key=lengths.get, default=0)
        if not d:
            raise SystemExit(f"{path} is no table of embeddings: a token and its numbers on each line")
        for i, line in enumerate(chain(head[bool(header):], f), 1 + bool(header)):
            first = line[:max(line.find(b" "), 1)]                                    # a line that begins with a space has the token space
            if first not in wanted:
                continue
            token, *row = line.rstrip().rsplit(b" ", d)
            if token == first and len(row) == d and numbers(row):
                found[wanted.pop(first)] = numbers(row)                               # the first of two counts
            elif token == first or numbers(token[len(first):].split()):               # else a longer token, of which this is the beginning
                raise SystemExit(f"{path}, line {i}: {first.decode()!r} is not followed by {d} numbers, as the other tokens are")
    return pick(found, alphabet)


def tensor_rows(path, alphabet):
    """{character: its numbers} of a .safetensors file with its tokenizer.json beside it; no row but these is read. Errors: one line and exit 1."""
    size, tokenizer = path.stat().st_size, path.with_name("tokenizer.json")
    try:
        spec = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocab = spec["model"]["vocab"]                                                # {token: id}, or [[token, score]] in the order of the ids
        vocab = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
            raise ValueError
        tokens, byte_level = max(vocab.values()) + 1, "ByteLevel" in str([spec.get("pre_tokenizer"), spec.get("decoder")])
    except FileNotFoundError:
        raise SystemExit(f"{path} needs its tokenizer.json in the same folder, which says what row is what character") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{tokenizer} is damaged, or has no vocabulary (model: vocab)") from None
    try:
        with path.open("rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            tensors = json.loads(f.read(start - 8) if start <= size else b"")
        large = [name for name, t in tensors.items() if len(t.get("shape", ())) == 2 and t["shape"][0] >= tokens]
        names = [name for name in large if USUAL.search(name)] or large
        if len(names) != 1:
            raise SystemExit(f"{path}: which tensor has a row for each of {tokens:,} tokens? It has {', '.join([*(names or tensors)][:9])}")
        kind, shape, (begin, end) = (tensors[names[0]][k] for k in ("dtype", "shape", "data_offsets"))
        if kind not in FLOATS:
            raise SystemExit(f"{path}: {names[0]} is {kind}, not one of {', '.join(FLOATS)}")
        if start + end > size or not 0 <= begin == end - math.prod(shape) * np.dtype(FLOATS[kind]).itemsize:
            raise ValueError
        ids = pick(vocab, alphabet, byte_level)
        rows = np.memmap(path, FLOATS[kind], "r", start + begin, tuple(shape))[list(ids.values())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path} is cut, damaged, or no safetensors file") from None
    return dict(zip(ids, (rows.astype("<u4") << 16).view("<f4") if kind == "BF16" else rows, strict=True))


def pretrained(path, alphabet, dim):
    """Embeddings to begin with, of a file: (rows of norm 1, fp32 (V, dim), the characters it lacks, whose rows are drawn).

    What the file has, less the mean, in its first dim principal directions; where it has fewer, zeros. Errors: one line and exit 1, or OSError."""
    found = (tensor_rows if path.endswith(".safetensors") else text_rows)(Path(path), alphabet)
    found = {ch: row for ch, row in found.items() if np.any(row)}                     # zeros: a row that was never used
    x = torch.from_numpy(np.atleast_2d(np.array([*found.values()], np.float64)))      # (found, numbers); where none is found, (1, 0)
    if not x.float().isfinite().all():
        raise SystemExit(f"table {path} has numbers that are not finite, or too large")
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    near = F.pad(u * s, (0, dim - len(s)))                                            # (found, dim); less than nothing to pad cuts
    known = {ch: (row / row.norm()).float() for ch, row in zip(found, near) if row.norm() > 1e-6 * x.norm()}   # at the mean, it says nothing
    if len(known) < 2:
        raise SystemExit(f"table {path} has no two different embeddings of characters of the text: {alphabet[:80]!r}")
    drawn = F.normalize(torch.randn(len(alphabet), dim), dim=1)
    return torch.stack([known.get(ch, row) for ch, row in zip(alphabet, drawn)]), "".join(ch for ch in alphabet if ch not in known)

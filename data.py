"""Corpora: find, fetch, verify, encode, batch; and prompts with blanks.

A corpus is downloaded once to data_dir, checked against its sha256 (or its published size) and renamed into place: a file that was
cut, or is something else, is told and never used."""
import hashlib
import os
import re
import shutil
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import DEVICE, HERE

CORPORA = {   # name: (file, addresses, sha256 or size in bytes of the file)
    "shakespeare": ("tinyshakespeare.txt", ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "warpeace": ("warpeace.txt", ["https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt"],
                 "fb66ba999dafe24017cdd59e04c56d385a9c8466993d374fd4c6f08b2142985e"),
    "text8": ("text8", ["https://mattmahoney.net/dc/text8.zip", "http://mattmahoney.net/dc/text8.zip"], 100_000_000),
    "enwik8": ("enwik8", ["https://mattmahoney.net/dc/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"], 100_000_000),
}


def right(path, check):
    """Whether the file is what it should be: its sha256 (a str) or its size in bytes (an int)."""
    if isinstance(check, int):
        return path.stat().st_size == check
    return hashlib.sha256(path.read_bytes()).hexdigest() == check


def fetch(urls, path, check, timeout=10):
    """Download the first of urls that answers to path, unzipped if it is a .zip, verified, renamed into place.

    timeout is in seconds of silence. Raises OSError with one line saying what happened at every address."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, told = path.with_name(f"{path.name}.{os.getpid()}.part"), []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as r, part.open("wb") as f:
                size = int(r.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(r, "read", total=size or None, desc=f"downloading {path.name}", leave=False) as body:
                    shutil.copyfileobj(body, f, 1 << 16)
            if part.stat().st_size < size:
                raise OSError(f"cut after {part.stat().st_size:,} of {size:,} bytes")
            if url.endswith(".zip"):
                with zipfile.ZipFile(part) as z, z.open(path.name) as r, path.with_name(part.name + "2").open("wb") as f:
                    shutil.copyfileobj(r, f)
                os.replace(path.with_name(part.name + "2"), part)
            if not right(part, check):
                raise OSError(f"not the right file ({part.stat().st_size:,} bytes)")
            os.replace(part, path)
            return
        except (OSError, EOFError, ValueError, KeyError, NotImplementedError, HTTPException, zipfile.BadZipFile, zlib.error) as e:
            told.append(f"{url}: {str(e) or type(e).__name__}")
        finally:
            part.unlink(missing_ok=True)
            path.with_name(part.name + "2").unlink(missing_ok=True)
    raise OSError("; ".join(told))


def find(name, folder, timeout=10):
    """The path of a known corpus in folder, downloaded if it is not there. Raises OSError with one line."""
    file, urls, check = CORPORA[name]
    path = folder / file
    if not path.exists():
        try:
            fetch(urls, path, check, timeout)
        except OSError as e:
            raise OSError(f"{path} is not there and could not be downloaded ({e})") from None
    if not right(path, check):
        raise OSError(f"{path} is not {name}: cut, or another file; delete it and it is downloaded again")
    return path


def read(name, folder):
    """(text, where it came from, a warning or "") of a dataset: a known name, auto, pydoc, or the path of a text file."""
    if name == "auto":
        try:
            return *read("shakespeare", folder)[:2], ""
        except SystemExit as e:
            text, source, _ = read("pydoc", folder)
            return text, source, f"NO TINY SHAKESPEARE, TRAINING ON PYTHON'S OWN DOCUMENTATION (pydoc) INSTEAD: {e}"
    if name == "pydoc":
        from pydoc_data import topics
        return "\n\n".join(topics.topics[k] for k in sorted(topics.topics)), "pydoc", ""
    try:
        path = find(name, folder, timeout=5) if name in CORPORA else Path(name)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise SystemExit(f"no dataset {name!r}: one of auto, {', '.join(CORPORA)}, pydoc, or the path of a text file") from None
    except OSError as e:
        raise SystemExit(f"dataset {name}: {e}") from None
    if name == "enwik8":
        return raw.decode("latin-1"), "enwik8", ""                # a character is a byte
    if b"\0" in raw:
        raise SystemExit(f"{path} is not text: it has zero bytes")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n"), name if name in CORPORA else f"file {path.name}", ""
    except UnicodeDecodeError as e:
        raise SystemExit(f"{path} is not UTF-8 text: byte {e.start} is {raw[e.start]:#04x}") from None


class Alphabet:
    """The characters of a corpus, in order: text to token ids and back. One past the last is MASK. With raw, characters are bytes."""

    def __init__(self, chars, raw=False):
        self.chars, self.raw = chars, raw

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str -> np.int64 (len,). SystemExit names the first character that the alphabet lacks."""
        table = np.full(0x110000, -1, np.int64)
        table[[ord(ch) for ch in self.chars]] = np.arange(len(self.chars))
        ids = table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        if (ids < 0).any():
            raise SystemExit(f"the model has never seen {text[int(np.argmin(ids))]!r}; its alphabet is {self.chars!r}")
        return ids

    def decode(self, ids):
        """Token ids (any sequence of int) -> str; what is still masked is shown as a middle dot."""
        return "".join(self.show(i) for i in ids) if not self.raw else \
            b"".join(self.show(i).encode("latin-1") for i in ids).decode("utf-8", "replace")

    def show(self, i):
        return self.chars[i] if i < len(self.chars) else "·"

    def paint(self, ids, sure, color=True):
        """Token ids and confidences in [0, 1] as text for a terminal: from red (a guess) to green (certain), masked ones dim."""
        if not color:
            return self.decode(ids)
        shades = (203, 209, 215, 221, 185, 149, 113)
        colors = [240 if i >= len(self) else shades[int(p * 6.99)] for i, p in zip(ids, sure, strict=True)]
        glyphs = [g if g.isprintable() or g in "\n\t" else "\ufffd" for g in map(self.show, ids)]      # no stray control codes
        return "".join(f"\x1b[38;5;{shade}m{g}" for shade, g in zip(colors, glyphs, strict=True)) + "\x1b[0m"

    def prompt(self, text):
        """A prompt -> (ids, known), int64 and bool (L,): {12} is a blank of 12 characters, \\n a new line, {{ a brace."""
        ids, known = [], []
        for brace, blank, bad, literal in re.findall(r"(\{\{)|\{(\d{1,6})\}|(\{.?)|([^{]+)", text, re.S):
            if bad or (blank and not int(blank)):
                raise SystemExit(f"prompt {text!r}: a blank is written {{12}}, a brace {{{{")
            literal = "{" if brace else literal.replace("\\n", "\n")
            if self.raw:
                literal = literal.encode("utf-8").decode("latin-1")
            ids += [0] * int(blank or 0) if blank else self.encode(literal).tolist()
            known += [not blank] * (int(blank) if blank else len(literal))
        return torch.tensor(ids, dtype=torch.long), torch.tensor(known, dtype=torch.bool)


class Text:
    """A corpus on the device, a byte or two a character: .batch(n) for training, .val (W, T) for the bound."""

    def __init__(self, c):
        text, self.name, self.warning = read(c.dataset, Path(c.data_dir or HERE / "data"))
        need = 20 * c.block_size
        if len(text) < need:
            raise SystemExit(f"{self.name} has {len(text):,} characters; training with block_size={c.block_size} needs {need:,}")
        if 0 < c.train_size < c.block_size:
            raise SystemExit(f"train_size={c.train_size} is less than one block_size={c.block_size}")
        self.alphabet = Alphabet("".join(sorted(set(text))), raw=self.name == "enwik8")
        if len(self.alphabet) > 30_000:
            raise SystemExit(f"{self.name} has {len(self.alphabet):,} different characters; 30,000 is the most")
        self.T = c.block_size
        ids = torch.from_numpy(self.alphabet.encode(text).astype(np.uint8 if len(self.alphabet) < 256 else np.int16))
        end = int(.9 * len(ids))                                   # the last tenth is held out; of text8 and enwik8 the tenth before the last
        val = ids[end:-5_000_000] if self.name in ("text8", "enwik8") else ids[end:]
        self.train = ids[:end][:c.train_size or end].to(DEVICE)
        self.val = val[:len(val) // self.T * self.T].view(-1, self.T).to(DEVICE)   # (W, T); less than one window is left over
        self.meta = {"alphabet": self.alphabet.chars, "data": {"name": self.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}}

    def __str__(self):
        return f"{self.name}: {len(self.train):,} characters to train, {self.val.numel():,} to validate, {len(self.alphabet)} different"

    def batch(self, n):
        """n random windows of the training text, int64 (n, T)."""
        start = torch.randint(len(self.train) - self.T + 1, (n, 1)).to(DEVICE)
        return self.train[start + torch.arange(self.T, device=DEVICE)].long()

"""Corpora and images of digits: find, fetch, verify, encode, batch; and prompts with blanks.

A corpus is downloaded once to data_dir, checked against its sha256 (or its published size) and renamed into place: a file that was
cut, or is something else, is told and never used."""
import codecs
import gzip
import hashlib
import math
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
import torch.nn.functional as F
from tqdm import tqdm

from config import DEVICE, HERE

CORPORA = {   # name: (file, addresses, sha256 of the unpacked file or its size in bytes)
    "shakespeare": ("tinyshakespeare.txt", ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "warpeace": ("warpeace.txt", ["https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt"],
                 "fb66ba999dafe24017cdd59e04c56d385a9c8466993d374fd4c6f08b2142985e"),
    "text8": ("text8", ["https://mattmahoney.net/dc/text8.zip", "http://mattmahoney.net/dc/text8.zip"], 100_000_000),
    "enwik8": ("enwik8", ["https://mattmahoney.net/dc/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"], 100_000_000),
}
MNIST = {   # the same for the four files of MNIST
    name: (f"mnist/{file}.gz", [f"{host}/{file}.gz" for host in ("https://ossci-datasets.s3.amazonaws.com/mnist",
                                                                 "https://storage.googleapis.com/cvdf-datasets/mnist")], check)
    for name, file, check in (
        ("train images", "train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        ("train labels", "train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        ("test images", "t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        ("test labels", "t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"))}
FONT = (" ### |  #  | ### | ### |   # |#####| ### |#####| ### | ### ",   # 5 x 7 a digit, 0 to 9
        "#   #| ##  |#   #|#   #|  ## |#    |#   #|    #|#   #|#   #",
        "#   #|  #  |    #|    #| # # |#### |#    |   # |#   #|#   #",
        "#   #|  #  |   # |  ## |#  # |    #|#### |   # | ### | ####",
        "#   #|  #  |  #  |    #|#####|    #|#   #|  #  |#   #|    #",
        "#   #|  #  | #   |#   #|   # |#   #|#   #|  #  |#   #|#   #",
        " ### | ### |#####| ### |   # | ### | ### |  #  | ### | ### ")


def right(path, check):
    """Whether the file is what it should be: its sha256, unpacked if it is gzip (a str), or its size in bytes (an int)."""
    if isinstance(check, int):
        return path.stat().st_size == check
    raw = path.read_bytes()
    try:
        return hashlib.sha256(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).hexdigest() == check
    except (OSError, EOFError, zlib.error):   # gzip that is cut or damaged
        return False


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
    """The path of a known corpus or MNIST file in folder, downloaded if it is not there. Raises OSError with one line."""
    file, urls, check = (CORPORA | MNIST)[name]
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
            b"".join(self.show(i).encode("latin-1" if i < len(self) else "utf-8") for i in ids).decode("utf-8", "replace")

    def show(self, i):
        return self.chars[i] if i < len(self.chars) else "·"

    def glyphs(self, ids):
        """What each of the token ids shows: a character, or with raw nothing but for the last byte of one."""
        if not self.raw:
            return [*map(self.show, ids)]
        join = codecs.getincrementaldecoder("utf-8")("replace").decode
        return [join(self.show(i).encode("latin-1" if i < len(self) else "utf-8"), n == len(ids)) for n, i in enumerate(ids, 1)]

    def paint(self, ids, sure, color=True):
        """Token ids and confidences in [0, 1] as text for a terminal: from red (a guess) to green (certain), masked ones dim."""
        if not color:
            return self.decode(ids)
        shades = (203, 209, 215, 221, 185, 149, 113)
        colors = [240 if i >= len(self) else shades[int(p * 6.99)] for i, p in zip(ids, sure, strict=True)]
        glyphs = self.glyphs(ids)
        glyphs = ["".join(ch if ch.isprintable() or ch in "\n\t" else "\ufffd" for ch in g) for g in glyphs]      # no stray control codes
        return "".join(f"\x1b[38;5;{shade}m{g}" for shade, g in zip(colors, glyphs, strict=True)) + "\x1b[0m"

    def pieces(self, text):
        """A prompt in pieces (their text, the lengths they may have): none for characters, \\n being a new line and {{ a brace; one for {12}, a
        blank of 12 characters; a range for {20-60}, a blank of unknown length."""
        pieces = []
        for piece, a, b in re.findall(r"((?:\{\{|[^{])+|\{(\d{1,6})(?:-(\d{1,6}))?\}|\{)", text):
            if piece == "{" or a and not 0 < int(a) <= int(b or a):
                raise SystemExit(f"prompt {text!r}: a blank is written {{12}} or {{20-60}}, a brace {{{{")
            pieces.append((piece, range(int(a), int(b or a) + 1) if a else range(0)))
        return pieces

    def prompt(self, text):
        """A prompt -> (ids, known), int64 and bool (L,), of `pieces`; SystemExit where there is a blank whose length is still unknown."""
        ids, known = [], []
        for piece, lengths in self.pieces(text):
            if len(lengths) > 1:
                raise SystemExit(f"{piece}: a blank of unknown length needs a masked checkpoint")
            literal = "" if lengths else piece.replace("{{", "{").replace("\\n", "\n")
            if self.raw:
                literal = literal.encode("utf-8").decode("latin-1")
            ids += [0] * sum(lengths) + self.encode(literal).tolist()
            known += [False] * sum(lengths) + [True] * len(literal)
        return torch.tensor(ids, dtype=torch.long), torch.tensor(known, dtype=torch.bool)


class Text:
    """A corpus on the device, a byte or two a character: .batch(n) for training, .val (W, T) for the bound. raw: a character is a byte
    of its UTF-8."""

    def __init__(self, c, raw=False):
        text, self.name, self.warning = read(c.dataset, Path(c.data_dir or HERE / "data"))
        sha256, raw = hashlib.sha256(text.encode()).hexdigest(), raw or self.name == "enwik8"
        if raw and self.name != "enwik8":
            text = text.encode().decode("latin-1")
        need = 20 * c.block_size
        if len(text) < need:
            raise SystemExit(f"{self.name} has {len(text):,} characters; training with block_size={c.block_size} needs {need:,}")
        if 0 < c.train_size < c.block_size:
            raise SystemExit(f"train_size={c.train_size} is less than one block_size={c.block_size}")
        self.alphabet = Alphabet("".join(sorted(set(text))), raw)
        if len(self.alphabet) > 30_000:
            raise SystemExit(f"{self.name} has {len(self.alphabet):,} different characters; 30,000 is the most")
        self.T = c.block_size
        ids = torch.from_numpy(self.alphabet.encode(text).astype(np.uint8 if len(self.alphabet) < 256 else np.int16))
        end = int(.9 * len(ids))                                   # the last tenth is held out; of text8 and enwik8 the tenth before the last
        val = ids[end:-5_000_000] if self.name in ("text8", "enwik8") else ids[end:]
        self.train = ids[:end][:c.train_size or end].to(DEVICE)
        self.val = val[:len(val) // self.T * self.T].view(-1, self.T).to(DEVICE)   # (W, T); less than one window is left over
        self.meta = {"alphabet": self.alphabet.chars, "data": {"name": self.name, "sha256": sha256}}

    def __str__(self):
        return f"{self.name}: {len(self.train):,} characters to train, {self.val.numel():,} to validate, {len(self.alphabet)} different"

    def batch(self, n):
        """n random windows of the training text, int64 (n, T)."""
        start = torch.randint(len(self.train) - self.T + 1, (n, 1)).to(DEVICE)
        return self.train[start + torch.arange(self.T, device=DEVICE)].long()


def mnist(folder):
    """MNIST as published: {part: uint8 array} for train and test images (N, 28, 28) and labels (N,). Raises OSError with one line."""
    parts = {}
    for name in MNIST:
        raw = gzip.decompress(find(name, folder, timeout=5).read_bytes())
        parts[name] = np.frombuffer(raw, np.uint8, offset=16 if "images" in name else 8)
    return {k: v.reshape(-1, 28, 28) if "images" in k else v for k, v in parts.items()}


def digits(n_train=20_000, n_test=2_000, seed=0):
    """MNIST's stand-in, made here: a 5 x 7 font under random rotation, shear, scale, shift, thickness and blur. The same dict;
    the same digits for the same seed, but for a grey level or two where another CPU rounds otherwise."""
    g, n = torch.Generator().manual_seed(seed), n_train + n_test
    between = lambda low, high: low + (high - low) * torch.rand(n, generator=g)
    glyphs = F.pad(torch.tensor([[[ch == "#" for ch in row.split("|")[d]] for row in FONT] for d in range(10)]).float(), (1, 1, 1, 1))
    label = torch.randint(10, (n,), generator=g)
    angle, shear, wide, high = between(-.25, .25), between(-.3, .3), between(1.15, 1.7), between(.95, 1.25)   # of 28 / 20
    threshold, sharp = between(.25, .55)[:, None, None, None], between(4, 12)[:, None, None, None]
    to_glyph = torch.stack([torch.stack([wide * angle.cos(), wide * (shear - angle.sin()), between(-.3, .3)], 1),
                            torch.stack([high * angle.sin(), high * angle.cos(), between(-.2, .2)], 1)], 1)     # (n, 2, 3)
    ink = torch.cat([F.grid_sample(glyphs[y][:, None], F.affine_grid(m, (len(y), 1, 28, 28), align_corners=False), align_corners=False)
                     for y, m in zip(label.split(2000), to_glyph.split(2000), strict=True)])                    # (n, 1, 28, 28)
    ink = torch.sigmoid((ink - threshold) * sharp) * (ink > .02)
    ink, label = (255 * ink[:, 0]).byte().numpy(), label.byte().numpy()
    return {"train images": ink[:n_train], "train labels": label[:n_train], "test images": ink[n_train:], "test labels": label[n_train:]}


def patches(images, p):
    """Images (N, 28, 28) as (N, (28 / p)^2, p^2): squares of p x p, row by row; and `whole` puts them together again."""
    return images.unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2)


def whole(x, p):
    """The images (N, 28, 28) of patches x (N, (28 / p)^2, p^2)."""
    side = math.isqrt(x.size(1))
    return x.unflatten(2, (p, p)).unflatten(1, (side, side)).transpose(2, 3).flatten(3).flatten(1, 2)


class Images:
    """MNIST or its stand-in on the device, a byte a pixel, in patches: .batch(n) for training, .val (W, T, p^2) for the bound."""

    def __init__(self, c):
        folder, self.warning = Path(c.data_dir or HERE / "data"), ""
        if c.dataset not in ("auto", "mnist", "digits"):
            raise SystemExit(f"no images {c.dataset!r}: one of auto, mnist, digits")
        try:
            self.name, parts = ("digits", digits()) if c.dataset == "digits" else ("mnist", mnist(folder))
        except OSError as e:
            if c.dataset == "mnist":
                raise SystemExit(f"dataset mnist: {e}") from None
            self.name, parts = "digits", digits()
            self.warning = f"NO MNIST, TRAINING ON DIGITS DRAWN BY THIS PROGRAM INSTEAD: {e}"
        self.train, self.labels, self.val, self.val_labels = (torch.from_numpy(v.copy()).to(DEVICE) for v in parts.values())
        self.train, self.labels = self.train[:c.train_size or None], self.labels[:c.train_size or None]
        self.train, self.val = patches(self.train, c.patch), patches(self.val, c.patch)
        self.T = 28 * 28                                               # numbers in an example, all of which the bound counts
        pixels = "".join(FONT).encode() if self.name == "digits" else parts["train images"].tobytes()   # CPUs round what is drawn differently
        self.meta = {"alphabet": "", "data": {"name": self.name, "sha256": hashlib.sha256(pixels).hexdigest()}}

    def __str__(self):
        return f"{self.name}: {len(self.train):,} images to train, {len(self.val):,} to validate"

    def batch(self, n):
        """n random training images in patches and their labels: int64 (n, T, p^2) and (n,)."""
        i = torch.randint(len(self.train), (n,)).to(DEVICE)
        return self.train[i].long(), self.labels[i].long()

"""Text: download, verify, tokenize, batch. A corpus is downloaded once to data/ and checked; a file
that was cut, or is something else, is never used. A .npy has ids of a tokenizer of one's own."""
import codecs
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import COLOR, DEVICE, HERE, TERMINAL, check, print0

KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data"
MAHONEY = "mattmahoney.net/dc"
CORPORA = {   # name: (file, addresses, its sha256 or else its size in bytes)
    "shakespeare": (
        "tinyshakespeare.txt",
        [f"{KARPATHY}/tinyshakespeare/input.txt"],
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "warpeace": (
        "warpeace.txt",
        ["https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt"],
        "fb66ba999dafe24017cdd59e04c56d385a9c8466993d374fd4c6f08b2142985e"),
    "text8": (
        "text8", [f"https://{MAHONEY}/text8.zip", f"http://{MAHONEY}/text8.zip"], 100_000_000),
    "enwik8": (
        "enwik8", [f"https://{MAHONEY}/enwik8.zip", f"http://{MAHONEY}/enwik8.zip"], 100_000_000),
}

CHUNK = 2 ** 22      # characters of a large text that are read, encoded, ... at a time
ON_DEVICE = 2 ** 31  # bytes of a training text that go to the device; more stay where they are


class CharTokenizer:
    """Text to ids and back, one character an id. id V = len(chars) is MASK, shown as a dot.
    With is_bytes a character is a byte of the text's UTF-8."""
    things = "characters"

    def __init__(self, chars, is_bytes=False):
        self.chars = chars
        self.is_bytes = is_bytes
        self.unit = "byte" if is_bytes else "char"
        # the id of every code point; V: not in the alphabet
        V = len(chars)
        dtype = np.uint8 if V < 256 else np.int16
        self.ids = np.full(0x110000, V, dtype)
        self.ids[[ord(ch) for ch in chars]] = np.arange(V)

    def __len__(self):
        return len(self.chars)

    def encode(self, text):
        """str -> ids (len,), a byte each if there are less than 256 characters, else two."""
        if self.is_bytes:
            text = as_bytes(text)
        ids = np.empty(len(text), self.ids.dtype)
        for start, chunk in chunks(text):
            found = self.ids[code_points(chunk)]
            ids[start:start + len(chunk)] = found
            unknown = found == len(self)
            if unknown.any():
                char = chunk[unknown.argmax()]
                more = "..." if len(self) > 80 else ""
                raise SystemExit(f"the model has never seen {char!r} (U+{ord(char):04X}), "
                                 f"only {self.chars[:80]!r}{more}")
        return ids

    def decode(self, ids):
        return "".join(self.decode_each(ids))

    def decode_each(self, ids):
        """ids -> the text of each. Of a character of several bytes the last one has it all."""
        if not self.is_bytes:
            return [self.chars[i] if i < len(self) else "·" for i in ids]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = []
        for n, i in enumerate(ids, 1):
            byte = self.chars[i].encode("latin-1") if i < len(self) else "·".encode()
            texts.append(decoder.decode(byte, final=n == len(ids)))
        return texts

    def paint(self, ids, confidence):
        """The text of each id as it is shown: where there are colours, from orange at confidence 0
        to blue at 1."""
        texts = [printable(text) for text in self.decode_each(ids)]
        if not COLOR:
            return texts
        shades = list(SHADES)
        painted = []
        for i, p, text in zip(ids, confidence, texts, strict=True):
            shade = shades[int(p * 4.99)] if i < len(self) else 240    # MASK is grey
            painted.append(f"\x1b[38;5;{shade}m{text}\x1b[0m")
        return painted


# from orange by grey to blue, ever lighter, also to the colour-blind; by day and by night
SHADES = {130: "#af5f00", 131: "#af5f5f", 244: "#808080", 67: "#5f87af", 69: "#5f87ff"}


class VocabTokenizer(CharTokenizer):
    """Text to ids and back, where id i is the i-th string of a list, of any length."""
    things = "tokens"

    def __init__(self, strings):
        self.chars = strings
        self.is_bytes = False
        self.unit = "token"
        self.ids = {text: i for i, text in enumerate(strings)}
        self.longest = max(map(len, strings))

    def encode(self, text):
        """str -> ids (n,): from left to right, each time the longest string that fits."""
        ids = []
        while text:
            lengths = range(min(len(text), self.longest), 0, -1)
            n = next((n for n in lengths if text[:n] in self.ids), 0)
            hint = ""
            if text == " ":
                hint = ": no space stands before a blank or at the end"
            elif not n and any(f" {text[:i]}" in self.ids for i in lengths):
                hint = ": words may begin with a space"
            check(n, f"no token of the vocabulary fits at {text[:40]!r}{hint}")
            ids.append(self.ids[text[:n]])
            text = text[n:]
        return np.array(ids, np.int64)


def tokenizer_of(meta):
    """The tokenizer of a checkpoint: its alphabet is a str of characters or a list of strings."""
    if isinstance(meta["alphabet"], list):
        return VocabTokenizer(meta["alphabet"])
    return CharTokenizer(meta["alphabet"], meta["is_bytes"])


def printable(text):
    """Text without the control codes that would steer a terminal; as it is in a file."""
    if not TERMINAL:
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def clean(text):
    """Text with \\n alone at a line's end, no byte order marks: all corpora, prompts and tables."""
    if "\r" in text:
        text = re.sub(r"\r+\n|\r", "\n", text)
    return text.replace("\ufeff", "")


def as_bytes(text):
    """The UTF-8 of text, a character a byte."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def chunks(text):
    """(start, chunk) of a text, or of ids, so that a large one is not copied at once."""
    for start in range(0, len(text), CHUNK):
        yield start, text[start:start + CHUNK]


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def alphabet(text):
    """The different characters of a text, in the order of their code points."""
    seen = np.zeros(0x110000, bool)
    for _, chunk in chunks(text):
        seen[code_points(chunk)] = True
    return "".join(map(chr, seen.nonzero()[0]))


def sha256_of(text):
    digest = hashlib.sha256()
    for _, chunk in chunks(text):
        digest.update(chunk.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class Text:
    """A corpus on the device: .batch(n) for training, .val (W, T) for the bound."""

    def __init__(self, c, is_bytes=False):
        load = load_tokens if c.dataset.endswith(".npy") else load_characters
        ids, self.tokenizer, self.name, sha256 = load(c, is_bytes)
        self.unit = self.tokenizer.unit

        # the last tenth is held out, of text8 and enwik8 the first half of it, as is usual
        n = int(0.9 * len(ids))
        train = ids[:n][:c.train_size or None]
        val = ids[n:]
        if self.name in ("text8", "enwik8"):
            val = val[:-5_000_000]
        self.T = c.block_size
        check(len(train) >= self.T and len(val) >= 2 * self.T,
              f"{self.name} has {len(train):,} {self.tokenizer.things} to train on, {len(val):,} "
              f"to validate; block_size={self.T} needs {self.T:,} and {2 * self.T:,}")
        self.train = train.to(DEVICE) if train.nbytes <= ON_DEVICE else train
        self.val = val[:len(val) // self.T * self.T].view(-1, self.T).to(DEVICE)
        self.meta = {"alphabet": self.tokenizer.chars, "is_bytes": self.tokenizer.is_bytes,
                     "data": {"name": self.name, "sha256": sha256}}

    def __str__(self):
        return (f"{self.name}: {len(self.train):,} {self.tokenizer.things} to train, "
                f"{self.val.numel():,} to validate, {len(self.tokenizer)} different")

    def batch(self, n):
        """n random windows of the training text, int64 (n, T)."""
        start = torch.randint(len(self.train) - self.T + 1, (n, 1), device=self.train.device)
        window = start + torch.arange(self.T, device=start.device)
        return self.train[window].long().to(DEVICE)


# -------------------------------------------------------------------------------------------------
# files

def load_characters(c, is_bytes):
    """-> the ids of the text c.dataset, its tokenizer, its name and sha256."""
    text, name = load_text(c.dataset, Path(c.data_dir or HERE / "data"))
    is_bytes = is_bytes or name == "enwik8"
    chars = alphabet(as_bytes(text)) if is_bytes else alphabet(text)
    V = len(chars)
    check(2 <= V <= 30_000, f"{name} has {V:,} different characters, not 2 to 30,000")
    tokenizer = CharTokenizer(chars, is_bytes)
    return torch.from_numpy(tokenizer.encode(text)), tokenizer, name, sha256_of(text)


def load_tokens(c, is_bytes):
    """-> the ids in the file c.dataset, a .npy, where they stay until they are used; the tokenizer
    of the strings in the vocab.json beside it; the name; the sha256 of both."""
    path = Path(c.dataset)
    vocab = path.with_name("vocab.json")
    check(not is_bytes, f"{path} has tokens, no bytes: leave out code=bytes")
    try:
        ids = np.load(path, mmap_mode="r")
        check(vocab.is_file(), f"no {vocab}, a list of strings, that of id 0 first")
        strings = json.loads(vocab.read_bytes())
        "".join(strings).encode()              # strings, and no halves of a surrogate pair
    except (ValueError, EOFError, TypeError) as error:
        raise SystemExit(f"{path} is no array, or {vocab} no list of strings: {error}") from None
    V = len(strings)
    differ = isinstance(strings, list) and len(set(strings)) == V and "" not in strings
    check(differ and 2 <= V <= 30_000,
          f"{vocab} is no list of 2 to 30,000 different strings, none of them empty")
    check(isinstance(ids, np.memmap) and ids.ndim == 1 and ids.dtype in (np.uint16, np.int32),
          f"{path} is no one-dimensional array of uint16 or int32")

    digest = hashlib.sha256(json.dumps(strings).encode())
    for _, chunk in tqdm(chunks(ids), f"checking {path.name}", leave=False, disable=None):
        check(chunk.min() >= 0 and chunk.max() < V,
              f"{path} has ids from {chunk.min()} to {chunk.max()}, {vocab} {V:,} strings")
        digest.update(chunk.astype("<i4"))
    if ids.dtype == np.uint16:                 # torch can do little with it; an id is < 30,000
        ids = ids.view(np.int16)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    return torch.from_numpy(ids), VocabTokenizer(strings), f"file {path.name}", digest.hexdigest()


def load_text(name, folder):
    """-> the text of a dataset, and what it is called. name: a corpus, auto, pydoc, or a path."""
    if name == "auto":
        try:
            return load_text("shakespeare", folder)
        except SystemExit as error:
            print0(f"NO TINY SHAKESPEARE, TRAINING ON PYTHON'S DOCUMENTATION: {error}")
            return load_text("pydoc", folder)
    if name == "pydoc":
        from pydoc_data.topics import topics
        return "\n\n".join(topics[key] for key in sorted(topics)), "pydoc"
    if name in CORPORA:
        file, urls, expected = CORPORA[name]
        path = folder / file
        find(path, urls, expected)
        source = name
    else:
        path = Path(name)
        source = f"file {path.name}"
        check(path.is_file(), f"no text file {name!r}, and no corpus: {', '.join(CORPORA)}, pydoc, "
                              "auto; --dataset=PATH says where it is")
    if name == "enwik8":                                               # cut within a character
        return path.read_bytes().decode("utf-8", "surrogateescape"), source
    text = read_text(path)
    check("\0" not in text, f"{path} is not text: it has zero bytes")
    return clean(text), source


def read_text(path):
    """The text in a file, UTF-8 or, by its first two bytes, UTF-16."""
    encoding = "utf-8"
    with path.open("rb") as f:
        if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            encoding = "utf-16"
    with path.open(encoding=encoding, newline="") as f:
        try:
            return f.read()
        except UnicodeDecodeError as error:
            byte = f.buffer.tell() - len(error.object) + error.start
            raise SystemExit(f"{path} is not {encoding.upper()} text, see byte {byte}") from None


def find(path, urls, expected):
    """Download path if it is not there; end with one line unless it is the expected file."""
    if not path.exists():
        try:
            download(urls, path, expected)
        except OSError as error:
            raise SystemExit(f"{path} is not there and could not be downloaded: {error}") from None
    check(is_valid(path.read_bytes(), expected),
          f"{path} is cut, or another file; delete it and it is downloaded again")


def is_valid(raw, expected):
    """Whether bytes have the expected size (int) or sha256 (str; of what is in them, if gzip)."""
    if isinstance(expected, int):
        return len(raw) == expected
    try:
        return hashlib.sha256(unzip(raw)).hexdigest() == expected
    except (OSError, EOFError, zlib.error):
        return False


def unzip(raw):
    """What is in bytes, if they are of a gzip file; else they themselves."""
    if raw[:2] == b"\x1f\x8b":
        return gzip.decompress(raw)
    return raw


def read_url(url, name):
    """The bytes at an address, with a progress bar."""
    raw = io.BytesIO()
    with urllib.request.urlopen(url, timeout=10) as response:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(response, "read", total=size, desc=f"downloading {name}") as body:
            shutil.copyfileobj(body, raw)
    return raw.getvalue()


def download(urls, path, expected):
    """Download path from the first of urls that has the expected file. OSError: what went wrong at
    each of them. The file appears when it is complete, under its name, or not at all."""
    errors = []
    for url in urls:
        try:
            raw = read_url(url, path.name)
            if url.endswith(".zip"):
                raw = zipfile.ZipFile(io.BytesIO(raw)).read(path.name)
        except (OSError, HTTPException, zipfile.BadZipFile, zlib.error, KeyError) as error:
            errors.append(f"{url}: {str(error).strip()}")
            continue
        if is_valid(raw, expected):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(raw)
            os.replace(part, path)
            return
        errors.append(f"{url}: not the expected file, {len(raw):,} bytes")
    raise OSError("; ".join(errors))

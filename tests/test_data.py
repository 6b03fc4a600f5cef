"""Corpora against a server that cuts, stalls, lies and refuses; alphabets, windows and batches;
MNIST and its stand-in."""
import gzip
import hashlib
import http.server
import io
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_line

import data
import mnist_ddpm
from config import Masked, Mnist
from data import CharTokenizer, Text, clean, download, load_text
from mnist_ddpm import Images, draw_digits

BODY = b"To be, or not to be, that is the question.\n" * 100
SHA = hashlib.sha256(BODY).hexdigest()


def zipped(name="corpus.txt", method=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as z:
        z.writestr(name, BODY)
    return packed.getvalue()


BROKEN = zipped(method=zipfile.ZIP_DEFLATED)
BODIES = {"/corpus.zip": zipped(), "/lacking.zip": zipped("another.txt"), "/lie": b"x" * len(BODY),
          "/broken.zip": BROKEN[:45] + b"x" * 15 + BROKEN[60:], "/cut.zip": zipped()[:-30]}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/refuse":
            self.send_error(404)
            return
        if self.path == "/portal":
            self.wfile.write(b"<html>please log in</html>\r\n\r\n")
            return
        body = BODIES.get(self.path, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in ("/cut", "/stall"):
            self.wfile.write(body[:100])
            self.wfile.flush()
            if self.path == "/stall":
                time.sleep(1)
        else:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}"
    s.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A server that stalls is given up after a tenth of a second."""
    request = data.urllib.request
    honest = request.urlopen

    def urlopen(url, timeout):
        assert timeout <= 20
        if url.endswith("/stall"):
            timeout = 0.1
        return honest(url, timeout=timeout)

    monkeypatch.setattr(request, "urlopen", urlopen)


@pytest.mark.parametrize("path, expected", [("/whole", SHA), ("/whole", len(BODY)),
                                            ("/corpus.zip", SHA)])
def test_a_download_is_verified_unpacked_and_renamed(server, tmp_path, path, expected):
    download([server + path], tmp_path / "data/corpus.txt", expected)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["corpus.txt"]
    assert (tmp_path / "data/corpus.txt").read_bytes() == BODY


@pytest.mark.parametrize("path, expected, says", [
    ("/cut", SHA, "not the expected file, 100 bytes|incomplete|IncompleteRead"),
    ("/lie", SHA, "not the expected file, 4,300 bytes"), ("/stall", SHA, "timed out"),
    ("/refuse", SHA, "404"), ("/whole", 99, "not the expected file"), ("/portal", SHA, "portal"),
    ("/broken.zip", SHA, "broken.zip"), ("/cut.zip", SHA, "cut.zip"),
    ("/lacking.zip", SHA, "no item named 'corpus.txt'")])
def test_a_bad_download_is_told_and_leaves_nothing(server, tmp_path, path, expected, says):
    with pytest.raises(OSError, match=says):
        download([server + path], tmp_path / "corpus.txt", expected)
    assert not list(tmp_path.iterdir())


def test_the_next_address_is_tried(server, tmp_path):
    urls = [server + "/cut", "http://127.0.0.1:9/", server + "/lie", server + "/whole"]
    download(urls, tmp_path / "corpus.txt", SHA)
    assert (tmp_path / "corpus.txt").read_bytes() == BODY


@pytest.fixture
def corpora(monkeypatch, server):
    """A function that puts a path of the server in the place of tiny Shakespeare."""
    def use(path):
        entry = ("tinyshakespeare.txt", [server + path], SHA)
        monkeypatch.setitem(data.CORPORA, "shakespeare", entry)
    return use


def test_auto_takes_shakespeare_if_it_can_be_had(corpora, tmp_path, capsys):
    corpora("/whole")
    d = Text(Masked(data_dir=str(tmp_path), block_size=8))
    assert d.name == "shakespeare" and d.meta["data"] == {"name": "shakespeare", "sha256": SHA}
    assert capsys.readouterr().out == ""
    corpora("/refuse")                                     # it is in the folder now
    assert Text(Masked(data_dir=str(tmp_path), block_size=8)).name == "shakespeare"


def test_auto_falls_back_loudly_and_a_named_corpus_never(corpora, tmp_path, capsys):
    corpora("/lie")
    d = Text(Masked(data_dir=str(tmp_path), block_size=8))
    line, = capsys.readouterr().out.splitlines()
    assert d.name == "pydoc" and line.startswith("NO TINY SHAKESPEARE, TRAINING ON PYTHON'S")
    assert len(d.train) > 300_000
    with pytest.raises(SystemExit, match="is not there and could not be downloaded"):
        Text(Masked(data_dir=str(tmp_path), dataset="shakespeare"))


# -------------------------------------------------------------------------------------------------
# text

def test_split_windows_and_batches(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_bytes("\ufeffab\r\ncé".encode() * 200)
    d = Text(Masked(dataset=str(path), block_size=7))
    assert d.tokenizer.chars == d.meta["alphabet"] == "\nabcé"
    N = 5 * 200
    n = int(0.9 * N)
    assert d.train.dtype == torch.uint8 and len(d.train) == n
    assert d.val.shape == ((N - n) // 7, 7)
    ids = torch.cat([d.train, d.val.flatten()]).tolist()
    assert d.tokenizer.decode(ids) == ("ab\ncé" * 200)[:len(ids)]
    d.train = torch.arange(20)                             # windows that can be told apart
    x = d.batch(500)
    assert x.shape == (500, 7) and x.dtype == torch.int64
    assert {tuple(row) for row in x.tolist()} == {tuple(range(i, i + 7)) for i in range(14)}
    d = Text(Masked(dataset=str(path), block_size=7))
    few = Text(Masked(dataset=str(path), block_size=7, train_size=9))
    assert torch.equal(few.train, d.train[:9]) and torch.equal(few.val, d.val)


@pytest.mark.parametrize("name", ["text8", "enwik8"])
def test_the_tenth_before_the_last_is_held_out(name, monkeypatch):
    """Half a tenth, that is, of a text of 60 million characters, in which it is all b."""
    ids = np.zeros(60_000_000, np.uint8)
    ids[54_000_000:55_000_000] = 1
    monkeypatch.setattr(data, "load_text", lambda *_: ("ab", name))
    monkeypatch.setattr(CharTokenizer, "encode", lambda *_: ids)
    d = Text(Masked(block_size=1))
    assert len(d.train) == 54_000_000 and not d.train.any()
    assert d.val.numel() == 1_000_000 and d.val.all()
    assert d.tokenizer.is_bytes == d.meta["is_bytes"] == (name == "enwik8")


@pytest.mark.parametrize("raw", [
    b"ab\rc\rab\r", b"ab\r\nc\r\nab\r\n", b"ab\r\r\nc\r\r\nab\r\r\n",
    "\ufeffab\nc\n\ufeffab\n".encode(), "\ufeffab\nc\nab\n".encode("utf-16-le"),
    "\ufeffab\nc\nab\n".encode("utf-16-be")])
def test_a_text_is_the_same_however_it_was_saved(raw, tmp_path):
    path = tmp_path / "my.txt"
    path.write_bytes(raw)
    assert load_text(str(path), tmp_path) == ("ab\nc\nab\n", "file my.txt")
    assert clean("a\r\rb\r\n\r\nc\n\nd") == "a\n\nb\n\nc\n\nd"         # an empty line stays one


def test_enwik8_is_read_as_bytes_and_may_end_within_a_character(tmp_path, monkeypatch):
    """But a file that only is called so is text."""
    monkeypatch.chdir(tmp_path)
    raw = "caf\u00e9 ".encode() * 10 ** 3
    Path("enwik8").write_bytes(raw)
    d = Text(Masked(dataset="./enwik8", block_size=8))
    assert d.name == "file enwik8"
    assert "\u00e9" in d.tokenizer.chars and not d.tokenizer.is_bytes
    raw += b"\xc3"
    Path("enwik8").write_bytes(raw)
    monkeypatch.setitem(data.CORPORA, "enwik8", ("enwik8", [], len(raw)))
    text, name = load_text("enwik8", tmp_path)
    assert name == "enwik8" and text.encode("utf-8", "surrogateescape") == raw
    assert CharTokenizer(data.as_bytes(text), True).encode(text).shape == (len(raw),)


def test_a_large_alphabet_takes_two_bytes():
    """An id more than the characters is the MASK's."""
    for n, dtype in [(255, np.uint8), (256, np.int16)]:
        tokenizer = CharTokenizer("".join(map(chr, range(n))))
        ids = tokenizer.encode(tokenizer.chars)
        assert ids.dtype == dtype and ids.tolist() == list(range(n))


def test_an_alphabet_that_is_too_large_is_one_line(tmp_path):
    """Also where an id does not fit into two bytes."""
    path = tmp_path / "many.txt"
    path.write_text("".join(map(chr, range(0x4e00, 0x4e00 + 33_000))), encoding="utf-8")
    with pytest.raises(SystemExit, match="has 33,000 different characters, not 2 to 30,000"):
        Text(Masked(dataset=str(path)))


def test_bytes_come_back_as_characters():
    tokenizer = CharTokenizer("".join(map(chr, range(256))), is_bytes=True)
    ids = tokenizer.encode("né!€").tolist()
    assert ids == list("né!€".encode()) and tokenizer.decode(ids) == "né!€"
    assert tokenizer.decode_each(ids) == ["n", "", "é", "!", "", "", "€"]
    assert tokenizer.decode([195]) == "\ufffd"             # half a character is shown, not raised
    assert tokenizer.decode([110, 256, 33]) == "n·!"


def test_an_unknown_character_is_named():
    tokenizer = CharTokenizer("ab\n")
    assert tokenizer.encode("b\na").tolist() == [1, 2, 0]
    with pytest.raises(SystemExit) as e:
        tokenizer.encode("ab\U0001f600b")
    assert "has never seen '\U0001f600' (U+1F600), only 'ab\\n'" in last_line(e.value)
    with pytest.raises(SystemExit) as e:                   # an alphabet of 9,000 is not printed
        CharTokenizer("".join(map(chr, range(0x4e00, 0x7000)))).encode("\u200b")
    line = last_line(e.value)
    assert "(U+200B)" in line and len(line) < 200 and line.endswith("'...")


def test_colours_are_shown_only_where_someone_sees_them(monkeypatch):
    """From orange to blue by confidence, a MASK grey; no control code of the text's own."""
    tokenizer = CharTokenizer("a\n\x1b")
    ids = [0, 0, 1, 2, 3]
    confidence = [0.0, 1.0, 1.0, 1.0, 0.0]
    text = "a\x1b[2Jb\x9b\r\n\tc\x7f"
    assert tokenizer.paint(ids, confidence) == ["a", "a", "\n", "\x1b", "·"]       # into a file
    assert data.printable(text) == text
    monkeypatch.setattr(data, "TERMINAL", True)
    assert tokenizer.paint(ids, confidence) == ["a", "a", "\n", "\ufffd", "·"]
    assert data.printable(text) == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd"
    monkeypatch.setattr(data, "COLOR", True)
    painted = [f"\x1b[38;5;{shade}m{text}\x1b[0m" for shade, text in [
        (130, "a"), (69, "a"), (69, "\n"), (69, "\ufffd"), (240, "·")]]
    assert tokenizer.paint(ids, confidence) == painted


# -------------------------------------------------------------------------------------------------
# images

@pytest.fixture
def idx(tmp_path, monkeypatch):
    """Four small idx files in tmp_path/mnist, the labels unpacked, as some browsers save them under
    the same name; and their sums in MNIST; no network."""
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(data, "download", offline)
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    arrays = []
    entries = []
    for name, _ in mnist_ddpm.MNIST:
        n = 30 if "train" in name else 10
        if "images" in name:
            x = rng.integers(0, 256, (n, 28, 28), np.uint8)
            raw = b"\0" * 16 + x.tobytes()
            saved = gzip.compress(raw)
        else:
            x = rng.integers(0, 10, n, np.uint8)
            raw = b"\0" * 8 + x.tobytes()
            saved = raw
        (tmp_path / f"mnist/{name}.gz").write_bytes(saved)
        arrays.append(x)
        entries.append((name, hashlib.sha256(raw).hexdigest()))
    monkeypatch.setattr(mnist_ddpm, "MNIST", entries)
    return tmp_path, arrays


def images(folder, **changes):
    return Images(Mnist(**{"dataset": "mnist", "data_dir": str(folder), **changes}))


def test_mnist_is_read_as_published(idx, capsys):
    folder, (train, labels, test, test_labels) = idx
    d = images(folder, drop_label=0.3)
    assert d.name == "mnist" and capsys.readouterr().out == "" and d.T == 784
    assert d.val.tolist() == test.reshape(10, 784).tolist()
    assert d.val_labels.tolist() == test_labels.tolist()
    torch.manual_seed(0)
    x, y = d.batch(3000)
    hidden = y < 0
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.03)
    seen = {(bytes(im), label) for im, label in zip(x[~hidden].tolist(), y[~hidden].tolist())}
    assert seen == {(im.tobytes(), int(label)) for im, label in zip(train, labels)}
    assert images(folder, train_size=7).train.shape == (7, 784)
    assert images(folder, dataset="auto").name == "mnist"


def test_a_damaged_mnist_is_told_and_never_replaced(idx):
    folder, _ = idx
    file = folder / "mnist/t10k-images-idx3-ubyte.gz"
    raw = file.read_bytes()
    overwritten = raw[:60] + b"x" * 9 + raw[69:]
    for damaged in (raw[:-40], overwritten, gzip.compress(b"\0" * 99), b""):
        file.write_bytes(damaged)
        with pytest.raises(SystemExit, match="t10k-images-idx3-ubyte.gz is cut, or another file"):
            images(folder)
        assert file.read_bytes() == damaged


def test_auto_says_loudly_that_it_took_the_stand_in(idx, capsys, monkeypatch):
    folder, _ = idx
    few = draw_digits(50, 20)
    monkeypatch.setattr(mnist_ddpm, "draw_digits", lambda: few)
    assert images(folder / "nothing", dataset="auto").name == "digits"
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("NO MNIST, TRAINING ON DIGITS DRAWN BY THIS PROGRAM")
    assert "no network" in line
    with pytest.raises(SystemExit, match="could not be downloaded"):
        images(folder / "nothing")
    with pytest.raises(SystemExit, match="no images 'cifar': one of auto, mnist, digits"):
        images(folder, dataset="cifar")


def test_digits_are_labelled_varied_and_always_the_same():
    """The nearest of ten class means reads most of them right, no two are alike, and the same seed
    makes the same."""
    arrays = draw_digits(1000, 200)
    x, y, test, label = [torch.from_numpy(a.copy()).float() for a in arrays]
    means = torch.stack([x[y == i].mean(0).flatten() for i in range(10)])
    read = torch.cdist(test.flatten(1), means).argmin(1)
    assert (read == label).float().mean() > 0.5
    assert len({im.tobytes() for im in arrays[0]}) == 1000
    assert x.min() == 0 and x.max() > 200 and (x.mean((1, 2)) > 10).all()
    for a, b in zip(arrays, draw_digits(1000, 200), strict=True):
        assert (a == b).all()
    assert (draw_digits(300, 50, seed=1)[0] != draw_digits(300, 50)[0]).any()


def test_a_large_text_in_chunks_is_the_text(monkeypatch, tmp_path):
    """Encoded, hashed and searched three characters at a time; a byte that is no UTF-8 is named
    wherever it stands."""
    monkeypatch.setattr(data, "CHUNK", 3)
    text = "abcdefg ïπ…🙂\nxyz"                # no character twice, so that none can be missed
    chars = "".join(sorted(text))
    assert data.alphabet(text) == chars
    assert data.sha256_of(text) == hashlib.sha256(text.encode()).hexdigest()
    assert CharTokenizer(chars).encode(text).tolist() == [chars.index(ch) for ch in text]
    with pytest.raises(SystemExit, match="never seen 'ï'"):
        CharTokenizer(chars.replace("ï", "")).encode(text)
    path = tmp_path / "text.txt"
    path.write_bytes("é".encode() * 100_001 + b"a\xff" + b"b" * 100_000)
    with pytest.raises(SystemExit, match="is not UTF-8 text, see byte 200003"):
        data.read_text(path)

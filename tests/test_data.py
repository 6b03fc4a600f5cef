"""Corpora against a server that cuts, stalls, lies and refuses; alphabets, windows and prompts."""
import gzip
import hashlib
import http.server
import io
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from config import Masked
from data import Alphabet, Images, Text, digits, fetch, patches, whole

BODY = b"To be, or not to be, that is the question.\n" * 100
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/refuse":
            return self.send_error(404)
        body = BODY
        if self.path == "/corpus.zip":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as z:
                z.writestr("corpus.txt", BODY)
            body = packed.getvalue()
        if self.path == "/broken.zip":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr("corpus.txt", BODY)
            body = packed.getvalue().replace(packed.getvalue()[45:60], b"x" * 15)
        if self.path == "/lie":
            body = b"x" * len(BODY)
        if self.path == "/portal":
            return self.wfile.write(b"<html>please log in</html>\r\n\r\n")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/stall":
            self.wfile.write(body[:100])
            self.wfile.flush()
            time.sleep(3)
        self.wfile.write(body[:100] if self.path in ("/cut", "/stall") else body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}"
    s.shutdown()


@pytest.mark.parametrize("path, check", [("/whole", SHA), ("/whole", len(BODY)), ("/corpus.zip", SHA)])
def test_fetch_verifies_unpacks_and_renames(server, tmp_path, path, check):
    fetch([server + path], tmp_path / "data/corpus.txt", check, timeout=5)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["corpus.txt"]
    assert (tmp_path / "data/corpus.txt").read_bytes() == BODY


@pytest.mark.parametrize("path, check, says", [
    ("/cut", SHA, "cut after 100 of 4,300"), ("/lie", SHA, "not the right file"), ("/stall", SHA, "timed out"), ("/refuse", SHA, "404"),
    ("/whole", 99, "not the right file"), ("/portal", SHA, "portal"), ("/broken.zip", SHA, "broken.zip")])
def test_a_bad_download_is_told_and_leaves_nothing(server, tmp_path, path, check, says):
    with pytest.raises(OSError, match=says):
        fetch([server + path], tmp_path / "corpus.txt", check, timeout=1)
    assert not list(tmp_path.iterdir())


def test_the_second_address_is_tried(server, tmp_path):
    fetch([server + "/cut", "http://127.0.0.1:9/", server + "/whole"], tmp_path / "corpus.txt", SHA, timeout=2)
    assert (tmp_path / "corpus.txt").read_bytes() == BODY


def corpora(monkeypatch, server, path="/whole"):
    monkeypatch.setitem(data.CORPORA, "shakespeare", ("tinyshakespeare.txt", [server + path], SHA))


def test_auto_takes_shakespeare_if_it_can_be_had(server, tmp_path, monkeypatch):
    corpora(monkeypatch, server)
    d = Text(Masked(data_dir=str(tmp_path), block_size=8))
    assert d.name == "shakespeare" and not d.warning and (tmp_path / "tinyshakespeare.txt").exists()


@pytest.mark.parametrize("path", ["/refuse", "/cut", "/lie"])
def test_auto_falls_back_loudly_and_a_named_corpus_never(server, tmp_path, monkeypatch, path):
    corpora(monkeypatch, server, path)
    d = Text(Masked(data_dir=str(tmp_path), block_size=8))
    assert d.name == "pydoc" and "NO TINY SHAKESPEARE" in d.warning and "\n" not in d.warning
    assert len(d.train) > 400_000 * .8
    with pytest.raises(SystemExit, match="could not be downloaded"):
        Text(Masked(data_dir=str(tmp_path), dataset="shakespeare"))


def test_a_cut_file_on_disk_is_told_and_not_used(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(BODY)
    with pytest.raises(SystemExit, match="is not shakespeare: cut, or another file"):
        Text(Masked(data_dir=str(tmp_path), dataset="shakespeare"))
    assert Text(Masked(data_dir=str(tmp_path))).name == "pydoc"


def test_split_windows_and_batches(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_bytes("\ufeffab\r\ncé".encode() * 200)
    d = Text(Masked(dataset=str(path), block_size=7))
    assert d.alphabet.chars == "\nabcé\ufeff"                       # only the first byte-order mark is one; \r is gone
    n = int(.9 * (6 * 200 - 1))
    assert d.train.dtype == torch.uint8 and len(d.train) == n and d.val.shape == ((6 * 200 - 1 - n) // 7, 7)
    whole = torch.cat([d.train, d.val.flatten()]).long()
    assert d.alphabet.decode(whole.tolist()) == path.read_text("utf-8-sig")[:len(whole)]
    x = d.batch(500)
    windows = {tuple(d.train[i:i + 7].tolist()) for i in range(n - 6)}
    assert x.shape == (500, 7) and x.dtype == torch.int64 and {tuple(r) for r in x.tolist()} <= windows


def test_a_file_that_is_called_like_a_corpus_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_text("caf\u00e9 " * 100, encoding="utf-8")
    d = Text(Masked(dataset="./enwik8", block_size=8))
    assert d.name == "file enwik8" and "\u00e9" in d.alphabet.chars and not d.alphabet.raw


def test_a_large_alphabet_takes_two_bytes(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(chr(0x4E00 + i % 500) for i in range(3000)), encoding="utf-8")
    d = Text(Masked(dataset=str(path), block_size=8))
    assert d.train.dtype == torch.int16 and int(d.train.max()) == 499


def test_bytes_of_enwik8_come_back():
    a = Alphabet("".join(map(chr, range(256))), raw=True)
    ids, known = a.prompt("né{2}!")
    assert known.tolist() == [True] * 3 + [False] * 2 + [True] and a.decode(ids.tolist()) == "né\0\0!"
    assert a.decode([195]) == "�"                                   # half a character is shown, not raised


def test_prompts():
    a = Alphabet("\n {}abcn\\")

    def parsed(text):
        ids, known = a.prompt(text)
        return "".join(a.show(i) if k else "_" for i, k in zip(ids.tolist(), known.tolist(), strict=True))

    assert parsed("ab{3}c") == "ab___c"                             # blanks stand where they stand
    assert parsed("{1}a{2}{1}") == "_a___"
    assert parsed(r"a\nb") == "a\nb" and parsed("{{a}{2}b") == "{a}__b"
    assert parsed("") == ""
    for bad in ("{", "{x}", "{0}", "{-1}", "{12", "a{}"):
        with pytest.raises(SystemExit, match="a blank is written"):
            a.prompt(bad)
    with pytest.raises(SystemExit, match="never seen 'Q'"):
        a.prompt("aQ")


# ---- images

@pytest.fixture
def idx(tmp_path, monkeypatch):
    """Four small idx files in tmp_path/mnist, and their sums in data.MNIST; no network."""
    rng, parts = np.random.default_rng(0), {}
    monkeypatch.setattr(data, "fetch", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    (tmp_path / "mnist").mkdir()
    for name, (file, urls, _) in list(data.MNIST.items()):
        n = 30 if "train" in name else 10
        x = rng.integers(0, 256, (n, 28, 28), np.uint8) if "images" in name else rng.integers(0, 10, n, np.uint8)
        raw = b"\0" * (16 if "images" in name else 8) + x.tobytes()
        (tmp_path / file).write_bytes(gzip.compress(raw))
        monkeypatch.setitem(data.MNIST, name, (file, urls, hashlib.sha256(raw).hexdigest()))
        parts[name] = x
    return tmp_path, parts


def settings(**k):
    return SimpleNamespace(**{"dataset": "mnist", "data_dir": "", "train_size": 0, "patch": 4, **k})


def test_mnist_is_read_as_published(idx):
    folder, parts = idx
    d = Images(settings(data_dir=folder))
    assert d.name == "mnist" and not d.warning and d.val.shape == (10, 49, 16) and d.T == 784
    assert torch.equal(whole(d.val, 4), torch.from_numpy(parts["test images"])) and d.val_labels.tolist() == parts["test labels"].tolist()
    torch.manual_seed(0)
    x, y = d.batch(200)
    pairs = {(im.tobytes(), int(label)) for im, label in zip(parts["train images"], parts["train labels"], strict=True)}
    assert {(im.numpy().astype(np.uint8).tobytes(), int(label)) for im, label in zip(whole(x, 4), y, strict=True)} == pairs
    assert len(Images(settings(data_dir=folder, train_size=7)).train) == 7


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: raw[:60] + b"x" * 9 + raw[69:], lambda raw: gzip.compress(b"\0" * 99),
                                    lambda raw: b""])
def test_a_damaged_mnist_is_told_and_never_replaced(idx, damage):
    folder, _ = idx
    file = folder / data.MNIST["test images"][0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SystemExit, match="dataset mnist: .*is not test images: cut, or another file"):
        Images(settings(data_dir=folder))
    assert file.exists()


def test_auto_says_loudly_that_it_took_the_stand_in(idx, tmp_path):
    folder, _ = idx
    assert Images(settings(dataset="auto", data_dir=folder)).name == "mnist"
    d = Images(settings(dataset="auto", data_dir=tmp_path / "nothing"))
    assert d.name == "digits" and d.warning.startswith("NO MNIST, TRAINING ON DIGITS DRAWN BY THIS PROGRAM") and "no network" in d.warning
    with pytest.raises(SystemExit, match="could not be downloaded"):
        Images(settings(data_dir=tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="no images 'cifar': one of auto, mnist, digits"):
        Images(settings(dataset="cifar"))


def test_digits_are_labelled_varied_and_always_the_same():
    """The nearest of ten class means reads most of them right, no two are alike, and the same seed makes the same."""
    d = digits(3000, 500)
    x, y = (torch.from_numpy(d[f"train {k}"].copy()).float() for k in ("images", "labels"))
    means = torch.stack([x[y == i].mean(0).flatten() for i in range(10)])
    test, label = (torch.from_numpy(d[f"test {k}"].copy()).float() for k in ("images", "labels"))
    right = (torch.cdist(test.flatten(1), means).argmin(1) == label).float().mean().item()
    assert right > .5 and len({im.tobytes() for im in d["train images"]}) == 3000
    assert d["train images"].min() == 0 and d["train images"].max() > 200 and (x.mean((1, 2)) > 10).all()
    assert all((digits(3000, 500)[k] == v).all() for k, v in d.items())


@pytest.mark.parametrize("p", [2, 4, 7])
def test_patches_and_whole_are_inverse(p):
    x = torch.arange(2 * 784).view(2, 28, 28)
    y = patches(x, p)
    assert y.shape == (2, (28 // p) ** 2, p * p) and torch.equal(whole(y, p), x)
    assert y[0, 1].tolist() == x[0, :p, p:2 * p].flatten().tolist()

"""Pretrained tables: each format written by hand, bad files, principal directions, and the way from
a file through experiments/table.py into a run of embed_diffusion.py."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from test_bits import TINY
from test_embed import tiny

import embed_diffusion
import train
from config import Masked
from data import CharTokenizer
from embed_diffusion import principal_rows, read_table
from experiments import table

KEY = "parametrizations.table.original"       # of the rows as they are learned, whatever their norm
ALPHABET = " \nabé"
NUMBERS = np.arange(60, dtype=np.float32).reshape(12, 5) - 7.5
TOKENS = ["<pad>", "the", "a", "\u2581", "é", "b", "<0x0A>", "\u2581a", "Ã©", "x", "y", "B"]
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}


def made(path, alphabet=ALPHABET):
    """{character: numbers} of the table that experiments.table makes of the file at path."""
    text = path.parent / "text.txt"
    text.write_text(alphabet, encoding="utf-8")
    to = path.parent / "made.txt"
    table.main([str(path), f"--out={to}", f"--dataset={text}"])
    found = read_table(to, alphabet.replace("\u2581", ""))       # which is a space there
    return {ch: row.tolist() for ch, row in found.items()}


# formats

READ_AS_IS = [
    "5 2 \na 1 2 \nthe 9 9 \nb -.5 3e-2 \né 0 7 \n\u2581 3 4 \n\\n 5 6 \n",             # fastText
    "a 1 2\r\nthe 9 9\r\nb -.5 3e-2\r\né 0 7\r\n\u2581 3 4\r\n\\n 5 6\r\n"]
TO_BE_MADE = [
    "5 2\na 1 2\nthe 9 9\nb -.5 3e-2\né 0 7\n  3 4\n<0x0A> 5 6",        # word2vec
    # longer tokens, a second a, tokens that are numbers, odd bytes
    "a 1 2\na . b 9 9\n7 9 9\na 8 8\nnan 9 9\nb -.5 3e-2\n. . . 9 9\n\udcff 9 9\n\né 0 7\n"
    "\u0120 3 4\n\u010a 5 6\n"]


@pytest.mark.parametrize("content", [*READ_AS_IS, *TO_BE_MADE])
def test_text(content, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_bytes(content.encode(errors="surrogateescape"))
    expected = {"a": [1, 2], "b": [-0.5, 0.03], "é": [0, 7], " ": [3, 4], "\n": [5, 6]}
    assert made(path) == expected
    if content in READ_AS_IS:
        rows = read_table(path, ALPHABET)
        assert {ch: row.tolist() for ch, row in rows.items()} == expected


PLACES = {"a": 2, " ": 3, "é": 4, "b": 5, "\n": 6}


@pytest.mark.parametrize("kind, numbers, vocabulary, places", [
    ("F64", NUMBERS.astype("<f8"), VOCABULARY, PLACES),
    ("F32", NUMBERS, [[token, -1.5] for token in TOKENS], PLACES),
    # as GPT-2, where é is the sign of a byte
    ("F16", NUMBERS.astype("<f2"), {"\u0120": 3, "\u010a": 4, "a": 2, "b": 7, "é": 1},
     {"a": 2, " ": 3, "b": 7, "\n": 4}),
    ("BF16", (NUMBERS.view("<u4") >> 16).astype("<u2"), VOCABULARY, PLACES)],
    ids=["F64", "F32", "F16", "BF16"])
def test_safetensors(kind, numbers, vocabulary, places, tmp_path):
    n = numbers.nbytes
    names = {"wpe.weight": 0, "h.0.wte.weight": n, "bert.position_embeddings.weight": 0}
    header = {name: {"dtype": kind, "shape": numbers.shape, "data_offsets": [start, start + n]}
              for name, start in names.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n) + numbers.tobytes())
    vocabulary = json.dumps({"model": {"vocab": vocabulary}})
    (tmp_path / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    assert made(path) == {ch: NUMBERS[i].tolist() for ch, i in places.items()}


@pytest.mark.parametrize("objective", ["masked", "ar"])
def test_the_embedding_of_a_checkpoint(objective, tmp_path, capsys):
    """Each number comes through the text form exactly; what it cannot hold is named."""
    alphabet = "\n \"'\\\u00a0aé0\u2028▂語🙂"
    config = dict(objective=objective, n_layer=1, n_head=1, n_embd=16, block_size=8)
    meta = {"alphabet": alphabet + "\u2581", "is_bytes": False, "step": 1}
    method = train.build(Masked(**config), meta)
    state = {"method": objective, "ema": method.state_dict(), "config": config, **meta}
    torch.save(state, tmp_path / "best.pt")
    rows = made(tmp_path / "best.pt", alphabet + "\u2581z")
    assert "lacks 'z\u2581'" in capsys.readouterr().out
    assert sorted(rows) == sorted(alphabet)
    for ch, row in rows.items():
        assert row == method.net.embed.weight[alphabet.index(ch)].tolist(), ch


HEADER = b'{"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(24)
GOOD = '{"model": {"vocab": {"a": 0, "b": 1}}}'


@pytest.mark.parametrize("name, content, tokenizer, says", [
    ("none.txt", None, None, "FileNotFoundError"),
    ("t.pt", b"\x80\x05\x95\0\n\xff", None, "is damaged, or no checkpoint"),
    ("made.txt", b"a 1 2\nb 3 4\n", None, "would replace the table that is read"),
    ("t.txt", b"", None, "has no embedding of any character of "),
    ("t.txt", b"the 1 2\nof 3 4\n", None, "has no embedding"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\nb 1 2 3\na 1 2\n", None, "no table of embeddings"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\nb 1 2 3\na 1 2,5 3\n", None, "'2,5'"),
    ("t.safetensors", WHOLE, None, "FileNotFoundError"),
    ("t.safetensors", WHOLE, "{", "tokenizer.json"),
    ("t.safetensors", WHOLE, '{"model": {}}', "'vocab'"),
    ("t.safetensors", WHOLE, '{"model": {"vocab": {"a": 2}}}', "index 2 is out of bounds"),
    ("t.safetensors", WHOLE[:40], GOOD, "is damaged"),
    ("t.safetensors", WHOLE[:-1], GOOD, "is damaged"),
    ("t.safetensors", b"\xff" * 99, GOOD, "is damaged"),
    ("t.safetensors", WHOLE.replace(b"[2, 3]", b"[2, 4]"), GOOD, "is damaged"),
    ("t.safetensors", WHOLE.replace(b"F32", b"I32"), GOOD, "'I32'"),
    ("t.safetensors", WHOLE.replace(b"wte", b"wpe"), GOOD, "which is its embedding, wpe.weight?")])
def test_a_bad_file_is_one_line(name, content, tokenizer, says, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if tokenizer:
        (tmp_path / "tokenizer.json").write_text(tokenizer)
    with pytest.raises((SystemExit, OSError)) as e:      # config.run makes one line of an OSError
        made(path)
    line = f"{e.type.__name__}: {e.value}"
    assert says in line and "\n" not in line


# tables that embed_diffusion.py reads

def begun(content, alphabet, path, seed=5, **settings):
    """The state of a method that begins with a table of this content, or with none."""
    path.write_text(content, encoding="latin-1")
    train.reseed(seed)
    c = tiny(table=str(path), **settings)
    method = embed_diffusion.build(c, {"alphabet": alphabet})
    if content:
        data = SimpleNamespace(tokenizer=CharTokenizer(alphabet))
        embed_diffusion.load_table(method, data, c)
    return {**method.state_dict(), "table": method.table}


@pytest.mark.parametrize("content, line", [
    ("a 1 2\nb 1\n", "is no table"), ("a 1 two\n", "is no table"), ("a nan 1\n", "not finite"),
    ("a 1e39 1\n", "not finite"), ("a 1 2\n", "no two different"),
    ("a 0 0\nb 0 0\n", "no two different"), ("a 1 2\nb 1 2\n", "no two different"),
    ("a .1 .2\nb .1 .2\nc .1 .2\n", "no two different"), ("\x00\xff\n", "no two different")])
def test_a_bad_table_is_one_line(content, line, tmp_path):
    with pytest.raises(SystemExit, match=line) as error:
        begun(content, "abcdefgh", tmp_path / "t.txt")
    assert "\n" not in str(error.value)


def test_principal_rows_keep_the_widest_directions():
    torch.manual_seed(0)
    wide = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.1]).double()
    x = 3 + torch.randn(40, 5).double() * wide
    rows = {chr(97 + i): row for i, row in enumerate(x)}
    rows["unused"] = torch.zeros(5).double()               # was never trained
    centred = F.normalize(x - x.mean(0), dim=1)
    for dim in (5, 8):                                     # all directions keep every angle
        got = torch.stack([*principal_rows(rows, dim).values()])
        assert got.shape == (40, dim) and got.dtype == torch.float32
        assert torch.allclose(got.double() @ got.double().T, centred @ centred.T, atol=1e-5)
        assert (got[:, 5:] == 0).all()
    few = torch.stack([*principal_rows(rows, 2).values()]).double()
    _, axes = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    flat = F.normalize((x - x.mean(0)) @ axes[:, [4, 3]], dim=1)
    assert torch.allclose(few @ few.T, flat @ flat.T, atol=1e-5)
    assert "unused" not in principal_rows(rows, 5)
    at_the_mean = {"a": torch.tensor([2.0]), "b": torch.tensor([4.0]), "c": torch.tensor([3.0])}
    assert principal_rows(at_the_mean, 1).keys() == {"a", "b"} and principal_rows({}, 3) == {}


def test_what_is_missing_is_told_and_drawn(tmp_path, capsys):
    """Zeros say nothing, nor does a row at the mean; the rest of the network is as without."""
    path = tmp_path / "t.txt"
    content = "a 1 0 0\nb 0 1 0\nc 0 0 1\nz 0 0 0\n"
    first, again, other = (begun(content, "a$bczq", path, seed, dim=3) for seed in (3, 3, 4))
    assert capsys.readouterr().out == f"{path} lacks 3 of 6 tokens: '$zq'\n" * 3
    rows = first[KEY]
    assert torch.allclose(rows.norm(dim=1), torch.ones(6))
    assert torch.allclose(first["table"], 2.65 * rows)     # row_norm
    expected = torch.full((3, 3), -0.5) + 1.5 * torch.eye(3)
    assert torch.allclose(rows[[0, 2, 3]] @ rows[[0, 2, 3]].T, expected, atol=1e-6)
    assert torch.equal(rows, again[KEY])
    moved = (rows - other[KEY]).abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False, True, True]
    for name, value in begun("", "a$bczq", path, 3, dim=3).items():
        assert torch.equal(value, first[name]) == (name not in (KEY, "table")), name
    begun("a 1 0\nb 0 1\nc .5 .5\n", "abc", path, dim=2)
    assert "t.txt lacks 1 of 3 tokens: 'c'" in capsys.readouterr().out


def test_a_run_begins_with_its_table_and_reads_it_once(tmp_path, capsys):
    """A frozen table stays and a learned one moves."""
    glove = tmp_path / "glove.txt"
    lines = [f"{chr(i)} {i % 7} {i * i % 11} {i % 3}\n" for i in range(33, 127)]
    glove.write_text("".join(lines))
    path = tmp_path / "new/table.txt"
    said = run("-m", "experiments.table", glove, f"--out={path}", f"--dataset={ROOT}/config.py")
    assert f"{path}: " in said.stdout and f"{glove} lacks " in said.stdout
    for train_table in (False, True):
        out = f"--out={tmp_path}/{train_table}"
        embed_diffusion.main([*TINY, f"--train_table={train_table}", f"--table={path}", out])
        assert f"{path} lacks " in capsys.readouterr().out
        state = torch.load(tmp_path / f"{train_table}/ckpt.pt", weights_only=True)
        rows = principal_rows(read_table(path, state["alphabet"]), 16)
        assert len(rows) > 60
        ended = torch.stack([state["ema"][KEY][state["alphabet"].index(ch)] for ch in rows])
        rows = torch.stack([*rows.values()])
        assert torch.equal(ended, rows) != train_table
        assert F.cosine_similarity(ended, rows).mean() > 0.9
    path.unlink()
    embed_diffusion.main(["sample", out, "--steps=2"])
    embed_diffusion.main(["--resume", out, "--max_iters=25"])
    said = capsys.readouterr().out
    assert "max_iters: 20 -> 25" in said and "lacks" not in said
    again = torch.load(tmp_path / "True/ckpt.pt", weights_only=True)
    assert not torch.equal(again["model"][KEY], state["model"][KEY])
    with pytest.raises(SystemExit, match="table="):
        embed_diffusion.main(["--resume", out, "--max_iters=30", "--table=x.txt"])
    with pytest.raises(FileNotFoundError):
        embed_diffusion.main([*TINY, f"--table={path}", f"--out={tmp_path}/new"])

"""Pretrained tables: each format written by hand, bad files, principal directions, and the way from
a file through experiments/table.py into a run."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run

import embed_diffusion
import train
from config import Embed, Masked
from data import CharTokenizer
from embed_diffusion import principal_rows, read_table
from experiments import table

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16",
        "--batch_size=8", "--max_iters=20", "--eval_interval=20", "--train_size=20000", "--dim=8"]
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


def tensors(folder, numbers, vocabulary, kind="F32"):
    """model.safetensors and tokenizer.json in folder; numbers: an array of what kind says."""
    n = numbers.nbytes
    names = {"wpe.weight": 0, "h.0.wte.weight": n, "bert.position_embeddings.weight": 0}
    header = {name: {"dtype": kind, "shape": numbers.shape, "data_offsets": [start, start + n]}
              for name, start in names.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = folder / "model.safetensors"
    raw = bytes(n) + numbers.tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    vocabulary = json.dumps({"model": {"vocab": vocabulary}})
    (folder / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    return path


# formats

@pytest.mark.parametrize("content", [
    "a 1 2\nthe 9 9\nb -.5 3e-2\né 0 7\n",
    "5 2\na 1 2\nthe 9 9\nb -.5 3e-2\né 0 7",                            # word2vec
    "5 2 \na 1 2 \nthe 9 9 \nb -.5 3e-2 \né 0 7 \n",                     # fastText
    "a 1 2\r\nthe 9 9\r\nb -.5 3e-2\r\né 0 7\r\n",
    # longer tokens, a second a, tokens that are numbers, odd bytes
    b"a 1 2\na . b 9 9\n7 9 9\na 8 8\nnan 9 9\nb -.5 3e-2\n. . . 9 9\n\xff 9 9\n\n\xc3\xa9 0 7\n"])
@pytest.mark.parametrize("space, line", [
    (" ", "\\n"), ("\u2581", "<0x0A>"), ("\u0120", "\u010a")])
def test_text(content, space, line, tmp_path):
    path = tmp_path / "glove.txt"
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content.rstrip() + f"\n{space} 3 4\n{line} 5 6\n".encode())
    assert made(path) == {"a": [1, 2], "b": [-0.5, 0.03], "é": [0, 7], " ": [3, 4], "\n": [5, 6]}


@pytest.mark.parametrize("kind, numbers", [
    ("F64", NUMBERS.astype("<f8")), ("F32", NUMBERS), ("F16", NUMBERS.astype("<f2")),
    ("BF16", (NUMBERS.view("<u4") >> 16).astype("<u2"))])
@pytest.mark.parametrize("vocabulary, places", [
    (VOCABULARY, {"a": 2, " ": 3, "é": 4, "b": 5, "\n": 6}),
    ([[token, -1.5] for token in TOKENS], {"a": 2, " ": 3, "é": 4, "b": 5, "\n": 6}),
    # as GPT-2, where é is the sign of a byte
    ({"\u0120": 3, "\u010a": 4, "a": 2, "b": 7, "é": 1}, {"a": 2, " ": 3, "b": 7, "\n": 4})])
def test_safetensors(kind, numbers, vocabulary, places, tmp_path):
    rows = made(tensors(tmp_path, numbers, vocabulary, kind))
    assert rows == {ch: NUMBERS[i].tolist() for ch, i in places.items()}


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
    assert [*rows] == sorted(alphabet)
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


# rows to begin with

def test_all_principal_directions_keep_every_angle():
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double()
    centred = F.normalize(rows - rows.mean(0), dim=1)
    known = dict(zip("abcdefgh", rows, strict=True))
    for dim in (5, 16):
        got = torch.stack([*principal_rows(known, dim).values()])
        assert got.shape == (8, dim) and got.dtype == torch.float32
        assert torch.allclose(got.double() @ got.double().T, centred @ centred.T, atol=1e-6)
        assert torch.allclose(got.norm(dim=1), torch.ones(8))
    # rows nearly on a line, far from the origin: one direction tells its ends apart
    line = torch.tensor([[100, 1, 0.01], [100, 2, -0.01], [100, 8, 0.01], [100, 9, -0.01]])
    ends = [row.item() for row in principal_rows(dict(enumerate(line)), 1).values()]
    assert ends in ([1, 1, -1, -1], [-1, -1, 1, 1])


def begun(path, alphabet, seed=5, **settings):
    """The method that begins with the table at path, or if it is empty with none."""
    train.reseed(seed)
    c = Embed(table=str(path), n_layer=1, n_head=1, n_embd=16, **settings)
    method = embed_diffusion.build(c, {"alphabet": alphabet})
    if path:
        data = SimpleNamespace(tokenizer=CharTokenizer(alphabet))
        embed_diffusion.load_table(method, data, c)
    return method.state_dict()


def test_what_is_missing_is_told_and_drawn(tmp_path, capsys):
    """Zeros say nothing, nor does a row at the mean; the rest of the network is as without."""
    path = tmp_path / "t.txt"
    path.write_text("a 1 0 0\nb 0 1 0\nc 0 0 1\nz 0 0 0\n")
    states = [begun(path, "a$bczq", seed, dim=3) for seed in (3, 3, 4)]
    assert capsys.readouterr().out.count("t.txt lacks 3 of 6 characters: '$zq'") == 3
    rows = states[0][KEY]
    assert torch.allclose(rows.norm(dim=1), torch.ones(6))
    expected = torch.full((3, 3), -0.5) + 1.5 * torch.eye(3)
    assert torch.allclose(rows[[0, 2, 3]] @ rows[[0, 2, 3]].T, expected, atol=1e-6)
    assert torch.equal(rows, states[1][KEY])
    moved = (rows - states[2][KEY]).abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False, True, True]
    for name, value in begun("", "a$bczq", 3, dim=3).items():
        assert torch.equal(value, states[0][name]) == (name != KEY), name
    path.write_text("a 1 0\nb 0 1\nc .5 .5\n")
    begun(path, "abc", dim=2)
    assert "t.txt lacks 1 of 3 characters: 'c'" in capsys.readouterr().out
    for same in ("a 1 2\n", "a .1 .2\nb .1 .2\nc .1 .2\n", "a 0 0\nb 0 0\n"):
        path.write_text(same)
        with pytest.raises(SystemExit, match="no two different embeddings"):
            begun(path, "abc", dim=2)


# runs

def test_a_frozen_table_stays_and_a_learned_one_moves(tmp_path, capsys):
    """The file of a table is needed only once."""
    glove = tmp_path / "glove.txt"
    lines = [f"{chr(i)} {i % 7} {i * i % 11} {i % 3}\n" for i in range(33, 127)]
    glove.write_text("".join(lines))
    path = tmp_path / "new/table.txt"
    done = run("-m", "experiments.table", glove, f"--out={path}", "--dataset=pydoc")
    assert f"{path}: 9" in done.stdout and f"{glove} lacks " in done.stdout
    for train_table in (False, True):
        out = tmp_path / f"run{train_table}"
        embed_diffusion.main([*TINY, f"--train_table={train_table}", f"--table={path}",
                              f"--out={out}"])
        assert f"{path} lacks " in capsys.readouterr().out
        state = torch.load(out / "best.pt", weights_only=True)
        rows = principal_rows(read_table(path, state["alphabet"]), 8)
        ended = torch.stack([state["ema"][KEY][state["alphabet"].index(ch)] for ch in rows])
        rows = torch.stack([*rows.values()])
        assert torch.equal(ended, rows) != train_table
        assert F.cosine_similarity(ended, rows).mean() > 0.9
    path.unlink()
    embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=25"])
    said = capsys.readouterr().out
    assert "max_iters: 20 -> 25" in said and "lacks" not in said
    with pytest.raises(SystemExit, match="table="):
        embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=30", "--table=x.txt"])
    with pytest.raises(FileNotFoundError):
        embed_diffusion.main([*TINY, f"--table={path}", f"--out={tmp_path}/new"])

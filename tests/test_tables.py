"""Pretrained tables: both formats written by hand, spellings, principal directions, two dozen bad files, export, a run that begins with one."""
import json
import math
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run

import embed_diffusion
import train
from config import Embed, Masked, parse
from data import Alphabet
from tables import GPT2, pretrained, spellings, tensor_rows, text_rows
from train import reseed

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8", "--max_iters=20", "--eval_interval=20",
        "--train_size=20000", "--dim=8"]
export = runpy.run_module("experiments.export_table")["main"]
BYTE_LEVEL = {"decoder": {"type": "ByteLevel"}}


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tensors(folder, arrays, vocab, kind="F32", more=None, **tokenizer):
    """model.safetensors and tokenizer.json in folder: arrays {name: array of the dtype of kind, or uint16 for BF16}."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, a in arrays.items():
        header[name] = {"dtype": kind, "shape": a.shape, "data_offsets": [len(raw), len(raw) + a.nbytes]}
        raw += a.tobytes()
    header = json.dumps({**header, **(more or {})}).encode()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, **tokenizer}))
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    return folder / "model.safetensors"


def glove(path, alphabet, d=6, seed=0):
    """A table of random rows (V, d), and those rows."""
    rows = torch.randn(len(alphabet), d, generator=torch.Generator().manual_seed(seed))
    names = {" ": "\u2581", "\n": "\\n"}
    text(path, "".join(f"{names.get(ch, ch)} {' '.join(map(repr, row))}\n" for ch, row in zip(alphabet, rows.tolist(), strict=True)))
    return rows


# ---- text

ROWS = {"a": [1, 2], "b": [-.5, 3e-2], "é": [0, 7]}


@pytest.mark.parametrize("content", [
    "a 1 2\nthe 9 9\nb -.5 3e-2\né 0 7\n",
    "4 2\na 1 2\nthe 9 9\nb -.5 3e-2\né 0 7",                                         # word2vec
    "4 2 \na 1 2 \nthe 9 9 \nb -.5 3e-2 \né 0 7 \n",                                  # fastText ends lines with a space
    "a 1 2\r\nthe 9 9\r\nb -.5 3e-2\r\né 0 7\r\n",
    "7 9 9\na . b 9 9\n8 9 9\na 1 2\na 8 8\nnan 9 9\nto name@x.org 9 9\nb -.5 3e-2\n. . . 9 9\né 0 7\n",   # longer tokens, a second a, numbers
    b"a 1 2\n\xff\xfe 9 9\n\n9 9\n\xe9 9 9\nb -.5 3e-2\n\xc3\xa9 0 7\n",               # odd bytes are no token of ours
    "1 9 9\n2 9 9\n3 9 9\n4 9 9\na 1 2\nb -.5 3e-2\né 0 7\n",                         # most tokens are numbers
    "".join(f"w{i} 9 9\n" for i in range(200)) + "a 1 2\nb -.5 3e-2\né 0 7\n"], ids=range(8))
def test_text(content, tmp_path):
    assert text_rows(text(tmp_path / "t.txt", content), "xéba") == ROWS


@pytest.mark.parametrize("space, line", [(" ", "\\n"), ("\u2581", "\u010a"), ("\u0120", "\\n"), ("<0x20>", "<0x0A>")])
def test_space_and_newline_in_text(space, line, tmp_path):
    path = text(tmp_path / "t.txt", f"\\ 5 6\n</s> 9 9\n{space} 1 2\n{line} 3 4\n\r 7 8\n\u2028 9 8\n")
    assert text_rows(path, "\n\r \\\u2028") == {"\n": [3, 4], "\r": [7, 8], " ": [1, 2], "\\": [5, 6], "\u2028": [9, 8]}


def test_what_is_a_character_itself_is_not_another(tmp_path):
    path = text(tmp_path / "t.txt", "\u0120 5 6\n\u2581 1 2\n  3 4\n<0x0A> 7 8\n\u010a 9 9\n")
    assert text_rows(path, " \u2581\u0120\n") == {" ": [3, 4], "\u2581": [1, 2], "\u0120": [5, 6], "\n": [7, 8]}


# ---- safetensors

TABLE = np.arange(60, dtype=np.float32).reshape(12, 5) - 7.5


@pytest.mark.parametrize("kind, array", [("F64", TABLE.astype("<f8")), ("F32", TABLE), ("F16", TABLE.astype("<f2")),
                                         ("BF16", (TABLE.view("<u4") >> 16).astype("<u2"))])
@pytest.mark.parametrize("unigram", [False, True])
def test_tensors(kind, array, unigram, tmp_path):
    tokens = ["<pad>", "the", "a", "\u2581", "\u0120", "b", "<0x0A>", "\u2581a", "Ã©", "é", "\u010a", "B"]
    vocab = [[t, -1.5] for t in tokens] if unigram else {t: i for i, t in enumerate(tokens)}
    arrays = {"wpe.weight": 0 * array[:9], "h.0.mlp.weight": 0 * array, "wte.weight": array, "h.bias": array[0], "lm_head.weight": 0 * array}
    found = tensor_rows(tensors(tmp_path, arrays, vocab, kind), "xé ab\n")
    for ch, i in {"é": 9, " ": 3, "a": 2, "b": 5, "\n": 6}.items():
        assert found.pop(ch).tolist() == TABLE[i].tolist(), ch
    assert not found


def test_a_byte_level_vocabulary_spells_characters_by_their_bytes(tmp_path):
    vocab = {"é": 0, "Ã©": 1, "a": 2, "\u0120": 3, "\u010a": 4, "\u2581": 5, "\u0122": 6, "\\n": 7, "ÃŁ": 8}
    for more in (BYTE_LEVEL, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}}):
        found = tensor_rows(tensors(tmp_path, {"weight": TABLE}, vocab, **more), "aé \n\u0122ß\"")
        assert {ch: row.tolist() for ch, row in found.items()} == {
            ch: TABLE[i].tolist() for ch, i in {"a": 2, "é": 1, " ": 3, "\n": 4, "ß": 8}.items()}


def test_spellings():
    assert len(set(GPT2)) == 256 and (GPT2[32], GPT2[10], GPT2[0], GPT2[127], GPT2[173], GPT2[65], GPT2[255]) == tuple("ĠĊĀġŃAÿ")
    assert spellings(" ") == [" ", "\u2581", "<0x20>", "Ġ"] and spellings("\n", True) == ["Ċ"] and spellings("A")[0] == "A"
    assert set(spellings("é")) == {"é"} and spellings("é", True) == ["Ã©"]


@pytest.mark.parametrize("name", ["transformer.wte.weight", "model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight",
                                  "transformer.word_embedding.weight", "embedding.weight", "embeddings.weight", "shared.weight",
                                  "tok_embeddings.weight", "gpt_neox.embed_in.weight"])
def test_the_usual_names(name, tmp_path):
    path = tensors(tmp_path, {"bert.embeddings.position_embeddings.weight": 0 * TABLE, name: TABLE, "lm_head.weight": 0 * TABLE}, {"a": 0, "b": 7})
    assert tensor_rows(path, "b")["b"].tolist() == TABLE[7].tolist()


def test_a_large_table_is_not_read_whole(tmp_path):
    path = tensors(tmp_path, {"x.weight": np.zeros((0, 1024), np.float16)}, {"a": 3, "b": 1 << 22}, "F16")
    header = json.dumps({"wte.weight": {"dtype": "F16", "shape": [1 << 23, 1024], "data_offsets": [0, 1 << 34]}}).encode()
    with path.open("wb") as f:                                                        # 16 GB, a hole but for one row
        f.write(len(header).to_bytes(8, "little") + header)
        f.seek((1 << 22) * 2048, 1)
        f.write(np.full(1024, 3, "<f2").tobytes())
        f.truncate(8 + len(header) + (1 << 34))
    found = tensor_rows(path, "ab")
    assert found["a"].tolist() == [0] * 1024 and found["b"].tolist() == [3] * 1024


# ---- rows to begin with

def test_all_principal_directions_keep_every_angle(tmp_path):
    rows = glove(tmp_path / "t.txt", "abcdefgh", d=5)
    centred = F.normalize((rows - rows.mean(0)).double(), dim=1)
    for dim in (5, 16):
        got, missing = pretrained(f"{tmp_path}/t.txt", "hgfedcba", dim)
        assert got.shape == (8, dim) and got.dtype == torch.float32 and missing == ""
        assert torch.allclose(got.flip(0).double() @ got.flip(0).double().T, centred @ centred.T, atol=1e-6)
        assert torch.allclose(got.norm(dim=1), torch.ones(8)) and not got[:, 5:].any()


def test_few_principal_directions_are_the_widest(tmp_path):
    """Rows on a line but for a little, far from the origin: one direction tells the ends of the line apart."""
    text(tmp_path / "t.txt", "a 100 1 .01\nb 100 2 -.01\nc 100 8 .01\nd 100 9 -.01\n")
    got, _ = pretrained(f"{tmp_path}/t.txt", "abcd", 1)
    assert got.abs().tolist() == [[1]] * 4 and got[0] == got[1] == -got[2] == -got[3]


def test_what_is_missing_is_told_and_drawn(tmp_path):
    text(tmp_path / "t.txt", "a 1 0 0\nb 0 1 0\nc 0 0 1\nz 0 0 0\n")      # z is nothing
    reseed(3)
    got, missing = pretrained(f"{tmp_path}/t.txt", "a$bczq", 3)
    assert missing == "$zq" and torch.allclose(got.norm(dim=1), torch.ones(6))
    assert torch.allclose(got[[0, 2, 3]] @ got[[0, 2, 3]].T, torch.full((3, 3), -.5) + 1.5 * torch.eye(3), atol=1e-6)
    reseed(3)
    assert torch.equal(got, pretrained(f"{tmp_path}/t.txt", "a$bczq", 3)[0])
    reseed(4)
    other = pretrained(f"{tmp_path}/t.txt", "a$bczq", 3)[0]
    assert ((got - other).abs().amax(1) > 0).tolist() == [False, True, False, False, True, True]
    text(tmp_path / "mean.txt", "a 1 0\nb 0 1\nc .5 .5\n")                            # so is what is at the mean
    assert pretrained(f"{tmp_path}/mean.txt", "abc", 2)[1] == "c"


# ---- bad files

GOOD = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}})
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def packed(header, raw=b"\0\0\x80\x3f" * 6):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + raw


BAD = [   # name, content (None: there is none), tokenizer.json, what the one line says
    ("none.txt", None, None, "FileNotFoundError"),
    ("none.safetensors", None, GOOD, "FileNotFoundError"),
    (".", None, None, "IsADirectoryError"),
    ("t.txt", b"", None, "no table of embeddings"),
    ("t.txt", b"just some words\nand more\n", None, "no table of embeddings"),
    ("t.txt", b"5 0\na\nb\n", None, "no table of embeddings"),
    ("t.txt", b"the 1 2\nof 3 4\n", None, "no two different embeddings of characters of the text: 'abcd'"),
    ("t.txt", b"a 1 2\nof 3 4\n", None, "no two different embeddings"),
    ("t.txt", b"a .1 .2\nb .1 .2\nc .1 .2\n", None, "no two different embeddings"),
    ("t.txt", b"a 0 0\nb 0 0\nc 0 0\n", None, "no two different embeddings"),
    ("t.txt", b"\x80\x05\x95\0\n\xff\0\0a", None, "no table of embeddings"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\na 1 2\n", None, "line 3: 'a' is not followed by 3 numbers"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\na 1 2 3 4\n", None, "line 3: 'a' is not followed by 3 numbers"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\nb 1 2 3\na 1 2,5 3\n", None, "line 4: 'a' is not followed by 3 numbers"),
    ("t.txt", b"2 3\na 1 2 3\nb 1 2 3.\0", None, "line 3: 'b' is not followed by 3 numbers"),
    ("t.txt", b"3 3\na 1 2 3\nb 1 2 3\nc", None, "line 4: 'c' is not followed by 3 numbers"),
    ("t.txt", b"a 1 2\nb nan 2\n", None, "not finite"),
    ("t.txt", b"a 1 2\nb 3 1e999\n", None, "not finite"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), None, "needs its tokenizer.json"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), "{", "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), "[]", "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), '{"model": {"type": "BPE"}}', "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), '{"model": {"vocab": {}}}', "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), '{"model": {"vocab": {"a": "0"}}}', "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), '{"model": {"vocab": {"a": -1}}}', "tokenizer.json is damaged, or has no vocabulary"),
    ("t.safetensors", b"", GOOD, "is cut, damaged"),
    ("t.safetensors", b"abc", GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": ENTRY})[:40], GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": ENTRY})[:-1], GOOD, "is cut, damaged"),
    ("t.safetensors", b"\xff" * 99, GOOD, "is cut, damaged"),
    ("t.safetensors", packed(b"not JSON"), GOOD, "is cut, damaged"),
    ("t.safetensors", packed([1, 2]), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": 3}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {"shape": [2, 3]}}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "data_offsets": [8, 32]}}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "data_offsets": [-8, 16]}}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "data_offsets": [0, 20]}}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "shape": ["2", 3]}}), GOOD, "is cut, damaged"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "dtype": "F8_E4M3"}}), GOOD, "wte.weight is F8_E4M3, not one of F64, F32, F16, BF16"),
    ("t.safetensors", packed({"p": ENTRY, "q": ENTRY}), GOOD, "which tensor has a row for each of 2 tokens? It has p, q"),
    ("t.safetensors", packed({"wte.weight": {**ENTRY, "shape": [1, 6]}}), GOOD, "which tensor has a row for each of 2 tokens? It has wte.weight"),
    ("t.safetensors", packed({}), GOOD, "which tensor"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), GOOD, "no two different embeddings"),
    ("t.safetensors", packed({"wte.weight": ENTRY}, b"\0\0\xc0\x7f" * 6), GOOD, "not finite"),
    ("t.safetensors", packed({"wte.weight": ENTRY}), '{"model": {"vocab": {"the": 0, "of": 1}}}', "no two different embeddings"),
]


@pytest.mark.parametrize("name, content, tokenizer, says", BAD)
def test_a_bad_file_is_one_line(name, content, tokenizer, says, tmp_path):
    if content is not None:
        text(tmp_path / name, content)
    if tokenizer:
        text(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises((SystemExit, OSError)) as e:                                   # run() turns an OSError into the same one line
        pretrained(f"{tmp_path}/{name}", "abcd", 4)
    line = str(e.value) if e.type is SystemExit else f"{e.type.__name__}: {e.value}"
    assert (says or "") in line and "\n" not in line and e.value.args[0] not in (0, None)


def test_settings():
    assert parse(["--table=x.txt"], Embed()).table == "x.txt" and "table" in train.BAKED
    for args in (["--recipe=baseline", "--table=x.txt"], ["--rows=free", "--table=x.txt"]):
        with pytest.raises(SystemExit, match="table needs rows=unit"):
            parse(args, Embed())


# ---- runs

def test_a_table_leaves_the_network_as_it_would_be(tmp_path, capsys):
    c, meta = Embed(table=f"{tmp_path}/t.txt", n_layer=1, n_head=1, n_embd=16, dim=6), {"alphabet": "abcdefgh"}
    data = SimpleNamespace(alphabet=Alphabet("abcdefgh"))
    glove(tmp_path / "t.txt", "abcdefg")
    reseed(5)
    plain = embed_diffusion.build(c, meta).state_dict()
    reseed(5)
    m = embed_diffusion.build(c, meta)
    embed_diffusion.begin(m, data, c)
    assert all(torch.equal(v, plain[k]) for k, v in m.state_dict().items() if k != "rows")
    rows = pretrained(c.table, "abcdefg", 6)[0]
    assert torch.allclose(m.rows[:7].detach(), rows, atol=1e-6) and torch.allclose(m.table[:7].detach(), c.norm * rows, atol=1e-6)
    assert capsys.readouterr().out == f"{c.table} lacks 1 of 8 characters: 'h'; they begin at random\n"


def checkpoint(folder, alphabet, objective="masked"):
    """best.pt of an untrained text model in folder. -> its embedding, without MASK"""
    c = Masked(objective=objective, n_layer=1, n_head=1, n_embd=16, block_size=8)
    method = train.build(c, {"alphabet": alphabet})
    folder.mkdir()
    config = {k: getattr(c, k) for k in c.__dataclass_fields__ if k not in ("out", "resume")}
    torch.save({"method": objective, "alphabet": alphabet, "data": {"name": "x", "sha256": ""}, "step": 1, "ema": method.state_dict(),
                "config": config}, folder / "best.pt")
    return method.net.inp.weight[:-1].detach()


@pytest.mark.parametrize("to, reader", [("t.txt", text_rows), ("new/t.safetensors", tensor_rows)])
@pytest.mark.parametrize("objective", ["masked", "ar"])
def test_what_is_exported_is_imported(to, reader, objective, tmp_path, capsys):
    alphabet = "\n\r \"'\\\u00a0aé0\u2028▂語🙂"
    rows = checkpoint(tmp_path / "run", alphabet, objective)
    export([f"{tmp_path}/run", f"{tmp_path}/{to}"])
    assert capsys.readouterr().out == f"{tmp_path}/{to}: 16 numbers for each of 14 characters\n"
    found = reader(tmp_path / to, alphabet)
    assert "".join(found) == alphabet and np.array_equal(np.float32([*found.values()]), rows.numpy())


@pytest.mark.parametrize("args, says", [("", "experiments.export_table CHECKPOINT"), ("run t.pt", "experiments.export_table CHECKPOINT"),
                                        ("none t.txt", "no checkpoint at"), ("run t.safetensors", "is that of another table")])
def test_export_says_what_is_wrong(args, says, tmp_path):
    checkpoint(tmp_path / "run", "xy")
    text(tmp_path / "tokenizer.json", GOOD)
    with pytest.raises(SystemExit, match=says):
        export([f"{tmp_path}/{a}" for a in args.split()])
    assert not list(tmp_path.glob("t.*")) and (tmp_path / "tokenizer.json").read_text() == GOOD


def test_export_from_the_shell(tmp_path):
    checkpoint(tmp_path / "run", "xy")
    assert "2 characters" in run("-m", "experiments.export_table", tmp_path / "run", tmp_path / "t.txt").stdout
    assert (tmp_path / "t.txt").read_text().startswith("x ") and len((tmp_path / "t.txt").read_text().split()) == 34


def test_a_frozen_table_stays_and_its_file_is_needed_only_once(tmp_path, capsys):
    path, out = tmp_path / "glove.txt", tmp_path / "run"
    glove(path, "".join(map(chr, range(97, 123))) + " \n")
    r = run("embed_diffusion.py", *TINY, "--learned=False", f"--table={path}", f"--out={out}")
    assert r.stdout.count("they begin at random") == 1 and f"{path} lacks " in r.stdout
    state = torch.load(out / "ckpt.pt", weights_only=True)
    alphabet, rows = state["alphabet"], pretrained(str(path), state["alphabet"], 8)[0]
    known = [i for i, ch in enumerate(alphabet) if ch.islower() and ch.isascii() or ch in " \n"]
    assert len(known) == 28 and torch.equal(state["model"]["rows"][known], rows[known]) and torch.equal(state["ema"]["rows"], state["model"]["rows"])
    path.unlink()
    embed_diffusion.main(["sample", f"--out={out}", "--steps=2"])
    assert len(capsys.readouterr().out) > 20
    embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=25"])
    told = capsys.readouterr().out
    assert "max_iters: 20 -> 25" in told and "random" not in told
    assert torch.equal(torch.load(out / "ckpt.pt", weights_only=True)["model"]["rows"], state["model"]["rows"])
    with pytest.raises(SystemExit, match="--table=x.txt: this run has table=.*which cannot change"):
        embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=30", "--table=x.txt"])
    with pytest.raises(FileNotFoundError):
        embed_diffusion.main([*TINY, f"--table={path}", f"--out={out}"])
    assert (out / "ckpt.pt").exists()                                                 # a run that cannot begin moves none aside


def test_a_learned_table_moves_from_where_it_began(tmp_path):
    path, out = tmp_path / "glove.txt", tmp_path / "run"
    glove(path, "".join(map(chr, range(32, 127))) + "\n")
    embed_diffusion.main([*TINY, f"--table={path}", f"--out={out}"])
    state = torch.load(out / "best.pt", weights_only=True)
    rows = pretrained(str(path), state["alphabet"], 8)[0]
    cosine = F.cosine_similarity(state["ema"]["rows"], rows)
    assert not torch.equal(state["ema"]["rows"], rows) and cosine.mean() > .9 and math.isfinite(cosine.sum())

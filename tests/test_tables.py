"""Pretrained tables: each format written by hand, spellings, bad files, principal directions, and
the way from a file through experiments/table.py into a run."""
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
from embed_diffusion import load_table, principal_rows, read_table
from experiments import table
from experiments.table import GPT2, read_rows, safetensors_rows, spellings, text_rows
from train import reseed

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16",
        "--batch_size=8", "--max_iters=20", "--eval_interval=20", "--train_size=20000", "--dim=8"]
KEY = "parametrizations.table.original"       # of the rows as they are learned, whatever their norm
BYTE_LEVEL = {"decoder": {"type": "ByteLevel"}}
GPT2_LIKE = {"pre_tokenizer": {"type": "Sequence",
                               "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}}


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def packed(header, raw=b"\0\0\x80\x3f" * 6):
    """The bytes of a safetensors file; header: a dict, or bytes."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + raw


def tensors(folder, arrays, vocab, kind="F32", **tokenizer):
    """model.safetensors and tokenizer.json in folder; arrays: {name: array of the dtype of kind, or
    uint16 for BF16}."""
    header = {"__metadata__": {"format": "pt"}}
    raw = b""
    for name, a in arrays.items():
        offsets = [len(raw), len(raw) + a.nbytes]
        header[name] = {"dtype": kind, "shape": a.shape, "data_offsets": offsets}
        raw += a.tobytes()
    write(folder / "tokenizer.json", json.dumps({"model": {"vocab": vocab}, **tokenizer}))
    return write(folder / "model.safetensors", packed(header, raw))


def pretrained(path, alphabet, dim, **settings):
    """The method that begins with the table at path, made into text first."""
    to = path.parent / "made.txt"
    table.main([str(path), f"--out={to}", f"--alphabet={alphabet}"])
    c = Embed(table=str(to), n_layer=1, n_head=1, n_embd=16, dim=dim, **settings)
    method = embed_diffusion.build(c, {"alphabet": alphabet})
    load_table(method, SimpleNamespace(tokenizer=CharTokenizer(alphabet)), c)
    return method


# text

ROWS = {"a": [1, 2], "b": [-0.5, 0.03], "é": [0, 7]}
TEXTS = [
    "a 1 2\nthe 9 9\nb -.5 3e-2\né 0 7\n",
    "5 2\na 1 2\nthe 9 9\nb -.5 3e-2\né 0 7",                            # word2vec
    "5 2 \na 1 2 \nthe 9 9 \nb -.5 3e-2 \né 0 7 \n",                     # fastText
    "a 1 2\r\nthe 9 9\r\nb -.5 3e-2\r\né 0 7\r\n",
    # longer tokens, a second a, tokens that are numbers
    "7 9 9\na . b 9 9\n8 9 9\na 1 2\na 8 8\nnan 9 9\nto name@x.org 9 9\nb -.5 3e-2\n. . . 9 9\n"
    "é 0 7\n",
    # odd bytes are no token of ours
    b"a 1 2\n\xff\xfe 9 9\n\n9 9\n\xe9 9 9\nb -.5 3e-2\n\xc3\xa9 0 7\n",
    "1 9 9\n2 9 9\n3 9 9\n4 9 9\na 1 2\nb -.5 3e-2\né 0 7\n",
    "".join(f"w{i} 9 9\n" for i in range(200)) + "a 1 2\nb -.5 3e-2\né 0 7\n",
]


@pytest.mark.parametrize("content", TEXTS, ids=range(8))
def test_text(content, tmp_path):
    assert text_rows(write(tmp_path / "t.txt", content), "x5éba") == ROWS


@pytest.mark.parametrize("space, line", [
    (" ", "\\n"), ("\u2581", "\u010a"), ("\u0120", "\\n"), ("<0x20>", "<0x0A>")])
def test_space_and_newline_in_text(space, line, tmp_path):
    content = f"\\ 5 6\n</s> 9 9\n{space} 1 2\n{line} 3 4\n\r 7 8\n\u2028 9 8\n"
    path = write(tmp_path / "t.txt", content)
    rows = {"\n": [3, 4], "\r": [7, 8], " ": [1, 2], "\\": [5, 6], "\u2028": [9, 8]}
    assert text_rows(path, "\n\r \\\u2028") == rows


def test_what_is_a_character_itself_is_not_another(tmp_path):
    content = "\u0120 5 6\n\u2581 1 2\n  3 4\n<0x0A> 7 8\n\u010a 9 9\n"
    rows = {" ": [3, 4], "\u2581": [1, 2], "\u0120": [5, 6], "\n": [7, 8]}
    assert text_rows(write(tmp_path / "t.txt", content), " \u2581\u0120\n") == rows


# safetensors

TABLE = np.arange(60, dtype=np.float32).reshape(12, 5) - 7.5
KINDS = {"F64": TABLE.astype("<f8"), "F32": TABLE, "F16": TABLE.astype("<f2"),
         "BF16": (TABLE.view("<u4") >> 16).astype("<u2")}
TOKENS = ["<pad>", "the", "a", "\u2581", "\u0120", "b", "<0x0A>", "\u2581a", "Ã©", "é", "\u010a",
          "B"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unigram", [False, True])
def test_tensors(kind, unigram, tmp_path):
    vocab = {token: i for i, token in enumerate(TOKENS)}
    if unigram:
        vocab = [[token, -1.5] for token in TOKENS]
    a = KINDS[kind]
    arrays = {"wpe.weight": 0 * a[:9], "h.0.mlp.weight": 0 * a, "wte.weight": a, "h.bias": a[0],
              "lm_head.weight": 0 * a}
    found = read_rows(tensors(tmp_path, arrays, vocab, kind), "xé ab\n")
    rows = {"é": 9, " ": 3, "a": 2, "b": 5, "\n": 6}
    assert {ch: row.tolist() for ch, row in found.items()} == {
        ch: TABLE[i].tolist() for ch, i in rows.items()}


@pytest.mark.parametrize("more", [BYTE_LEVEL, GPT2_LIKE])
def test_a_byte_level_vocabulary_spells_characters_by_their_bytes(more, tmp_path):
    vocab = {"é": 0, "Ã©": 1, "a": 2, "\u0120": 3, "\u010a": 4, "\u2581": 5, "\u0122": 6, "\\n": 7,
             "ÃŁ": 8}
    path = tensors(tmp_path, {"weight": TABLE}, vocab, **more)
    found = safetensors_rows(path, "aé \n\u0122ß\"")
    rows = {"a": 2, "é": 1, " ": 3, "\n": 4, "ß": 8}
    assert {ch: row.tolist() for ch, row in found.items()} == {
        ch: TABLE[i].tolist() for ch, i in rows.items()}


def test_spellings():
    assert len(set(GPT2)) == 256
    assert [GPT2[b] for b in (32, 10, 0, 127, 173, 65, 255)] == [*"ĠĊĀġŃAÿ"]
    assert spellings(" ") == [" ", "\u2581", "<0x20>", "Ġ"]
    assert spellings("\n", True) == ["Ċ"]
    assert spellings("A")[0] == "A"
    assert set(spellings("é")) == {"é"}
    assert spellings("é", True) == ["Ã©"]


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight",
    "transformer.word_embedding.weight", "embedding.weight", "embeddings.weight", "shared.weight",
    "tok_embeddings.weight", "gpt_neox.embed_in.weight"])
def test_the_usual_names(name, tmp_path):
    arrays = {"bert.embeddings.position_embeddings.weight": 0 * TABLE, name: TABLE,
              "lm_head.weight": 0 * TABLE}
    path = tensors(tmp_path, arrays, {"a": 0, "b": 7})
    assert safetensors_rows(path, "b")["b"].tolist() == TABLE[7].tolist()


def test_a_large_table_is_not_read_whole(tmp_path):
    """16 GB, a hole but for one row."""
    entry = {"dtype": "F16", "shape": [1 << 23, 1024], "data_offsets": [0, 1 << 34]}
    path = write(tmp_path / "t.safetensors", packed({"wte.weight": entry}, b""))
    vocab = {"model": {"vocab": {"a": 3, "b": 1 << 22}}}
    write(tmp_path / "tokenizer.json", json.dumps(vocab))
    start = path.stat().st_size
    with path.open("r+b") as f:
        f.seek(start + (1 << 22) * 2048)
        f.write(np.full(1024, 3, "<f2").tobytes())
        f.truncate(start + (1 << 34))
    found = safetensors_rows(path, "ab")
    assert found["a"].tolist() == [0] * 1024
    assert found["b"].tolist() == [3] * 1024


# checkpoints

@pytest.mark.parametrize("objective", ["masked", "ar"])
def test_the_embedding_of_a_checkpoint(objective, tmp_path, capsys):
    """Each number comes through the text form exactly; what it cannot hold is named."""
    alphabet = "\n\r \"'\\\u00a0aé0\u2028▂語🙂"
    config = dict(objective=objective, n_layer=1, n_head=1, n_embd=16, block_size=8)
    method = train.build(Masked(**config), {"alphabet": alphabet})
    state = {"method": objective, "alphabet": alphabet, "is_bytes": False, "step": 1,
             "data": {"name": "x", "sha256": ""}, "ema": method.state_dict(), "config": config}
    torch.save(state, tmp_path / "best.pt")
    wanted = alphabet + "z"
    table.main([str(tmp_path), f"--out={tmp_path}/new/t.txt", f"--alphabet={wanted}"])
    assert r"lacks '\rz'" in capsys.readouterr().out
    found = read_table(tmp_path / "new/t.txt", wanted)
    kept = alphabet.replace("\r", "")
    assert {*found} == {*kept}
    for ch in kept:
        row = method.net.embed.weight[alphabet.index(ch)].detach().double()
        assert torch.equal(found[ch], row), ch


# rows to begin with

def test_all_principal_directions_keep_every_angle(tmp_path):
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double()
    centred = F.normalize(rows - rows.mean(0), dim=1)
    known = dict(zip("abcdefgh", rows, strict=True))
    for dim in (5, 16):
        got = torch.stack([*principal_rows(known, dim).values()])
        assert got.shape == (8, dim) and got.dtype == torch.float32
        assert torch.allclose(got.double() @ got.double().T, centred @ centred.T, atol=1e-6)
        assert torch.allclose(got.norm(dim=1), torch.ones(8))
        assert not got[:, 5:].any()


def test_few_principal_directions_are_the_widest(tmp_path):
    """Rows nearly on a line, far from the origin: one direction tells its ends apart."""
    path = write(tmp_path / "t.txt", "a 100 1 .01\nb 100 2 -.01\nc 100 8 .01\nd 100 9 -.01\n")
    rows = pretrained(path, "abcd", 1).state_dict()[KEY][:, 0]
    assert rows.abs().tolist() == [1] * 4
    assert rows[0] == rows[1] == -rows[2] == -rows[3]


def test_what_is_missing_is_told_and_drawn(tmp_path, capsys):
    """Zeros say nothing, nor does a row at the mean."""
    path = write(tmp_path / "t.txt", "a 1 0 0\nb 0 1 0\nc 0 0 1\nz 0 0 0\n")
    seeded = []
    for seed in (3, 3, 4):
        reseed(seed)
        seeded.append(pretrained(path, "a$bczq", 3).state_dict()[KEY])
    assert capsys.readouterr().out.count("made.txt lacks 3 of 6 characters: '$zq'") == 3
    rows = seeded[0]
    assert torch.allclose(rows.norm(dim=1), torch.ones(6))
    expected = torch.full((3, 3), -0.5) + 1.5 * torch.eye(3)
    assert torch.allclose(rows[[0, 2, 3]] @ rows[[0, 2, 3]].T, expected, atol=1e-6)
    assert torch.equal(rows, seeded[1])
    moved = (rows - seeded[2]).abs().amax(1) > 0
    assert moved.tolist() == [False, True, False, False, True, True]
    path = write(tmp_path / "mean.txt", "a 1 0\nb 0 1\nc .5 .5\n")
    pretrained(path, "abc", 2)
    assert "made.txt lacks 1 of 3 characters: 'c'" in capsys.readouterr().out


# bad files

GOOD = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}})
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
ONE = packed({"wte.weight": ENTRY})
NO_TABLE = "no table of embeddings"
NO_TWO = "no two different embeddings"
NO_VOCABULARY = "tokenizer.json is damaged, or has no vocabulary"
CUT = "is cut, damaged"


def entry(**changes):
    return packed({"wte.weight": {**ENTRY, **changes}})


BAD = [   # name, content (None: there is none), tokenizer.json, what the one line says
    ("none.txt", None, None, "FileNotFoundError"),
    ("none.safetensors", None, GOOD, "FileNotFoundError"),
    ("none.pt", None, None, "no checkpoint at"),
    (".", None, None, "no checkpoint at"),
    ("t.pt", b"\x80\x05\x95\0\n\xff", None, "is damaged, or no checkpoint"),
    ("made.txt", b"a 1 2\nb 3 4\n", None, "would replace the table that is read"),
    ("t.txt", b"", None, NO_TABLE),
    ("t.txt", b"just some words\nand more\n", None, NO_TABLE),
    ("t.txt", b"5 0\na\nb\n", None, NO_TABLE),
    ("t.txt", b"\x80\x05\x95\0\n\xff\0\0a", None, NO_TABLE),
    ("t.txt", b"the 1 2\nof 3 4\n", None, "has no embedding of any character of 'abcd'"),
    ("t.txt", b"a 1 2\nof 3 4\n", None, NO_TWO),
    ("t.txt", b"a .1 .2\nb .1 .2\nc .1 .2\n", None, NO_TWO),
    ("t.txt", b"a 0 0\nb 0 0\nc 0 0\n", None, NO_TWO),
    ("t.txt", b"the 1 2 3\nof 1 2 3\na 1 2\n", None, "line 3: 'a' is not followed by 3 numbers"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\na 1 2 3 4\n", None, "line 3: 'a' is not followed by 3"),
    ("t.txt", b"the 1 2 3\nof 1 2 3\nb 1 2 3\na 1 2,5 3\n", None, "line 4: 'a' is not followed"),
    ("t.txt", b"2 3\na 1 2 3\nb 1 2 3.\0", None, "line 3: 'b' is not followed by 3 numbers"),
    ("t.txt", b"3 3\na 1 2 3\nb 1 2 3\nc", None, "line 4: 'c' is not followed by 3 numbers"),
    ("t.txt", b"a 1 2\nb nan 2\n", None, "not finite"),
    ("t.txt", b"a 1 2\nb 3 1e999\n", None, "not finite"),
    ("t.safetensors", ONE, None, "needs its tokenizer.json"),
    ("t.safetensors", ONE, "{", NO_VOCABULARY),
    ("t.safetensors", ONE, "[]", NO_VOCABULARY),
    ("t.safetensors", ONE, '{"model": {"type": "BPE"}}', NO_VOCABULARY),
    ("t.safetensors", ONE, '{"model": {"vocab": {}}}', NO_VOCABULARY),
    ("t.safetensors", ONE, '{"model": {"vocab": {"a": "0"}}}', NO_VOCABULARY),
    ("t.safetensors", ONE, '{"model": {"vocab": {"a": -1}}}', NO_VOCABULARY),
    ("t.safetensors", b"", GOOD, CUT),
    ("t.safetensors", b"abc", GOOD, CUT),
    ("t.safetensors", ONE[:40], GOOD, CUT),
    ("t.safetensors", ONE[:-1], GOOD, CUT),
    ("t.safetensors", b"\xff" * 99, GOOD, CUT),
    ("t.safetensors", packed(b"not JSON"), GOOD, CUT),
    ("t.safetensors", packed([1, 2]), GOOD, CUT),
    ("t.safetensors", packed({"wte.weight": 3}), GOOD, CUT),
    ("t.safetensors", packed({"wte.weight": {"shape": [2, 3]}}), GOOD, CUT),
    ("t.safetensors", entry(data_offsets=[8, 32]), GOOD, CUT),
    ("t.safetensors", entry(data_offsets=[-8, 16]), GOOD, CUT),
    ("t.safetensors", entry(data_offsets=[0, 20]), GOOD, CUT),
    ("t.safetensors", entry(shape=["2", 3]), GOOD, CUT),
    ("t.safetensors", entry(dtype="F8_E4M3"), GOOD,
     "wte.weight is F8_E4M3, not one of F64, F32, F16, BF16"),
    ("t.safetensors", packed({"p": ENTRY, "q": ENTRY}), GOOD,
     "which tensor has a row for each of 2 tokens? It has p, q"),
    ("t.safetensors", entry(shape=[1, 6]), GOOD, "which tensor has a row for each of 2 tokens?"),
    ("t.safetensors", packed({}), GOOD, "which tensor"),
    ("t.safetensors", ONE, GOOD, NO_TWO),
    ("t.safetensors", packed({"wte.weight": ENTRY}, b"\0\0\xc0\x7f" * 6), GOOD, "not finite"),
    ("t.safetensors", ONE, '{"model": {"vocab": {"the": 0, "of": 1}}}', "has no embedding of any"),
]


@pytest.mark.parametrize("name, content, tokenizer, says", BAD)
def test_a_bad_file_is_one_line(name, content, tokenizer, says, tmp_path):
    if content is not None:
        write(tmp_path / name, content)
    if tokenizer:
        write(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises((SystemExit, OSError)) as e:      # config.run makes one line of an OSError
        pretrained(tmp_path / name, "abcd", 4)
    line = f"{e.type.__name__}: {e.value}"
    assert says in line and "\n" not in line


@pytest.mark.parametrize("table_init", ["small", "free"])
def test_a_table_has_rows_of_norm_one(table_init):
    with pytest.raises(SystemExit, match="table needs table_init=unit"):
        Embed(table="x.txt", table_init=table_init)


# runs

def test_a_table_leaves_the_network_as_it_would_be(tmp_path):
    path = write(tmp_path / "t.txt", "".join(f"{ch} {i} {i * i} 1\n"
                                             for i, ch in enumerate("abcdefg")))
    reseed(5)
    c = Embed(n_layer=1, n_head=1, n_embd=16, dim=6)
    plain = embed_diffusion.build(c, {"alphabet": "abcdefgh"}).state_dict()
    reseed(5)
    method = pretrained(path, "abcdefgh", 6)
    state = method.state_dict()
    assert all(torch.equal(v, plain[key]) for key, v in state.items() if key != KEY)
    rows = principal_rows(read_table(path, "abcdefg"), 6)
    rows = torch.stack([*rows.values()])
    assert torch.allclose(state[KEY][:7], rows, atol=1e-6)
    assert torch.allclose(method.table[:7].detach(), c.row_norm * rows, atol=1e-6)


def test_a_frozen_table_stays_and_its_file_is_needed_only_once(tmp_path, capsys):
    path = tmp_path / "table.txt"
    out = tmp_path / "run"
    rows = {ch: [i + 1, i * i % 7, i % 3] for i, ch in enumerate("abcdefghijklm \n")}
    table.write_table(tmp_path / "glove.txt", rows)
    r = run("-m", "experiments.table", tmp_path / "glove.txt", f"--out={path}", "--dataset=pydoc")
    assert f"{path}: 15 of " in r.stdout and "glove.txt lacks " in r.stdout
    r = run("embed_diffusion.py", *TINY, "--train_table=False", f"--table={path}", f"--out={out}")
    assert f"{path} lacks " in r.stdout
    state = torch.load(out / "ckpt.pt", weights_only=True)
    alphabet = state["alphabet"]
    rows = principal_rows(read_table(path, alphabet), 8)
    assert len(rows) == 15
    for ch, row in rows.items():
        assert torch.equal(state["model"][KEY][alphabet.index(ch)], row), ch
    assert torch.equal(state["ema"][KEY], state["model"][KEY])
    path.unlink()
    embed_diffusion.main(["sample", f"--out={out}", "--steps=2"])
    assert len(capsys.readouterr().out) > 20
    embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=25"])
    told = capsys.readouterr().out
    assert "max_iters: 20 -> 25" in told and "lacks" not in told
    resumed = torch.load(out / "ckpt.pt", weights_only=True)
    assert torch.equal(resumed["model"][KEY], state["model"][KEY])
    with pytest.raises(SystemExit, match="table="):
        embed_diffusion.main(["--resume", f"--out={out}", "--max_iters=30", "--table=x.txt"])
    with pytest.raises(FileNotFoundError):
        embed_diffusion.main([*TINY, f"--table={path}", f"--out={tmp_path}/new"])


def test_a_learned_table_moves_from_where_it_began(tmp_path):
    path = tmp_path / "glove.txt"
    out = tmp_path / "run"
    chars = "".join(map(chr, range(33, 127)))
    drawn = torch.randn(94, 6, generator=torch.Generator().manual_seed(0)).tolist()
    rows = dict(zip(chars, drawn, strict=True))
    table.write_table(path, rows)
    embed_diffusion.main([*TINY, f"--table={path}", f"--out={out}"])
    state = torch.load(out / "best.pt", weights_only=True)
    alphabet = state["alphabet"]
    begun = principal_rows(read_table(path, alphabet), 8)
    ended = torch.stack([state["ema"][KEY][alphabet.index(ch)] for ch in begun])
    begun = torch.stack([*begun.values()])
    assert not torch.equal(ended, begun)
    assert F.cosine_similarity(ended, begun).mean() > 0.9

"""Tokens of one's own: tokens.npy and vocab.json, read, refused, trained on by all four methods,
written with, measured in nats a token and a character; words and their embeddings."""
import json
import random
import re
import textwrap
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, last_line, read_state
from test_evaluate import tables_of

import analog_bits
import data
import embed_diffusion
import generate
import train
from config import Masked
from data import CharTokenizer, Text, VocabTokenizer, tokenizer_of
from evaluation import __main__ as evaluation
from evaluation.likelihood import count_chars, unigram_of
from experiments import words

VOCABULARY = [" the", " cat", " cats", "s", ".", "\n", " sat on", " ", "t", "he", "c\n"]
SPACE = ": words may begin with a space"
LAST = ": no space stands before a blank or at the end"
N = 3000


def write_tokens(folder, ids=None, vocabulary=VOCABULARY, dtype=np.uint16):
    """tokens.npy and vocab.json in a folder -> the path of the first."""
    if ids is None:
        ids = np.random.default_rng(0).integers(0, len(vocabulary), N)
    np.save(folder / "tokens.npy", np.asarray(ids, dtype))
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder / "tokens.npy"


# -------------------------------------------------------------------------------------------------
# text to ids and back

def test_a_text_is_cut_into_the_longest_strings_that_fit():
    """Against a search of all strings for each piece; and it comes back as it was."""
    rng = random.Random(0)
    strings = ["a", "b", "c"]
    while len(strings) < 40:
        string = "".join(rng.choices("abc", k=rng.randint(2, 7)))
        if string not in strings:
            strings.append(string)
    rng.shuffle(strings)
    tokenizer = VocabTokenizer(strings)
    for _ in range(200):
        text = "".join(rng.choices("abc", k=rng.randint(0, 30)))
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        rest = text
        for i in ids:
            assert strings[i] == max(filter(rest.startswith, strings), key=len)
            rest = rest[len(strings[i]):]
    assert len(tokenizer) == 40 and tokenizer.decode([40, strings.index("a")]) == "·a"
    assert count_chars(tokenizer, torch.tensor([[0, 1], [1, 1]])).tolist() == [
        len(strings[0] + strings[1]), 2 * len(strings[1])]


@pytest.mark.parametrize("text, says", [
    (" the catfish", "'fish'"), (" the dog", "' dog'"), ("the cat", "'the cat'" + SPACE),
    (" the cat.cat", "'cat'" + SPACE), (" the cat ", "' '" + LAST)])
def test_where_no_token_fits_is_named(text, says):
    with pytest.raises(SystemExit) as e:
        VocabTokenizer([" the", " cat", "."]).encode(text)
    assert last_line(e.value) == f"no token of the vocabulary fits at {says}"


def test_the_alphabet_of_a_checkpoint_says_which_tokenizer_it_has():
    of_tokens = tokenizer_of({"alphabet": ["ab", "a"], "is_bytes": False})
    assert isinstance(of_tokens, VocabTokenizer) and of_tokens.encode("aab").tolist() == [1, 0]
    for is_bytes in (False, True):
        of_chars = tokenizer_of({"alphabet": "ab", "is_bytes": is_bytes})
        assert type(of_chars) is CharTokenizer and of_chars.is_bytes == is_bytes
    units = [tokenizer.unit for tokenizer in (of_tokens, of_chars, CharTokenizer("ab"))]
    assert units == ["token", "byte", "char"]


# -------------------------------------------------------------------------------------------------
# the file

def test_split_windows_and_batches_of_tokens(tmp_path):
    """The same ids are the same data in either type; another vocabulary makes them others."""
    ids = np.random.default_rng(0).integers(0, len(VOCABULARY), N)
    sums = set()
    for dtype in (np.uint16, np.int32):
        d = Text(Masked(dataset=str(write_tokens(tmp_path, ids, dtype=dtype)), block_size=7))
        n = int(0.9 * N)
        assert d.train.tolist() == ids[:n].tolist() and d.val.shape == ((N - n) // 7, 7)
        assert d.val.flatten().tolist() == ids[n:][:d.val.numel()].tolist()
        assert d.unit == "token" and d.name == "file tokens.npy"
        assert str(d).startswith("file tokens.npy: 2,700 tokens to train, ")
        assert d.meta["alphabet"] == VOCABULARY and d.meta["is_bytes"] is False
        x = d.batch(5)
        assert x.shape == (5, 7) and x.dtype == torch.int64
        windows = {tuple(ids[i:i + 7]) for i in range(n - 6)}
        assert {tuple(row) for row in x.tolist()} <= windows
        counts = np.bincount(ids[:n], minlength=len(VOCABULARY)) + 1
        assert np.allclose(unigram_of(d).numpy(), counts / counts.sum())
        sums.add(d.meta["data"]["sha256"])
    assert len(sums) == 1
    for changed in ([*ids[:-1], (ids[-1] + 1) % 11], ids):
        d = Text(Masked(dataset=str(write_tokens(tmp_path, changed, VOCABULARY[::-1]))))
        sums.add(d.meta["data"]["sha256"])
    assert len(sums) == 3


def test_a_large_file_stays_on_the_disk(tmp_path, monkeypatch):
    """200 MB: what is trained on is the file."""
    path = tmp_path / "tokens.npy"
    np.lib.format.open_memmap(path, "w+", np.uint16, (10 ** 8,))
    (tmp_path / "vocab.json").write_text('["a", "b"]')
    loaded = []
    load = np.load

    def spy(path, mmap_mode):
        assert mmap_mode == "r"
        loaded.append(load(path, mmap_mode))
        return loaded[-1]

    monkeypatch.setattr(np, "load", spy)
    tracemalloc.start()
    d = Text(Masked(dataset=str(path), block_size=8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert np.shares_memory(d.train.numpy(), loaded[0])
    assert np.shares_memory(d.val.numpy(), loaded[0])
    assert not d.batch(3).any() and not unigram_of(d)[1] > 1e-6


def test_ids_are_checked_to_the_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 999)
    path = write_tokens(tmp_path, [0] * (N - 1) + [11])
    with pytest.raises(SystemExit, match="has ids from 0 to 11, .*vocab.json 11 strings"):
        Text(Masked(dataset=str(path)))


@pytest.mark.parametrize("limit, device", [(5400, "meta"), (5399, "cpu")])
def test_what_does_not_fit_on_the_device_stays_and_its_batches_go_there(
        limit, device, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEVICE", "meta")
    monkeypatch.setattr(data, "ON_DEVICE", limit)
    d = Text(Masked(dataset=str(write_tokens(tmp_path)), block_size=8))
    assert d.train.device.type == device and d.val.device.type == "meta"
    x = d.batch(4)
    assert x.device.type == "meta" and x.shape == (4, 8)


GOOD = '["a", "b"]'
TWO = np.zeros(N, np.uint16)


@pytest.mark.parametrize("ids, vocabulary, says", [
    (TWO, None, "no TMP/vocab.json, a list of strings, that of id 0 first"),
    (None, GOOD, "FileNotFoundError"),
    (b"", GOOD, "TMP/tokens.npy is no array"), (b"to be or not to be", GOOD, "is no array"),
    (TWO.astype(object), GOOD, "is no array"),
    (TWO, '{"a": 0, "b": 1}', "is no list of 2 to 30,000 different strings, none of them empty"),
    (TWO, '"ab"', "is no list of"), (TWO, '["a", "b", "a"]', "is no list of"),
    (TWO, '["a", ""]', "is no list of"), (TWO, '["a"]', "is no list of 2 to"),
    (TWO, json.dumps([str(i) for i in range(30_001)]), "is no list of 2 to"),
    (TWO, '["a", 1]', "vocab.json no list of strings: sequence item 1"),
    (TWO, "17", "no list of strings"), (TWO, '["a", ', "no list of strings"),
    (TWO, '["a", "\\ud83d"]', "no list of strings"), (TWO, b'["a", "\xff"]', "no list of strings"),
    (TWO + 2, GOOD, "TMP/tokens.npy has ids from 2 to 2, TMP/vocab.json 2 strings"),
    (TWO.astype(np.int32) - 1, GOOD, "has ids from -1 to -1"),
    (TWO.astype(np.int64), GOOD, "is no one-dimensional array of uint16 or int32"),
    (TWO.astype(np.float32), GOOD, "is no one-dimensional array"),
    (TWO.astype(">u2"), GOOD, "is no one-dimensional array"),
    (TWO.reshape(2, -1), GOOD, "is no one-dimensional array"),
    (np.uint16(1), GOOD, "is no one-dimensional array"),
    (TWO[:319], GOOD, "has 287 tokens to train on, 32 to validate; block_size=17 needs 17 and 34"),
    (TWO[:0], GOOD, "has 0 tokens to train on")])
def test_bad_tokens_are_one_line(ids, vocabulary, says, tmp_path):
    path = tmp_path / "tokens.npy"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    elif ids is not None:
        np.save(path, ids, allow_pickle=True)
    if vocabulary is not None:
        raw = vocabulary if isinstance(vocabulary, bytes) else vocabulary.encode()
        (tmp_path / "vocab.json").write_bytes(raw)
    with pytest.raises((SystemExit, OSError)) as e:        # config.run makes one line of an OSError
        Text(Masked(dataset=str(path), block_size=17))
    assert says.replace("TMP", str(tmp_path)) in last_line(e.value)


def test_a_file_that_is_cut_and_a_code_of_bytes_are_refused(tmp_path):
    path = write_tokens(tmp_path)
    with pytest.raises(SystemExit, match="has tokens, no bytes: leave out code=bytes"):
        analog_bits.main([f"--dataset={path}", "--code=bytes", f"--out={tmp_path}/out"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit, match="tokens.npy is no array"):
        Text(Masked(dataset=str(path)))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------
# all four methods

METHODS = {"masked": [train], "ar": [train, "--objective=ar"],
           "bits": [analog_bits, "--head=bits"], "embed": [embed_diffusion]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tokens, and a run of three steps of each method in a folder of its own."""
    folder = tmp_path_factory.mktemp("tokens")
    path = write_tokens(folder)
    for name, (script, *args) in METHODS.items():
        script.main([*TINY, *args, f"--dataset={path}", f"--out={folder / name}", "--max_iters=3"])
    return folder


def test_a_run_says_tokens_and_its_checkpoint_has_the_vocabulary(runs, tmp_path, capsys):
    """So that it writes without the files; but they are needed to go on with it."""
    for name, (script, *_) in METHODS.items():
        assert read_state(runs / name, "best.pt")["alphabet"] == VOCABULARY
        where = f"--out={runs / name}"
        args = [where, "--prompt= the cats cat", "--length=12"]
        capsys.readouterr()
        if name in ("bits", "embed"):
            script.main(["sample", *args, "--steps=3"])
        else:
            generate.main(args)
        out, err = capsys.readouterr()
        assert out.startswith(" the cats cat") and "tokens/s" in err
        script.main(["--resume", where, "--max_iters=4"])
        assert re.search(r"nats/token = .* tokens/s", capsys.readouterr().out)
        other = write_tokens(tmp_path, vocabulary=VOCABULARY[::-1])
        with pytest.raises(SystemExit, match="was trained on file tokens.npy, not on this file"):
            script.main(["--resume", where, "--max_iters=5", f"--dataset={other}"])


def test_prompts_with_blanks_are_of_tokens(runs, capsys):
    args = [f"--out={runs}/masked", "--min_distance=0"]
    generate.main([*args, "--prompt= the{2} cats{1-3}.\\n"])
    out, err = capsys.readouterr()
    assert re.search(r"\{1-3\}: \d tokens \(next best", err)
    L = int(re.search(r": (\d) tokens", err)[1])
    some = "|".join(map(re.escape, VOCABULARY))
    assert re.fullmatch(rf" the(?:{some}){{2}} cats(?:{some}){{{L}}}\.\n\n", out)
    with pytest.raises(SystemExit, match="no token of the vocabulary fits at 'dog'"):
        generate.main([*args, "--prompt= the cat{3}dog"])
    with pytest.raises(SystemExit, match="with the 1 tokens that follow, a blank may have 15, not"):
        generate.main([*args, "--prompt={1-40}."])
    with pytest.raises(SystemExit, match="this model writes tokens"):
        embed_diffusion.main(["sample", f"--out={runs}/embed", "--steer=no:e"])


def test_the_evaluation_is_in_nats_a_token_and_a_character(runs, capsys):
    """One is the other divided by the mean length of the tokens that are measured."""
    path = runs / "tokens.npy"                             # is found where it was
    names = ",".join(f"{runs}/{name}" for name in METHODS)
    evaluation.main([f"--out={names}", "--n=3", "--exact=2", "--steps=4",
                     "--gaussian_steps=3", f"--eval_model={runs}/ar", "--windows=11"])
    titles, tables = zip(*tables_of(capsys.readouterr().out), strict=True)
    assert titles[0].endswith("11 of 18 windows of 16 tokens")
    d = Text(Masked(dataset=str(path), block_size=16))
    measured = d.val[np.linspace(0, 17, 11).astype(int)]
    text = "".join(VOCABULARY[i] for i in measured.flatten().tolist())
    assert [row[1] for row in tables[0]] == [*METHODS]
    for row in tables[0]:
        assert float(row[-1]) == pytest.approx(float(row[4]) * 11 * 16 / len(text), abs=2e-4)

    # generative NLL, of the held-out text, is the exact bound of the evaluation model there
    samples = next(rows for title, rows in zip(titles, tables, strict=True)
                   if title.startswith("samples, "))
    assert samples[0][0] == "held out, beside 2,700 tokens"
    blocks = d.val[[0, 8, 17]].long()
    method = train.build(Masked(n_layer=1, n_head=1, n_embd=16, block_size=16, objective="ar"),
                         d.meta)
    method.load_state_dict(read_state(runs / "ar", "best.pt")["ema"])
    with torch.no_grad():
        nats, _ = method.eval().bound(blocks)
    text = "".join(VOCABULARY[i] for i in blocks.flatten().tolist())
    nll = nats.sum().item() * 16 / len(text)
    assert float(samples[0][2].split()[0]) == pytest.approx(nll, abs=2e-3)


def test_rows_of_a_terminal_of_tokens():
    """A token may have several characters, new lines among them, and be cut at the edge."""
    painted = ["\x1b[38;5;67m38;\n5\x1b[0m", "\x1b[38;5;130m\n\n\x1b[0m", "ab", " cd"]
    rows = generate.screen_rows(painted, 3)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", row) for row in rows]
    assert plain == ["38;", "5", "", "ab ", "cd"]
    assert rows[1] == "\x1b[38;5;67m5\x1b[0m"


# -------------------------------------------------------------------------------------------------
# words

def test_the_lines_of_the_page_make_tokens(tmp_path, monkeypatch):
    """docs/hacking.md; decoded they are the text."""
    page = (ROOT / "docs/hacking.md").read_text(encoding="utf-8")
    lines = re.search(r"(?m)^    import json\n(?:    .*\n|\n(?=    ))+", page)[0]
    assert len(lines.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    text = "The cat's on the mat.\n\nThe mat, ça va, is 10 years old.\n" * 30
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    exec(textwrap.dedent(lines), {})
    d = Text(Masked(dataset="tokens.npy", block_size=8))
    ids = np.load("tokens.npy").tolist()
    assert d.tokenizer.decode(ids) == text and d.tokenizer.encode(text).tolist() == ids


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    """A text in which kings and queens do the same; beside it, tokens and a table made of it."""
    folder = tmp_path_factory.mktemp("words")
    rng = random.Random(0)
    parts = [["The", "A"], ["king", "queen"], ["eats", "drinks"], ["bread", "wine"],
             ["and", "but"], ["dogs", "cats"], ["don't"], ["sleep", "run"]]
    lines = [" ".join(map(rng.choice, parts)) + ".\n" + "\n" * (i % 2) for i in range(1500)]
    lines[0] = f"Unheard {lines[0]}"
    text = "".join(lines)
    (folder / "novel.txt").write_text(text)
    words.main([f"--dataset={folder}/novel.txt", f"--out={folder}/made", "--n=17", "--ppmi=16"])
    return folder / "made", text


def test_words_and_their_vocabulary(novel):
    folder, text = novel
    vocabulary = json.loads((folder / "vocab.json").read_text())
    ids = np.load(folder / "tokens.npy")
    said = VocabTokenizer(vocabulary).decode(ids.tolist())
    paragraphs = [" " + part.replace("\n", " ") for part in text.lower().split("\n\n")]
    assert said == "\n\n".join(paragraphs).replace("unheard", "<unk>").rstrip(" ")
    assert ids.dtype == np.uint16 and len(vocabulary) == 18 and (ids == 0).sum() == 1


def test_words_that_are_used_alike_have_embeddings_alike(novel):
    """From the part to train on alone; each row is found by the string of its token."""
    folder, _ = novel
    vocabulary = json.loads((folder / "vocab.json").read_text())
    table = embed_diffusion.read_table(folder / "table.txt", vocabulary)
    assert [*table] == vocabulary
    rows = embed_diffusion.principal_rows(table, 16)
    names = [name for name in rows if name not in (" <unk>", "\n\n")]
    for a, b in [(" king", " queen"), (" bread", " wine"), (" dogs", " cats")]:
        nearest = sorted(names, key=lambda name: -(rows[a] @ rows[name]).item())
        assert nearest[:2] == [a, b]
    ids = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    again = words.ppmi_table(ids[:int(0.9 * len(ids))], 18, 16)
    assert torch.equal(again, torch.stack([*table.values()]).float())
    assert not torch.equal(again, words.ppmi_table(ids, 18, 16))


def test_a_frozen_table_of_words_stays(novel, tmp_path, capsys):
    folder, _ = novel
    args = [*TINY, f"--dataset={folder}/tokens.npy", f"--table={folder}/table.txt", "--dim=16",
            "--max_iters=3"]
    embed_diffusion.main([*args, "--train_table=False", f"--out={tmp_path}/frozen"])
    assert "lacks" not in capsys.readouterr().out
    vocabulary = json.loads((folder / "vocab.json").read_text())
    table = embed_diffusion.read_table(folder / "table.txt", vocabulary)
    rows = torch.stack([*embed_diffusion.principal_rows(table, 16).values()])
    state = read_state(tmp_path / "frozen", "best.pt")
    assert torch.equal(state["ema"]["parametrizations.table.original"], rows)


def test_a_word_has_the_row_of_its_own_spelling_or_else_without_its_space(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("the 1 2\n\u2581the 3 4\ncat 5 6\nNew\u2581York 7 8\n\\n\\n 9 9\n")
    table = embed_diffusion.read_table(path, [" the", "the", " cat", "New York", "\n\n", " dog"])
    assert {token: row.tolist() for token, row in table.items()} == {
        " the": [3, 4], "the": [1, 2], " cat": [5, 6], "New York": [7, 8], "\n\n": [9, 9]}

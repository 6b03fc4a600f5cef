"""`python -m evaluation` as it is typed: which checkpoints it opens, its tables, Ctrl-C;
diagnostics and bench."""
import math
import re
import signal
import sys
import types

import pytest
import torch
from conftest import end, run, start
from test_evaluate import text_file

import embed_diffusion
import train
from config import Embed, Masked, Sample
from data import Text
from evaluation import bench, likelihood
from evaluation.diagnostics import bigram_information, diagnostics
from evaluation.likelihood import Evaluate, corpus, open_checkpoint

TINY = ["--dataset=pydoc", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32",
        "--batch_size=8", "--max_iters=120", "--eval_interval=60"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run("train.py", *TINY, f"--out={folder}/masked")
    run("train.py", *TINY, "--objective=ar", "--train_size=2000", f"--out={folder}/ar")
    run("analog_bits.py", *TINY, "--code=bytes", f"--out={folder}/bits")
    return folder


def test_a_script_that_somebody_adds_can_be_evaluated_and_nothing_else_is_imported(
        trained, tmp_path, monkeypatch):
    state = torch.load(trained / "masked/best.pt", weights_only=True)

    def saved_as(script):
        torch.save({**state, "script": script, "method": "mine"}, tmp_path / "a.pt")
        return tmp_path / "a.pt"

    monkeypatch.setattr(likelihood, "HERE", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.py").touch()
    mine = types.ModuleType("experiments.mine")
    vars(mine).update(SETTINGS=Masked, SAMPLER=Sample, build=train.build)
    monkeypatch.setitem(sys.modules, "experiments.mine", mine)
    checkpoint = open_checkpoint(saved_as("mine"))
    assert checkpoint.script is mine and checkpoint.name == "mine"
    assert checkpoint.c.block_size == 32 and not checkpoint.method.training
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    for script in ("antigravity", "../mine", "experiments.mine", "os.path", 7, ""):
        with pytest.raises(SystemExit, match="no name of a script|not in this clone"):
            open_checkpoint(saved_as(script))
    assert "antigravity" not in sys.modules
    (tmp_path / "config.py").touch()
    with pytest.raises(SystemExit, match="config.py has no SETTINGS"):
        open_checkpoint(saved_as("config"))


def test_another_text_than_the_checkpoint_was_trained_on_is_refused(trained, tmp_path):
    checkpoint = open_checkpoint(trained / "masked")
    assert corpus(checkpoint, Evaluate()) is corpus(checkpoint, Evaluate())
    checkpoint.meta["data"] = {"name": "pydoc", "sha256": "0"}
    with pytest.raises(SystemExit, match="was trained on another pydoc"):
        corpus(checkpoint, Evaluate())
    checkpoint.meta["data"] = {"name": "file my.txt", "sha256": "0"}
    with pytest.raises(SystemExit, match="pass its path, --dataset=PATH"):
        corpus(checkpoint, Evaluate())


@pytest.mark.parametrize("typed", [dict(n=1), dict(exact=1), dict(digits=9), dict(draws=1),
                                   dict(windows=1), dict(n=-2)])
def test_too_few_for_an_error_is_refused(typed):
    with pytest.raises(SystemExit, match="must be"):
        Evaluate(**typed)


# python -m evaluation

def tables_of(out):
    """Markdown -> [(title, [cells of each row])]"""
    found = re.findall(r"\n(.+)\n\n\|.*\n\|---.*\n((?:\|.*\n)+)", out)
    return [(title, [line.strip("| ").split(" | ") for line in rows.splitlines()])
            for title, rows in found]


def test_evaluation_prints_every_table(trained):
    """Two checkpoints that are the same differ by exactly nothing; the baseline, trained on less,
    has no masks and so no error from them; bits of bytes read the same text, with a sampler of
    their own."""
    names = ["masked", "masked/best.pt", "ar", "bits"]
    out = run("-m", "evaluation", f"--out={','.join(f'{trained}/{name}' for name in names)}",
              "--n=3", "--exact=2", "--steps=8", "--gaussian_steps=4", "--two_pass",
              f"--eval_model={trained}/ar", "--windows=50").stdout
    assert re.match(r"`python -m evaluation --out=.*` at commit .*PyTorch", out)
    assert out.count("\nSample(") == out.count("\nCodeSampler(") == 1
    W = len(corpus(open_checkpoint(trained / "masked"), Evaluate()).val)
    titles, tables = zip(*tables_of(out), strict=True)
    bounds, by_mask, samples, firsts, per_byte, by_time, ce, of_bits, _ = tables
    assert titles[0] == f"pydoc, held out: 50 of {W:,} windows of 32 chars"
    assert re.fullmatch(r"pydoc, held out: 50 of 1,\d+ windows of 32 bytes", titles[4])
    assert (titles[1], titles[5]) == ("nats by share masked", "nats by time")
    assert [row[1] for row in bounds] == ["masked", "masked", "ar"]
    assert [row[1] for row in per_byte] == ["bits"]
    assert bounds[0][4:7] == bounds[1][4:7] and bounds[1][8] == "0.0000 ± 0.0000"
    assert bounds[2][6] == "exact" and "±" in bounds[2][8] and "±" in bounds[0][10]
    assert len(by_mask) == 2 and len(by_time) == 1
    assert all(float(cell) > 0 for row in [*by_mask, *by_time] for cell in row[1:])
    assert titles[6].startswith("cross-entropy") and float(ce[0][1]) < float(ce[0][5]) < 6

    # samples; overlap and known words of each are of its own training text
    assert titles[2] == f"samples, pydoc, windows of 32; generative NLL by {trained}/ar"
    assert all(row[1] == "3" for row in [*samples, *of_bits])
    held_out, own, first, same, ar = samples
    assert "held out" in held_out[0] and "the evaluation model's own" in own[0]
    assert first[1:-1] == same[1:-1] and float(ar[7].split()[0]) < float(first[7].split()[0])
    assert first[10] == "8.0" and ar[10] == own[10] == "32.0" and of_bits[-1][10] == "8.0"
    assert [row[0] for row in firsts] == [row[0] for row in samples]
    assert all(len(row[1]) > 30 for row in firsts)
    assert firsts[2][1] == firsts[3][1] != firsts[1][1]


def test_ctrl_c_ends_it_without_a_traceback(trained):
    process = start("-u", "-m", "evaluation", f"--out={trained}/masked", "--n=0", "--draws=1000")
    for line in process.stdout:
        if "checkpoint" in line:
            break
    process.send_signal(signal.SIGINT)
    code, out = end(process)
    assert code == 130 and "Traceback" not in out


def test_an_evaluation_model_of_shorter_windows_scores_in_pieces_and_writes_nothing(
        trained, tmp_path):
    run("train.py", *TINY, "--max_iters=10", "--objective=ar", "--block_size=12",
        f"--out={tmp_path}/ar")
    out = run("-m", "evaluation", f"--out={trained}/masked", f"--eval_model={tmp_path}/ar",
              "--bound=False", "--n=2", "--steps=2").stdout
    (_, rows), _ = tables_of(out)
    assert len(rows) == 2 and "±" in rows[1][2]
    done = run("-m", "evaluation", f"--out={trained}/masked", f"--eval_model={trained}/masked",
               "--bound=False", "--n=2", code=1)
    assert "an evaluation model is trained with --objective=ar" in done.stderr


# diagnostics

def test_bigram_information():
    """Of a text whose next character is decided by this one, the entropy of a character; of a text
    in any order nothing."""
    x = torch.arange(64 * 100).view(64, 100) % 4
    assert bigram_information(x) == pytest.approx(2, abs=0.01)
    x = torch.randint(4, (64, 100), generator=torch.Generator().manual_seed(1))
    assert bigram_information(x) == pytest.approx(0, abs=0.01)


def test_diagnostics_of_an_untrained_table(tmp_path):
    """The table's rows have the norm that was asked for; an untrained network's samples say nothing
    of their neighbours; the unigram is that of the text."""
    c = Embed(dataset=str(text_file(tmp_path)), block_size=24, n_layer=1, n_head=1, n_embd=16)
    data = Text(c)
    torch.manual_seed(0)
    method = embed_diffusion.build(c, data.meta).eval()
    table = diagnostics(method, data, embed_diffusion.SAMPLER(steps=5))
    (unigram, *ce), (norm, nearest), (_, order, order_of_text) = [
        [float(row[1]) for row in table.rows[i:j]] for i, j in ((0, 6), (6, 8), (8, 11))]
    assert norm == 2.65 and 0 < nearest < 2 * 2.65
    counts = torch.bincount(data.train.long(), minlength=len(data.tokenizer)) + 1
    bits = -(counts / counts.sum()).log2()
    assert unigram == pytest.approx(bits[data.val.long()].mean().item(), abs=1e-3)
    assert ce[0] < 0.1 and ce[4] == pytest.approx(math.log2(len(counts)), abs=0.1)
    assert order < 0.3 * order_of_text


def test_the_command_of_the_last_line_of_embedding_training(trained):
    out = run("-m", "evaluation.diagnostics", f"--out={trained}/bits").stdout
    (_, rows), = tables_of(out)
    assert len(rows) == 11 and all(float(value) > -0.1 for _, value in rows)
    done = run("-m", "evaluation.diagnostics", f"--out={trained}/masked", code=1)
    assert "only embeddings and bits have diagnostics" in done.stderr


def test_bench_prints_markdown_rows(capsys):
    """Fewer rounds of a tiny network; rows in fp32 run in fp32, whatever this machine has."""
    c = Masked(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, compile=False)
    row = bench.Trained(train, c, torch.float32)
    dtypes = set()
    row.method.net.head.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype))
    row.step(0)
    assert dtypes == {torch.float32}
    bench.training(c, rounds=4)
    bench.sampling(c, n=2, rounds=2)
    (_, rows), (_, writing) = tables_of(capsys.readouterr().out)
    assert len(rows) == 2 * 4 + 2 and len(writing) == 6
    assert all(float(row[1].split()[0]) > 0 and float(row[4].replace(",", "")) > 0 for row in rows)
    assert rows[3][5] == rows[7][5] == "1.00" and float(rows[0][5]) > 0
    assert [row[1] for row in writing] == ["16", "6", "16", "16", "50", "50"]

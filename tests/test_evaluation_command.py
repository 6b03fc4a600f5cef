"""`python -m evaluation` as it is typed: which checkpoints it opens, its tables, Ctrl-C;
diagnostics and bench."""
import math
import re
import shutil
import signal
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import end, run, start
from test_evaluate import drawn, save, tables_of, text_file
from torch.utils.flop_counter import FlopCounterMode

import analog_bits
import config
import embed_diffusion
import train
from config import Bits, Embed, Masked, Sample
from data import Text
from evaluation import __main__ as command
from evaluation import bench, diagnostics, likelihood
from evaluation.likelihood import Evaluate, corpus, grouped, open_checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with text.txt and networks of it in folders of their own."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = dict(dataset=str(text_file(folder)), n_layer=1, n_head=1, n_embd=16)
    for name, method, script, c in [
            ("masked", "masked", train, Masked(**tiny, block_size=32)),
            ("ar", "ar", train, Masked(**tiny, block_size=32, objective="ar", train_size=64)),
            ("short", "ar", train, Masked(**tiny, block_size=12, objective="ar")),
            ("bits", "bits", analog_bits, Bits(**tiny, block_size=32, code="bytes"))]:
        meta = Text(c, is_bytes=name == "bits").meta
        save(folder / name, method, script, c, meta, drawn(script, c, meta))
    c = Embed(**tiny, block_size=32)
    torch.manual_seed(0)
    save(folder / "embed", "embed", embed_diffusion, c, meta, embed_diffusion.build(c, meta))
    return folder


def test_a_script_that_somebody_adds_can_be_evaluated_and_nothing_else_is_imported(
        runs, tmp_path, monkeypatch):
    state = torch.load(runs / "masked/best.pt", weights_only=True)

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
    for script in ("antigravity", "experiments/mine", "experiments.mine", "os.path", 7, ""):
        with pytest.raises(SystemExit, match="no name of a script|not in this clone"):
            open_checkpoint(saved_as(script))
    assert "antigravity" not in sys.modules
    (tmp_path / "config.py").touch()
    with pytest.raises(SystemExit, match="config.py has no SETTINGS"):
        open_checkpoint(saved_as("config"))


def test_another_text_than_the_checkpoint_was_trained_on_is_refused(runs, tmp_path):
    checkpoint = open_checkpoint(runs / "masked")
    s = Evaluate(dataset=f"{runs}/text.txt")
    assert corpus(checkpoint, s) is corpus(checkpoint, s) is corpus(checkpoint, Evaluate())

    # another one: where it was, elsewhere, changed, moved
    path = tmp_path / "own.txt"
    path.write_text("abc" * 999)
    c = replace(checkpoint.c, dataset=str(path))
    own = replace(checkpoint, path="own", c=c, meta={**checkpoint.meta, **Text(c).meta})
    assert len(grouped([checkpoint, own], Evaluate())) == 2
    moved = str(shutil.copy(path, tmp_path / "moved.txt"))
    assert corpus(own, Evaluate(dataset=moved)).name == "file moved.txt"
    other = r"own was trained on other data \(file own.txt\) than this file "
    asks = ": pass its path, --dataset=PATH$"
    with pytest.raises(SystemExit, match=f"{other}text.txt{asks}"):
        corpus(own, s)
    path.write_text("abd" * 999)
    likelihood.read_text.cache_clear()
    with pytest.raises(SystemExit, match=f"{other}own.txt{asks}"):
        corpus(own, Evaluate())
    path.unlink()
    with pytest.raises(SystemExit, match=f"own was trained on {path}, which is not there{asks}"):
        corpus(own, Evaluate())
    checkpoint.meta["data"] = {"name": "pydoc", "sha256": "0"}
    with pytest.raises(SystemExit, match=r"was trained on other data \(pydoc\) than this pydoc$"):
        corpus(checkpoint, Evaluate())


def test_a_corpus_is_read_where_the_run_found_it_or_where_is_typed(runs, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(runs / "masked")
    data = corpus(checkpoint, Evaluate())
    read_from = []

    def read_text(c, is_bytes):
        read_from.append(c.data_dir)
        return data

    monkeypatch.setattr(likelihood, "read_text", read_text)
    for folder in (str(tmp_path), "gone"):
        run = replace(checkpoint, c=replace(checkpoint.c, data_dir=folder))
        corpus(run, Evaluate())
        corpus(run, Evaluate(data_dir="typed"))
    assert read_from == [str(tmp_path), "typed", "", "typed"]


@pytest.mark.parametrize("typed", [dict(n=1), dict(exact=1), dict(digits=9), dict(draws=1),
                                   dict(windows=1), dict(n=-2)])
def test_too_few_for_an_error_is_refused(typed):
    with pytest.raises(SystemExit, match="must be"):
        Evaluate(**typed)


# python -m evaluation

def test_evaluation_prints_every_table(runs, capsys):
    """Two checkpoints that are the same differ by exactly nothing; the baseline, trained on less,
    has no masks and so no error from them; bits of bytes read the same text, with a sampler of
    their own."""
    names = ["masked", "masked/best.pt", "ar", "bits"]
    command.main([f"--out={','.join(f'{runs}/{name}' for name in names)}", "--n=3", "--exact=2",
                  "--steps=8", "--gaussian_steps=4", "--two_pass", f"--eval_model={runs}/ar",
                  "--windows=40", f"--dataset={runs}/text.txt"])
    out = capsys.readouterr().out
    assert out.count("\nSample(") == out.count("\nCodeSampler(") == 1
    titles, tables = zip(*tables_of(out), strict=True)
    bounds, by_mask, samples, firsts, per_byte, by_time, ce, of_bits, _ = tables
    W = len(corpus(open_checkpoint(runs / "masked"), Evaluate(dataset=f"{runs}/text.txt")).val)
    assert titles[0] == f"file text.txt, held out: 40 of {W:,} windows of 32 chars"
    assert titles[4] == f"file text.txt, held out: 40 of {W:,} windows of 32 bytes"
    assert (titles[1], titles[5]) == ("nats by share masked", "nats by time")
    assert [row[1] for row in bounds] == ["masked", "masked", "ar"]
    assert [row[1] for row in per_byte] == ["bits"]
    assert bounds[0][4:7] == bounds[1][4:7] and bounds[1][8] == "0.0000 ± 0.0000"
    assert bounds[2][6] == "exact" and "±" in bounds[2][8] and "±" in bounds[0][10]
    assert len(by_mask) == 2 and len(by_time) == 1
    assert all(float(cell) > 0 for row in [*by_mask, *by_time] for cell in row[1:])
    assert titles[6].startswith("cross-entropy") and float(ce[0][1]) < float(ce[0][5]) < 6

    # samples; overlap and known words of each are of its own training text
    assert titles[2] == f"samples, file text.txt, windows of 32; generative NLL by {runs}/ar"
    assert all(row[1] == "3" for row in [*samples, *of_bits])
    held_out, own, first, same, ar = samples
    assert "held out" in held_out[0] and "the evaluation model's own" in own[0]
    assert first[1:-1] == same[1:-1] and float(ar[7].split()[0]) < float(first[7].split()[0])
    assert first[10] == "8.0" and ar[10] == own[10] == "32.0" and of_bits[-1][10] == "8.0"
    assert [row[0] for row in firsts] == [row[0] for row in samples]
    assert all(len(row[1]) == 32 for row in firsts)
    assert firsts[2][1] == firsts[3][1] != firsts[1][1]


def test_ctrl_c_ends_it_without_a_traceback(runs):
    process = start("-u", "-m", "evaluation", f"--out={runs}/masked", "--n=0", "--draws=1000",
                    f"--dataset={runs}/text.txt")
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("| checkpoint"):
            break
    process.send_signal(signal.SIGINT)
    code, out = end(process)
    assert re.match(r"`python -m evaluation --out=.*` at commit .*PyTorch", said[0])
    assert code == 130 and "Traceback" not in out


def test_an_evaluation_model_of_shorter_windows_scores_in_pieces_and_writes_nothing(runs, capsys):
    typed = [f"--out={runs}/masked", f"--dataset={runs}/text.txt", "--bound=False", "--n=2",
             "--steps=2"]
    command.main([*typed, f"--eval_model={runs}/short"])
    (_, rows), _ = tables_of(capsys.readouterr().out)
    assert len(rows) == 2 and "±" in rows[1][2]
    with pytest.raises(SystemExit, match="an evaluation model is trained with --objective=ar"):
        command.main([*typed, f"--eval_model={runs}/masked"])


# diagnostics

def test_bigram_information():
    """Of a text whose next character is decided by this one, the entropy of a character; of a text
    in any order nothing."""
    x = torch.arange(64 * 100).view(64, 100) % 4
    assert diagnostics.bigram_information(x) == pytest.approx(2, abs=0.01)
    x = torch.randint(4, (64, 100), generator=torch.Generator().manual_seed(1))
    assert diagnostics.bigram_information(x) == pytest.approx(0, abs=0.01)


def test_diagnostics_of_an_untrained_table(runs, capsys):
    """The table's rows have the norm that was asked for; an untrained network's samples say nothing
    of their neighbours; the unigram is that of the text."""
    diagnostics.main([f"--out={runs}/embed", f"--dataset={runs}/text.txt"])
    (_, rows), = tables_of(capsys.readouterr().out)
    unigram, *ce, norm, nearest, _, order, order_of_text = [float(value) for _, value in rows]
    assert norm == 2.65 and 0 < nearest < 2 * 2.65
    data = Text(Masked(dataset=f"{runs}/text.txt", block_size=32))
    counts = torch.bincount(data.train.long(), minlength=len(data.tokenizer)) + 1
    bits = -(counts / counts.sum()).log2()
    assert unigram == pytest.approx(bits[data.val.long()].mean().item(), abs=1e-3)
    assert ce[0] < 0.1 and ce[4] == pytest.approx(math.log2(len(counts)), abs=0.1)
    assert order < 0.3 * order_of_text
    done = run("-m", "evaluation.diagnostics", f"--out={runs}/masked", code=1)
    assert "only embeddings and bits have diagnostics" in done.stderr


@pytest.mark.parametrize("name", ["masked", "AR", "bits", "embeddings"])
def test_the_operations_of_a_step_are_those_that_torch_counts(name, monkeypatch):
    monkeypatch.setattr(config, "AMP", config.AMP)         # to be put back
    c = Masked(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=4, compile=False)
    script, settings = bench.text_models(c)[name]
    row = bench.Trained(script, settings, torch.float32)
    with FlopCounterMode(display=False) as counter:
        row.train_step.micro_batch()
    assert row.flops() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_bench_prints_markdown_rows(capsys, monkeypatch):
    """Fewer rounds of a tiny network; rows in fp32 run in fp32, whatever the others have."""
    monkeypatch.setattr(config, "AMP", config.AMP)         # to be put back
    c = Masked(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, compile=False)
    row = bench.Trained(train, c, torch.float32)
    bench.Trained(train, c, torch.bfloat16)                # built later, it must not matter
    dtypes = set()
    row.method.net.head.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype))
    row.step(0)
    assert dtypes == {torch.float32}
    bench.training(c, rounds=2)
    bench.sampling(c, n=2, rounds=2)
    (_, rows), (_, writing) = tables_of(capsys.readouterr().out)
    assert len(rows) == 2 * 4 + 2 and len(writing) == 6
    assert all(float(row[1].split()[0]) > 0 and float(row[4].replace(",", "")) > 0 for row in rows)
    assert rows[3][5] == rows[7][5] == "1.00" and float(rows[0][5]) > 0
    assert [row[1] for row in writing] == ["16", "6", "16", "16", "50", "50"]
    for _, calls, ms, speed in writing:
        seconds = int(calls) * float(ms.split()[0]) / 1e3
        assert float(speed.replace(",", "")) == pytest.approx(2 * 16 / seconds, rel=0.1)


def test_milliseconds_are_the_median_the_least_and_the_greatest_of_a_call(monkeypatch):
    seconds = iter([0.08, 0.024, 0.016, 0.04, 0.032])
    monkeypatch.setattr(bench, "timed", lambda f: next(seconds))
    assert bench.milliseconds(abs) == pytest.approx((4, 2, 10))

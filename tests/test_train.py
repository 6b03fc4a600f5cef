"""The loop: the step, the moving average, resuming, several processes, the compiler, NaNs."""
import math
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import (
    TINY, assert_same_run, end, last_line, read_log, read_state, start, tensors, training_step,
    wait_for)

import analog_bits
import checkpoint
import config
import step
import train
from checkpoint import load
from config import Masked, parse
from data import Text
from step import TrainingStep, build_optimizers, get_lr


def tiny(corpus, *typed):
    return Masked(**parse([corpus, *TINY, *typed], Masked))


def refused(main, args):
    """The line with which a script ends."""
    with pytest.raises(SystemExit) as e:
        main(args)
    return last_line(e.value)


def after_each_step(monkeypatch, do):
    """Call do(n, method, loss) when training has taken n steps."""
    honest = TrainingStep.__call__

    def watched(train_step, i, stop):
        loss, stop = honest(train_step, i, stop)
        do(i + 1, train_step.method, loss)
        return loss, stop

    monkeypatch.setattr(TrainingStep, "__call__", watched)


def signal_at(monkeypatch, step, *numbers):
    """Send signals to this process when training has taken that many steps: it takes one more."""
    def send(n, *_):
        for number in numbers:
            if n == step:
                os.kill(os.getpid(), number)

    after_each_step(monkeypatch, send)


# -------------------------------------------------------------------------------------------------
# a step

def test_the_rate_rises_holds_and_falls_to_zero():
    c = Masked(warmup_iters=9, max_iters=100, learning_rate=1.0)
    rates = [get_lr(i, c) for i in range(100)]
    assert rates[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert set(rates[9:51]) == {1.0}
    assert rates[50:] == pytest.approx([2 - i / 50 for i in range(50, 100)])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(corpus, optimizer):
    c = tiny(corpus, f"--optimizer={optimizer}")
    method = train.build(c, Text(c).meta)
    groups = [[id(p) for g in opt.param_groups for p in g["params"]]
              for opt in build_optimizers(method, c, torch.zeros(()), torch.zeros(()))]
    assert sorted(sum(groups, [])) == sorted(id(p) for p in method.parameters())
    blocks = method.net.blocks.parameters()
    muon = {id(p) for p in blocks if p.ndim == 2 and min(p.shape) >= 16}   # not the convolution
    assert muon
    if optimizer == "adamw":
        assert len(groups) == 1
    else:
        assert set(groups[1]) == muon


@pytest.mark.parametrize("clip, scaled", [(0.0, False), (0.01, False), (0.0, True), (0.01, True)])
def test_a_step_takes_the_mean_of_two_micro_batches_and_clips_it(corpus, clip, scaled):
    """The gradient and the loss of grad_accum=2 are the means over its micro-batches, each of a
    seed of its own. Under a scaler a gradient is unscaled first."""
    c = tiny(corpus, "--grad_accum=2", f"--grad_clip={clip}")
    data = Text(c)
    method = train.build(c, data.meta)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.1)
    losses = []
    for i in range(2):
        train.reseed(c.seed, 5, i)
        losses.append(method(data.batch(c.batch_size)))
    assert losses[0] != losses[1]
    mean = sum(losses) / 2
    expected = torch.autograd.grad(mean, [*method.parameters()])
    norm = torch.nn.utils.get_total_norm(expected)
    assert norm > 0.1
    seen = []

    def look(*_):
        seen.extend(p.grad.clone() for p in method.parameters())

    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0 ** 10)
    train_step = training_step(method, data, c, scaler)
    train_step.opts[-1].register_step_pre_hook(look)
    total, _ = train_step(5)
    assert total.item() == pytest.approx(mean.item(), rel=1e-6)
    for a, b in zip(expected, seen, strict=True):
        if clip:
            a = a * clip / norm
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_average_the_mean_losses_and_the_rate(corpus, tmp_path, monkeypatch):
    """The average of the weights, which has no graph and is what is shown; in the log the mean
    loss since the last evaluation, its rate, and bits."""
    c = tiny(corpus, "--max_iters=7", "--eval_interval=3", f"--out={tmp_path}/run")
    data = Text(c)
    meta = {"method": "masked", **data.meta}
    method = train.build(c, meta)
    average = [p.detach().clone() for p in method.parameters()]
    losses = []
    shown = []

    def follow(n, _, loss):
        losses.append(loss.item())
        time.sleep(0.01)
        for a, p in zip(average, method.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - min(c.ema, n / (9 + n)))

    after_each_step(monkeypatch, follow)
    out = train.fit(method, data, c, meta, lambda *args: shown.append(args))
    assert [where for _, *where in shown] == [[out, step] for step in (3, 6, 7)]
    assert out == tmp_path / "run"
    ema = shown[-1][0]
    assert not ema.training
    assert not any(p.requires_grad or p.grad_fn for p in ema.parameters())
    state = read_state(out)
    for a, b in zip(average, state["ema"].values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert state["progress"]["seconds"] >= 7 * 0.01
    rows = read_log(out)
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means)
    assert [float(row["lr"]) for row in rows] == [get_lr(i, c) for i in (2, 5, 6)]
    assert float(rows[1]["bits"]) == pytest.approx(float(rows[1]["bound"]) / math.log(2))


# -------------------------------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize("how, numbers", [
    ("--optimizer=muon", [signal.SIGINT]), ("--optimizer=adamw", [signal.SIGTERM]),
    ("--objective=ar", [signal.SIGHUP, signal.SIGHUP])])
def test_resume_is_the_straight_run_to_the_bit(corpus, tmp_path, monkeypatch, capsys, how, numbers):
    """Stopped at a step without evaluation by Ctrl-C, a scheduler or a lost ssh, which says so
    twice: weights, moving average, optimizer state, log and samples are then the same. Evaluating
    more often changes no weight."""
    args = [corpus, *TINY, "--max_iters=12", "--eval_interval=5", how]
    train.main([*args, f"--out={tmp_path}/straight"])
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        signal_at(patch, 7, *numbers)
        train.main([*args, f"--out={out}"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped at step 8 and saved: --resume --out={out} goes on"
    assert read_state(out)["step"] == 8 and (out / "status").read_text() != "finished"
    assert [row["step"] for row in read_log(out)] == ["5"]
    train.main(["--resume", f"--out={out}"])
    assert_same_run(tmp_path / "straight", out)
    assert [row["step"] for row in read_log(out)] == ["5", "10", "12"]
    kept = (out / "samples.txt").read_text(encoding="utf-8")
    assert kept == (tmp_path / "straight/samples.txt").read_text(encoding="utf-8")
    _, *samples = re.split(r"(?m)^--- step (\d+)\n", kept)
    assert samples[::2] == ["5", "10", "12"]
    *_, c, meta = load(out, Masked, train.build, ["masked", "ar"])
    assert all(len(text) == 17 and set(text) <= set(meta["alphabet"]) for text in samples[1::2])
    assert samples[-1] in capsys.readouterr().out
    train.main([*args, "--eval_interval=3", f"--out={tmp_path}/often"])
    straight = tensors(read_state(tmp_path / "straight"))
    for x, y in zip(straight, tensors(read_state(tmp_path / "often")), strict=True):
        assert torch.equal(x, y)


def test_a_run_from_before_a_column_goes_on(corpus, tmp_path):
    """Its rows are shorter: what they lack is empty."""
    args = [corpus, *TINY, "--eval_interval=2", f"--out={tmp_path}"]
    train.main([*args, "--max_iters=2"])
    state = read_state(tmp_path)
    before, = read_log(tmp_path)
    state["progress"]["log"] = [row[:8] for row in state["progress"]["log"]]
    torch.save(state, tmp_path / "ckpt.pt")
    train.main(["--resume", "--max_iters=4", f"--out={tmp_path}"])
    old, new = read_log(tmp_path)
    added = ["train_ce", "val_ce", "bound_0.2", "bound_0.4", "bound_0.6", "bound_0.8", "bound_1.0"]
    assert [*old] == [*new] == [*before] and [*old][-7:] == added
    assert old == before | dict.fromkeys(added, "")
    assert all(math.isfinite(float(new[name])) for name in added)


# -------------------------------------------------------------------------------------------------
# what is compared, what is best, and what is no number

@pytest.mark.parametrize("script, typed, name", [
    (train, [], "CE"), (train, ["--objective=ar"], "CE"), (analog_bits, [], "bound")])
def test_training_and_held_out_text_are_compared_under_the_same_noise(script, typed, name, corpus,
                                                                      tmp_path, capsys):
    """Where they are the same text, they are equal to the bit; on every second window of the bound.
    A text of one window is enough. The bound by noise level is in the log."""
    settings = script.SETTINGS
    c = settings(**parse([corpus, *TINY, "--max_iters=9", "--eval_interval=9", *typed], settings))
    data = Text(c)
    texts = {"same": data.val.flatten(), "other": data.train, "short": data.train[:data.T]}
    rows = {}
    for text, data.train in texts.items():
        train.reseed(c.seed)
        method = script.build(c, data.meta)
        run = replace(c, out=f"{tmp_path}/{text}")
        train.fit(method, data, run, {"method": text, **data.meta}, lambda *_: None)
        rows[text] = read_log(tmp_path / text)[-1]
        said = re.findall(rf"\| train {name} ([\d.]+), val {name} ([\d.]+) \|",
                          capsys.readouterr().out)
        expected = [f"{float(rows[text][column]):.3f}" for column in ("train_ce", "val_ce")]
        assert said == [tuple(expected)]
    assert rows["same"]["train_ce"] == rows["same"]["val_ce"]
    assert rows["other"]["train_ce"] != rows["other"]["val_ce"]
    assert torch.equal(train.training_windows(data, 3), data.train.expand(3, -1))

    ema = method.eval()
    ema.load_state_dict(read_state(tmp_path / "short", "best.pt")["ema"])
    val, levels = train.eval_subset(data.val, c, ema)
    half = train.estimate(ema, val, levels, every=2)
    e = train.evaluate(ema, val, levels)
    for ours, all_windows in zip(half, e["estimates"], strict=True):
        assert ours.shape == ((len(val) + 1) // 2, levels)
        assert torch.allclose(ours, all_windows[::2], atol=1e-5)
    logged = [float(rows["short"][f"bound_{i / 5}"]) for i in range(1, 6)]
    assert logged == pytest.approx(e["fifths"], nan_ok=True, abs=1e-5)
    assert float(rows["short"]["val_ce"]) == pytest.approx(train.cross_entropy(ema, *half))



def test_training_learns_and_best_is_the_lowest(corpus, tmp_path, capsys):
    """On squares and their roots both objectives learn; best.pt is the row with the lowest bound,
    and the last line says its bound over the whole split."""
    for objective in ("masked", "ar"):
        out = tmp_path / objective
        train.main([corpus, *TINY, "--n_embd=32", "--max_iters=60", "--eval_interval=20",
                    "--batch_size=16", "--learning_rate=3e-2", f"--objective={objective}",
                    f"--out={out}"])
        method, c, meta = load(out, Masked, train.build, [objective])
        best = min(read_log(out), key=lambda row: float(row["bound"]))
        assert float(best["bound"]) < math.log(len(meta["alphabet"])) * 0.7
        assert str(meta["step"]) == best["step"]
        assert (meta["method"], meta["script"]) == (objective, "train")
        data = Text(c)
        e = train.evaluate(method, data.val, method.eval_levels)
        n = len(data.val)
        assert capsys.readouterr().out.splitlines()[-2] == (
            f"best weights, of step {best['step']}, over {n} of {n} windows: "
            f"{train.describe(e, method, 'char')}")


@pytest.mark.parametrize("early_stopping, kept", [(True, 4), (False, 12)])
def test_best_is_the_lowest_bound_where_it_says_something(early_stopping, kept, corpus, tmp_path,
                                                          monkeypatch, capsys):
    """best.pt has the weights of the lowest bound; those of the last step where the method says
    that its bound chooses nothing. Samples are drawn from the same noise every time."""
    bounds = iter([1.0, 0.5, 2.0, 3.0])
    honest = train.evaluate
    monkeypatch.setattr(train, "FIRST_EVAL", 2)
    monkeypatch.setattr(train, "evaluate", lambda *a: {**honest(*a), "bound": next(bounds, 3.0)})
    monkeypatch.setattr(train.MaskedDiffusion, "early_stopping", early_stopping)
    train.main([corpus, *TINY, "--max_iters=12", "--eval_interval=4", "--learning_rate=0",
                f"--out={tmp_path}/run"])
    assert read_state(tmp_path / "run", "best.pt")["step"] == kept
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["2", "4", "8", "12"]
    *samples, last = re.split(r"(?m)^step .*\n", capsys.readouterr().out)[1:]
    assert len(set(samples)) == 1 and last.startswith(samples[0])


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_nan_ends_the_run_and_keeps_what_was_saved(corpus, tmp_path, monkeypatch, what):
    """A loss that is no number at step 8, or a weight after step 10 while every loss is fine."""
    def spoil(n, method, loss):
        if what == "loss" and n == 8:
            loss.fill_(math.nan)
        if what == "weight" and n == 10:
            next(method.parameters()).data.fill_(math.nan)

    after_each_step(monkeypatch, spoil)
    line = refused(train.main, [corpus, *TINY, "--max_iters=20", "--eval_interval=5",
                                f"--out={tmp_path}/run"])
    assert "is no number at step 10" in line and "try a lower --learning_rate" in line
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = read_state(tmp_path / "run")
    assert state["step"] == 5
    assert all(x.isfinite().all() for x in tensors(state))


def test_an_evaluation_looks_at_windows_over_the_whole_split(corpus, monkeypatch):
    """The twentieth of a run's time is spread over val: its first and last window, in order."""
    val = torch.arange(1000)[:, None]
    ar = train.build(tiny(corpus, "--objective=ar"), {"alphabet": "abc"})
    masked = train.build(tiny(corpus), {"alphabet": "abc"})
    c = tiny(corpus, "--eval_interval=100", "--batch_size=32")
    few, levels = train.eval_subset(val, c, ar)
    assert (len(few), levels) == (320, 1)
    few, levels = train.eval_subset(val, c, masked)
    assert (len(few), levels) == (80, 4)
    assert (few[0].item(), few[-1].item()) == (0, 999)
    assert (few.diff(dim=0) >= 12).all()
    few, _ = train.eval_subset(val, tiny(corpus, "--eval_interval=1"), masked)
    assert len(few) == 2
    data = Text(c)
    ends = [data.train[:16], data.train[:len(data.train) // 16 * 16][-16:]]
    assert torch.equal(train.training_windows(data, 9)[[0, -1]], torch.stack(ends))
    monkeypatch.setattr(train, "WORLD_SIZE", 2)            # each trains on half of the rows
    assert len(train.eval_subset(val, c, masked)[0]) == 40


# -------------------------------------------------------------------------------------------------
# several processes

def test_two_processes_equal_one(corpus, tmp_path, monkeypatch):
    """To the bit, also where they stop: the second is told to, and both do at the same step."""
    args = [corpus, *TINY, "--max_iters=100000", "--eval_interval=10", "--grad_accum=2",
            "--compile=False"]
    process = start("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py",
                    *args, f"--out={tmp_path}/two")
    wait_for(tmp_path / "two/ckpt.pt", process)
    _, second = os.popen(f"pgrep -P {process.pid}").read().split()
    os.kill(int(second), signal.SIGTERM)
    code, out = end(process)
    assert code == 0 and out.count("stopped at step") == 1, out
    signal_at(monkeypatch, read_state(tmp_path / "two")["step"] - 1, signal.SIGTERM)
    train.main([*args, f"--out={tmp_path}/one"])
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_second_of_two_processes_says_nothing_unless_it_ends(corpus, tmp_path, monkeypatch,
                                                                 capsys):
    """Nor does it write. The first one is played: it says what this one says, and adds nothing."""
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2)):
        for module in (config, checkpoint, step, train):
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name in ("init_process_group", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(train.dist, name, lambda *_, **named: None)

    def gather(data, ours):
        data[:] = [{"name": "file 0.txt", "sha256": sha256 or ours["sha256"]}, ours]

    def fail(_):
        raise RuntimeError("Connection closed by peer")

    sha256 = ""
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    args = [corpus, *TINY, "--grad_accum=2", "--max_iters=4", f"--out={tmp_path}/run"]
    train.main([*args, "--eval_interval=2"])
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()
    assert refused(train.main, [*args, "--grad_accum=3"]) == (
        "grad_accum=3 is not a multiple of the 2 processes")
    monkeypatch.setattr(train.dist, "all_reduce", fail)
    assert refused(train.main, args) == "another process has ended, so this one does"
    sha256 = "another"
    assert refused(train.main, args) == "processes read different data: file 0.txt, file text.txt"


# -------------------------------------------------------------------------------------------------
# the compiler

def test_compiled_the_run_is_the_same_after_a_resume_too(corpus, tmp_path, monkeypatch, capsys):
    """A run of 1,000 steps is compiled after its first evaluation: learns what the eager run
    learns, and stopped and resumed it is the straight run to the bit."""
    monkeypatch.setattr(train, "FIRST_EVAL", 4)
    torch._dynamo.reset()

    def train_until(step, out, *typed):
        with monkeypatch.context() as patch:
            signal_at(patch, step - 1, signal.SIGTERM)
            train.main([*typed, f"--out={tmp_path}/{out}"])

    args = [corpus, *TINY, "--max_iters=1000", "--eval_interval=10"]
    train_until(20, "eager", *args, "--compile=False")
    train_until(20, "short", *args, "--max_iters=999")
    train_until(20, "straight", *args)
    train_until(9, "cut", *args)
    train_until(20, "cut", "--resume")
    assert "going on without" not in capsys.readouterr().out
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    assert_same_run(tmp_path / "eager", tmp_path / "short")
    eager, compiled = [read_log(tmp_path / name) for name in ("eager", "straight")]
    assert eager[0] == compiled[0] and eager[2] != compiled[2]
    assert float(compiled[2]["bound"]) == pytest.approx(float(eager[2]["bound"]), abs=0.01)


class Lookup(torch.nn.Module):
    """A network that has little to compile, but an embedding."""

    def __init__(self, V):
        super().__init__()
        self.embed = torch.nn.Embedding(V + 1, V)

    def forward(self, x, t):
        return self.embed(x)


def test_compiled_gradients_are_the_same_every_time(corpus):
    """On two threads, with enough work for both."""
    c = tiny(corpus, "--block_size=128", "--batch_size=64")
    data = Text(c)
    V = len(data.tokenizer)
    method = train.MaskedDiffusion(Lookup(V), V)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    training_step(method, data, c).compile()
    gradients = []
    for _ in range(6):
        train.reseed(1)
        method(data.batch(c.batch_size)).backward()
        gradients.append(method.net.embed.weight.grad.clone())
        method.zero_grad()
    torch.set_num_threads(threads)
    for other in gradients[1:]:
        assert torch.equal(gradients[0], other)


def test_without_a_compiler_one_line_and_on(corpus, tmp_path, monkeypatch, capsys):
    """The run is the eager one, and the time that was lost does not count."""
    failed = []
    clock = time.perf_counter

    def fail(*_):
        failed.append("once")
        raise RuntimeError("no C++ compiler\nhere")

    monkeypatch.setattr(train, "FIRST_EVAL", 2)
    monkeypatch.setattr(torch, "compile", lambda *_, **named: fail)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(failed))
    signal_at(monkeypatch, 5, signal.SIGTERM)
    args = [corpus, *TINY, "--max_iters=1000", "--eval_interval=3"]
    train.main([*args, f"--out={tmp_path}/run"])
    out = capsys.readouterr().out
    assert out.count("going on without torch.compile, which failed: RuntimeError: no C++ "
                     "compiler\n") == len(failed) == 1
    assert read_state(tmp_path / "run")["progress"]["seconds"] < 1000
    train.main([*args, "--compile=False", f"--out={tmp_path}/eager"])
    assert_same_run(tmp_path / "eager", tmp_path / "run")

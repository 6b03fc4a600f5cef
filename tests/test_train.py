"""The loop: the step, the moving average, resuming, several processes, the compiler, NaNs."""
import math
import os
import signal
import time

import pytest
import torch
from conftest import (
    TINY, assert_same_run, end, last_line, read_log, read_state, start, tensors, training_step)

import train
from checkpoint import load
from config import Masked, parse
from data import Text
from step import TrainingStep, build_optimizers, get_lr


def tiny(corpus, *typed):
    return Masked(**parse([corpus, *TINY, *typed], Masked))


def after_step(monkeypatch, step, do):
    """Call do(method) when training has taken that many steps."""
    honest = TrainingStep.__call__

    def watched(train_step, i, stop):
        result = honest(train_step, i, stop)
        if i + 1 == step:
            do(train_step.method)
        return result

    monkeypatch.setattr(TrainingStep, "__call__", watched)


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
              for opt in build_optimizers(method, c, torch.zeros(()))]
    assert sorted(sum(groups, [])) == sorted(id(p) for p in method.parameters())
    blocks = method.net.blocks.parameters()
    muon = {id(p) for p in blocks if p.ndim == 2 and min(p.shape) >= 16}   # not the convolution
    assert muon
    if optimizer == "adamw":
        assert len(groups) == 1
    else:
        assert set(groups[1]) == muon


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_under_a_scaler_the_step_is_the_step_without_it(corpus, clip):
    """A gradient is unscaled first and then clipped: with grad_clip=0.01 it is cut by far."""
    c = tiny(corpus, f"--grad_clip={clip}", "--dropout=0", "--warmup_iters=0")
    data = Text(c)
    stepped = []
    for enabled in (False, True):
        train.reseed(1)
        method = train.build(c, data.meta)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0 ** 10)
        train_step = training_step(method, data, c, scaler)
        sizes = []

        def look(opt, *_, sizes=sizes):
            for group in opt.param_groups:
                sizes.extend(p.grad.norm() for p in group["params"])

        for opt in train_step.opts:
            opt.register_step_pre_hook(look)
        train_step(0)
        stepped.append((torch.stack(sizes).norm().item(), [*method.parameters()]))
    (size, plain), (scaled_size, scaled) = stepped
    if clip:
        assert size == pytest.approx(clip, rel=1e-3)
    else:
        assert size > 0.1
    assert scaled_size == pytest.approx(size, rel=1e-4)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_two_micro_batches_are_the_mean_of_both(corpus):
    """The gradient and the loss of grad_accum=2 are the means over its micro-batches, each of a
    seed of its own."""
    c = tiny(corpus, "--grad_accum=2", "--grad_clip=0")
    data = Text(c)
    method = train.build(c, data.meta)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.1)
    losses = []
    for i in range(2):
        train.reseed(c.seed, 5, i)
        losses.append(method(data.batch(c.batch_size)))
    expected = torch.autograd.grad(sum(losses) / 2, [*method.parameters()])
    seen = []

    def look(*_):
        if not seen:
            seen.extend(p.grad.clone() for p in method.parameters())

    train_step = training_step(method, data, c)
    for opt in train_step.opts:
        opt.register_step_pre_hook(look)
    total, _ = train_step(5)
    assert losses[0] != losses[1]
    assert total.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    for a, b in zip(expected, seen, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_average_is_the_average_and_no_graph(corpus, tmp_path, monkeypatch):
    c = tiny(corpus, "--max_iters=4", f"--out={tmp_path}/run")
    data = Text(c)
    meta = {"method": "masked", **data.meta}
    method = train.build(c, meta)
    average = [p.detach().clone() for p in method.parameters()]
    shown = []
    honest = TrainingStep.__call__

    def watched(train_step, step, stop):
        result = honest(train_step, step, stop)
        for a, p in zip(average, method.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - min(c.ema, (1 + step) / (10 + step)))
        return result

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    out = train.fit(method, data, c, meta, lambda ema, out: shown.append((ema, out)))
    (ema, shown_in), = shown                               # one evaluation, at the last step
    assert shown_in == out == tmp_path / "run"
    assert not ema.training
    assert not any(p.requires_grad or p.grad_fn for p in ema.parameters())
    for a, b in zip(average, read_state(out, "best.pt")["ema"].values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_log_has_the_mean_loss_since_the_last_evaluation_and_the_rate(corpus, tmp_path,
                                                                          monkeypatch):
    losses = []
    honest = TrainingStep.__call__

    def watched(*args):
        time.sleep(0.01)
        loss, stop = honest(*args)
        losses.append(loss.item())
        return loss, stop

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    c = tiny(corpus, "--max_iters=7", "--eval_interval=3")
    train.main([corpus, *TINY, "--max_iters=7", "--eval_interval=3", f"--out={tmp_path}/run"])
    first, second, third = read_log(tmp_path / "run")
    assert float(first["loss"]) == pytest.approx(sum(losses[:3]) / 3)
    assert float(second["loss"]) == pytest.approx(sum(losses[3:6]) / 3)
    assert float(third["loss"]) == pytest.approx(losses[6])
    assert read_state(tmp_path / "run")["progress"]["seconds"] >= 7 * 0.01
    assert float(second["lr"]) == get_lr(5, c)
    assert float(second["bits"]) == pytest.approx(float(second["bound"]) / math.log(2))


# -------------------------------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize("how", ["--optimizer=muon", "--optimizer=adamw", "--objective=ar"])
def test_resume_is_the_straight_run_to_the_bit(corpus, tmp_path, monkeypatch, how):
    """Stopped by a signal at a step without evaluation, then resumed: weights, moving average,
    optimizer state and log are the same."""
    args = [corpus, *TINY, "--max_iters=23", "--eval_interval=5", how]
    train.main([*args, f"--out={tmp_path}/straight"])
    with monkeypatch.context() as patch:
        after_step(patch, 13, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        train.main([*args, f"--out={tmp_path}/cut"])
    assert read_state(tmp_path / "cut")["step"] == 14
    assert [row["step"] for row in read_log(tmp_path / "cut")] == ["5", "10"]
    train.main(["--resume", f"--out={tmp_path}/cut"])
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    assert [row["step"] for row in read_log(tmp_path / "cut")] == ["5", "10", "15", "20", "23"]


def test_evaluating_more_often_changes_no_weight(corpus, tmp_path):
    for interval in (3, 7):
        train.main([corpus, *TINY, "--max_iters=10", f"--eval_interval={interval}",
                    f"--out={tmp_path}/{interval}"])
    a = read_state(tmp_path / "3")
    b = read_state(tmp_path / "7")
    for part in ("model", "ema", "AdamW", "Muon"):
        for x, y in zip(tensors(a[part]), tensors(b[part]), strict=True):
            assert torch.equal(x, y)


def test_a_finished_run_goes_on_with_more_steps(corpus, tmp_path, capsys):
    train.main([corpus, *TINY, "--max_iters=3", f"--out={tmp_path}/run"])
    train.main(["--resume", "--max_iters=5", f"--out={tmp_path}/run"])
    assert "max_iters: 3 -> 5" in capsys.readouterr().out
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["3", "5"]


# -------------------------------------------------------------------------------------------------
# what is best, and what is no number

def test_training_learns_and_best_is_the_lowest(corpus, tmp_path, capsys):
    """On squares and their roots both objectives learn; best.pt is the row with the lowest bound,
    and the last line says its bound over the whole split."""
    for objective in ("masked", "ar"):
        out = tmp_path / objective
        train.main([corpus, *TINY, "--n_embd=32", "--max_iters=300", "--eval_interval=100",
                    "--dropout=0", "--learning_rate=2e-2", f"--objective={objective}",
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


@pytest.mark.parametrize("early_stopping, kept", [(True, 40), (False, 120)])
def test_a_rising_bound_ends_early_where_it_says_something(early_stopping, kept, corpus, tmp_path,
                                                           monkeypatch):
    """best.pt has the weights of the lowest bound; those of the last step where the method says
    that its bound chooses nothing."""
    bounds = iter([1.0, 0.5, 2.0, 3.0])
    honest = train.evaluate
    monkeypatch.setattr(train, "FIRST_EVAL", 20)
    monkeypatch.setattr(train, "evaluate", lambda *a: {**honest(*a), "bound": next(bounds, 3.0)})
    monkeypatch.setattr(train.MaskedDiffusion, "early_stopping", early_stopping)
    train.main([corpus, *TINY, "--max_iters=120", "--eval_interval=40", f"--out={tmp_path}/run"])
    assert read_state(tmp_path / "run", "best.pt")["step"] == kept


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_nan_ends_the_run_and_keeps_what_was_saved(corpus, tmp_path, monkeypatch, what):
    """A loss that is no number at step 8, or a weight after step 10 while every loss is fine."""
    honest = TrainingStep.__call__

    def watched(train_step, i, stop):
        loss, stop = honest(train_step, i, stop)
        if what == "loss" and i == 7:
            loss = loss * math.nan
        if what == "weight" and i == 9:
            next(train_step.method.parameters()).data.fill_(math.nan)
        return loss, stop

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    with pytest.raises(SystemExit) as e:
        train.main([corpus, *TINY, "--max_iters=20", "--eval_interval=5", f"--out={tmp_path}/run"])
    line = last_line(e.value)
    assert "is no number at step 10" in line and "try a lower --learning_rate" in line
    state = read_state(tmp_path / "run")
    assert state["step"] == 5
    assert all(x.isfinite().all() for x in tensors(state))


def test_every_process_looks_at_windows_over_the_whole_split(corpus):
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


# -------------------------------------------------------------------------------------------------
# several processes

def torchrun(*args):
    """On a port that is free."""
    return start("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *args)


@pytest.mark.parametrize("script", ["train.py", "embed_diffusion.py --fluency=1"])
def test_two_processes_equal_one(script, corpus, tmp_path):
    args = [*script.split(), corpus, *TINY, "--max_iters=6", "--eval_interval=3", "--grad_accum=2"]
    one = start(*args, f"--out={tmp_path}/one")
    two = torchrun(*args, f"--out={tmp_path}/two")
    for process in (one, two):
        code, out = end(process)
        assert code == 0, out
        assert out.count("done: ") == 1
    a = read_state(tmp_path / "one")
    b = read_state(tmp_path / "two")
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert (x - y).abs().max() < 1e-6
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        assert float(one["bound"]) == pytest.approx(float(two["bound"]), abs=1e-6)
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-6)


def test_three_micro_batches_do_not_fit_two_processes(corpus, tmp_path):
    process = torchrun("train.py", corpus, *TINY, "--grad_accum=3", f"--out={tmp_path}/run")
    code, out = end(process)
    assert code and "grad_accum=3 is not a multiple of the 2 processes" in out


def test_processes_that_read_different_texts_stop(corpus, tmp_path):
    (tmp_path / "0.txt").write_text("another text entirely, of the same length or not.\n" * 300)
    with open(corpus.partition("=")[2]) as f:
        (tmp_path / "1.txt").write_text(f.read())
    command = (f"exec python train.py --dataset={tmp_path}/$RANK.txt {' '.join(TINY)} "
               f"--grad_accum=2 --out={tmp_path}/run")
    code, out = end(torchrun("--no-python", "bash", "-c", command))
    assert code and "processes read different data: file 0.txt, file 1.txt" in out


def test_ctrl_c_with_two_processes_saves_the_step_that_was_reached(corpus, tmp_path):
    """One of them is told to stop: both do, at the same step."""
    process = torchrun("train.py", corpus, *TINY, "--grad_accum=2", "--max_iters=100000",
                       "--compile=False", f"--out={tmp_path}/run")
    while not (tmp_path / "run/ckpt.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    children = os.popen(f"pgrep -P {process.pid}").read().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGTERM)
    code, out = end(process)
    assert code == 0 and "--resume goes on" in out
    assert read_state(tmp_path / "run")["step"] > 100


# -------------------------------------------------------------------------------------------------
# the compiler

def test_compiled_the_run_is_the_same_after_a_resume_too(corpus, tmp_path):
    """Long enough to be compiled: learns what the eager run learns, and killed and resumed it is
    the straight run to the bit."""
    args = ["train.py", corpus, *TINY, "--max_iters=1000", "--eval_interval=250"]
    for name, more in (("eager", ["--compile=False"]), ("straight", [])):
        code, out = end(start(*args, *more, f"--out={tmp_path}/{name}"))
        assert code == 0 and "torch.compile" not in out, out
    process = start(*args, f"--out={tmp_path}/cut")
    log = tmp_path / "cut/log.csv"
    while not (log.exists() and "\n250," in log.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    code, out = end(start("train.py", "--resume", f"--out={tmp_path}/cut"))
    assert code == 0, out
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    bounds = [float(read_log(tmp_path / name)[-1]["bound"]) for name in ("eager", "straight")]
    assert bounds[1] == pytest.approx(bounds[0], abs=0.05)


def test_compiled_gradients_are_the_same_every_time(corpus):
    """On two threads, with enough work for both."""
    c = tiny(corpus, "--n_embd=32", "--block_size=128", "--batch_size=64", "--dropout=0")
    data = Text(c)
    threads = torch.get_num_threads()
    method = train.build(c, data.meta)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.set_num_threads(2)
    try:
        training_step(method, data, c).compile()
        gradients = []
        for _ in range(6):
            method.zero_grad()
            train.reseed(1)
            method(data.batch(c.batch_size)).backward()
            gradients.append([p.grad.clone() for p in method.parameters()])
    finally:
        torch.set_num_threads(threads)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.equal(a, b)


def test_without_a_compiler_one_line_and_on(corpus, tmp_path):
    code, out = end(start(
        "train.py", corpus, *TINY, "--max_iters=1000", "--eval_interval=1000",
        f"--out={tmp_path}/run", env={"CXX": "/nowhere/c++", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
                                      "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}))
    assert code == 0 and "Traceback" not in out, out
    assert out.count("going on without torch.compile") == 1

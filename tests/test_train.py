"""The loop: resuming, kill -9, several processes, what is written and what is kept."""
import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from config import Masked
from data import Text

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=4", "--warmup_iters=2", "--dropout=0.1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i * i} is the square of {i}.\n" for i in range(400)), encoding="utf-8")
    return f"--dataset={path}"


def shell(*args, env=None, **k):
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **k)


def log(out):
    with open(out / "log.csv", encoding="utf-8") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def weights(out):
    state = torch.load(out / "ckpt.pt", weights_only=True)
    return [*state["model"].values(), *state["ema"].values(), *(v for o in state["optimizers"] for s in o["state"].values() for v in s.values())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("how", ["--optimizer=muon", "--optimizer=adamw", "--objective=ar"])
def test_resume_is_the_straight_run_bit_for_bit(corpus, tmp_path, how):
    """Stopped by a signal at a step that is no evaluation's, resumed: weights, moving average, optimizer state and log are the same."""
    args = [corpus, *TINY, "--max_iters=23", "--eval_interval=5", how]
    train.main([*args, f"--out={tmp_path}/straight"])
    stop_at(13, args + [f"--out={tmp_path}/cut"])
    assert torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["step"] == 14
    train.main(["--resume", f"--out={tmp_path}/cut"])
    assert same(tmp_path / "straight", tmp_path / "cut")
    assert log(tmp_path / "straight") == log(tmp_path / "cut") and len(log(tmp_path / "cut")) == 5


def stop_at(step, args):
    """train.main, which gets a SIGTERM after that many steps."""
    honest = train.train_step

    def step_and_signal(method, data, c, i, *rest):
        result = honest(method, data, c, i, *rest)
        if i + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    train.train_step = step_and_signal
    try:
        train.main(args)
    finally:
        train.train_step = honest


def test_evaluating_more_often_changes_no_weight(corpus, tmp_path):
    for interval in (3, 7):
        train.main([corpus, *TINY, "--max_iters=10", f"--eval_interval={interval}", f"--out={tmp_path}/{interval}"])
    assert same(tmp_path / "3", tmp_path / "7")


def test_kill_9_at_any_moment_loses_nothing(corpus, tmp_path):
    """Killed again and again while it steps, evaluates and saves (every third step), the run ends as the straight one does."""
    args = [corpus, *TINY, "--max_iters=240", "--eval_interval=3"]
    straight = shell("train.py", *args, f"--out={tmp_path}/straight")
    p = shell("train.py", *args, f"--out={tmp_path}/killed")
    kills = 0
    while kills < 4:
        ckpt = tmp_path / "killed/ckpt.pt"
        before, deadline = ckpt.stat().st_mtime_ns if ckpt.exists() else 0, time.time() + 60
        while not (ckpt.exists() and ckpt.stat().st_mtime_ns > before) and time.time() < deadline:
            time.sleep(.01)
        time.sleep(.037 * kills)
        assert p.poll() is None, p.stdout.read()
        p.kill()
        p.wait()
        kills += 1
        p = shell("train.py", "--resume", f"--out={tmp_path}/killed")
    out = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and "done" in out, out
    assert straight.wait(timeout=120) == 0
    assert same(tmp_path / "straight", tmp_path / "killed") and log(tmp_path / "straight") == log(tmp_path / "killed")


@pytest.mark.parametrize("script", ["train.py", "embed_diffusion.py --fluency=1"])
def test_two_processes_equal_one(script, corpus, tmp_path):
    args = [*script.split(), corpus, *TINY, "--max_iters=6", "--eval_interval=3", "--grad_accum=2"]
    one = shell(*args, f"--out={tmp_path}/one")
    two = shell("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", *args, f"--out={tmp_path}/two")
    for p in (one, two):
        out = p.communicate(timeout=120)[0]
        assert p.returncode == 0, out
    worst = max((a - b).abs().max().item() for a, b in zip(weights(tmp_path / "one"), weights(tmp_path / "two"), strict=True))
    assert worst < 1e-6
    assert [r["step"] for r in log(tmp_path / "two")] == ["3", "6"]
    assert float(log(tmp_path / "two")[1]["bound"]) == pytest.approx(float(log(tmp_path / "one")[1]["bound"]), abs=1e-6)


def test_three_micro_batches_do_not_fit_two_processes(corpus, tmp_path):
    p = shell("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29618", "train.py", corpus, *TINY, "--grad_accum=3",
              f"--out={tmp_path}/three")
    assert "grad_accum=3 is not a multiple of the 2 processes" in p.communicate(timeout=120)[0] and p.returncode


def test_ctrl_c_saves_and_says_how_to_go_on(corpus, tmp_path):
    p = shell("train.py", corpus, *TINY, "--max_iters=100000", f"--out={tmp_path}/run")
    while not (tmp_path / "run/ckpt.pt").exists():                   # the first report, at step 100
        assert p.poll() is None, p.stdout.read()
        time.sleep(.05)
    p.send_signal(signal.SIGINT)
    out = p.communicate(timeout=60)[0]
    assert p.returncode == 0 and "--resume goes on" in out.splitlines()[-1] and "Traceback" not in out
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] > 100


def test_a_fresh_run_moves_the_old_one_aside(corpus, tmp_path, capsys):
    args = [corpus, *TINY, "--max_iters=2", f"--out={tmp_path}/run"]
    for _ in range(3):
        train.main(args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "ckpt.pt").exists() and (p / "best.pt").exists() for p in tmp_path.iterdir())
    assert f"to go on with it: python train.py --resume --out={tmp_path}/run.2" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_more_steps(corpus, tmp_path, capsys):
    train.main([corpus, *TINY, "--max_iters=3", f"--out={tmp_path}/run"])
    train.main(["--resume", "--max_iters=5", f"--out={tmp_path}/run"])
    assert "max_iters: 3 -> 5" in capsys.readouterr().out
    assert [r["step"] for r in log(tmp_path / "run")] == ["3", "5"]


def test_a_nan_stops_with_step_and_rate_and_keeps_what_was_saved(corpus, tmp_path, monkeypatch):
    honest = train.train_step
    monkeypatch.setattr(train, "train_step", lambda m, d, c, i, *r: (honest(m, d, c, i, *r)[0] * (math.nan if i == 7 else 1), False))
    with pytest.raises(SystemExit, match="is no number, at step 10, learning rate .*try a lower --learning_rate"):
        train.main([corpus, *TINY, "--max_iters=20", "--eval_interval=5", f"--out={tmp_path}/run"])
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 5


def test_nan_weights_are_never_saved(corpus, tmp_path, monkeypatch):
    honest = train.train_step

    def poison(method, data, c, i, *rest):
        result = honest(method, data, c, i, *rest)
        if i == 9:
            next(method.parameters()).data.fill_(math.nan)
        return result

    monkeypatch.setattr(train, "train_step", poison)
    with pytest.raises(SystemExit, match="is no number, at step 10"):
        train.main([corpus, *TINY, "--max_iters=20", "--eval_interval=5", f"--out={tmp_path}/run"])
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())


def test_an_overflow_in_fp16_skips_every_optimizer(corpus):
    """One bad gradient, in a parameter of AdamW: nothing moves, Muon's matrices included, and the scale backs off."""
    c = Masked(dataset=corpus.split("=")[1], n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=4)
    data = Text(c)
    method = train.build(c, data.meta)
    opts, scaler, stop = train.optimizers(method, c), torch.amp.GradScaler("cpu", enabled=True), SimpleNamespace(asked=False)
    for step in range(3):
        train.train_step(method, data, c, step, opts, scaler, stop)
    before, scale = [p.clone() for p in method.parameters()], scaler.get_scale()
    for bad in (math.inf, math.nan):
        hook = method.net.head.weight.register_hook(lambda g, bad=bad: g * bad)
        train.train_step(method, data, c, 3, opts, scaler, stop)
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True)) and scaler.get_scale() < scale
    train.train_step(method, data, c, 4, opts, scaler, stop)
    assert not any(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_the_average_is_the_average_and_no_graph(corpus, tmp_path, monkeypatch):
    seen = []
    honest = train.train_step
    monkeypatch.setattr(train, "train_step", lambda m, *r: (honest(m, *r), seen.append([p.detach().clone() for p in m.parameters()]))[0])
    c = train.parse([corpus, *TINY, "--max_iters=4", f"--out={tmp_path}/run"], Masked())
    data = Text(c)
    meta = {"method": "masked", **data.meta}
    method = train.build(c, meta)
    average = [p.detach().clone() for p in method.parameters()]
    ema = train.fit(method, data, c, meta)
    assert not any(p.requires_grad or p.grad_fn for p in ema.parameters())
    for step, now in enumerate(seen):
        decay = min(c.ema, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)]
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(average, ema.parameters(), strict=True))


def test_killed_in_the_last_evaluation_a_run_can_still_be_ended(corpus, tmp_path, monkeypatch, capsys):
    honest = train.evaluate

    def killed(method, val, levels, **k):
        if levels == method.levels:
            raise KeyboardInterrupt
        return honest(method, val, levels, **k)

    monkeypatch.setattr(train, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([corpus, *TINY, "--max_iters=4", f"--out={tmp_path}/run"])
    monkeypatch.undo()
    train.main(["--resume", f"--out={tmp_path}/run"])
    assert "over the whole validation split" in capsys.readouterr().out and "bound" in torch.load(tmp_path / "run/best.pt", weights_only=True)


def test_a_second_run_in_the_same_folder_stops_the_first(corpus, tmp_path):
    """Each keeps what is its own: the first run's checkpoints move aside whole, and it stops at its next save."""
    args = ["train.py", corpus, *TINY, "--max_iters=100000", "--eval_interval=100", f"--out={tmp_path}/run"]
    first = shell(*args)
    while not (tmp_path / "run/ckpt.pt").exists():
        time.sleep(.05)
    second = shell(*args)
    out = first.communicate(timeout=60)[0]
    assert first.returncode == 1 and "another run has taken" in out.splitlines()[-1]
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=60)
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["step"] for name in ("run.1", "run"))
    assert a % 100 == 0 and b > 0


def test_processes_that_read_different_texts_stop(corpus, tmp_path):
    other = tmp_path / "0.txt"
    other.write_text("another text entirely, of the same length or not.\n" * 300)
    (tmp_path / "1.txt").write_text(Path(corpus.split("=")[1]).read_text())
    command = f"{sys.executable} train.py --dataset={tmp_path}/$RANK.txt {' '.join(TINY)} --grad_accum=2 --out={tmp_path}/run"
    p = shell("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29619", "--no-python", "bash", "-c", command)
    assert "the processes read different data: file 0.txt, file 1.txt" in p.communicate(timeout=120)[0] and p.returncode


@pytest.mark.parametrize("room", [100_000, 0])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays_whole(corpus, tmp_path, room):
    """A limit on the size of files, in the middle of a checkpoint of 280 kB or right at its start, stands for the full disk."""
    args = ["train.py", corpus, *TINY, "--n_embd=64", f"--out={tmp_path}/run"]
    assert shell(*args, "--max_iters=3").wait(timeout=60) == 0
    whole = (tmp_path / "run/ckpt.pt").read_bytes()
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d)); sys.argv = %r; "
               "runpy.run_path('train.py', run_name='__main__')")
    p = shell("-c", limited % (room, room, ["train.py", "--resume", "--max_iters=6", f"--out={tmp_path}/run"]))
    out = p.communicate(timeout=60)[0]
    assert p.returncode == 1 and "cannot write" in out.splitlines()[-1] and "Traceback" not in out, out
    assert (tmp_path / "run/ckpt.pt").read_bytes() == whole and not list((tmp_path / "run").glob("*.part"))


def test_training_learns_and_best_is_the_lowest(corpus, tmp_path):
    """On squares and their roots both objectives learn; best.pt is the row with the lowest bound, and says its bound over the whole split."""
    for objective in ("masked", "ar"):
        out = tmp_path / objective
        train.main([corpus, *TINY, "--n_embd=32", "--max_iters=300", "--eval_interval=100", "--dropout=0", "--learning_rate=2e-2",
                    f"--objective={objective}", f"--out={out}"])
        rows = log(out)
        m, c, meta = train.load(out, train.build)
        best = min(rows, key=lambda r: float(r["bound"]))
        assert float(best["bound"]) < math.log(len(meta["alphabet"])) * .7 and str(meta["step"]) == best["step"] and meta["method"] == objective
        e = train.evaluate(m, Text(c).val, m.levels)
        assert e["bound"] == torch.load(out / "best.pt", weights_only=True)["bound"]


@pytest.mark.parametrize("early_stopping, kept", [(True, 40), (False, 120)])
def test_a_rising_bound_ends_early_where_it_says_something(early_stopping, kept, corpus, tmp_path, monkeypatch):
    """best.pt has the weights of the lowest bound; those of the last step where the method says that its bound chooses nothing."""
    glances, evaluate = iter([1.0, .5, 2.0, 3.0]), train.evaluate
    monkeypatch.setattr(train, "FIRST", 20)
    monkeypatch.setattr(train, "evaluate", lambda *a: {**evaluate(*a), "bound": next(glances, 3.0)})
    monkeypatch.setattr(train.MaskedDiffusion, "early_stopping", early_stopping)
    train.main([corpus, *TINY, "--max_iters=120", "--eval_interval=40", f"--out={tmp_path}/run"])
    assert train.load(tmp_path / "run", train.build)[2]["step"] == kept


def test_the_rate_rises_holds_and_falls_to_zero():
    c = Masked(warmup_iters=9, max_iters=100, learning_rate=1.0)
    rates = [train.learning_rate(c, i) for i in range(100)]
    assert rates[0] == .1 and rates[9] == rates[50] == 1 and rates[99] == pytest.approx(.02)


def test_compiled_the_run_is_the_same_after_a_resume_too(corpus, tmp_path):
    """Long enough to be compiled: learns what the eager run learns, and stopped and resumed it is the straight run bit for bit."""
    args = ["train.py", corpus, *TINY, "--max_iters=1000", "--eval_interval=250"]
    for name, more in (("eager", ["--compile=False"]), ("straight", [])):
        out = shell(*args, *more, f"--out={tmp_path}/{name}").communicate(timeout=300)[0]
        assert "done" in out and "torch.compile" not in out, out
    p = shell(*args, f"--out={tmp_path}/cut")
    while not any(r["step"] == "250" for r in (log(tmp_path / "cut") if (tmp_path / "cut/log.csv").exists() else [])):
        time.sleep(.05)
    p.kill()
    p.wait()
    assert "done" in shell("train.py", "--resume", f"--out={tmp_path}/cut").communicate(timeout=300)[0]
    assert same(tmp_path / "straight", tmp_path / "cut") and log(tmp_path / "straight") == log(tmp_path / "cut")
    eager, compiled = (float(log(tmp_path / name)[-1]["bound"]) for name in ("eager", "straight"))
    assert compiled == pytest.approx(eager, abs=.05)


def test_compiled_gradients_are_the_same_every_time(corpus):
    """On two threads, with enough work for both."""
    c = Masked(dataset=corpus.split("=")[1], n_layer=1, n_head=1, n_embd=32, block_size=128, batch_size=64)
    data, threads = Text(c), torch.get_num_threads()
    method = train.build(c, data.meta)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=.1)
    torch.set_num_threads(2)
    train.compile_net(method, data, c)
    gradients = []
    for _ in range(6):
        method.zero_grad()
        train.reseed(1)
        method(data.batch(c.batch_size)).backward()
        gradients.append([p.grad.clone() for p in method.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for g in gradients for a, b in zip(g, gradients[0], strict=True))


def test_without_a_compiler_one_line_and_on(corpus, tmp_path):
    p = shell("train.py", corpus, *TINY, "--max_iters=1000", "--eval_interval=1000", f"--out={tmp_path}/run",
              env={"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"})
    out = p.communicate(timeout=300)[0]
    assert p.returncode == 0 and out.count("going on without torch.compile") == 1 and "Traceback" not in out, out

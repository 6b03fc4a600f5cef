"""Nothing of the user's is lost: whose a folder is, which checkpoint writes, what is saved when the
disk is full, a file is in the way, a terminal closes or the process is killed."""
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import (
    TINY, assert_same_run, end, last_line, read_log, read_state, run, start, wait_for)

import checkpoint
import train
from checkpoint import find_checkpoint
from step import TrainingStep

SHORT = [*TINY, "--max_iters=2"]
ENDLESS = [*TINY, "--max_iters=1000000", "--eval_interval=20", "--compile=False"]


def files(folder):
    """Everything in a folder: {path: contents}."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def assert_kept(before):
    for path, contents in before.items():
        assert path.read_bytes() == contents, path


def refused(args):
    with pytest.raises(SystemExit) as e:
        train.main(args)
    return last_line(e.value)


def make_run(folder, status, age, names=("best.pt", "ckpt.pt"), best=b""):
    """A folder that looks like a run's, of so many seconds ago."""
    folder.mkdir(parents=True)
    (folder / "status").write_text(status)
    for name in names:
        (folder / name).write_bytes(best)
        os.utime(folder / name, (time.time() - age, time.time() - age))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The repository's folder, as far as checkpoint.py knows."""
    monkeypatch.setattr(checkpoint, "HERE", tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------------------
# a run owns its folder

@pytest.mark.parametrize("out, script", [(".", "train.py"), ("results", "train.py"),
                                         ("out", "train.py"), ("out/masked", "analog_bits.py")])
def test_a_folder_that_holds_no_run_is_used_as_it_is_and_a_run_refused(corpus, copy, out, script):
    """Beside the files that are there, in the folder of the repository too. Again: one line that
    names --resume, and nothing has changed, or moved."""
    (copy / "out/other").mkdir(parents=True)
    (copy / "out/other/notes.txt").write_text("mine")
    before = files(copy)
    args = [script, corpus, *SHORT, f"--out={out}"]
    run(*args, cwd=copy)
    assert_kept(before)
    assert (copy / out / "status").read_text() == "finished"
    after = files(copy)
    made = {path.relative_to(copy / out).as_posix() for path in after.keys() - before.keys()}
    assert made == {"ckpt.pt", "best.pt", "log.csv", "status"}
    line, = run(*args, cwd=copy, code=1).stderr.splitlines()
    assert line == f"{out} holds a run: --resume goes on with it, another --out begins anew"
    assert files(copy) == after
    assert not copy.with_name("clone.1").exists()


@pytest.mark.parametrize("file", ["best.pt", "ckpt.pt", "log.csv", "status", "samples.png"])
def test_whatever_a_run_would_write_over_is_kept(corpus, tmp_path, file):
    """best.pt without ckpt.pt; and a picture or a log of somebody else."""
    (tmp_path / file).write_text("mine")
    assert "holds a run: --resume" in refused([corpus, *SHORT, f"--out={tmp_path}"])
    assert files(tmp_path) == {tmp_path / file: b"mine"}


def test_the_default_folder_that_is_taken_is_left_for_the_next_number(corpus, home, capsys):
    for n, name in enumerate(["masked", "masked.1", "masked.2"]):
        before = files(home)
        train.main([corpus, *SHORT])
        out = capsys.readouterr().out
        assert_kept(before)
        assert read_state(home / "out" / name)["step"] == 2
        assert f"done: python generate.py --out={home}/out/{name}\n" in out
        said = f"{home}/out/masked holds a run, this one is in {home}/out/{name}\n"
        assert (said in out) == (n > 0)
    train.main([corpus, *SHORT, "--objective=ar"])         # each method has its own
    assert read_state(home / "out/ar")["method"] == "ar"


def test_of_many_starts_at_once_each_has_a_folder_of_its_own(corpus, copy, tmp_path):
    """Three with the default folder get three numbers; of two that are told the same, one."""
    args = ["train.py", corpus, *SHORT]
    default = [start(*args, cwd=copy) for _ in range(3)]
    typed = [start(*args, "--out=one", cwd=copy) for _ in range(2)]
    results = [end(process) for process in default]
    assert [code for code, _ in results] == [0] * 3, results
    done = [out.rpartition("--out=")[2].strip() for _, out in results]
    expected = ["masked", "masked.1", "masked.2"]
    assert sorted(done) == [str(copy / "out" / name) for name in expected]
    results = [end(process) for process in typed]
    assert sorted(code for code, _ in results) == [0, 1]
    assert sum("one holds a run: --resume" in out for _, out in results) == 1
    for folder in [*(copy / "out").iterdir(), copy / "one"]:
        assert read_state(folder)["step"] == 2
        assert [row["step"] for row in read_log(folder)] == ["2"]


def test_of_two_resumes_the_first_ends_at_its_next_save(corpus, tmp_path):
    """With one line, and the folder is whole: the second goes on alone."""
    out = tmp_path / "run"
    first = start("train.py", corpus, *ENDLESS, f"--out={out}")
    wait_for(out / "ckpt.pt", first)
    second = start("train.py", "--resume", f"--out={out}")
    code, text = end(first)
    assert code == 1 and "Traceback" not in text
    assert text.splitlines()[-1] == f"another process trains in {out}, so this one ends"
    wait_for(out / "ckpt.pt", second, newer_than=time.time_ns())
    second.send_signal(signal.SIGTERM)
    assert end(second)[0] == 0
    step = read_state(out)["step"]
    assert [int(row["step"]) for row in read_log(out)] == [*range(20, step + 1, 20)]
    assert not list(out.glob("*.part"))


def test_what_another_process_saved_is_not_saved_over(corpus, tmp_path, monkeypatch):
    """A token that is not ours: refused before a byte is written, best.pt and ckpt.pt alike."""
    train.main([corpus, *SHORT, f"--out={tmp_path}/run"])
    before = files(tmp_path)
    c = train.Masked(out=f"{tmp_path}/run")
    mine = checkpoint.RunFolder(c, {"method": "masked"}, resumed=True)
    (tmp_path / "run/status").write_text("another")
    for name in ("best.pt", "ckpt.pt"):
        with pytest.raises(SystemExit, match="another process trains in .*run, so this one ends$"):
            mine.save(name, {"step": 3})
    after = files(tmp_path)
    assert after.pop(tmp_path / "run/status") == b"another"
    del before[tmp_path / "run/status"]
    assert after == before


# -------------------------------------------------------------------------------------------------
# which checkpoint writes

def test_the_newest_finished_run_writes_else_the_shipped_one(home, capsys):
    shipped = home / "results/masked.pt"
    assert find_checkpoint("", "masked") == shipped
    assert capsys.readouterr() == ("", "")
    make_run(home / "out/masked", "token", age=50)
    assert find_checkpoint("", "masked") == shipped        # a run that was stopped replaces nothing
    make_run(home / "out/masked.1", "finished", age=40)
    make_run(home / "out/masked.10", "finished", age=20)
    make_run(home / "out/masked.9", "finished", age=30)    # by time, not by name
    capsys.readouterr()
    assert find_checkpoint("", "masked") == home / "out/masked.10"
    assert capsys.readouterr() == ("", "")                 # an older unfinished run is not named
    make_run(home / "out/masked.11", "token", age=10)
    make_run(home / "out/masked.12", "token", age=5, names=["ckpt.pt"])   # cannot write yet
    make_run(home / "out/ar", "finished", age=1)           # is another method's
    assert find_checkpoint("", "masked") == home / "out/masked.10"
    out, err = capsys.readouterr()
    line, = err.splitlines()                               # stdout is for the text
    assert f"{home}/out/masked.11 is newer, but not finished" in line and out == ""
    assert f"--out={home}/out/masked.11 " in line
    assert find_checkpoint("typed", "masked") == checkpoint.Path("typed")
    assert capsys.readouterr() == ("", "")


def test_resume_goes_on_with_the_newest_run_that_is_unfinished(corpus, home, monkeypatch):
    train.main([corpus, *SHORT])
    assert refused(["--resume"]) == "no run of masked is unfinished: pass --out=FOLDER"
    assert refused(["--resume", "--objective=ar"]).startswith("no run of ar is unfinished")
    for _ in range(2):
        train.main([corpus, *SHORT])
    for n, name in enumerate(["masked", "masked.2", "masked.1"]):        # the first is finished
        folder = home / "out" / name
        if n:
            (folder / "status").write_text("token")
        os.utime(folder / "ckpt.pt", (time.time() - 10 + n, time.time() - 10 + n))
    make_run(home / "out/masked.3", "token", age=0, names=[])           # killed before it saved
    train.main(["--resume", "--max_iters=4"])
    steps = [read_state(home / "out" / name)["step"] for name in ("masked", "masked.1", "masked.2")]
    assert steps == [2, 4, 2]
    assert (home / "out/masked.1/status").read_text() == "finished"
    train.main(["--resume", "--max_iters=3"])
    assert read_state(home / "out/masked.2")["step"] == 3


def test_as_it_is_typed_in_a_fresh_clone(corpus, copy):
    """Stopped after 100 steps: the shipped model goes on writing, and a line says how to write with
    the other; --resume finds it; finished, it writes. The same of a sibling, which ships none."""
    process = start("train.py", corpus, *ENDLESS, cwd=copy)
    wait_for(copy / "out/masked/ckpt.pt", process)
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0
    done = run("generate.py", "--length=8", "--steps=2", cwd=copy)
    first, second = done.stderr.splitlines()[:2]
    assert f"--out={copy}/out/masked writes with it" in first
    assert second.startswith(f"{copy}/results/masked.pt: masked, trained on shakespeare for 2,800")
    run("train.py", "--resume", "--max_iters=1", cwd=copy)
    done = run("generate.py", "--length=8", "--steps=2", cwd=copy)
    assert done.stderr.startswith(f"{copy}/out/masked: masked, trained on file text.txt")
    sample = ["analog_bits.py", "sample", "--length=8", "--steps=2"]
    line, = run(*sample, cwd=copy, code=1).stderr.splitlines()
    assert line.startswith(f"no checkpoint at {copy}/results/bits.pt: train first")
    run("analog_bits.py", corpus, *SHORT, cwd=copy)
    assert f"{copy}/out/bits: bits, " in run(*sample, cwd=copy).stderr


# -------------------------------------------------------------------------------------------------
# what was computed is saved before anything else

def trained_beside(corpus, out, capsys, *typed):
    """Train to step 6, evaluating at 3 and 6. -> what was said"""
    capsys.readouterr()
    train.main([corpus, *TINY, "--max_iters=6", "--eval_interval=3", f"--out={out}", *typed])
    state = read_state(out)
    assert state["step"] == 6
    assert [row[0] for row in state["progress"]["log"]] == [3, 6]
    assert (out / "status").read_text() == "finished"
    return capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_told_once(corpus, tmp_path, capsys, monkeypatch):
    def denied(path, rows):
        assert (path.parent / "ckpt.pt").exists()          # which comes first
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(train, "write_log", denied)
    said = trained_beside(corpus, tmp_path / "run", capsys)
    assert said.count("training goes on, but something was not written: ") == 1


def test_a_log_that_became_a_folder_stops_nothing(corpus, tmp_path, capsys, monkeypatch):
    honest = train.write_log

    def in_the_way(path, rows):
        if path.is_file():
            path.unlink()
            path.mkdir()
        honest(path, rows)

    monkeypatch.setattr(train, "write_log", in_the_way)
    said = trained_beside(corpus, tmp_path / "run", capsys)
    assert said.count("training goes on, but something was not written: ") == 1


def test_a_sample_that_cannot_be_written_stops_nothing(tmp_path, capsys, monkeypatch):
    """A folder called samples.png, made while the run goes on."""
    import mnist_ddpm
    few = mnist_ddpm.draw_digits(50, 20)
    monkeypatch.setattr(mnist_ddpm, "draw_digits", lambda: few)
    monkeypatch.setattr(mnist_ddpm, "sample_batches", lambda *_: torch.zeros(100, 28, 28))
    honest = train.log_evaluation

    def log_evaluation(*args):
        (tmp_path / "run/samples.png").mkdir(exist_ok=True)
        honest(*args)

    monkeypatch.setattr(train, "log_evaluation", log_evaluation)
    mnist_ddpm.main(["--dataset=digits", "--n_layer=1", "--n_head=1", "--n_embd=16",
                     "--batch_size=2", "--max_iters=4", "--eval_interval=2",
                     f"--out={tmp_path}/run"])
    assert capsys.readouterr().out.count("training goes on, but something was not written: ") == 1
    assert read_state(tmp_path / "run")["step"] == 4
    assert (tmp_path / "run/status").read_text() == "finished"


@pytest.mark.parametrize("closed", ["| head -2", "2>&1 | head -2", "> /dev/full"])
def test_a_reader_that_leaves_stops_no_training(corpus, tmp_path, closed):
    """A pipe whose reader has gone, also behind stderr, and a full disk behind stdout."""
    args = [corpus, *TINY, "--max_iters=150", "--eval_interval=50", f"--out={tmp_path}/run"]
    shell = f"{sys.executable} train.py {' '.join(args)} {closed}"
    process = start("-c", "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])", shell,
                    env={"PYTHONUNBUFFERED": ""})
    _, out = end(process)
    assert "Traceback" not in out and "Error" not in out
    assert read_state(tmp_path / "run")["step"] == 150
    assert (tmp_path / "run/status").read_text() == "finished"
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["50", "100", "150"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_step_that_was_reached(corpus, tmp_path, name):
    """Ctrl-C, a scheduler, and a lost ssh, which says so twice."""
    out = tmp_path / "run"
    process = start("train.py", corpus, *TINY, "--max_iters=1000000", "--compile=False",
                    "--eval_interval=1000000", f"--out={out}")
    wait_for(out / "ckpt.pt", process)                     # the first evaluation, at step 100
    process.send_signal(signal.Signals[name])
    if name == "SIGHUP":
        process.send_signal(signal.SIGHUP)
    code, text = end(process)
    assert code == 0 and "Traceback" not in text, text
    step = read_state(out)["step"]
    assert step > 100
    last = text.splitlines()[-1]
    assert last == f"stopped at step {step} and saved: --resume --out={out} goes on"
    assert (out / "status").read_text() != "finished"


def test_nohup_means_that_a_hangup_stops_nothing(corpus, tmp_path):
    out = tmp_path / "run"
    process = start("train.py", corpus, *ENDLESS, f"--out={out}",
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(out / "ckpt.pt", process)
    process.send_signal(signal.SIGHUP)
    wait_for(out / "ckpt.pt", process, newer_than=time.time_ns() + 10 ** 8)
    process.kill()
    process.communicate()


def test_only_a_second_ctrl_c_ends_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stop = train.StopSignal()
    try:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop.requested
            stop.requested = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore()
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("what", ["renamed", "removed", "status"])
def test_a_folder_that_is_gone_is_made_again(corpus, tmp_path, monkeypatch, what):
    """Renamed, removed, or without its status: the run ends as the straight one does. Its best
    weights are then those of the evaluations since."""
    out = tmp_path / "run"
    honest = TrainingStep.__call__

    def watched(train_step, i, stop):
        if i == 10 and what == "renamed":
            out.rename(tmp_path / "old")
        if i == 10 and what == "removed":
            shutil.rmtree(out)
        if i == 10 and what == "status":
            (out / "status").unlink()
        return honest(train_step, i, stop)

    args = [corpus, *TINY, "--max_iters=24", "--eval_interval=8"]
    train.main([*args, f"--out={tmp_path}/straight"])
    bounds = iter([0.1, 0.3, 0.2])
    evaluate = train.evaluate
    monkeypatch.setattr(TrainingStep, "__call__", watched)
    monkeypatch.setattr(train, "evaluate", lambda *a: {**evaluate(*a), "bound": next(bounds, 0.5)})
    train.main([*args, f"--out={out}"])
    ours = read_state(out)["model"].values()
    theirs = read_state(tmp_path / "straight")["model"].values()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert [row["step"] for row in read_log(out)] == ["8", "16", "24"]
    best = read_state(out, "best.pt")
    assert best["step"] == (8 if what == "status" else 24)
    assert (out / "status").read_text() == "finished"
    if what == "renamed":
        assert read_state(tmp_path / "old")["step"] == 8
        assert read_state(tmp_path / "old", "best.pt")["step"] == 8


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
sys.argv = {args!r}
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("room", [100_000, 0])
def test_a_full_disk_is_one_line_and_what_was_saved_stays_whole(corpus, tmp_path, room):
    """A limit on the size of files, in the middle of a checkpoint or right at its start, stands for
    the full disk. With room again the run goes on."""
    out = tmp_path / "run"
    args = ["train.py", corpus, *TINY, "--n_embd=64", f"--out={out}"]
    run(*args, "--max_iters=3")
    assert (out / "best.pt").stat().st_size > 100_000
    before = files(tmp_path)
    resume = ["train.py", "--resume", "--max_iters=6", f"--out={out}"]
    done = run("-c", LIMITED.format(room=room, args=resume), code=1)
    line, = done.stderr.splitlines()
    assert "cannot write" in line or room == 0 and "File too large" in line
    after = files(tmp_path)
    del before[out / "status"]
    del after[out / "status"]                              # says that this process has begun
    assert after == before
    run(*resume)
    assert read_state(out)["step"] == 6


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), OSError(5, "Input/output error"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")])
def test_a_save_that_fails_leaves_no_piece(corpus, tmp_path, monkeypatch, error):
    """Whatever torch.save says of a disk, after it wrote a part."""
    out = tmp_path / "run"
    train.main([corpus, *SHORT, f"--out={out}"])
    before = files(out)

    def save(state, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    line = refused(["--resume", "--max_iters=6", f"--out={out}"])
    assert line.startswith(f"cannot write {out}/best.pt, what was saved is complete: ")
    assert str(error).splitlines()[0] in line
    after = files(out)
    assert before.pop(out / "status") == b"finished"
    assert len(after.pop(out / "status")) == 16
    assert after == before


def test_kill_9_at_any_moment_loses_nothing(corpus, tmp_path):
    """Killed again and again while it steps, evaluates and saves (every third step), the run ends
    as the straight one does."""
    args = [corpus, *TINY, "--max_iters=240", "--eval_interval=3"]
    straight = start("train.py", *args, f"--out={tmp_path}/straight")
    out = tmp_path / "killed"
    process = start("train.py", *args, f"--out={out}")
    for kills in range(4):
        before = 0
        if (out / "ckpt.pt").exists():
            before = (out / "ckpt.pt").stat().st_mtime_ns
        wait_for(out / "ckpt.pt", process, newer_than=before)
        time.sleep(0.037 * kills)
        assert process.poll() is None
        process.kill()
        process.communicate()
        process = start("train.py", "--resume", f"--out={out}")
    code, text = end(process)
    assert code == 0 and "done" in text, text
    assert end(straight)[0] == 0
    assert_same_run(tmp_path / "straight", out)


def test_killed_in_the_last_evaluation_a_run_can_still_be_ended(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_best", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([corpus, *SHORT, f"--out={out}"])
    assert (out / "status").read_text() != "finished"
    train.main(["--resume", f"--out={out}"])
    assert (out / "status").read_text() == "finished"

"""Nothing of the user's is lost: whose a folder is, which checkpoint writes, what is saved when the
disk is full, a file is in the way, a terminal closes or the process is killed."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT, TINY, assert_same_run, read_log, read_state, run, start, wait_for)
from test_train import after_each_step, refused, tiny

import analog_bits
import checkpoint
import config
import generate
import train
from checkpoint import find_checkpoint
from data import Text

SHORT = [*TINY, "--max_iters=2"]
THRICE = [*TINY, "--max_iters=6", "--eval_interval=2"]
RUN = {"ckpt.pt", "best.pt", "log.csv", "status", "samples.txt"}


def test_shipped_checkpoints_of_a_script_have_the_same_settings():
    """So that none says, after cloning, that it was made before some of them."""
    configs = [torch.load(ROOT / f"results/{name}.pt", weights_only=True)["config"]
               for name in ("masked", "judge")]
    assert configs[0].keys() == configs[1].keys()


def files(folder):
    """Everything in a folder: {path: contents}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def but_status(folder):
    """The same without the status, which says that a process has begun."""
    return {path: contents for path, contents in files(folder).items() if path.stem != "status"}


def make_run(folder, status, age, names=("best.pt", "ckpt.pt")):
    """A folder that looks like a run's, of so many seconds ago."""
    folder.mkdir(parents=True)
    (folder / "status").write_text(status)
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age, time.time() - age))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The repository's folder, as far as checkpoint.py knows."""
    folder = tmp_path / "clone"
    (folder / "results").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "HERE", folder)
    monkeypatch.chdir(folder)
    return folder


# -------------------------------------------------------------------------------------------------
# a run owns its folder

@pytest.mark.parametrize("out, script", [(".", train), ("results", train), ("out", train),
                                         ("out/masked", analog_bits)])
def test_a_folder_that_holds_no_run_is_used_as_it_is_and_a_run_refused(corpus, home, out, script):
    """Beside the files that are there, in the folder of the repository too. Again: one line that
    names --resume, and nothing has changed, or moved."""
    (home / "out/other").mkdir(parents=True)
    for name in ("train.py", "results/masked.pt", "out/other/notes.txt"):
        (home / name).write_text("mine")
    before = files(home)
    args = [corpus, *SHORT, f"--out={out}"]
    script.main(args)
    after = files(home)
    made = {home / out / name for name in RUN}
    assert after.keys() - before.keys() == made and after.items() >= before.items()
    assert (home / out / "status").read_text() == "finished"
    line = f"{out} holds a run: --resume goes on with it, another --out begins anew"
    assert refused(script.main, args) == line
    assert files(home) == after and [*home.parent.iterdir()] == [home]


@pytest.mark.parametrize("file", [*sorted(RUN), "samples.png", "progress.png"])
def test_whatever_a_run_would_write_over_is_kept(corpus, tmp_path, file):
    """best.pt without ckpt.pt; and a picture or a log of somebody else."""
    (tmp_path / file).write_text("mine")
    assert "holds a run: --resume" in refused(train.main, [corpus, *SHORT, f"--out={tmp_path}"])
    assert files(tmp_path) == {tmp_path / file: b"mine"}


@pytest.mark.parametrize("seen", [checkpoint.FILES, ()])
def test_the_default_folder_that_is_taken_is_left_for_the_next_number(corpus, home, monkeypatch,
                                                                      capsys, seen):
    """Also where it seemed free, for another process was faster: only one can create its log. The
    newest writes. Each method has its own."""
    monkeypatch.setattr(checkpoint, "FILES", seen)
    for n, name in enumerate(["masked", "masked.1", "masked.2"]):
        before = files(home)
        train.main([corpus, *SHORT])
        out = capsys.readouterr().out
        assert files(home).items() >= before.items()
        assert read_state(home / "out" / name)["step"] == 2
        assert f"done: python generate.py --out={home}/out/{name}\n" in out
        said = f"{home}/out/masked holds a run, this one is in {home}/out/{name}\n"
        assert (said in out) == (n > 0)
    assert "holds a run: --resume" in refused(train.main, [corpus, *SHORT, "--out=out/masked"])
    generate.main(["--length=8", "--steps=2"])
    assert capsys.readouterr().err.startswith(f"{home}/out/masked.2: masked, trained on file text")
    sample = ["sample", "--length=8", "--steps=2"]
    line = refused(analog_bits.main, sample)
    assert line.startswith(f"no checkpoint at {home}/results/bits.pt: train first")
    analog_bits.main([corpus, *SHORT])
    analog_bits.main(sample)
    assert capsys.readouterr().err.startswith(f"{home}/out/bits: bits, trained on file text")


def test_in_a_fresh_clone_a_run_is_kept_from_wherever_it_is_started(corpus, copy, tmp_path):
    run(str(copy / "train.py"), corpus, *SHORT, cwd=tmp_path)
    assert {path.name for path in (copy / "out/masked").iterdir()} == RUN


def test_of_two_resumes_the_first_ends_at_its_next_save(corpus, tmp_path, monkeypatch):
    """With one line, before it writes a byte: the second has gone on alone."""
    kept = {}

    def go_on(n, *_):
        if n == 3:
            monkeypatch.undo()
            train.main(["--resume", f"--out={tmp_path}"])
            kept.update(files(tmp_path))

    after_each_step(monkeypatch, go_on)
    line = refused(train.main, [corpus, *THRICE, f"--out={tmp_path}"])
    assert line == f"another process trains in {tmp_path}, so this one ends"
    assert files(tmp_path) == kept
    assert {path.name for path in kept} == RUN
    assert [row["step"] for row in read_log(tmp_path)] == ["2", "4", "6"]


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


def test_resume_goes_on_with_the_newest_run_that_is_unfinished(corpus, home, capsys):
    train.main([corpus, *SHORT])
    line = "no run of masked is unfinished: pass --out=FOLDER"
    assert refused(train.main, ["--resume"]) == line
    assert refused(train.main, ["--resume", "--objective=ar"]) == line.replace("masked", "ar")
    for n, name in enumerate(["masked", "masked.2", "masked.1"]):        # the first is finished
        folder = home / "out" / name
        if n:
            shutil.copytree(home / "out/masked", folder)
            (folder / "status").write_text("token")
        os.utime(folder / "ckpt.pt", (time.time() - 10 + n, time.time() - 10 + n))
    make_run(home / "out/masked.3", "token", age=0, names=[])           # killed before it saved
    train.main(["--resume", "--max_iters=4"])
    assert "max_iters: 2 -> 4\n" in capsys.readouterr().out
    steps = [read_state(home / "out" / name)["step"] for name in ("masked", "masked.1", "masked.2")]
    assert steps == [2, 4, 2]
    train.main(["--resume", "--max_iters=3"])
    assert read_state(home / "out/masked.2")["step"] == 3


# -------------------------------------------------------------------------------------------------
# what was computed is saved before anything else

def test_what_cannot_be_written_is_told_once_and_stops_nothing(corpus, tmp_path, capsys,
                                                               monkeypatch):
    """A log that became a folder, and samples on a full disk; the checkpoint comes first."""
    honest = train.write_log

    def in_the_way(path, rows):
        assert read_state(path.parent)["step"] == rows[-1][0]
        if path.is_file():
            path.unlink()
            path.mkdir()
            path.with_name("samples.txt").symlink_to("/dev/full")
        honest(path, rows)

    monkeypatch.setattr(train, "write_log", in_the_way)
    c = tiny(corpus, "--max_iters=6", "--eval_interval=3", f"--out={tmp_path}")
    data = Text(c)
    meta = {"method": "masked", **data.meta}
    train.fit_text(train.build(c, meta), data, c, meta, config.Sample(steps=4), None)
    said = capsys.readouterr().out
    assert said.count("training goes on, but something was not written: ") == 2
    assert said.count("No space left on device") == 1
    assert [row[0] for row in read_state(tmp_path)["progress"]["log"]] == [3, 6]
    assert (tmp_path / "status").read_text() == "finished"


def test_a_reader_that_leaves_stops_no_training(corpus, tmp_path):
    """A pipe whose reader has gone; also behind stderr, with a full disk behind stdout."""
    command = f"'{sys.executable}' train.py {corpus} {' '.join(THRICE)} --out={tmp_path}"
    shell = f"{command}/pipe | head -2 & {command}/full 2>&1 > /dev/full | true & wait"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert len(done.stdout.splitlines()) == 2 and done.stderr == ""
    for name in ("pipe", "full"):
        assert (tmp_path / name / "status").read_text() == "finished"
        assert [row["step"] for row in read_log(tmp_path / name)] == ["2", "4", "6"]


def test_nohup_means_that_a_hangup_stops_nothing_and_kill_9_loses_nothing(corpus, tmp_path):
    process = start("train.py", corpus, *TINY, "--max_iters=1000000", "--eval_interval=20",
                    "--compile=False", f"--out={tmp_path}",
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(tmp_path / "ckpt.pt", process)
    process.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "ckpt.pt", process, newer_than=time.time_ns() + 10 ** 8)
    process.kill()
    process.communicate()
    step = read_state(tmp_path)["step"]
    train.main(["--resume", f"--max_iters={step + 20}", f"--out={tmp_path}"])
    assert [int(row["step"]) for row in read_log(tmp_path)] == [*range(20, step + 21, 20)]


def test_only_a_second_ctrl_c_ends_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt), train.StopSignal() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop.requested
            stop.requested = False
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("gone, best", [("run", 6), ("run/status", 2)])
def test_a_folder_that_is_gone_is_made_again(corpus, tmp_path, monkeypatch, gone, best):
    """Renamed, or without its status. Its best weights are those of the evaluations since, if the
    others are not there."""
    def rename(n, *_):
        if n == 3:
            (tmp_path / gone).rename(tmp_path / "old")

    def evaluate(ema, *args):
        weights.append(next(ema.parameters()).clone())
        return {**honest(ema, *args), "bound": next(bounds)}

    weights = []
    bounds = iter([0.1, 0.3, 0.2, 0.1])
    honest = train.evaluate
    after_each_step(monkeypatch, rename)
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main([corpus, *THRICE, f"--out={tmp_path}/run"])
    assert torch.equal(weights[-1], weights[best // 2 - 1])
    assert read_state(tmp_path / "run")["step"] == 6
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["2", "4", "6"]
    assert read_state(tmp_path / "run", "best.pt")["step"] == best
    assert (tmp_path / "run/status").read_text() == "finished"
    if gone == "run":
        assert read_state(tmp_path / "old")["step"] == 2


@pytest.mark.parametrize("room, line", [
    (100_000, r"^cannot write .*/\w+.pt, what was saved is complete: "),
    (0, "^OSError: .*File too large")])
def test_a_full_disk_is_one_line_and_what_was_saved_stays_whole(corpus, tmp_path, monkeypatch,
                                                                capsys, room, line):
    """In the middle of a checkpoint or right at its start: a limit on the size of files stands for
    it. With room again the run goes on."""
    train.main([corpus, *SHORT, "--n_embd=64", f"--out={tmp_path}"])
    assert (tmp_path / "best.pt").stat().st_size > 100_000
    before = but_status(tmp_path)
    resume = ["--resume", "--max_iters=6", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *resume])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(SystemExit, match=line):
            config.run(train.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert but_status(tmp_path) == before
    if not room:
        assert (tmp_path / "status").read_text() == "finished"
    train.main(resume)
    assert read_state(tmp_path)["step"] == 6


def test_a_save_that_fails_leaves_no_piece(corpus, tmp_path, monkeypatch):
    """Whatever the system says of a disk, after a part was written."""
    train.main([corpus, *SHORT, f"--out={tmp_path}"])
    before = but_status(tmp_path)

    replace = os.replace

    def fail(part, path):
        if path.suffix == ".pt":
            raise OSError(5, "Input/output error")
        replace(part, path)

    monkeypatch.setattr(os, "replace", fail)
    line = refused(train.main, ["--resume", "--max_iters=40", f"--out={tmp_path}"])   # bound falls
    assert line == (f"cannot write {tmp_path}/best.pt, what was saved is complete: "
                    "[Errno 5] Input/output error")
    assert but_status(tmp_path) == before


class Killed(BaseException):
    """As after kill -9, nothing more is done."""


def test_killed_at_any_moment_of_an_evaluation_a_run_loses_nothing(corpus, tmp_path, monkeypatch):
    """Resumed, it ends as the straight one."""
    moments = []

    def watch(patch, owner, name):
        honest = getattr(owner, name)

        def watched(*args):
            moments.append(name)
            if len(moments) == last:
                if name == "save":
                    args[1].write_bytes(b"half")
                raise Killed
            return honest(*args)

        patch.setattr(owner, name, watched)

    train.main([corpus, *THRICE, f"--out={tmp_path}/straight"])
    for last in range(6, 11):        # of the second: best.pt, ckpt.pt, each renamed, log.csv
        out = tmp_path / str(last)
        moments.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            watch(patch, torch, "save")
            watch(patch, os, "replace")
            watch(patch, train, "write_log")
            train.main([corpus, *THRICE, f"--out={out}"])
        train.main(["--resume", f"--out={out}"])
        assert_same_run(tmp_path / "straight", out)
        assert {path.name for path in out.iterdir()} == RUN


def test_ctrl_c_in_the_last_evaluation_leaves_a_run_that_can_be_ended(corpus, tmp_path,
                                                                      monkeypatch):
    honest = train.evaluate
    evaluated = []

    def interrupted(*args):
        evaluated.append("once")
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    line = refused(train.main, [corpus, *SHORT, f"--out={tmp_path}"])
    assert line == f"the run is saved: --resume --out={tmp_path} evaluates it"
    assert (tmp_path / "status").read_text() != "finished"
    train.main(["--resume", f"--out={tmp_path}"])
    assert (tmp_path / "status").read_text() == "finished"

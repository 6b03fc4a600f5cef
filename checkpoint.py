"""The folder of a run, and the checkpoints in it. A new run never uses the folder of another.

    ckpt.pt    all that resuming needs
    best.pt    the EMA weights with the lowest bound, for everybody else
    log.csv    a line per evaluation
    status     a secret of the process that trains here, or "finished"
    samples.txt    what it wrote at each evaluation; of digits progress.png, a row at each, and
                   samples.png, the last that were drawn

A checkpoint is a dict of tensors and plain Python: method, script, config, alphabet, data, step,
ema; ckpt.pt has more.
"""
import contextlib
import csv
import functools
import os
import secrets
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from config import DEVICE, HERE, RANK, check, first_line, is_out_of_memory, parse, print0

# the settings that --resume may change; dataset only to another path of the same data
CHANGEABLE = ("dataset", "data_dir", "max_iters", "eval_interval", "windows", "compile", "dropout",
              "batch_size", "grad_accum", "learning_rate", "weight_decay", "grad_clip", "ema")
# train_ce, val_ce: cross-entropies under the same noise; of Gaussian methods the bounds.
# bound_0.4: the mean of its estimates at noise levels from 0.2 to 0.4
LOG_COLUMNS = ["step", "seconds", "loss", "bound", "stderr", "bits", "masked_ce", "lr", "train_ce",
               "val_ce", "bound_0.2", "bound_0.4", "bound_0.6", "bound_0.8", "bound_1.0"]
FILES = ("ckpt.pt", "best.pt", "log.csv", "status", "samples.txt", "samples.png",
         "progress.png")         # what a run may write


class RunFolder:
    """The folder of a run that trains. meta: what its checkpoints say beside the weights."""

    def __init__(self, c, meta, resumed):
        self.meta = {**meta, "config": {**asdict(c), "out": "", "resume": False}}
        self.secret = secrets.token_hex(8)
        self.path = Path(c.out)
        if RANK == 0 and not resumed:
            self.path = claim_folder(c.out, meta["method"])
            self.write_status(self.secret)

    def write_status(self, status):
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "status.part"
        temporary.write_text(status)
        os.replace(temporary, self.path / "status")

    def restore(self, parts, state):
        """Load a checkpoint into the parts of a run, {name: module, optimizer or scaler}."""
        before = state["data"]
        now = self.meta["data"]
        check(before["sha256"] == now["sha256"],
              f"this run was trained on {before['name']}, not on this {now['name']}")
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, state[name])
            elif state[name]:                              # the scaler of a CPU has no state
                part.load_state_dict(state[name])
        if RANK == 0:                                      # from now on the folder is ours
            self.write_status(self.secret)

    def save(self, name, state):
        """Write to a temporary file, then rename: a checkpoint is complete or not there."""
        path = self.path / name
        temporary = path.with_suffix(".part")
        try:
            if not (self.path / "status").exists():        # renamed or removed: made again
                self.write_status(self.secret)
            owner = (self.path / "status").read_text()
            check(owner == self.secret, f"another process trains in {self.path}, so this one ends")
            torch.save({**self.meta, **state}, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:           # RuntimeError: torch's full disk
            temporary.unlink(missing_ok=True)
            raise SystemExit(f"cannot write {path}, what was saved is complete: "
                             f"{first_line(error)}") from None


def load_optimizer(opt, state):
    """Load an optimizer's state, but not its settings: --resume may change them, and the device."""
    settings = [dict(group) for group in opt.param_groups]
    opt.load_state_dict(state)
    for group, own in zip(opt.param_groups, settings, strict=True):
        group.update(own)


def claim_folder(typed, name):
    """The folder of a new run: the one that is typed, else the first of out/name, out/name.1, ...
    that holds no run. It is ours if we create its log.csv: only one process can."""
    default = HERE / "out" / name
    out = Path(typed or default)
    n = 0
    while True:
        out.mkdir(parents=True, exist_ok=True)
        if not any((out / file).exists() for file in FILES):
            with contextlib.suppress(FileExistsError):     # another process was faster
                (out / "log.csv").open("x").close()
                break
        check(not typed, f"{out} holds a run: --resume goes on with it, another --out begins anew")
        n += 1
        out = default.with_name(f"{name}.{n}")
    if n:
        print0(f"{default} holds a run, this one is in {out}")
    return out


def newest_first(name, file):
    """Those of the folders out/name, out/name.1, ... that have a file."""
    found = [*HERE.glob(f"out/{name}/{file}"), *HERE.glob(f"out/{name}.*/{file}")]
    return [path.parent for path in sorted(found, key=os.path.getmtime, reverse=True)]


def out_option(path):
    """--out=path as it is typed in a shell."""
    return f"--out={shlex.quote(str(path))}"


def is_finished(folder):
    status = folder / "status"
    return status.exists() and status.read_text() == "finished"


def find_checkpoint(typed, name):
    """The checkpoint to sample from: typed, or of the newest finished run, or that in results/."""
    if typed:
        return Path(typed)
    found = newest_first(name, "best.pt")
    finished = [folder for folder in found if is_finished(folder)]
    if found[:1] != finished[:1]:
        print(f"{found[0]} is newer, but not finished: {out_option(found[0])} writes with it",
              file=sys.stderr)
    return [*finished, HERE / f"results/{name}.pt"][0]


def read_checkpoint(path, settings, methods):
    """The dict in a checkpoint of one of `methods`; of a run's folder, in its best.pt."""
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    check(path.exists(), f"no checkpoint at {path}: train first, or pass --out=FOLDER")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        method = state["method"]
        finite = all(p.isfinite().all() for p in state["ema"].values())
    except Exception as error:           # whatever torch.load makes of a file that is not its own
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        reason = type(error).__name__
        raise SystemExit(f"{path} is damaged, or no checkpoint of ours ({reason})") from None
    check(method in methods, f"{path} is a {method} checkpoint, not {' or '.join(methods)}")
    check(finite, f"{path} has weights that are no numbers: its run diverged")
    names = {f.name for f in fields(settings)}
    check(names >= set(state["config"]), f"{path} was made by another version")
    missing = ", ".join(sorted(names - set(state["config"])))
    if missing:
        print(f"{path} was made before these settings existed: {missing}; their defaults are taken",
              file=sys.stderr)
    return state


def load(path, settings, build, methods):
    """A checkpoint or a run's folder -> the method with its EMA weights, its settings, the dict."""
    state = read_checkpoint(path, settings, methods)
    c = settings(**state["config"])
    try:
        method = build(c, state)
        method.load_state_dict(state["ema"])
    except (KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise SystemExit(f"{path} does not fit this network: the code was changed since") from None
    return method.to(DEVICE).eval(), c, state


def start_or_resume(argv, settings, methods, recipes=None):
    """-> the settings, and the checkpoint to go on from, or None without --resume. Resuming takes
    its settings, but for what is typed. methods: what the run may be, the default first."""
    typed = parse(argv, settings, recipes)
    c = settings(**typed)
    if not c.resume:
        return c, None
    name = typed.get("objective", methods[0])
    out = Path(c.out)
    if not c.out:
        found = newest_first(name, "ckpt.pt")
        unfinished = [folder for folder in found if not is_finished(folder)]
        check(unfinished, f"no run of {name} is unfinished: pass --out=FOLDER")
        out = unfinished[0]
    state = read_checkpoint(out / "ckpt.pt", settings, methods)
    for key, new in typed.items():
        old = state["config"].get(key)
        if new != old and key not in ("out", "resume"):
            check(key in CHANGEABLE, f"this run has {key}={old}, which cannot become {new}")
            print0(f"{key}: {old} -> {new}")
    return settings(**{**state["config"], **typed, "out": str(out)}), state


def write_log(path, rows):
    with path.open("w", newline="") as f:
        log = csv.writer(f)
        log.writerow(LOG_COLUMNS)
        for row in rows:
            missing = len(LOG_COLUMNS) - len(row)          # of a run that an older version began
            log.writerow(row + [""] * missing)


def try_to_write(write, *args):
    """Call write(*args). What cannot be written is said once, and training goes on."""
    try:
        write(*args)
    except OSError as error:
        print_once(f"training goes on, but something was not written: {error}")


print_once = functools.cache(print0)

"""Train masked diffusion, or with --objective=ar its autoregressive baseline, on characters.
fit and evaluate are shared by every script that trains.   settings: config.Masked

    python train.py
    python train.py --dataset=my.txt --max_iters=2000
    python train.py --resume                    # goes on where it stopped; on a CPU, to the bit
    torchrun --nproc_per_node=2 train.py --grad_accum=2
"""
import copy
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from numpy.random import SeedSequence
from torch import nn
from tqdm import tqdm

from checkpoint import RunFolder, out_option, start_or_resume, try_to_write, write_log
from config import AMP, DEVICE, RANK, WORLD_SIZE, Masked, Sample, check, print0, run
from data import Text
from diffusion import Autoregressive, MaskedDiffusion
from model import Transformer
from step import TrainingStep, get_lr, reseed

SETTINGS = Masked
SAMPLER = Sample
FIRST_EVAL = 100                                 # an early sample; compiling waits for it


def build(c, meta):
    """The module to train, MaskedDiffusion or Autoregressive, from settings and alphabet."""
    V = len(meta["alphabet"])
    embed = nn.Embedding(V + 1, c.n_embd)
    net = Transformer(c, embed, V, causal=c.objective == "ar")
    if c.objective == "ar":
        return Autoregressive(net, V)
    return MaskedDiffusion(net, V, c.schedule, c.loss)


@torch.no_grad()
def estimate(method, x, levels, batch_size=128, seed=0, every=1):
    """Estimates of the bound on windows 0, every, 2 every, ... of x (W, T), each at `levels`
    stratified noise levels, with the same noise for any text of W windows.
    -> nats per character, noise level: each (W / every, levels) float64"""
    # window w is evaluated at u = (i + place[w]) / levels, i = 0 .. levels - 1; the places of all
    # windows are stratified too, one in each W-th of [0, 1]
    W = len(x)
    g = torch.Generator().manual_seed(seed)
    place = (torch.randperm(W, generator=g) + torch.rand(W, generator=g)) / W
    u = ((torch.arange(levels) + place[:, None]) / levels).flatten().to(x.device)
    # the noise of a row comes from a seed of its own: it does not depend on batch_size
    seeds = SeedSequence((seed, W)).generate_state(W * levels).tolist()

    results = []
    batches = torch.arange(W * levels).view(W, levels)[::every].flatten().split(batch_size)
    for rows in tqdm(batches, desc="evaluating", leave=False, disable=RANK > 0 or None):
        x0 = x[rows // levels].long()
        results.append(method.bound(x0, u[rows], [seeds[i] for i in rows]))
    columns = [torch.cat(column).cpu().double() for column in zip(*results, strict=True)]
    return [column.view(-1, levels) for column in columns]


def evaluate(method, val, levels, batch_size=128, seed=0):
    """The bound on the windows val (W, T). -> dict: bound and stderr in nats per character, bits,
    windows (W,); masked_ce, no bound; fifths, mean nats by noise level; and what estimate gives."""
    nats, noise_level = estimate(method, val, levels, batch_size, seed)
    windows = nats.mean(1)
    bound = windows.mean().item()
    fifth = (5 * noise_level - 1e-6).ceil().clamp(1, 5)
    masked_ce = math.nan
    if method.noise_name == "share masked":
        masked_ce = cross_entropy(method, nats, noise_level)
    return {
        "bound": bound,
        "stderr": block_stderr(windows),
        "bits": bound / math.log(2),
        "windows": windows,
        "masked_ce": masked_ce,
        "fifths": [nats[fifth == i].mean().item() for i in range(1, 6)],
        "estimates": (nats, noise_level),
    }


def cross_entropy(method, nats, noise_level):
    """The mean over all masked tokens; of a method without masks, the mean of its estimates."""
    if method.noise_name == "share masked":
        return ((noise_level * nats).sum() / noise_level.sum()).item()
    return nats.mean().item()


def block_stderr(windows):
    """Error of the mean of windows (W,) of a text, by its quarters, for neighbouring windows are
    alike and plays differ: mean ± 2 errors is Student's 95% interval, as if quarters were
    independent. Simulated, it covers 0.91 (docs/LOG.md)."""
    n_blocks = min(4, len(windows))
    means = torch.stack([block.mean() for block in windows.tensor_split(n_blocks)])
    t = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182}[n_blocks]         # 97.5%, n_blocks - 1 degrees
    return (t / 2 * means.std() / n_blocks ** 0.5).item()


@dataclass
class Progress:
    """How far a run has come; saved in its ckpt.pt."""
    step: int = 0
    seconds: float = 0.0
    best_bound: float = math.inf
    log: list = field(default_factory=list)      # the rows of log.csv
    loss_sum: float = 0.0                        # since the last evaluation
    loss_count: int = 0


def fit(method, data, c, meta, show_sample, state=None):
    """Train method, an nn.Module whose forward(batch) is its loss; state: a checkpoint to go on
    from. data: batch(n), train, val (W, T), T, unit; meta: what checkpoints say beside the weights.
    show_sample(ema, folder, step) is called after every evaluation.
    -> the run's folder, or None if it was stopped"""
    join_processes(c, meta)
    folder = RunFolder(c, meta, resumed=state is not None)

    # the model, its average, the optimizers, and how far the run has come
    method.to(DEVICE).train()
    ema = copy.deepcopy(method).eval().requires_grad_(False)
    train_step = TrainingStep(method, ema, data, c)
    parts = {"model": method, "ema": ema, "scaler": train_step.scaler}
    parts |= {type(opt).__name__: opt for opt in train_step.opts}
    progress = Progress()
    if state:
        folder.restore(parts, state)
        progress = Progress(**state["progress"])
    n_params = sum(p.numel() for p in method.parameters())
    print0(f"{meta['method']}, {n_params:,} parameters, {DEVICE} {AMP} x {WORLD_SIZE} | {data} | "
           "Ctrl-C saves, --resume goes on")

    compile_at = max(progress.step, FIRST_EVAL)
    stopping = False
    start_time = time.perf_counter() - progress.seconds
    # disable=None: shown in a terminal only
    bar = tqdm(total=c.max_iters, initial=progress.step, disable=RANK > 0 or None)
    with bar, StopSignal() as stop:
        while progress.step < c.max_iters and not stopping:
            if progress.step == compile_at and c.compile and c.max_iters >= 1000:
                train_step.compile()
                start_time = time.perf_counter() - progress.seconds

            # one step
            loss, to_stop = train_step(progress.step, stop.requested)
            progress.step += 1
            progress.loss_sum += loss
            progress.loss_count += 1
            bar.update()

            # every ten steps: the host waits for the device to read the loss, all weights, and
            # whether another process is to stop
            evaluating = progress.step % c.eval_interval == 0
            evaluating = evaluating or progress.step in (FIRST_EVAL, c.max_iters)
            reading = evaluating or progress.step % 10 == 0
            if reading or WORLD_SIZE == 1:
                stopping = bool(to_stop)
            if not reading and not stopping:
                continue
            mean_loss = progress.loss_sum.item() / progress.loss_count
            progress.seconds = time.perf_counter() - start_time
            bar.set_postfix_str(f"loss {mean_loss:.3f}")
            weight_norm = nn.utils.get_total_norm(method.parameters()).item()
            finite = math.isfinite(mean_loss) and math.isfinite(weight_norm)
            check(finite, f"the loss, {mean_loss:.3g}, or a weight is no number at step "
                  f"{progress.step}: try a lower --learning_rate; what is saved is good")

            # the first process evaluates, saves and shows a sample; the others wait for it
            if RANK > 0 or not (evaluating or stopping):
                continue
            if evaluating:
                log_evaluation(ema, data, c, folder, progress, mean_loss)
                progress.loss_sum = torch.zeros_like(loss)
                progress.loss_count = 0
            states = {name: part.state_dict() for name, part in parts.items()}
            states["progress"] = {**vars(progress), "loss_sum": float(progress.loss_sum)}
            folder.save("ckpt.pt", {**states, "step": progress.step})
            try_to_write(write_log, folder.path / "log.csv", progress.log)
            if evaluating:
                try_to_write(show_sample, ema, folder.path, progress.step)
                start_time = time.perf_counter() - progress.seconds        # only steps count

    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if progress.step < c.max_iters:
        out = out_option(folder.path)
        print0(f"stopped at step {progress.step} and saved: --resume {out} goes on")
        return None
    if RANK == 0:
        evaluate_best(ema, data, folder, c.windows)
    return folder.path


def fit_text(method, data, c, meta, s, state):
    """fit, where the sample is a block of text, written by the sampler s from the same noise."""
    def show_sample(ema, out, step):
        reseed(c.seed)
        x = torch.zeros(1, c.block_size, dtype=torch.long, device=DEVICE)
        nothing_known = torch.zeros_like(x, dtype=torch.bool)
        *_, (x, confidence) = ema.sample(x, nothing_known, s)
        ids = x[0].tolist()
        print0("".join(data.tokenizer.paint(ids, confidence[0].tolist())))
        with (out / "samples.txt").open("a", encoding="utf-8") as f:
            f.write(f"--- step {step}\n{data.tokenizer.decode(ids)}\n")
    return fit(method, data, c, meta, show_sample, state)


def main(argv):
    c, state = start_or_resume(argv, Masked, ["masked", "ar"])
    data = Text(c)
    reseed(c.seed)
    method = build(c, data.meta)
    meta = {"method": c.objective, "script": "train", **data.meta}
    out = fit_text(method, data, c, meta, Sample(steps=64), state)
    if out:
        print0(f"done: python generate.py {out_option(out)}")


# -------------------------------------------------------------------------------------------------
# what the first process reports and saves

def log_evaluation(ema, data, c, folder, progress, mean_loss):
    """Print how good the averaged weights are, add it to the log, and save the best of them."""
    n_chars = progress.step * c.grad_accum * c.batch_size * data.T
    speed = n_chars / max(progress.seconds, 1e-9)                      # of all steps so far
    val, levels = eval_subset(data.val, c, ema)
    e = evaluate(ema, val, levels)

    # training and held-out text under the same noise; to save time, on every second window
    train = training_windows(data, len(val))
    train_ce = cross_entropy(ema, *estimate(ema, train, levels, every=2))
    nats, noise_level = e["estimates"]
    val_ce = cross_entropy(ema, nats[::2], noise_level[::2])

    is_ce = ema.eval_levels == 1 or ema.noise_name == "share masked"
    name = "CE" if is_ce else "bound"
    print0(f"step {progress.step} | train {name} {train_ce:.3f}, val {name} {val_ce:.3f} | "
           f"{describe(e, ema, data.unit)} | {speed:,.0f} {data.unit}s/s")
    progress.log.append([progress.step, round(progress.seconds, 3), mean_loss, e["bound"],
                         e["stderr"], e["bits"], e["masked_ce"], get_lr(progress.step - 1, c),
                         train_ce, val_ce, *e["fifths"]])
    is_best = e["bound"] < progress.best_bound or not ema.early_stopping
    if is_best or not (folder.path / "best.pt").exists():
        progress.best_bound = e["bound"]
        folder.save("best.pt", {"step": progress.step, "ema": ema.state_dict()})


def evaluate_best(ema, data, folder, max_windows):
    """Print the bound of a run's best weights, on so many windows of the validation split at most;
    the run is then finished."""
    best = torch.load(folder.path / "best.pt", map_location=DEVICE, weights_only=True)
    ema.load_state_dict(best["ema"])
    val = spaced_rows(data.val, max_windows)
    try:
        e = evaluate(ema, val, ema.eval_levels)
    except KeyboardInterrupt:
        out = out_option(folder.path)
        raise SystemExit(f"the run is saved: --resume {out} evaluates it") from None
    folder.write_status("finished")
    print0(f"best weights, of step {best['step']}, over {len(val):,} of {len(data.val):,} windows: "
           f"{describe(e, ema, data.unit)}")


def spaced_rows(x, n):
    """n evenly spaced rows of x, or all if it has fewer."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()]


def training_windows(data, n):
    """n evenly spaced windows (n, T) of what data trains on; some twice if there are fewer."""
    windows = data.train.flatten().unfold(0, data.T, data.T)
    rows = torch.arange(n) * (len(windows) - 1) // (n - 1)
    return windows[rows].to(DEVICE)


def eval_subset(val, c, method):
    """Evenly spaced windows of val and levels: a tenth of the rows that one process trained on
    since the last evaluation; with those of the training text a twentieth of the time."""
    levels = min(4, method.eval_levels)
    passes = c.eval_interval * c.batch_size * c.grad_accum // WORLD_SIZE // 10
    return spaced_rows(val, max(2, passes // levels)), levels


def describe(e, method, unit):
    """What evaluate returned, in words; unit: char, byte or pixel."""
    line = (f"{e['bound']:.4f} ± {e['stderr']:.4f} nats/{unit} = {e['bits']:.3f} ± "
            f"{e['stderr'] / math.log(2):.3f} bits")
    if method.eval_levels == 1:
        return f"{line}, exact"
    fifths = "  ".join(f"{i / 5:.1f}: {nats:.2f}" for i, nats in enumerate(e["fifths"], 1))
    return f"bound {line} | by {method.noise_name} up to {fifths}"


# signals, processes

class StopSignal:
    """Ctrl-C, SIGTERM or SIGHUP lets the step finish and saves; a second Ctrl-C ends it."""

    def __enter__(self):
        self.requested = False
        self.previous = {}
        # only the main thread can have handlers; Windows has no SIGHUP
        is_main = threading.current_thread() is threading.main_thread()
        for number in signal.Signals:
            stops = is_main and number.name in ("SIGINT", "SIGTERM", "SIGHUP")
            if stops and signal.getsignal(number) != signal.SIG_IGN:   # nohup ignores it
                self.previous[number] = signal.signal(number, self.request)
        return self

    def request(self, number, _):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def join_processes(c, meta):
    """Join the processes of torchrun; all must read the same data."""
    if WORLD_SIZE == 1 and RANK == 0:
        return
    check(RANK < WORLD_SIZE and "MASTER_ADDR" in os.environ,
          f"RANK={RANK} and WORLD_SIZE={WORLD_SIZE} are set, but not by torchrun: unset them")
    check(c.grad_accum % WORLD_SIZE == 0,
          f"grad_accum={c.grad_accum} is not a multiple of the {WORLD_SIZE} processes")
    # nccl or gloo, as the tensors ask; two hours, because the others wait while the first evaluates
    dist.init_process_group(timeout=timedelta(hours=2))
    data = [None] * WORLD_SIZE
    dist.all_gather_object(data, meta["data"])
    names = ", ".join(d["name"] for d in data)
    check(len({d["sha256"] for d in data}) == 1, f"processes read different data: {names}")


if __name__ == "__main__":
    run(main)

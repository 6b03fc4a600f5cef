"""Train the masked diffusion model, or with --objective=ar its autoregressive twin. Here live, once for every method, the loop (fit),
the bound over a validation split (evaluate) and checkpoints (save, load).          settings: config.Config and config.Masked

    python train.py                                        # tiny Shakespeare if it can be had, else Python's own documentation
    python train.py --dataset=my.txt --max_iters=2000
    python train.py --resume                               # goes on where the run stopped, to the bit on a CPU
    torchrun --nproc_per_node=2 train.py --grad_accum=2"""
import copy
import csv
import math
import os
import signal
import time
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from config import AMP, COLOR, DEVICE, GPU, HERE, Bits, Embed, Masked, Mnist, Sample, parse, run
from data import Text
from diffusion import Autoregressive, MaskedDiffusion
from model import Transformer, compile_net

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun
FIRST = 100   # the first report comes at this step, before anything is compiled
LOG = ["step", "seconds", "loss", "bound", "stderr", "bits", "masked_ce", "lr"]   # log.csv: losses in nats, bits per character
METHODS = {"masked": (Masked, "train.py", "generate.py"), "ar": (Masked, "train.py", "generate.py"),   # settings, what trains, what samples
           "mnist": (Mnist, "mnist_ddpm.py", "mnist_ddpm.py sample"), "bits": (Bits, "analog_bits.py", "analog_bits.py sample"),
           "embed": (Embed, "embed_diffusion.py", "embed_diffusion.py sample")}
BAKED = ("objective predict patch train_size block_size n_layer n_head n_embd time optimizer code head selfcond prior hint spread dim rows norm "
         "learned positions fluency table").split()   # for good


def build(c, meta):
    """The method of a run: c its Masked settings, meta its alphabet -> MaskedDiffusion or Autoregressive."""
    V = len(meta["alphabet"])
    net = Transformer(c, nn.Embedding(V + 1, c.n_embd), V, causal=c.objective == "ar")
    return Autoregressive(net, V) if c.objective == "ar" else MaskedDiffusion(net, V, c.schedule, c.weight)


# ---- evaluation

def text_error(windows):
    """Standard error of the mean of a text's windows (W,), where neighbours are alike: deviation of 50 contiguous blocks / sqrt 50."""
    blocks = torch.stack([b.mean() for b in windows.tensor_split(min(50, len(windows)))])
    return (blocks.std() / len(blocks) ** .5).item()


@torch.no_grad()
def evaluate(method, val, levels, batch_size=128, seed=0):
    """The bound of method on the windows val (W, ...), each at `levels` stratified noise levels, with the same noise every time.

    -> dict: bound and stderr (`text_error`) in nats per character, bits per character, masked_ce = total CE / number masked (not a
    bound; nan where nothing is masked), buckets = mean nats in fifths of t, windows = the bound of each window (W,) in float64."""
    W, g = len(val), torch.Generator().manual_seed(seed)
    place = (torch.randperm(W, generator=g) + torch.rand(W, generator=g)) / W         # window w, level j: u = (j + place_w) / levels
    u = ((torch.arange(levels) + place[:, None]) / levels).flatten().to(val.device)   # (W * levels,)
    seeds = np.random.SeedSequence((seed, W)).generate_state(W * levels).tolist()
    draws = [method.bound(val[rows // levels].long(), u[rows], [seeds[i] for i in rows]) for rows in torch.arange(W * levels).split(batch_size)]
    nats, t = (torch.cat(parts).cpu().double() for parts in zip(*draws, strict=True))  # (W * levels,) each
    windows = nats.view(W, levels).mean(1)                                            # (W,)
    bound = windows.mean().item()
    return dict(bound=bound, stderr=text_error(windows), bits=bound / math.log(2), windows=windows,
                masked_ce=((t * nats).sum() / t.sum()).item() if method.noise == "share masked" else math.nan,
                buckets=[nats[(5 * t - 1e-6).ceil().clamp(1, 5) == i].mean().item() for i in range(1, 6)])


def glance(val, c, method):
    """What a glance during training evaluates: (evenly spaced windows, levels), forward passes for about a twentieth of the run's."""
    levels = min(4, method.levels)
    n = min(len(val), max(2, c.eval_interval * c.batch_size * c.grad_accum // WORLD // 10 // levels))
    return val[torch.linspace(0, len(val) - 1, n).long()], levels


def report(e, method):
    """One evaluation in words; with one level per window the bound is the likelihood itself, and there is no noise to sort it by."""
    line = f"{e['bound']:.4f} ± {e['stderr']:.4f} nats/{method.unit} = {e['bits']:.3f} ± {e['stderr'] / math.log(2):.3f} bits"
    fifths = zip(("0-.2", ".2-.4", ".4-.6", ".6-.8", ".8-1"), e["buckets"], strict=True)
    more = f" | masked CE {e['masked_ce']:.3f}" * (e["masked_ce"] > 0) + f" | by {method.noise}: " + "  ".join(f"{s}: {b:.2f}" for s, b in fifths)
    return line + ", exact" if method.levels == 1 else line + ", a bound" + more


# ---- checkpoints

def folder(c, name):
    """The folder of a run: out, or out/<method> beside the scripts."""
    return Path(c.out) if c.out else HERE / "out" / name


def make_room(out, name):
    """An empty folder for a fresh run; an earlier run that is there moves to the next free number, and is named."""
    if (out / "ckpt.pt").exists():
        out = out.resolve()
        aside = next(p for p in (out.with_name(f"{out.name}.{i}") for i in range(1, 10 ** 6)) if not p.exists())
        out.rename(aside)
        print(f"the run in {out} is now in {aside}; to go on with it: python {METHODS[name][1]} --resume --out={aside}")
    out.mkdir(parents=True, exist_ok=True)


def save(path, state):
    """Write state to path whole or not at all; one line and exit 1 if the disk will not take it."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path} ({str(e).splitlines()[0]}); what was saved before is whole") from None


def read(path, methods=("masked", "ar")):
    """The dict in a checkpoint file, its config as settings; a file that is missing, damaged, of another version or of a method that
    is not one of `methods` is one line and exit 1."""
    try:
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        name, config = state["method"], state["config"]
        if name not in methods:
            raise SystemExit(f"{path} is a {name} checkpoint: python {METHODS[name][2] if name in METHODS else '?'} --out={path}")
        if extra := config.keys() - {f.name for f in fields(METHODS[name][0])}:
            raise SystemExit(f"{path} was made by another version: it has the setting {min(extra)!r}")
        if lost := {f.name for f in fields(METHODS[name][0])} - config.keys() - {"out", "resume", "train_size"}:
            raise SystemExit(f"{path} was made by another version: it lacks the setting {min(lost)!r}")
        if not all(p.isfinite().all() for p in state["ema"].values()):
            raise SystemExit(f"{path} has weights that are no numbers: its run diverged")
        if [*map(type, (state["step"], state["alphabet"], state["data"]["name"], state["data"]["sha256"]))] != [int, str, str, str]:
            raise TypeError
        return {**{k: state[k] for k in ("alphabet", "data", "step", "ema")}, **state, "config": METHODS[name][0](**config)}
    except FileNotFoundError:
        begun = (Path(path).parent / "ckpt.pt").exists()
        why = "its run has not yet come to its first report, --resume goes on with it" if begun else "train first, or pass --out=FOLDER"
        raise SystemExit(f"no checkpoint at {path}: {why}") from None
    except Exception as e:   # whatever torch.load makes of a file that is cut or foreign
        raise SystemExit(f"{path} is damaged, or no checkpoint of this project ({type(e).__name__})") from None


def load(path, build, methods=("masked", "ar")):
    """A checkpoint, or a run's folder (its best.pt) -> (build(settings, meta) with the averaged weights, settings, meta); errors: `read`'s."""
    state = read(Path(path) / "best.pt" if Path(path).is_dir() else Path(path), methods)
    c, meta = state["config"], {k: state[k] for k in ("method", "alphabet", "data", "step")}
    method = build(c, meta)
    try:
        method.load_state_dict(state["ema"])                                          # into fp32, whatever it was saved in
    except RuntimeError:
        raise SystemExit(f"{path} was made by another version: its weights do not fit") from None
    return method.to(DEVICE).eval(), c, meta


def restore(out, c, meta, parts):
    """Load ckpt.pt of the run in out into parts: method, average, scaler, optimizers. -> where the run is"""
    state = read(out / "ckpt.pt", (meta["method"],))
    if state["data"] != meta["data"]:
        raise SystemExit(f"{out} was trained on {state['data']['name']}, not on this {meta['data']['name']}")
    if state["step"] >= c.max_iters and "bound" in read(out / "best.pt", (meta["method"],)):
        raise SystemExit(f"{out} is finished, at step {state['step']}; --max_iters={2 * state['step']} would go on")
    for part, saved in zip(parts, [state["model"], state["ema"], state["scaler"], *state["optimizers"]], strict=True):
        if saved:                                         # the scaler of a CPU has nothing to say to that of a GPU
            part.load_state_dict(saved)
    return state["at"]


def resumed(argv, c, name):
    """The settings a run goes on with: its own, but for what is typed in argv; told, and refused where the network would change."""
    was = replace(read(folder(c, name) / "ckpt.pt", [m for m in METHODS if METHODS[m][0] is type(c)])["config"], out=c.out, resume=True)
    now = parse(argv, was)
    for k, old in asdict(was).items():
        new = getattr(now, k)
        if new != old and k in BAKED:
            raise SystemExit(f"--{k}={new}: this run has {k}={old}, which cannot change; leave --resume out for a new run")
        if new != old and RANK == 0:
            print(f"{k}: {old} -> {new}")
    return now


# ---- training

def reseed(*key):
    """Seed torch from a tuple of integers. Every micro-batch has a stream of its own, (seed, step, i): resuming is exact with no generator
    saved, evaluating or sampling in the middle changes nothing, and it does not matter which process takes which micro-batch."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def learning_rate(c, step):
    """Linear warm-up, constant, and over the last half a linear decay to zero: a function of the step alone."""
    return c.learning_rate * min((step + 1) / (c.warmup_iters + 1), 2 * (1 - step / c.max_iters), 1)


def optimizers(method, c):
    """AdamW for everything; or with optimizer=muon, Muon for the matrices of the blocks at the same learning rate."""
    muon = {n: p for n, p in method.named_parameters() if c.optimizer == "muon" and "blocks." in n and n.endswith("weight")}
    rest = [p for n, p in method.named_parameters() if n not in muon]
    adamw = torch.optim.AdamW(rest, betas=(.9, .98), weight_decay=c.weight_decay, fused=True)
    return [adamw, torch.optim.Muon(muon.values(), weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")] if muon else [adamw]


def share(method, loss, stop):
    """Add up gradients, loss and the wish to stop over the processes of torchrun, in one message. -> (loss, whether to stop)"""
    if WORLD == 1:
        return loss, stop.asked
    grads = [p.grad for p in method.parameters()]
    flat = torch.cat([*(g.flatten() for g in grads), torch.stack([loss, torch.full_like(loss, stop.asked)])])
    try:
        dist.all_reduce(flat)
    except RuntimeError:
        raise SystemExit("another process has ended, so this one does") from None
    for g, part in zip(grads, flat[:-2].split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))
    return flat[-2], flat[-1].item() > 0


def train_step(method, data, c, step, opts, scaler, stop):
    """One update, from this process's share of the step's micro-batches. -> (mean loss over all of them, whether to stop)"""
    for group in (g for o in opts for g in o.param_groups):
        group["lr"] = learning_rate(c, step)
    loss = torch.zeros((), device=DEVICE)
    for i in range(RANK, c.grad_accum, WORLD):
        reseed(c.seed, step, i)
        part = method(data.batch(c.batch_size)) / c.grad_accum
        scaler.scale(part).backward()
        loss += part.detach()
    loss, ending = share(method, loss, stop)
    for o in opts:
        scaler.unscale_(o)
    norm = nn.utils.clip_grad_norm_(method.parameters(), c.grad_clip or math.inf)
    for o in opts:
        if not scaler.is_enabled() or norm.isfinite():     # an overflow in fp16 skips the step of every optimizer, not only of one
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    return loss, ending


def first_line(method, data, c, meta, steps):
    """What is about to happen: model, size, device, data, how long (two passes are timed), how to stop and go on."""
    for _ in range(2):
        begun = time.time()
        method(data.batch(c.batch_size)).backward()
        method.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()
    minutes = (time.time() - begun) * steps * c.grad_accum / WORLD / 60
    return (f"{meta['method']}, {sum(p.numel() for p in method.parameters()):,} parameters, {DEVICE} {str(AMP)[6:]}"
            f"{f' x {WORLD}' if WORLD > 1 else ''} | {data} | {steps:,} steps, about {minutes:.0f} min{', less once compiled' if c.compile else ''}"
            " | Ctrl-C saves, --resume goes on")


class Stop:
    """Ctrl-C or SIGTERM: the first lets the step finish and saves, the second ends at once."""

    def __init__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, *_):
        if self.asked:
            raise SystemExit("stopped at once; the last checkpoint is whole")
        self.asked = True

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def fit(method, data, c, meta, show=None):
    """Train method, a module whose forward(batch) is its loss, on data.batch(n), and evaluate its moving average on data.val.

    Every c.eval_interval steps the run's folder gets log.csv, ckpt.pt (all that is needed to go on) and, if the bound fell or
    method.early_stopping is off, best.pt (the averaged weights); then show(averaged method) is called. A run that ends adds to best.pt its
    bound over the whole split. -> the averaged method with its best weights, or None if the run was stopped."""
    if c.grad_accum % WORLD:
        raise SystemExit(f"grad_accum={c.grad_accum} is not a multiple of the {WORLD} processes")
    if WORLD > 1:
        dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(hours=2))   # the others wait while the first evaluates
        texts = [None] * WORLD
        dist.all_gather_object(texts, meta["data"])
        if texts != texts[:1] * WORLD:
            raise SystemExit(f"the processes read different data: {', '.join(t['name'] for t in texts)}")
    out, say = folder(c, meta["method"]), tqdm.write if RANK == 0 else lambda line: None
    method.to(DEVICE).train()
    ema = copy.deepcopy(method).eval().requires_grad_(False)
    opts, scaler = optimizers(method, c), torch.amp.GradScaler(DEVICE, enabled=AMP == torch.float16)
    at = dict(step=0, seconds=0.0, loss=torch.zeros((), device=DEVICE), count=0, best=math.inf, log=[])   # where the run is
    if c.resume:
        at = restore(out, c, meta, [method, ema, scaler, *opts])
    elif RANK == 0:
        make_room(out, meta["method"])
    keep = {**meta, "config": {k: v for k, v in asdict(c).items() if k not in ("out", "resume")}}
    say(first_line(method, data, c, meta, c.max_iters - at["step"]))
    begun, since, compiled, ending, stop = time.time() - at["seconds"], time.time(), False, False, Stop()
    place = out.stat().st_ino if RANK == 0 else None

    def look_and_log(mean, spent):
        e = evaluate(ema, *glance(data.val, c, method))
        rate = data.T * c.batch_size * c.grad_accum * at["count"] / spent
        say(f"step {at['step']} | loss {mean:.3f} | {report(e, method)} | {rate:,.0f} {method.unit}s/s")
        at["log"].append([at["step"], round(time.time() - begun, 1), mean, *(e[k] for k in LOG[3:7]), learning_rate(c, at["step"] - 1)])
        if e["bound"] < at["best"] or not method.early_stopping:
            at["best"] = e["bound"]
            save(out / "best.pt", {**keep, "step": at["step"], "ema": ema.state_dict()})

    def checkpoint():
        at["seconds"] = time.time() - begun
        if out.stat().st_ino != place:
            raise SystemExit(f"another run has taken {out}; this one stops, and what it saved is in the folder beside it")
        with (out / "log.csv").open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([LOG, *at["log"]])
        save(out / "ckpt.pt", {**keep, "step": at["step"], "model": method.state_dict(), "ema": ema.state_dict(), "at": at,
                               "optimizers": [o.state_dict() for o in opts], "scaler": scaler.state_dict()})

    bar = tqdm(total=c.max_iters, initial=at["step"], disable=None if RANK == 0 else True, dynamic_ncols=True)
    while at["step"] < c.max_iters and not ending:
        step = at["step"]
        if c.compile and not compiled and step >= FIRST and c.max_iters >= 10 * FIRST:
            compiled, since = compile_net(method, data, c), time.time()
        loss, ending = train_step(method, data, c, step, opts, scaler, stop)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(method.parameters()), 1 - min(c.ema, (1 + step) / (10 + step)))
        at.update(step=step + 1, loss=at["loss"] + loss, count=at["count"] + 1)
        bar.update()
        due = at["step"] in (FIRST, c.max_iters) or at["step"] % c.eval_interval == 0
        if due or ending or step % 10 == 0:
            mean = at["loss"].item() / at["count"]
            bar.set_postfix_str(f"loss {mean:.3f}")
            if not math.isfinite(mean) or (due or ending) and not all(p.isfinite().all() for p in method.parameters()):
                raise SystemExit(f"the loss is {mean}, or a weight is no number, at step {at['step']}, learning rate "
                                 f"{learning_rate(c, step):.2g}; the last checkpoint is whole; try a lower --learning_rate")
        if due:
            if RANK == 0:
                look_and_log(mean, time.time() - since)
            at.update(loss=torch.zeros_like(loss), count=0)
        if RANK == 0 and (due or ending):
            checkpoint()
        if RANK == 0 and due and show:
            show(ema)
        since = time.time() if due else since
    bar.close()
    stop.restore()
    if WORLD > 1:
        dist.destroy_process_group()
    if at["step"] < c.max_iters:
        return say(f"stopped at step {at['step']}, saved in {out}; --resume goes on")
    if RANK == 0:
        best = read(out / "best.pt", (meta["method"],))
        ema.load_state_dict(best["ema"])
        e = evaluate(ema, data.val, ema.levels)
        save(out / "best.pt", {**best, "config": keep["config"], "bound": e["bound"], "stderr": e["stderr"]})
        say(f"best weights, of step {best['step']}, over the whole validation split: {report(e, ema)}")
    return ema


def start(argv, c, name, read_data, build, show, begin=lambda method, data, c: None):
    """What every script that trains does with its settings c: resume or begin, read the data, fit, and say how to sample.
    name of the method; read_data(c), build(c, meta); begin(method, data, c) before the first step, show(averaged method, data, c) after each
    evaluation. -> what fit returns, data"""
    c = resumed(argv, c, name) if c.resume else c
    name = getattr(c, "objective", name)                                              # of the run that is resumed, not of what is typed
    data, out = read_data(c), folder(c, name)
    if data.warning and RANK == 0:
        print(data.warning)
    reseed(c.seed)
    method = build(c, data.meta)
    begin(method, data, c)
    ema = fit(method, data, c, {"method": name, **data.meta}, lambda ema: show(ema, data, c))
    if ema and RANK == 0:
        print(f"done: python {METHODS[name][2]}{'' if out == HERE / 'out' / name and name != 'ar' else f' --out={out}'} writes with it")
    return ema, data


def show_text(how):
    """-> show for `start`: one block of text, by the sampler's settings how, the same noise every time."""
    def show(ema, data, c):
        reseed(c.seed)
        nothing = torch.zeros(1, c.block_size, dtype=torch.long, device=DEVICE)
        *_, (x, sure) = ema.sample(nothing, nothing > 0, how)
        tqdm.write("\n" + data.alphabet.paint(x[0].tolist(), sure[0].tolist(), COLOR) + "\n")
    return show


def main(argv):
    c = parse(argv, Masked())
    start(argv, c, c.objective, Text, build, show_text(Sample(steps=64)))


if __name__ == "__main__":
    run(main)

"""Device, precision, processes and every hyperparameter. Edit and rerun, or override one:
python train.py --n_layer=8

Lengths are in characters, rates and probabilities in [0, 1]. How a network is built and trained
travels in its checkpoint; the settings of a sampler only say how to write with it.
"""
import argparse
import ctypes
import difflib
import inspect
import math
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TERMINAL = sys.stdout is not None and sys.stdout.isatty()
# colours, and a cursor that moves
COLOR = TERMINAL and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

# device: one line to change for "cpu", or "mps" (masked and AR models, which need no float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"

# precision: what matrix products are computed in; weights are always fp32
AMP = torch.float32
if GPU:
    AMP = torch.float16
elif DEVICE == "cpu" and torch.cpu._is_avx512_bf16_supported():
    AMP = torch.bfloat16                        # 4 times as fast as fp32

CUDA_GRAPHS = GPU       # a training step is recorded as graphs, once it is compiled
# no kernels that sum over rows and columns at once: on an H200 a step kept the GPU busy for 8.8 ms
# with them, for 7.0 ms without
os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
# keep up to 1 GiB of freed memory: else a step on the CPU asks the system for 30,000 pages anew,
# which is a fifth of its time
if platform.libc_ver()[0] == "glibc":
    for option in (-1, -3):            # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, 2 ** 30)


def autocast():
    return torch.autocast(DEVICE, AMP, enabled=AMP != torch.float32)


# processes of torchrun, each with its GPU
RANK = int(os.environ.get("RANK") or 0)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
if GPU and WORLD_SIZE > 1:
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or RANK)
    if LOCAL_RANK >= torch.cuda.device_count():
        raise SystemExit(f"there is no GPU number {LOCAL_RANK}")
    torch.cuda.set_device(LOCAL_RANK)


# settings that are 1 or more; other numbers are 0 or more, but gamma_min is any
ONE_OR_MORE = {"max_iters", "eval_interval", "n_layer", "n_head", "n_embd", "batch_size", "dim",
               "grad_accum", "block_size", "steps", "n", "block", "windows"}
PATHS = {"out", "dataset", "data_dir", "table", "ar", "png", "svg", "json", "eval_model"}


class Settings:
    may_be_zero = ()

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            choices = get_args(f.type)
            if choices:
                check(value in choices, f"{f.name}={value} is none of {choices}")
                continue
            kind = (int, float) if f.type is float else f.type
            check(isinstance(value, kind), f"{f.name}={value!r} is no {f.type.__name__}")
            if not isinstance(value, str) and f.name != "gamma_min":
                least = int(f.name in ONE_OR_MORE and f.name not in self.may_be_zero)
                check(least <= value < math.inf, f"{f.name}={value} must be {least} or more")


@dataclass(frozen=True)
class Config(Settings):   # every script that trains
    # data
    dataset: str = "auto"          # shakespeare, warpeace, text8, enwik8, pydoc, a text, or ids.npy
    data_dir: str = ""             # where corpora are kept; empty: data/
    train_size: int = 0            # train on the first so many characters only; 0: all
    # run
    out: str = ""                  # folder of the run; empty: out/<method>, or out/<method>.1, ...
    resume: bool = False           # go on with the run in `out`; empty: with the newest unfinished
    seed: int = 1337               # of the weights and of all noise
    max_iters: int = 20000 if GPU else 2800      # steps
    eval_interval: int = 1000 if GPU else 400    # steps between evaluations; one more is at 100
    windows: int = 4000            # of the validation text, that the last evaluation takes at most
    compile: bool = sys.platform != "darwin"   # after step 100, in runs of 1,000 steps or more
    # model
    block_size: int = 256 if GPU else 128        # characters of a window
    n_layer: int = 6               # blocks
    n_head: int = 6 if GPU else 5  # attention heads of a block
    n_embd: int = 384 if GPU else 160            # channels
    dropout: float = 0.1 if GPU else 0.0         # share of what a block adds that is dropped
    # optimizer
    batch_size: int = 64 if GPU else 32     # of one micro-batch
    grad_accum: int = 1            # micro-batches a step, of all processes together
    optimizer: Literal["muon", "adamw"] = "muon"   # muon: for matrices in blocks, adamw for others
    learning_rate: float = 1e-2    # of Muon, whose update is scaled to AdamW's
    adamw_factor = 3               # AdamW's rate beside Muon over Muon's; no setting
    warmup_iters: int = 20         # steps in which the learning rate rises
    weight_decay: float = 0.1 if GPU else 0.02   # times the rate: share of a weight lost in a step
    grad_clip: float = 1.0         # largest norm of the gradient; 0: any
    ema: float = 0.998             # decay of the averaged weights, which are evaluated

    def __post_init__(self):
        super().__post_init__()
        D = self.n_embd / self.n_head
        check(D % 2 == 0, f"n_embd/n_head is {D:g}: it must be even, for RoPE rotates pairs")
        check(self.dropout < 1, f"dropout={self.dropout} must be less than 1")


@dataclass(frozen=True)
class Masked(Config):   # train.py: masked diffusion and the autoregressive baseline
    objective: Literal["masked", "ar"] = "masked"     # ar: the autoregressive baseline
    schedule: Literal["linear", "square", "cosine", "logit-normal"] = "logit-normal"   # in training
    loss: Literal["elbo", "pooled"] = "pooled"     # the bound, or the mean per masked character
    time: bool = False             # feed the network the share masked (it can count the MASKs)


@dataclass(frozen=True)
class Mnist(Config):   # mnist_ddpm.py: Gaussian diffusion of pixels
    dataset: str = "auto"          # mnist, or digits, drawn by this program; auto: mnist if it can
    predict: Literal["eps", "x0", "v", "levels"] = "v"   # what the network predicts
    schedule: Literal["linear", "cosine", "sqrt"] = "cosine"   # of the noise in training
    loss: Literal["simple", "elbo", "min-snr", "ce"] = "min-snr"   # levels: ce or elbo
    patch: Literal[1, 2, 4, 7, 14] = 4   # pixels on a side of a position
    drop_label: float = 0.1        # share of labels hidden, for classifier-free guidance
    time: bool = True              # feed the network the noise level
    max_iters: int = 40000 if GPU else 4000
    batch_size: int = 256 if GPU else 64
    learning_rate: float = 6e-3    # 1e-2 learns more slowly here
    adamw_factor = 1               # with 3 the bound is worse, at the clean end
    n_layer: int = 6 if GPU else 4
    n_head: int = 6 if GPU else 4
    n_embd: int = 384 if GPU else 128
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        losses = ("simple", "elbo", "min-snr")
        if self.predict == "levels":
            losses = ("ce", "elbo")
        check(self.loss in losses, f"predict={self.predict} has loss={' or '.join(losses)}")

MNIST_RECIPES = {
    "best": dict(predict="v", schedule="cosine", loss="min-snr"),        # the default
    "levels": dict(predict="levels", schedule="cosine", loss="ce"),       # the lowest bound
    "ddpm": dict(predict="eps", schedule="linear", loss="simple"),        # Ho et al. 2020
}


@dataclass(frozen=True)
class Codes(Config):   # both below: Gaussian diffusion of tokens through a table of codes
    schedule: Literal["linear", "cosine", "sqrt"] = "sqrt"   # of the noise in training
    times: Literal["uniform", "logit-normal"] = "logit-normal"   # how t is drawn in training
    self_cond: bool = True         # show the network its own earlier prediction
    output_prior: bool = True      # add to its logits log p(noisy code | character)
    feed_posterior: bool = True    # show the network those probabilities, too
    stagger: float = 12.0          # 0: all equally noisy; more: one after another, as MASKs are
    prompts: float = 0.25          # share of training windows with a clean part
    time: bool = False             # feed the network the noise level


@dataclass(frozen=True)
class Bits(Codes):   # analog_bits.py: the codes are the bits of characters
    code: Literal["index", "bytes"] = "index"    # bits of the place in the alphabet, or UTF-8
    head: Literal["softmax", "bits"] = "softmax" # predict characters, or each bit alone
    loss: Literal["ce", "elbo"] = "ce"           # cross-entropy, or the bound


@dataclass(frozen=True)
class Embed(Codes):   # embed_diffusion.py: the codes are embeddings of characters
    dim: int = 16                  # of an embedding
    table_init: Literal["small", "unit", "free"] = "unit"   # std 0.02, norm row_norm, std 1
    row_norm: float = 2.65         # of table_init=unit: that of 7 bits in analog_bits.py
    train_table: bool = True       # False: it stays as it begins
    table: str = ""                # start from this text file: a character and its numbers a line
    predict: Literal["eps", "x0", "tokens"] = "tokens"   # what the network predicts
    loss: Literal["simple", "ce", "elbo", "diffusion-lm"] = "ce"   # tokens: ce or elbo
    gamma_min: float = -4.0        # -log SNR at the clean end
    gamma_max: float = 8.0         # and where all is noise
    use_positions: bool = True     # False: the network cannot tell the order of what it reads
    fluency: float = 0.0           # weight of a bigram term in the loss

    def __post_init__(self):
        super().__post_init__()
        losses = {"tokens": ("ce", "elbo"), "x0": ("simple", "diffusion-lm"), "eps": ("simple",)}
        check(self.loss in losses[self.predict],
              f"predict={self.predict} has loss={' or '.join(losses[self.predict])}")
        needs_tokens = (self.self_cond, self.output_prior, self.feed_posterior, self.stagger,
                        self.prompts, self.fluency, self.times == "logit-normal")
        check(self.predict == "tokens" or not any(needs_tokens), "self_cond, output_prior, "
              "feed_posterior, stagger, prompts, fluency, logit-normal times need predict=tokens")
        check(not self.table or self.table_init == "unit", "table needs table_init=unit")


@dataclass(frozen=True)
class Writing(Settings):   # every script that writes text
    out: str = ""                  # a run's folder or a checkpoint; empty: the newest finished run
    prompt: str = ""               # {12}: a blank of 12, {20-60}: of unknown length; \n, \\, {{
    length: int = 0                # characters in all; 0: prompt's if it has blanks, or a window
    n: int = 1                     # texts
    seed: int = 1337               # of all that is drawn
    watch: bool = False            # live in the terminal


@dataclass(frozen=True)
class Sample(Writing):   # generate.py: how a masked model or the baseline writes
    may_be_zero = ("steps",)
    steps: int = 0                 # network calls per window, at most; 0: two a character
    order: Literal["random", "left", "confidence", "margin", "entropy"] = "margin"   # what is first
    counts: Literal["even", "documents", "cosine", "entropy"] = "even"         # entropy: EB sampler
    min_distance: int = 4          # prefer characters farther apart than this in one call; 0: none
    entropy_bound: float = 0.1     # counts=entropy: sum of entropies - the largest, in nats
    temperature: float = 0.9       # 0: the likeliest character
    top_k: int = 0                 # only the k likeliest; 0: all
    remask: float = 0.01           # share of what is written that is masked again after a call


@dataclass(frozen=True)
class CodeSampler(Writing):   # analog_bits.py sample
    steps: int = 50                # of one network call, with two_pass of two
    sampler: Literal["ddim", "ancestral"] = "ancestral"
    td: float = 0.0                # asymmetric time intervals: a step goes so many steps further
    two_pass: bool = False         # self-condition on a first pass at this step, not the last step


@dataclass(frozen=True)
class EmbedSampler(CodeSampler):   # embed_diffusion.py sample
    mode: Literal["diffusion", "blocks", "guided"] = "diffusion"   # guided: by the baseline
    block: int = 32                # mode=blocks: characters written at a time
    ar: str = ""                   # mode=guided: the baseline's checkpoint; empty: results/judge.pt
    ar_weight: float = 0.5         # mode=guided: 0 the network alone, 1 the baseline alone
    steer: str = ""                # no:e (no e), only:abc, at:5=T, line:40 (lines of 40)
    strength: float = 2.0          # of steering
    rounding: Literal["", "learned", "cosine", "clamp"] = ""   # "": cosine after loss=simple


@dataclass(frozen=True)
class ImageSampler(Settings):   # mnist_ddpm.py sample
    out: str = ""                  # a run's folder or a checkpoint; empty: the newest finished run
    n: int = 64                    # pictures
    seed: int = 1337               # of all that is drawn
    steps: int = 50                # of one network call, with guidance of two
    sampler: Literal["ddim", "ancestral"] = "ddim"
    td: float = 0.0                # asymmetric time intervals: a step goes so many steps further
    digit: Literal[-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9] = -1   # -1: all in turn
    guidance: float = 1.4          # 1: as trained with labels, 0: without
    clip: bool = True              # keep predicted pictures in [-1, 1]
    trace: bool = False            # also a strip from noise to digit
    png: str = ""                  # where to; empty: samples.png in the run's folder or out/


# -------------------------------------------------------------------------------------------------
# the command line

def print0(line):
    """Print from the first process only, above a progress bar. A closed pipe stops no training."""
    if RANK == 0:
        try:
            tqdm.write(str(line))
        except OSError:
            forget_stdout()


def forget_stdout():
    """Let what is printed from now on go nowhere: its reader has left, or its disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def check(ok, message):
    """Unless ok, end with one line and exit code 1."""
    if not ok:
        raise SystemExit(message)


def first_line(error):
    """What an exception says, without its explanation."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error):
    if isinstance(error, RuntimeError):
        return "memory" in str(error) and "illegal" not in str(error)  # illegal access: a bug
    return isinstance(error, MemoryError)


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def expand(name, path):
    """A path as it was typed, with the home folder in place of ~. One that a checkpoint keeps is
    made absolute, so that --resume finds it from another folder."""
    path = os.path.expanduser(path)
    stays = name in ("data_dir", "table") or name == "dataset" and os.path.isfile(path)
    if path and stays:
        path = os.path.abspath(path)
    return path


def parse(argv, settings, recipes=None):
    """--name=value arguments -> dict of what was typed, for a dataclass `settings`.
    recipes: {name: dict}; --recipe=NAME gives its settings, where they are not typed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    for f in fields(settings):
        if f.type is bool:
            parser.add_argument(f"--{f.name}", type=boolean, nargs="?", const=True)
        else:
            choices = get_args(f.type)
            kind = type(choices[0]) if choices else f.type
            parser.add_argument(f"--{f.name}", type=kind, choices=choices or None)
    if recipes:
        parser.add_argument("--recipe", choices=recipes)
    try:
        known, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise SystemExit(str(error)) from None
    typed = vars(known)
    if unknown:
        raise SystemExit(did_you_mean(unknown[0], settings))
    asks_for_help = typed.pop("help", False)
    if "recipe" in typed:
        typed = recipes[typed.pop("recipe")] | typed
    if asks_for_help:
        show_help(settings(**typed), recipes or {})
        raise SystemExit(0)
    for name in PATHS & typed.keys():
        typed[name] = expand(name, typed[name])
    return typed


def did_you_mean(argument, settings):
    """What to say of an argument that is no setting."""
    names = [f"--{f.name}" for f in fields(settings)]
    if hasattr(sys.modules["__main__"], "sample"):
        names.append("sample")
    similar = difflib.get_close_matches(argument.partition("=")[0], names, 1)
    if not similar and "--prompt" in names and not argument.startswith("-"):
        return f"no setting {argument!r}; a prompt is written --prompt={shlex.quote(argument)}"
    return f"no setting {argument!r}, did you mean {' '.join(similar or names)}?"


def show_help(s, recipes):
    """What the script says of itself, its recipes, and the settings s with their comments."""
    print(sys.modules["__main__"].__doc__)
    for name, values in recipes.items():
        print(f"--recipe={name}: {values}")
    comments = {}
    for parent in type(s).__mro__[:-2]:                      # all but Settings and object
        for name, said in re.findall(r"    (\w+): .*?# (.*)", inspect.getsource(parent)):
            comments.setdefault(name, said)
    for f in fields(s):
        setting = f"--{f.name}={getattr(s, f.name)}"
        choices = " | ".join(map(str, get_args(f.type)))
        said = [choices, comments.get(f.name, "")]
        print(f"  {setting:<26}  {'; '.join(filter(None, said))}")


def run(main):
    """Call main(argv). What a user can do about ends in one line: Ctrl-C, a full disk, a folder
    that cannot be written, too little memory."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                         # was closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):       # a notebook's has none
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:                        # | head has seen enough
        forget_stdout()
        raise SystemExit(1) from None
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"out of memory: {first_line(error)}") from None

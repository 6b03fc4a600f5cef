"""Every hyperparameter of every script. Edit and rerun, or override one: python train.py --n_layer=8

Lengths are in characters, probabilities and rates in [0, 1]. The network is chosen when a run is trained and travels in its
checkpoint; `Sample` only says how to write with it."""
import difflib
import inspect
import math
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"   # one line to change for "cpu", or "mps" (text only)
GPU = DEVICE == "cuda"
FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()   # 4x fp32 in matrix products
AMP = torch.float16 if GPU else torch.bfloat16 if FAST_BF16 and DEVICE == "cpu" else torch.float32
HERE = Path(__file__).resolve().parent
COLOR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")   # colours and moving cursors only where someone looks
if GPU and (rank := int(os.environ.get("LOCAL_RANK", 0))):         # torchrun: one process, one GPU
    if rank >= torch.cuda.device_count():
        raise SystemExit(f"torchrun asks for {rank + 1} GPUs; this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(rank)


def autocast():
    """The precision of one forward pass. A disabled object, never a branch, where there is nothing to gain."""
    return torch.autocast(DEVICE, AMP, enabled=AMP != torch.float32)


@dataclass(frozen=True)
class Config:   # shared by every script that trains
    # data
    dataset: str = "auto"          # shakespeare, warpeace, text8, enwik8, pydoc, or the path of a text file
    data_dir: str = ""             # where corpora are kept; empty: data/ beside the scripts
    train_size: int = 0            # train on only the first so many characters; 0: all
    # run
    out: str = ""                  # folder of the run; empty: out/<method>/ beside the scripts
    resume: bool = False           # go on with the run in `out`, with its own settings; what is typed here wins
    seed: int = 1337
    max_iters: int = 20000 if GPU else 2800
    eval_interval: int = 1000 if GPU else 400
    compile: bool = True           # after the first sample, where it pays
    # model
    block_size: int = 256 if GPU else 128   # characters seen at once
    n_layer: int = 6
    n_head: int = 6 if GPU else 5
    n_embd: int = 384 if GPU else 160       # a laptop trains the small one in minutes
    dropout: float = 0.1 if GPU else 0.0
    # optimizer
    batch_size: int = 64 if GPU else 32     # examples in a micro-batch
    grad_accum: int = 1            # micro-batches in a step, shared out among the processes of torchrun
    optimizer: Literal["muon", "adamw"] = "muon"   # muon: the matrices of the blocks by Muon, all else by AdamW
    learning_rate: float = 6e-3    # of both: Muon's update is scaled to AdamW's
    warmup_iters: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    ema: float = 0.998             # decay of the averaged weights, which are evaluated and sampled

    def __post_init__(self):
        at_least(self, 1, "max_iters", "eval_interval", "n_layer", "n_head", "n_embd", "batch_size", "grad_accum")
        at_least(self, 2, "block_size")
        at_least(self, 0, "train_size", "seed", "warmup_iters", "dropout", "weight_decay", "grad_clip", "learning_rate", "ema")
        if self.n_embd % self.n_head:
            raise SystemExit(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_embd // self.n_head % 2:
            raise SystemExit(f"n_embd/n_head={self.n_embd // self.n_head} must be even: positions are rotations of pairs")
        if self.dropout >= 1 or self.ema >= 1:
            raise SystemExit("dropout and ema must be below 1")


@dataclass(frozen=True)
class Masked(Config):   # train.py: masked diffusion and its autoregressive twin
    objective: Literal["masked", "ar"] = "masked"          # ar: the same network, causal
    schedule: Literal["linear", "square", "cosine"] = "linear"   # where training looks; the bound does not depend on it
    weight: Literal["elbo", "pooled"] = "pooled"           # of the training loss: a bound, or per masked character; evaluated is always the bound
    time: bool = False             # feed the network the fraction masked (it can count the MASKs itself)


RECIPES = {   # the best found here; the one with the best bound, a softmax over the 256 grey levels; and the loss of Ho et al. 2020
    "best": dict(predict="v", schedule="cosine", weight="min-snr"),
    "levels": dict(predict="levels", schedule="cosine", weight="ce"),
    "ddpm": dict(predict="eps", schedule="linear", weight="simple"),
}


@dataclass(frozen=True)
class Mnist(Config):   # mnist_ddpm.py: Gaussian diffusion over pixels
    dataset: str = "auto"          # mnist, or digits, drawn by this program; auto: mnist if it can be had
    predict: Literal["eps", "x0", "v", "levels"] = "v"
    schedule: Literal["linear", "cosine", "sqrt"] = "cosine"
    weight: Literal["simple", "elbo", "min-snr", "ce"] = "min-snr"
    patch: int = 4                 # pixels on a side of a patch, one position of the transformer; 2 takes 6.5x as long a step
    drop_label: float = 0.1        # share of the images that hide their label in training, for classifier-free guidance
    time: bool = True              # feed the network the noise level
    max_iters: int = 40000 if GPU else 4000
    batch_size: int = 256 if GPU else 64
    n_layer: int = 6 if GPU else 4
    n_head: int = 6 if GPU else 4
    n_embd: int = 384 if GPU else 128
    dropout: float = 0.0
    recipes = RECIPES              # --recipe=NAME: its settings, where they are not typed themselves

    def __post_init__(self):
        super().__post_init__()
        if self.patch not in (1, 2, 4, 7, 14):
            raise SystemExit(f"patch={self.patch} does not divide 28: one of 1, 2, 4, 7, 14")
        if self.weight not in (("ce", "elbo") if self.predict == "levels" else ("simple", "elbo", "min-snr")):
            raise SystemExit(f"weight={self.weight} does not go with predict={self.predict}: --recipe=levels is predict=levels with weight=ce")
        if not 0 < self.drop_label < 1:
            raise SystemExit(f"drop_label={self.drop_label} must be between 0 and 1: guidance needs both, with and without")


@dataclass(frozen=True)
class Bits(Config):   # analog_bits.py: Gaussian diffusion over the bits of characters
    code: Literal["index", "bytes", "random"] = "index"    # bits of: the place in the alphabet, UTF-8 bytes, or a code drawn for each
    head: Literal["softmax", "bits"] = "softmax"           # probabilities of the characters, or of each bit alone
    schedule: Literal["linear", "cosine", "sqrt"] = "sqrt"
    weight: Literal["ce", "elbo"] = "ce"                   # of the training loss: cross-entropy, no bound; or the bound
    selfcond: bool = True          # show the network its own earlier guess
    prior: bool = True             # add to its logits what the noisy bits themselves say
    hint: bool = True              # show the network those probabilities, too
    spread: float = 3.0            # 0: all characters equally noisy; more: they take turns, in random order
    prompts: float = 0.25          # share of the training windows that have a clean part, for prompts and blanks
    time: bool = False             # feed the network the noise level (it can see it)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "spread")
        if not 0 <= self.prompts < 1:
            raise SystemExit(f"prompts={self.prompts} is a share, below 1")


LADDER = {   # embed_diffusion.py: the documents' baseline, which fails, and its cure, one change at a time; each rung stands on those before it
    "baseline": dict(rows="small", norm=1.0, predict="eps", weight="simple", schedule="linear", low=-9.2, high=10.0, positions=False, learned=False,
                     selfcond=False, prior=False, hint=False, spread=0.0, prompts=0.0, time=True),
    "positions": dict(positions=True),                     # the network can tell the order
    "unit": dict(rows="unit"),                             # rows of norm 1 instead of .02 a number
    "x0": dict(predict="x0"),                              # the embedding is predicted, not the noise
    "softmax": dict(predict="tokens", weight="ce"),        # probabilities of the characters are, trained by cross-entropy: learned rounding
    "learned": dict(learned=True),                         # the table is trained with the network
    "range": dict(low=-6.0, high=6.0),                     # noise from where characters of norm 1 are certain to where they are lost
    "prior": dict(prior=True),                             # what the noisy embedding says of its character is added, not learned
    "sqrt": dict(schedule="sqrt"),                         # training is mostly where there is something to learn, hardly where all is clear
    "selfcond": dict(selfcond=True),                       # the network is shown its own earlier guess
    "hint": dict(hint=True),                               # what the noisy embedding says is shown to the network, too
    "timeless": dict(time=False),                          # the network can see the noise level itself
    "turns": dict(spread=3.0),                             # characters become clean one after another
    "scaled": dict(norm=2.65, low=-4.0, high=8.0),         # the same noise for longer rows: where the schedule looks is where they are told apart
}
EMBED = {name: {k: v for rung in list(LADDER.values())[:i + 1] for k, v in rung.items()} for i, name in enumerate(LADDER)}   # recipes in full
EMBED["best"] = EMBED["scaled"] | dict(prompts=0.25)
EMBED["orderless"] = EMBED["scaled"] | dict(positions=False)   # the last rung, without the first cure
EMBED["diffusion-lm"] = EMBED["x0"] | dict(rows="free", weight="diffusion-lm", schedule="sqrt", low=-4.6, high=10.0, learned=True)   # Li et al. 2022


@dataclass(frozen=True)
class Embed(Config):   # embed_diffusion.py: Gaussian diffusion over embeddings of characters
    dim: int = 16                  # numbers in an embedding
    rows: Literal["small", "unit", "free"] = "unit"        # of the table: .02 a number, as the documents' baseline; all of one norm; as they come
    norm: float = 2.65             # of rows=unit: as long as the 7 bits of a character in analog_bits.py, so that the same schedule fits
    learned: bool = True           # train the table with the network
    table: str = ""                # begin with these embeddings: GloVe, word2vec, fastText text; .safetensors beside its tokenizer.json
    predict: Literal["eps", "x0", "tokens"] = "tokens"
    weight: Literal["simple", "ce", "elbo", "diffusion-lm"] = "ce"
    schedule: Literal["linear", "cosine", "sqrt"] = "sqrt"
    low: float = -4.0              # gamma = -log SNR at the clean end
    high: float = 8.0              # and where all is noise
    positions: bool = True         # False: the network cannot tell the order of what it reads
    selfcond: bool = True          # show the network its own earlier guess
    prior: bool = True             # add to its logits what the noisy embeddings themselves say
    hint: bool = True              # show the network those probabilities, too
    spread: float = 3.0            # 0: all characters equally noisy; more: they take turns, in random order
    prompts: float = 0.25          # share of the training windows that have a clean part, for prompts and blanks
    fluency: float = 0.0           # weight of the surprise of predicted pairs of characters, added to the loss
    time: bool = False             # feed the network the noise level
    recipes = EMBED                # --recipe=NAME: its settings, where they are not typed themselves

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "dim")
        at_least(self, 0, "spread", "fluency")
        at_least(self, .01, "norm")
        if not 0 <= self.prompts < 1:
            raise SystemExit(f"prompts={self.prompts} is a share, below 1")
        if not -13.3 <= self.low < self.high <= 20:
            raise SystemExit(f"low={self.low}, high={self.high}: -13.3 <= low < high <= 20")
        tokens, needs = self.predict == "tokens", [k for k in ("selfcond", "prior", "hint", "spread", "prompts", "fluency") if getattr(self, k)]
        if (self.weight in ("ce", "elbo")) != tokens or self.weight == "diffusion-lm" and self.predict != "x0":
            raise SystemExit(f"weight={self.weight} does not go with predict={self.predict}: tokens ce or elbo; eps and x0 simple; x0 diffusion-lm")
        if needs and not tokens:
            raise SystemExit(f"{needs[0]} needs predict=tokens, weight=ce or elbo")
        if self.table and self.rows != "unit":
            raise SystemExit(f"table needs rows=unit, not {self.rows}")


@dataclass(frozen=True)
class Sampler:   # how a trained model writes; shared by generate.py and evaluate.py
    steps: int = 256               # network calls per block, at most
    order: Literal["random", "confidence", "margin", "entropy"] = "margin"             # which masked character next
    counts: Literal["even", "documents", "cosine", "entropy"] = "even"                 # how many in one call
    apart: int = 4                 # characters revealed in one call are farther apart than this, while there are such
    gamma: float = 0.1             # counts=entropy: reveal while sum of entropies - the largest <= gamma (nats)
    temperature: float = 0.9       # 0 takes the likeliest character; 1, order=random, remask=0 samples the model that has the bound
    top_k: int = 0                 # only the k likeliest characters; 0: all
    remask: float = 0.01           # share of the revealed characters masked again after each call, at least one once all are
    remask_by: Literal["random", "confidence"] = "confidence"   # confidence: those that were unlikely when revealed
    seed: int = 1337

    def __post_init__(self):
        at_least(self, 1, "steps")
        at_least(self, 0, "apart", "gamma", "temperature", "top_k", "remask", "seed")
        if self.remask > 1:
            raise SystemExit(f"remask={self.remask} is a share, at most 1")


@dataclass(frozen=True)
class Sample(Sampler):   # generate.py: what to write; never what the network is
    out: str = ""                  # folder of a run or a checkpoint; empty: out/masked if trained, else the one in results/
    prompt: str = ""               # {12} is a blank of 12 characters, {20-60} one of unknown length, \n a new line, {{ a brace
    length: int = 0                # characters in all; 0: the prompt if it has blanks, else one block
    n: int = 1                     # texts
    watch: bool = False            # the unmasking, live in the terminal
    svg: str = ""                  # write the unmasking as an animated picture

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n")
        at_least(self, 0, "length")
        if max(self.length, self.n) > 10 ** 6:
            raise SystemExit(f"length={self.length}, n={self.n}: a million is the most")


@dataclass(frozen=True)
class Picture:   # mnist_ddpm.py sample: which digits, and how they are made
    out: str = ""                  # folder of a run or a checkpoint; empty: out/mnist
    n: int = 64
    digit: int = -1                # 0 to 9; -1: all in turn
    guidance: float = 1.4          # 1: as trained with labels, 0: without; above 1 exaggerates the label
    steps: int = 50
    sampler: Literal["ddim", "ancestral"] = "ddim"
    td: float = 0.0                # take the state so many steps further than its label says (asymmetric time intervals)
    clip: bool = True              # keep the guess of the picture in [-1, 1]
    trace: bool = False            # also a strip from noise to digit, and the same moving
    png: str = ""                  # where to; empty: samples.png in the folder of the run
    seed: int = 1337

    def __post_init__(self):
        at_least(self, 1, "n", "steps")
        at_least(self, 0, "guidance", "td", "seed")
        if not -1 <= self.digit <= 9 or self.n > 10 ** 6:
            raise SystemExit(f"digit={self.digit}, n={self.n}: a digit is 0 to 9 (-1: all), a million pictures are the most")


@dataclass(frozen=True)
class CodeSampler:   # analog_bits.py sample: how text is made from noise
    out: str = ""                  # folder of a run or a checkpoint; empty: the folder that training wrote
    prompt: str = ""               # {12} is a blank of 12 characters, \n a new line, {{ a brace
    length: int = 0                # characters in all; 0: the prompt if it has blanks, else one block
    n: int = 1                     # texts
    steps: int = 50                # network calls (twice as many passes with twice)
    sampler: Literal["ddim", "ancestral"] = "ancestral"
    td: float = 0.0                # take the state so many steps further than its label says (asymmetric time intervals)
    twice: bool = False            # the guess shown to the network is of a first pass at the same step, not of the step before
    replace: bool = False          # prompts as noisy as the rest, for networks that never saw a clean part (prompts=0, spread=0)
    watch: bool = False            # the text out of the noise, live in the terminal
    seed: int = 1337

    def __post_init__(self):
        at_least(self, 1, "n", "steps")
        at_least(self, 0, "length", "td", "seed")
        if max(self.length, self.n) > 10 ** 6:
            raise SystemExit(f"length={self.length}, n={self.n}: a million is the most")


@dataclass(frozen=True)
class EmbedSampler(CodeSampler):   # embed_diffusion.py sample
    mode: Literal["diffusion", "blocks", "guided"] = "diffusion"   # blocks: a few characters at a time, each block given those before; guided: the
    #                                probabilities of the characters are the network's and those of an autoregressive twin, multiplied
    block: int = 32                # characters in a block
    twin: str = ""                 # guided: the twin's checkpoint; empty: results/judge.pt
    weight: float = 0.5            # guided: of the twin, from 0 to 1; the network has the rest
    steer: str = ""                # towards no:e (no e), only:abc, at:5=T (a T at position 5), line:40 (lines of 40 characters)
    strength: float = 2.0          # of steering: how many times the gradient of the logarithm of that probability
    rounding: Literal["", "learned", "cosine", "clamp"] = ""   # from guess to character. learned: the network's probabilities; cosine: the row at
    #                                the smallest angle; clamp: learned, and each guess becomes the row of its likeliest character, or of the
    #                                nearest (Diffusion-LM); empty: learned, but cosine where weight=simple has taught the network none

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "block")
        at_least(self, 0, "weight", "strength")
        if self.weight > 1:
            raise SystemExit(f"weight={self.weight} is a share, at most 1")


@dataclass(frozen=True)
class Evaluate(Sampler):   # evaluate.py: which checkpoints, and how much of each measurement
    out: str = ""                  # checkpoints or folders of runs, separated by commas; empty: all under out/ and results/
    frontier: bool = False         # samples at four temperatures, too
    quick: bool = False            # train tiny versions of all four and the twin first, where out/quick lacks them, and report on these alone
    report: bool = False           # write the page, out/report.html
    json: str = ""                 # write what was measured to this file
    dataset: str = ""              # the path of the text of checkpoints that were trained on a file
    data_dir: str = ""             # where corpora are kept; empty: data/ beside the scripts
    judge: str = ""                # an autoregressive checkpoint that scores samples; empty: results/judge.pt
    bound: bool = True             # the bound over the whole validation split
    draws: int = 2                 # sets of masks or noise it is averaged over; their spread is the error ± draws
    exact: int = 200               # with bound: windows for the exact left-to-right likelihood of a masked model; 0: none
    n: int = 200                   # blocks to sample, and held-out blocks to infill; 0: none
    digits: int = 10000 if GPU else 1000                   # pictures to sample; 0: none
    gaussian_steps: int = 50       # bits and pixels: how they are sampled, as in Picture and CodeSampler
    guidance: float = Picture.guidance
    sampler: Literal["", "ddim", "ancestral"] = ""         # empty: what each takes by itself
    td: float = 0.0
    twice: bool = False
    rounding: Literal["", "learned", "cosine", "clamp"] = ""   # of embeddings, as in EmbedSampler

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "exact", "n", "digits", "guidance", "td")
        at_least(self, 1, "gaussian_steps")
        at_least(self, 2, "draws")
        if 1 in (self.n, self.exact) or 0 < self.digits < 10:
            raise SystemExit("n and exact must be 0, or 2 and more: one has no error; digits 0, or 10 and more: one of each")


def at_least(c, least, *names):
    """One line and exit 1 for the first setting below `least` (or not a finite number)."""
    for name in names:
        if not least <= getattr(c, name) < math.inf:
            raise SystemExit(f"{name}={getattr(c, name)} must be {least} or more")


def parse(argv, cfg):
    """cfg with the --name=value overrides of argv, before them those of --recipe=NAME where cfg has recipes; a wrong name, type or choice
    is one line and exit 1 (SystemExit)."""
    types, changed, recipes = {f.name: f.type for f in fields(cfg)}, {}, getattr(cfg, "recipes", {})
    if recipes:
        types["recipe"] = Literal[tuple(recipes)]
    for arg in argv:
        if arg in ("-h", "--help"):
            print("\n".join(inspect.getsource(k) for k in type(cfg).__mro__[-2::-1]))
            print("\n".join(f"--recipe={name}: {settings}" for name, settings in getattr(cfg, "recipes", {}).items()))
            raise SystemExit(0)
        name, eq, text = arg.removeprefix("--").partition("=")
        if name not in types and arg.startswith("--"):
            near = difflib.get_close_matches(name, types, 1)
            raise SystemExit(f"no setting {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; there are: {', '.join(types)}"))
        kind = types.get(name)
        if not arg.startswith("--") or not (eq or kind is bool):
            raise SystemExit(f"write --{name if kind else next(iter(types))}=VALUE, not {arg!r}")
        changed[name] = convert(name, kind, text if eq else "True")
    return replace(cfg, **(recipes.get(changed.pop("recipe", ""), {}) | changed))


def convert(name, kind, text):
    """The value of `text` as type `kind`: str, int, float, bool, or one of the words of a Literal."""
    if get_args(kind):
        if text not in get_args(kind):
            raise SystemExit(f"--{name}: one of {', '.join(get_args(kind))}, got {text!r}")
        return text
    try:
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise SystemExit(f"--{name}: expected {kind.__name__}, got {text!r}") from None


def run(main):
    """main(argv) of a script: utf-8 out whatever the terminal claims, and Ctrl-C is no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as e:   # a folder that cannot be written, a full disk, a closed pipe
        raise SystemExit(f"{type(e).__name__}: {e}") from None
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        raise SystemExit(f"out of memory: {str(e).splitlines()[0]}") from None

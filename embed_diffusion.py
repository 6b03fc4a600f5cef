"""Gaussian diffusion over embeddings of characters. Three things: the usual baseline, which fails;
its cure, one change at a time; Diffusion-LM. settings: config.Embed, config.EmbedSampler. Read with
it, in gaussian.py: TokenDiffusion, q_sample, log_likelihood, alpha_sigma and x0_from_output.

    python embed_diffusion.py
    python embed_diffusion.py --recipe=baseline                    # RECIPES has all
    python embed_diffusion.py --table=glove.txt                    # begin with a pretrained table
    python embed_diffusion.py sample --rounding=clamp --steps=100
    python embed_diffusion.py sample --prompt="ROMEO:{200}" --watch
    python embed_diffusion.py sample --steer="no:e" --strength=2   # or only:abc, at:5=T, line:40
    python embed_diffusion.py sample --mode=blocks --length=1000
    python embed_diffusion.py sample --mode=guided                 # by an autoregressive model
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from checkpoint import load, out_option, start_or_resume
from config import DEVICE, HERE, Embed, EmbedSampler, Masked, check, parse, print0, run
from data import Text, clean
from gaussian import TokenDiffusion, alpha_sigma, q_sample, stratified_times, x0_from_output
from generate import lay_out, open_model, parse_prompt, show_texts, unescape, write
from model import Transformer
from step import reseed
from train import build as build_ar, fit_text

SETTINGS = Embed
SAMPLER = EmbedSampler
DIFFUSION_LM_STEPS = 2000
DIFFUSION_LM_SIGMA = (1 - (1 - 0.0006 ** 0.5) / 0.99) ** 0.5     # 0.121, sigma of its first step

# From the usual baseline, which fails, to its cure, one change at a time.
LADDER = {
    "baseline": dict(table_init="small", row_norm=1.0, train_table=False, predict="eps",
                     loss="simple", schedule="linear", gamma_min=-9.2, gamma_max=10.0,
                     use_positions=False, self_cond=False, output_prior=False,
                     feed_posterior=False, stagger=0.0, prompts=0.0, time=True, times="uniform"),
    "positions": dict(use_positions=True),                # the network can tell the order
    "unit": dict(table_init="unit"),                      # rows of norm 1, not 0.02 a number
    "x0": dict(predict="x0"),                             # predicts the embedding, not the noise
    "softmax": dict(predict="tokens", loss="ce"),         # predicts characters: learned rounding
    "learned": dict(train_table=True),                    # trains the table with the network
    "range": dict(gamma_min=-6.0, gamma_max=6.0),         # where rows of norm 1 differ at all
    "prior": dict(output_prior=True),
    "sqrt": dict(schedule="sqrt"),                        # trains where there is most to learn
    "selfcond": dict(self_cond=True),
    "hint": dict(feed_posterior=True),
    "timeless": dict(time=False),                         # the level is not fed: z shows it
    "turns": dict(stagger=3.0),                           # characters come one after another
    "scaled": dict(row_norm=2.65, gamma_min=-4.0, gamma_max=8.0),   # the same for longer rows
}
RECIPES = {}                   # each rung stands on all before it
rungs = {}
for rung, change in LADDER.items():
    rungs = rungs | change
    RECIPES[rung] = rungs
RECIPES |= {
    "best": {**rungs, "stagger": 12.0, "prompts": 0.25, "times": "logit-normal"},   # the default
    "orderless": {**rungs, "use_positions": False},       # the last rung without the first cure
    "diffusion-lm": {**RECIPES["x0"], "table_init": "free", "train_table": True,
                     "loss": "diffusion-lm", "schedule": "sqrt", "gamma_min": -4.6,
                     "gamma_max": 10.0},                  # Li et al. 2022
}


class RowNorm(nn.Module):
    """A reparametrization: rows of any length are scaled to the norm row_norm."""

    def __init__(self, row_norm):
        super().__init__()
        self.row_norm = row_norm

    def forward(self, table):
        return self.row_norm * F.normalize(table, dim=1)

    def right_inverse(self, table):              # what is stored when a table is assigned
        return table


class EmbeddingDiffusion(TokenDiffusion):
    """TokenDiffusion over a table that may be learned. predict=x0 or eps, of the recipes that fail:
    the network predicts K numbers, and a token is as likely as softmax(xhat @ table.T)."""

    def __init__(self, net, table, c):
        if c.train_table:
            table = nn.Parameter(table)
        super().__init__(net, table, c.schedule, c.loss, c.gamma_min, c.gamma_max, c.self_cond,
                         c.output_prior, c.feed_posterior, c.prompts, c.stagger, c.times)
        if c.table_init == "unit":
            parametrize.register_parametrization(self, "table", RowNorm(c.row_norm))
        self.predict = c.predict
        self.fluency = c.fluency
        if c.fluency:
            V = len(table)
            self.bigrams = nn.Buffer(torch.ones(V, V))      # counts in the training text, plus one

    def predict_tokens(self, z, gamma, cond=None, x_prev=None):
        if self.predict == "tokens":
            return super().predict_tokens(z, gamma, cond, x_prev)
        xhat = x0_from_output(self.predict, self.call_net(z, gamma, cond).double(), z, gamma)
        return xhat, (xhat.float() @ self.table.T).softmax(-1)

    def forward(self, x0):
        if self.loss == "diffusion-lm":
            return self.diffusion_lm_loss(x0)
        if self.predict == "tokens":
            return super().forward(x0)
        return self.squared_error(x0)

    @torch.compiler.disable
    def draw_diffusion_lm(self, embedding):
        t, _ = stratified_times(len(embedding), embedding.device)
        return t, torch.randn_like(embedding), torch.randn_like(embedding)

    def diffusion_lm_loss(self, x0):
        """Li et al. 2022: |target - xhat|^2, where x is drawn around the embedding, and the target
        is x, or at the first of 2,000 steps the embedding; + |alpha_1 x|^2, which keeps embeddings
        small; + cross-entropy of rounding x, not xhat, which keeps embeddings apart."""
        embedding = self.embed_tokens(x0)
        t, eps_embedding, eps = self.draw_diffusion_lm(embedding)
        gamma, _ = self.gamma(t)
        alpha_1, _ = alpha_sigma(self.gamma(torch.ones_like(t))[0])
        x = embedding + DIFFUSION_LM_SIGMA * eps_embedding
        xhat = self.predict_x0(q_sample(x, gamma, eps), gamma)
        is_first_step = (t < 1 / DIFFUSION_LM_STEPS)[..., None]
        target = torch.where(is_first_step, embedding, x)
        squares = (target - xhat).square().mean() + (alpha_1 * x).square().mean()
        rounding = F.cross_entropy((x.float() @ self.table.T).flatten(0, 1), x0.flatten())
        return squares.float() + rounding

    def regularizer(self, logits):
        """Fluency: expected surprise -log p(b | a), in the bigrams of the training text, of
        neighbours drawn from the predicted probabilities; nats per pair."""
        if not self.fluency:
            return 0
        probs = logits.softmax(-1)                                     # (B, T, V)
        surprise = self.bigrams.sum(1, keepdim=True).log() - self.bigrams.log()  # (V, V)
        return self.fluency * ((probs[:, :-1] @ surprise) * probs[:, 1:]).sum(-1).mean()

    def sample(self, x, known, s, locked=None, allowed=None, ar=None):
        """As TokenDiffusion.sample. allowed (T, V) bool: steer towards these characters where they
        are to be written. ar: a function from a text (B, T) to the logits of the autoregressive
        baseline, which guide."""
        if locked is None:
            locked = torch.zeros_like(known)
        if allowed is not None:
            allowed = allowed | (known | locked)[..., None]            # (B, T, V)

        def predict_controlled(z, gamma, x_prev):
            if ar is None and allowed is None:
                xhat, probs = self.predict_tokens(z, gamma, x_prev=x_prev)
            else:
                xhat, probs = self.guided_prediction(z, gamma, x_prev, s, allowed, ar)
            return self.round(xhat, probs, s.rounding)
        return super().sample(x, known, s, locked, predict_controlled)

    def guided_prediction(self, z, gamma, x_prev, s, allowed, ar):
        """Guided by ar: p is proportional to p_network^(1 - weight) p_ar^weight, where ar reads the
        likeliest characters. Steered to y, "each position has an allowed character": xhat +
        strength sigma^2 / alpha grad_z log p(y | z), at strength 1 the mean of x given z and y
        (Dhariwal & Nichol 2021), with p(y | z) the product over positions. The probabilities that
        are returned are not steered: only z is."""
        steer = allowed is not None
        with torch.set_grad_enabled(steer):
            z = z.detach().requires_grad_(steer)
            log_probs = self.logits(z, gamma, x_prev=x_prev).log_softmax(-1)  # (B, T, V)
            if ar is not None:
                ar_log_probs = ar(log_probs.detach().argmax(-1)).log_softmax(-1)
                log_probs = (1 - s.ar_weight) * log_probs + s.ar_weight * ar_log_probs
                log_probs = log_probs.log_softmax(-1)
            probs = log_probs.detach().softmax(-1)
            xhat = self.expected_embedding(probs)
            if not steer:
                return xhat, probs
            log_p_y = log_probs.masked_fill(~allowed, -math.inf).logsumexp(-1)  # (B, T)
            pull, = torch.autograd.grad(log_p_y.sum(), z)
        alpha, sigma = alpha_sigma(gamma)
        return xhat + s.strength * sigma ** 2 / alpha * pull, probs

    def round(self, xhat, probs, rounding):
        """clamp: xhat becomes the row of the likeliest token, or if numbers are predicted the
        nearest row (Diffusion-LM). cosine: the token is the row at the smallest angle. learned:
        neither. Empty: cosine after loss=simple, which teaches no rounding, else learned."""
        if rounding == "clamp":
            score = probs
            if self.predict != "tokens":
                score = -torch.cdist(xhat.float(), self.table)
            return self.embed_tokens(score.argmax(-1)), probs
        if rounding == "cosine" or (rounding == "" and self.loss == "simple"):
            cosine = F.normalize(xhat.float(), dim=-1) @ F.normalize(self.table, dim=1).T
            best, token = cosine.max(-1)                               # (B, T)
            probs = F.one_hot(token, len(self.table)) * best.clamp(0, 1)[..., None]
        return xhat, probs


def build(c, meta):
    V = len(meta["alphabet"])
    n_in = c.dim + c.dim * c.self_cond + V * c.feed_posterior
    n_out = V if c.predict == "tokens" else c.dim
    net = Transformer(c, nn.Linear(n_in, c.n_embd), n_out, use_positions=c.use_positions)
    scale = 0.02 if c.table_init == "small" else 1
    return EmbeddingDiffusion(net, scale * torch.randn(V, c.dim), c)


def sample(argv):
    s = EmbedSampler(**parse(argv, EmbedSampler))
    method, c, _, tokenizer = open_model(s.out, "embed", Embed, build, ["embed"])
    check(method.self_cond or not s.two_pass, "two_pass needs a network trained with self_cond")
    T = c.block_size
    pieces = parse_prompt(s.prompt, tokenizer)
    ids, known = lay_out(pieces, s.length, T, method.mask_id)
    allowed, ar = control(method, tokenizer, s, len(ids), T)

    reseed(s.seed)
    frames = write_controlled(method, ids, known, T, s, allowed, ar)
    calls_per_frame = 1 + s.two_pass + (s.mode == "guided")
    show_texts(frames, ids, known, tokenizer, s, calls_per_frame)


def main(argv):
    if argv[:1] == ["sample"]:
        return sample(argv[1:])
    c, state = start_or_resume(argv, Embed, ["embed"], RECIPES)
    data = Text(c)
    reseed(c.seed)
    method = build(c, data.meta)
    if c.fluency:
        count_bigrams(method, data)
    if c.table and not state:
        load_table(method, data, c)
    meta = {"method": "embed", "script": "embed_diffusion", **data.meta}
    out = fit_text(method, data, c, meta, EmbedSampler(), state)
    if out:
        print0(f"done: python embed_diffusion.py sample {out_option(out)}; how well it denoises: "
               f"python -m evaluation.diagnostics {out_option(out)}")


# -------------------------------------------------------------------------------------------------
# before training

def count_bigrams(method, data):
    """Add the bigrams of the training text to method.bigrams."""
    V = len(data.tokenizer)
    pairs = data.train[:-1].long() * V + data.train[1:].long()
    method.bigrams += torch.bincount(pairs, minlength=V * V).view(V, V).cpu()


def load_table(method, data, c):
    """Begin with the rows of the file c.table; tokens that it lacks begin at random."""
    alphabet = data.tokenizer.chars
    known = principal_rows(read_table(c.table, alphabet), c.dim)
    check(len(known) >= 2, f"{c.table} has no two different embeddings of the text's tokens")
    drawn = F.normalize(torch.randn(len(alphabet), c.dim), dim=1)
    rows = [known.get(ch, row) for ch, row in zip(alphabet, drawn, strict=True)]
    method.table = torch.stack(rows)
    missing = [token for token in alphabet if token not in known]
    if missing:
        text = "".join(missing)[:80]
        print0(f"{c.table} lacks {len(missing)} of {len(rows)} tokens: {text!r}")


def read_table(path, alphabet):
    """{token: its numbers, float64} of a text file as GloVe's: on each line a token, a new line in
    it as \\n and a space as \u2581, and its numbers. What begins with a space is looked up without
    it, too. Other tokens are passed over."""
    spellings = {}
    for token in alphabet:
        exact = token.replace("\n", "\\n").replace(" ", "\u2581")
        spellings[token] = [exact, exact.removeprefix("\u2581") or exact]
    wanted = {spelling for pair in spellings.values() for spelling in pair}
    lines = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in tqdm(f, f"reading {path}", unit=" lines", leave=False, disable=None):
            token, _, numbers = clean(line).partition(" ")
            if token in wanted:
                lines[token] = numbers.split()
    found = {token: lines.get(exact, lines.get(bare)) for token, (exact, bare) in spellings.items()
             if exact in lines or bare in lines}
    try:
        table = torch.tensor([[float(x) for x in row] for row in found.values()],
                             dtype=torch.float64)
    except ValueError:
        raise SystemExit(f"{path} is no table: a token and as many numbers on each line; python "
                         f"-m experiments.table {path} --out=table.txt makes one") from None
    check(table.float().isfinite().all(), f"{path} has numbers that are not finite, or too large")
    return dict(zip(found, table, strict=True))


def principal_rows(table, dim):
    """The rows of a table {character: numbers}, less their mean, in their first dim principal
    directions, zeros where there are fewer; of norm 1, fp32. Rows at the mean are left out: they
    have no direction."""
    used = {ch: row for ch, row in table.items() if row.any()}         # zeros: was never trained
    if not used:
        return {}
    x = torch.stack([*used.values()])
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    rows = F.pad(u * s, (0, dim - len(s)))                             # a negative pad cuts
    norms = rows.norm(dim=1)
    return {ch: (row / norm).float() for ch, row, norm in zip(used, rows, norms, strict=True)
            if norm > 1e-6 * x.norm()}


# writing, steered and guided

def steer_mask(steer, tokenizer, L):
    """Which characters --steer allows at each position, from 0 on, of a text: (L, V) bool."""
    check(tokenizer.unit != "token", "steer names characters, and this model writes tokens")
    check(steer.isascii() or not tokenizer.is_bytes,
          f"steer={steer!r}: this model writes bytes and is steered by ASCII alone")

    def mask_of(chars):
        mask = torch.zeros(len(tokenizer), dtype=torch.bool)
        mask[tokenizer.encode(chars).tolist()] = True
        return mask

    kind, _, what = unescape(steer).partition(":")
    place, _, char = what.partition("=")
    position = torch.arange(L)[:, None]
    if kind == "no" and what and not mask_of(what).all():
        return ~mask_of(what).expand(L, -1)
    if kind == "only" and what:
        return mask_of(what).expand(L, -1)
    if kind == "at" and place.isdecimal() and len(place) < 7 and len(char) == 1:
        return mask_of(char) | (position != int(place))
    if kind == "line" and what.isdecimal() and len(what) < 7 and int(what):
        is_end = position % (int(what) + 1) == int(what)
        return mask_of("\n") == is_end          # a new line there, and nowhere else
    raise SystemExit(f"steer={steer!r}: write no:e, only:abc, at:5=T or line:40")


def control(method, tokenizer, s, L, T):
    """allowed and ar of EmbeddingDiffusion.sample, or None: what s asks of a text of L characters
    in windows of T."""
    allowed = None
    ar = None
    check(method.predict == "tokens" or not s.steer and s.mode != "guided",
          "steer and mode=guided need a network that predicts tokens")
    if s.steer:
        check(s.rounding != "clamp",
              "steer moves xhat and rounding=clamp moves it back: leave one out")
        allowed = steer_mask(s.steer, tokenizer, L)
        check(not allowed.all(), f"steer={s.steer!r} allows everything in a text of {L} characters")
        allowed = F.pad(allowed, (0, 0, 0, max(0, T - L)), value=True).to(DEVICE)
    if s.mode == "guided":
        path = s.ar or HERE / "results/judge.pt"
        baseline, c, meta = load(path, Masked, build_ar, ["ar"])
        check(meta["alphabet"] == tokenizer.chars and c.block_size >= T,
              f"{path} reads other characters, or shorter windows, than this model writes: train "
              "one, python train.py --objective=ar, pass --ar=FOLDER")
        ar = baseline.logits
    return allowed, ar


def block_windows(L, T, block):
    """(start, end) of windows of T: a block is written at the end of each, and what the window has
    after end stays noise. If L > T, at least half a window was written before."""
    if L > T:
        block = min(block, T // 2)
    windows = []
    for start in range(0, L, block):
        end = min(start + block, max(L, T))
        windows.append((max(0, end - T), end))
    return windows


def write_controlled(method, ids, known, T, s, allowed, ar):
    """As generate.write, but steered and guided, and with mode=blocks a block at a time."""
    windows = None
    if s.mode == "blocks":
        windows = block_windows(len(ids), T, s.block)

    def sample_window(x, known, locked, start):
        allowed_here = None
        if allowed is not None:
            allowed_here = allowed[start:start + T]
        return method.sample(x, known, s, locked, allowed_here, ar)
    return write(method, ids, known, T, s, windows, sample_window)


if __name__ == "__main__":
    run(main)

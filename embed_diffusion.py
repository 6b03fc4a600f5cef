"""Diffusion over embeddings of characters, as the documents' baseline, Diffusion-LM and the cure.  settings: config.Embed, config.EmbedSampler

    python embed_diffusion.py                                   # the cured model
    python embed_diffusion.py --recipe=baseline                 # watch it fail, with the diagnosis; all recipes: config.EMBED
    python embed_diffusion.py --table=glove.txt                 # begin with the rows of the alphabet in a pretrained table
    python embed_diffusion.py sample --rounding=clamp --steps=100
    python embed_diffusion.py sample --prompt="ROMEO:{200}" --watch
    python embed_diffusion.py sample --steer="no:e" --strength=2        # or only:, at:, line:; while the text comes out of the noise
    python embed_diffusion.py sample --mode=blocks --length=1000        # or guided, by an autoregressive twin"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import generate
from config import HERE, Embed, EmbedSampler, parse, run
from data import Text
from diffusion import PLAIN, XHAT, Characters, GaussianDiffusion, scales, stratified
from model import Transformer
from tables import pretrained
from train import RANK, load, reseed, show_text, start
from train import build as build_twin

STEPS = 2000                                      # of Diffusion-LM, whose sqrt schedule
SIGMA_0 = (1 - (1 - .0006 ** .5) / .99) ** .5     # begins with this much noise: .121


class Embeddings(Characters):
    """Codes are embeddings, which may be learned. predict=tokens: all as in CodeDiffusion; eps or x0: the network's output is K numbers."""

    wish, twin = None, None   # for sampling: what is allowed, positions (T,) -> bool (T, V); a twin's logits of its text (B, T)
    start, free = 0, ...      # the position of the window in the text, and which of its positions (B, T) are to be written

    def __init__(self, net, rows, c):
        super().__init__(net, rows, c.schedule, c.weight, (c.low, c.high), c.selfcond, c.prior, c.prompts, c.spread, c.hint)
        del self.rows
        if c.learned:
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)                                        # kept in checkpoints: it was drawn
        self.norm, self.tokens, self.fluency = c.norm if c.rows == "unit" else 0, c.predict == "tokens", c.fluency
        if not self.tokens:
            self.to_x, self.plain = XHAT[c.predict], PLAIN[c.predict]
        if self.fluency:
            self.register_buffer("pairs", torch.ones(len(rows), len(rows)))           # of characters, each once more than in the training text

    @property
    def table(self):
        """The embeddings (V, K)."""
        return self.norm * F.normalize(self.rows, dim=1) if self.norm else self.rows

    def guess(self, z, gamma, extra, before=None):
        """As in CodeDiffusion; of a network that predicts numbers, p(token) is softmax(xhat C^T), Diffusion-LM's rounding."""
        if self.tokens:
            return super().guess(z, gamma, extra, before)
        xhat = self.to_x(self.output(z, gamma, extra).double(), z, *scales(gamma))
        return xhat, (xhat.float() @ self.table.T).softmax(-1)[:, :, None]

    def decide(self, z, gamma, extra, before, s):
        """The guess that the sampler s goes on with: guided and steered, if so prepared, and rounded."""
        guess = self.wished(z, gamma, extra, before, s) if self.wish or self.twin else self.guess(z, gamma, extra, before)
        return self.rounded(*guess, s)

    def rounded(self, xhat, p, s):
        """A guess by s.rounding: learned, as it is; cosine, the row at the smallest angle; clamp, xhat becomes the likeliest row, or that nearest to
        it if the network predicts numbers (so that it cannot be steered)."""
        if s.rounding == "clamp":
            near = p[:, :, 0] if self.tokens else -torch.cdist(xhat.float(), self.table)
            return self.clean(near.argmax(-1, keepdim=True)), p
        if s.rounding == "cosine" or not s.rounding and self.weight == "simple":      # nothing has taught such a network to round
            angle = F.normalize(xhat.float(), dim=-1) @ F.normalize(self.table, dim=1).T
            p = F.one_hot(angle.argmax(-1), len(self.table))[:, :, None] * angle.amax(-1).clamp(0, 1)[..., None, None]
        return xhat, p

    def wished(self, z, gamma, extra, before, s):
        """`guess`, guided: p is p^(1 - weight) p_twin^weight, where the twin reads what is likeliest so far. And steered towards a wish y: xhat +
        strength sigma^2 / alpha grad_z log p(y | z) is, at strength 1, the mean of x given z and y (Dhariwal & Nichol 2021), with p(y | z) by
        this very network: every position on its way holds what is allowed there, independently."""
        with torch.set_grad_enabled(bool(self.wish)):
            z = z.detach().requires_grad_(bool(self.wish))
            logp = self.logits(z, gamma, extra, before).log_softmax(-1)               # (B, T, 1, V)
            if self.twin:
                twin = self.twin(logp.detach()[:, :, 0].argmax(-1)).log_softmax(-1)[:, :, None]
                logp = ((1 - s.weight) * logp + s.weight * twin).log_softmax(-1)
            xhat, p = self.mean(logp).detach(), logp.detach().exp()
            if self.wish:
                allowed = self.wish(self.start + torch.arange(z.size(1))).to(z.device)                  # (T, V)
                odds = logp[:, :, 0].masked_fill(~allowed, -math.inf).logsumexp(-1)
                pull, = torch.autograd.grad(odds[self.free].sum(), z)
                a, sd = scales(gamma)
                xhat = xhat + s.strength * sd ** 2 / a * pull
        return xhat, p

    def forward(self, x0):
        """Training loss of characters x0 (B, T)."""
        if self.weight == "diffusion-lm":
            return self.diffusion_lm(x0)
        if not self.tokens:
            return GaussianDiffusion.forward(self, (x0[..., None], x0.new_zeros(*x0.shape, 0)))
        return super().forward(x0)

    def diffusion_lm(self, x0):
        """The loss of Li et al. 2022: |x - f(z)|^2, x a draw around the embedding (at the first of 2,000 steps the embedding itself), + |alpha_T
        x|^2, which keeps embeddings small, + the cross-entropy of rounding x, not f(z), which keeps them apart; nothing else rounds."""
        embedding, t = self.clean(x0[..., None]), stratified(len(x0), x0.device)
        gamma = self.gamma(t)[0]
        (a, s), (aT, _) = scales(gamma), scales(self.gamma(torch.ones_like(t))[0])
        x = embedding + SIGMA_0 * torch.randn_like(embedding)
        f = self.guess(a * x + s * torch.randn_like(x), gamma, x0.new_zeros(*x0.shape, 0))[0]
        error = (torch.where((t < 1 / STEPS)[..., None], embedding, x) - f).square().mean() + (aT * x).square().mean()
        return error.float() + F.cross_entropy((x.float() @ self.table.T).flatten(0, 1), x0.flatten())

    def regularizer(self, logits):
        """Fluency: the surprise -log p(b | a) of the training text's pairs of characters, expected over what is predicted, in nats a pair."""
        if not self.fluency:
            return 0
        p = logits[:, :, 0].softmax(-1)
        surprise = self.pairs.sum(1, keepdim=True).log() - self.pairs.log()           # (V, V)
        return self.fluency * ((p[:, :-1] @ surprise) * p[:, 1:]).sum(-1).mean()


def build(c, meta):
    """The method of a run: c its Embed settings, meta its alphabet."""
    V = len(meta["alphabet"])
    net = Transformer(c, nn.Linear(c.dim * (1 + c.selfcond) + V * c.hint, c.n_embd), V if c.predict == "tokens" else c.dim, positions=c.positions)
    return Embeddings(net, torch.randn(V, c.dim) * (.02 if c.rows == "small" else 1), c)


def begin(method, data, c):
    """Give a method that is to be trained what it takes from elsewhere: from the training text the counts of its pairs of characters, from the
    file c.table, if one is named, its rows; and say what that lacks."""
    if c.fluency:
        pairs = data.train[:-1].long() * len(data.alphabet) + data.train[1:].long()
        method.pairs += torch.bincount(pairs.flatten(), minlength=method.pairs.numel()).view_as(method.pairs).cpu()
    if c.table and not c.resume:
        rows, missing = pretrained(c.table, data.alphabet.chars, c.dim)               # drawn after the network, which a table leaves as it is
        method.rows.data.copy_(rows)
        if missing and RANK == 0:
            print(f"{c.table} lacks {len(missing)} of {len(rows)} characters: {missing[:80]!r}{' ...' * (len(missing) > 80)}; they begin at random")


# ---- why it fails

def cross_entropy(method, x0, unigram, generator):
    """Of the text that method, a Characters, predicts, in nats, and the own times of its characters: two tensors (B, T), for x0 (B, T) at noise
    levels all over the way.

    A network that predicts numbers has no probabilities: log p = log unigram - beta |xhat - C|^2 with the beta in each fifth of the way that serves
    it best, so that it cannot be worse than the know-nothing line because of the scale of its table."""
    u = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    own, _ = method.turns(u.double()[:, None], lambda: torch.rand(x0.shape, generator=generator))
    own, tokens = own.expand(x0.shape).to(x0.device), method.spelled(x0)
    gamma, x = method.ends[0] + own * (method.ends[1] - method.ends[0]), method.clean(tokens)
    (a, s), nothing = scales(gamma), x.new_zeros(*x0.shape, 0)
    z = a * x + s * torch.randn(x.shape, generator=generator).to(x)
    before = method.guess(z, gamma, nothing)[0] if method.selfcond else None
    xhat, p = method.guess(z, gamma, nothing, before)
    if method.tokens:
        return -p.gather(-1, tokens[..., None]).clamp(min=1e-30).log().sum((2, 3)), own
    far = (xhat[:, :, None] - method.table).square().sum(-1)                          # (B, T, V)
    nats, unigram = far.new_zeros(x0.shape), unigram.to(far)
    for fifth in range(5):
        at = (own * 5).ceil().clamp(min=1) == fifth + 1
        tried = [F.cross_entropy(unigram.log() - 2. ** k * far[at], x0[at], reduction="none") for k in range(-10, 16)]
        nats[at] = min(tried, key=lambda n: n.mean().item())
    return nats, own


def tells(x):
    """Bits that a character of the texts x (n, T) tells of the next, beyond what it tells in the same text shuffled: 0 where order means nothing."""
    def information(x):
        pairs = torch.unique(x[:, :-1] * (x.max() + 1) + x[:, 1:], return_counts=True)[1].double()
        joint, (first, second) = pairs[pairs > 0], (torch.bincount(v.flatten()).double() for v in (x[:, :-1], x[:, 1:]))
        entropy = lambda n: -(n[n > 0] / n.sum() * (n[n > 0] / n.sum()).log2()).sum().item()
        return entropy(first) + entropy(second) - entropy(joint)
    shuffled = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0)).to(x.device)].view(x.shape)
    return information(x) - information(shuffled)


def held_out(data, n):
    """n evenly spaced windows (n, T) of held-out text, and the frequencies (V,) of the characters of the training text."""
    unigram = torch.bincount(data.train.long(), minlength=len(data.alphabet)).double() + 1
    return data.val[torch.linspace(0, len(data.val) - 1, min(n, len(data.val))).long()].long(), unigram / unigram.sum()


@torch.no_grad()
def cross_entropy_by_noise(method, data, n=64):
    """Of the predicted text, in nats, in fifths of the way from clean to noise, from n windows at five levels each."""
    val, unigram = held_out(data, n)
    nats, own = cross_entropy(method, val.repeat(5, 1), unigram, torch.Generator().manual_seed(0))
    return [nats[((own * 5).ceil() == i) & (own < 1)].mean().item() for i in range(1, 6)]


@torch.no_grad()
def kit(method, data, n=64):
    """What the failures of embedding diffusion look like, from n windows, all in bits: nothing, the know-nothing line, which is what one scores
    who knows only how frequent each character is; ce, the cross-entropy of the predicted text in fifths of the noise; norm and nearest other
    row of the table; entropy of the characters of samples x, and what one tells of the next, in samples and in text."""
    val, unigram = held_out(data, n)
    table = method.table.double()
    ce = [nats / math.log(2) for nats in cross_entropy_by_noise(method, data, n)]
    reseed(0)
    nothing = torch.zeros_like(val[:32])
    *_, (x, _) = method.sample(nothing, nothing > 0, EmbedSampler())
    share = torch.bincount(x.flatten()).double() / x.numel()
    return dict(nothing=-unigram[data.val.long()].log2().mean().item(), norm=table.norm(dim=1).mean().item(), ce=ce,
                near=torch.cdist(table, table).fill_diagonal_(math.inf).amin(1).mean().item(),
                entropy=-(share[share > 0] * share[share > 0].log2()).sum().item(), order=tells(x), order_of_text=tells(val[:32]), x=x)


def diagnosis(k):
    """The kit in words."""
    return (f"know-nothing line: {k['nothing']:.3f} bits/char: validation text under the frequencies of its characters\n"
            "cross-entropy of the predicted text by noise level, bits/char: "
            + "  ".join(f"{a / 5:.1f}-{(a + 1) / 5:.1f}: {ce:.2f}" for a, ce in enumerate(k["ce"])) +
            f"\ntable: norm {k['norm']:.3f}, nearest other row at {k['near']:.3f}\nsamples: {k['entropy']:.2f} bits of entropy a character, "
            f"which tells {k['order']:.2f} bits of the next (held-out text {k['order_of_text']:.2f})")


# ---- control

def wish(steer, alphabet):
    """What --steer allows: positions (T,) -> bool (T, V). SystemExit where it is none of no:, only:, at:, line:."""
    if alphabet.raw and not steer.isascii():
        raise SystemExit(f"steer={steer!r}: this model writes bytes, and is steered by plain ASCII alone")
    kind, _, what = steer.replace("\\n", "\n").partition(":")
    place, _, char = what.partition("=")
    named = lambda chars: torch.zeros(len(alphabet), dtype=torch.bool).index_fill_(0, torch.from_numpy(alphabet.encode(chars)), True)
    if kind in ("no", "only") and what and (kind == "only" or not named(what).all()):
        return lambda at: (named(what) ^ (kind == "no")).expand(len(at), -1)
    if kind == "at" and place.isdecimal() and len(place) < 7 and len(char) == 1:
        return lambda at: named(char) | (at != int(place))[:, None]
    if kind == "line" and what.isdecimal() and len(what) < 7 and int(what):
        return lambda at: named("\n") ^ (at % (int(what) + 1) != int(what))[:, None]
    raise SystemExit(f"steer={steer!r}: write no:e, only:abc, at:5=T or line:40")


def prepare(method, alphabet, s, T):
    """Give method, whose windows have T characters, what the sampler s needs: the wish and the twin."""
    if (s.steer or s.mode == "guided") and not method.tokens:
        raise SystemExit("steer and mode=guided need a network that predicts probabilities: predict=tokens")
    if s.steer and s.rounding == "clamp":
        raise SystemExit("steer moves a guess, and rounding=clamp takes it back: leave one of them out")
    method.wish, method.twin, method.start, method.free = wish(s.steer, alphabet) if s.steer else None, None, 0, ...
    L = len(generate.plan(alphabet, s, T)[0])
    if s.steer and method.wish(torch.arange(L)).all():
        raise SystemExit(f"steer={s.steer!r} allows everything in a text of {L} characters")
    if s.mode == "guided":
        twin, c, meta = load(s.twin or HERE / "results/judge.pt", build_twin, ("ar",))
        if meta["alphabet"] != alphabet.chars or c.block_size < T:
            raise SystemExit(f"the twin {s.twin or 'results/judge.pt'} reads other characters, or shorter windows, than this model writes: train one "
                             "with python train.py --objective=ar and name it, --twin=FOLDER")
        method.twin = twin.logits


def main(argv):
    if argv[:1] == ["sample"]:
        return generate.sample(argv[1:], EmbedSampler(), "embed", build, prepare)
    ema, data = start(argv, parse(argv, Embed()), "embed", Text, build, show_text(EmbedSampler()), begin)
    if ema and RANK == 0:
        print(diagnosis(kit(ema, data)))


if __name__ == "__main__":
    run(main)

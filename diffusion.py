"""The processes: how data become noise, the loss that trains a network to undo it, and the walk back.

A method is a module over a network net(x, t). forward(batch) is its training loss; bound(batch, u, seeds) draws its variational
bound; sample(...) is a generator that yields (state, confidence) after every network call, the last being the result."""
import math

import torch
import torch.nn.functional as F
from torch import nn


def stream(seeds, draw):
    """draw(generator) once for each seed, stacked: every row has random numbers of its own, whatever batch it is in."""
    return torch.stack([draw(torch.Generator().manual_seed(seed)) for seed in seeds])


def predicted(logits, s):
    """The distribution sampled from: logits (..., V) -> probabilities (..., V), by s.temperature (0: argmax) and s.top_k."""
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.size(-1))).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return ((logits - logits.amax(-1, keepdim=True)) / max(s.temperature, 1e-6)).softmax(-1)


def draw(p):
    """One draw from each distribution: p (B, T, V) -> tokens (B, T) and their probabilities (B, T)."""
    token = torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2])
    return token, p.gather(-1, token[..., None])[..., 0]


def entropy(p):
    """Entropy in nats: (..., V) -> (...)."""
    return torch.special.entr(p).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------------------
# Masked diffusion. Forward: each token becomes MASK with probability m(t). With CE(m) the mean cross-entropy of the masked tokens,
#
#     -log p(x0) <= T int_0^1 CE(m) dm = T mean_{k=1..T} E[mean CE over exactly k masked]        (MDLM, MD4, RADD; ARDM)
#
# so the schedule m(t) moves only the variance of the estimate, never its value.

SCHEDULES = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - torch.cos((t + .008) / 1.008 * math.pi / 2) ** 2 / math.cos(.008 / 1.008 * math.pi / 2) ** 2).clamp(0, .999),
}

# How much each masked position deserves to be next, from the predicted distribution p (B, T, V) before anything is drawn:
# scoring by the token drawn would sample another distribution.
ORDERS = {
    "random": lambda p: torch.rand(p.shape[:2], device=p.device),
    "confidence": lambda p: p.amax(-1),
    "margin": lambda p: p.topk(2).values @ p.new_tensor([1, -1]),
    "entropy": lambda p: -entropy(p),
}

# How many of k masked characters (B,) to reveal now, with `left` calls to come, this one included, of `steps`; k0 at the start.
COUNTS = {
    "even": lambda k, k0, left, steps: -(-k // left),                    # quotient, the remainder spread over the first calls
    "documents": lambda k, k0, left, steps: k // left,                   # max(1, int(masked / (t + 1))): the remainder comes last
    "cosine": lambda k, k0, left, steps: k - (k0 * math.sin(math.pi / 2 * (left - 1) / steps)).long(),   # few first (MaskGIT)
}


def exactly(k, T, rand):
    """A mask (B, T) with exactly k[i] True in row i, uniform among all such; rand (B, T) uniform on [0, 1]."""
    return rand.argsort(1).argsort(1) < k[:, None]


def bounded(p, score, gamma):
    """The entropy bound (EB sampler): reveal in order of score while sum H - max H <= gamma. p (B, T, V) -> counts (B,)."""
    H = entropy(p).gather(1, score.argsort(1, descending=True)).masked_fill(score.sort(1, descending=True).values == -math.inf, math.inf)
    return (H.cumsum(1) - H.cummax(1).values <= gamma).sum(1)


def spread(score, apart):
    """Scores (B, T) in which whoever has a better one within `apart` places comes after all who have none: characters revealed in one
    call are drawn without seeing each other, which costs most between neighbours. Ties, as on an empty page, are broken at random."""
    score = score + 1e-6 * torch.rand_like(score)
    best = F.max_pool1d(score, 2 * apart + 1, 1, apart)
    return torch.where(score < best, score - 100, score)


class MaskedDiffusion(nn.Module):
    """Tokens 0..V-1 and MASK = V: the network reads V + 1 tokens and predicts V, so MASK cannot be predicted."""

    levels = 16   # noise levels drawn per window when the whole split is evaluated

    def __init__(self, net, vocab, schedule="linear", weight="elbo"):
        super().__init__()
        self.net, self.mask, self.rate, self.weight = net, vocab, SCHEDULES[schedule], weight

    def masked_ce(self, x0, k, rand):
        """Cross-entropy (B, T) in nats at exactly k masked positions (B,), 0 elsewhere. The network is fed k/T."""
        B, T = x0.shape
        masked = exactly(k, T, rand)                                                  # (B, T)
        logits = self.net(x0.masked_fill(masked, self.mask), k / T)                   # (B, T, V)
        return F.cross_entropy(logits.transpose(1, 2), x0, reduction="none") * masked

    def levels_of(self, B, device):
        """A stratified draw of B mask rates and the mass of the stratum each stands for, times B: (B,), (B,), mean mass 1."""
        edges = self.rate(torch.linspace(0, 1, B + 1, device=device))
        edges[-1] = 1                                                                 # undoes the clip
        mass = edges.diff()
        return edges[:-1] + torch.rand(B, device=device) * mass, B * mass

    def forward(self, x0):
        """Training loss of tokens x0 (B, T), nats per token: elbo is the bound itself, flat forgets the weight of the stratum,
        pooled is the mean over all masked tokens of the batch (not a bound)."""
        B, T = x0.shape
        mu, mass = self.levels_of(B, x0.device)
        k = (mu * T).ceil().clamp(1, T)                                               # ceil alone makes k uniform on 1..T
        ce = self.masked_ce(x0, k, torch.rand(B, T, device=x0.device)).sum(1)         # (B,)
        weight = {"elbo": mass / k / B, "flat": 1 / k / B, "pooled": 1 / k.sum()}[self.weight]
        return (weight * ce).sum()

    def bound(self, x0, u, seeds):
        """One draw of the bound for each row of x0 (B, T), at mask rate u (B,) in (0, 1] -> (nats per token (B,), k/T (B,))."""
        T = x0.size(1)
        k = (u * T).ceil().clamp(1, T)
        rand = stream(seeds, lambda g: torch.rand(T, generator=g)).to(x0.device)
        return self.masked_ce(x0, k, rand).sum(1) / k, k / T

    @torch.no_grad()
    def sample(self, x, known, s):
        """Unmask every position of x (B, T) that is not known (B, T), in at most s.steps network calls; yields (x, confidence) after
        each: x has MASK where nothing is written yet, confidence is the probability of each character when it was revealed.

        order=random, counts=even, temperature=1, remask=0, one character a call is an exact draw from the model that `bound` bounds."""
        x = torch.where(known, x, self.mask)
        sure = known.float()
        k0 = (~known).sum(1)
        for left in range(s.steps, 0, -1):
            masked = x == self.mask
            k = masked.sum(1)                                                         # (B,)
            logits = self.net(x, k.clamp(min=1) / x.size(1))                          # (B, T, V)
            p = predicted(logits, s)
            score = (ORDERS["entropy"](p) if s.counts == "entropy" else ORDERS[s.order](logits.softmax(-1)))
            score = score.masked_fill(~masked, -math.inf)
            if s.apart:
                score = spread(score, s.apart)
            n = bounded(p, score, s.gamma) if s.counts == "entropy" else COUNTS[s.counts](k, k0, left, s.steps)
            n = k if left == 1 else torch.minimum(n.clamp(min=1), k)
            now = score.argsort(1, descending=True).argsort(1) < n[:, None]           # (B, T)
            token, prob = draw(p)
            x, sure = torch.where(now, token, x), torch.where(now, prob, sure)
            if s.remask and left > 1:
                x, sure = self.again(x, sure, known, s)
            yield x, sure
            if not (x == self.mask).any():
                return

    def again(self, x, sure, known, s):
        """Mask a share s.remask of each row's revealed characters again (ReMDM), at least one if none is masked, never a known one: at
        random, or those least probable *when they were revealed*; what the network now says at a revealed position was never trained."""
        free, full = (x != self.mask) & ~known, (x != self.mask).all(1)
        n = torch.maximum((s.remask * free.sum(1)).long(), full.long())               # (B,)
        score = torch.rand_like(sure) if s.remask_by == "random" else sure
        back = free & (score.masked_fill(~free, math.inf).argsort(1).argsort(1) < n[:, None])
        return x.masked_fill(back, self.mask), sure.masked_fill(back, 0)


class Autoregressive(nn.Module):
    """The twin: the same network, causal, with MASK as its start symbol and a constant t. It scores all T characters exactly."""

    levels = 1

    def __init__(self, net, vocab):
        super().__init__()
        self.net, self.mask = net, vocab

    def logits(self, x):
        """Predictions (B, T, V) of each character of x (B, T) from those before it."""
        return self.net(F.pad(x[:, :-1], (1, 0), value=self.mask), torch.ones(len(x), device=x.device))

    def forward(self, x0):
        """Exact negative log-likelihood of tokens x0 (B, T), nats per token."""
        return self.bound(x0)[0].mean()

    def bound(self, x0, u=None, seeds=None):
        """Exact, so nothing is drawn: (nats per token (B,), ones (B,))."""
        nats = F.cross_entropy(self.logits(x0).transpose(1, 2), x0, reduction="none").mean(1)
        return nats, torch.ones_like(nats)

    @torch.no_grad()
    def sample(self, x, known, s):
        """Write x (B, T) from left to right around what is known (B, T); yields (x, confidence) after each network call."""
        B, T = x.shape
        x, sure, past = torch.where(known, x, self.mask), known.float(), {}
        shown, start = torch.ones(B, device=x.device), int((~known).any(0).int().argmax())   # one call reads all that is known at first
        for i in range(start, T):
            before = F.pad(x[:, :i], (1, 0), value=self.mask)[:, 0 if i == start else i:]
            token, prob = draw(predicted(self.net(before, shown, past)[:, -1:], s))   # (B, 1)
            free = ~known[:, i]
            x, sure = x.clone(), sure.clone()
            x[free, i], sure[free, i] = token[free, 0], prob[free, 0]
            yield x, sure
            if known[:, i + 1:].all():
                return

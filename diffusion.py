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


def stratified(B, device):
    """B times in [0, 1], one uniform draw in each B-th of it: (B, 1) float64."""
    return ((torch.arange(B, device=device) + torch.rand(B, device=device, dtype=torch.float64)) / B)[:, None]


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
    "square": lambda t: t ** 2,
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
    """Scores (B, T), -inf where nothing is to be revealed, in a new order: first the best, the best of those farther than `apart` from it,
    the best of those farther from both, and so on; then the rest. Equal scores, as on an empty page, come in random order.

    Characters revealed in one call are drawn without seeing each other, which costs most between neighbours."""
    T, near = score.size(1), dict(kernel_size=2 * apart + 1, stride=1, padding=apart)
    shuffled = torch.rand_like(score).argsort(1)
    rank = shuffled.gather(1, score.gather(1, shuffled).argsort(dim=1, stable=True)).argsort(1).float()              # (B, T), 0 the worst
    first, free = torch.zeros_like(score, dtype=torch.bool), score > -math.inf
    while free.any():
        peak = free & (rank == F.max_pool1d(rank.masked_fill(~free, -1), **near))
        first |= peak
        free &= F.max_pool1d(peak.float(), **near) == 0
    return (rank + T * first).masked_fill(score == -math.inf, -math.inf)


class MaskedDiffusion(nn.Module):
    """Tokens 0..V-1 and MASK = V: the network reads V + 1 tokens and predicts V, so MASK cannot be predicted."""

    levels, unit, noise = 16, "char", "share masked"   # noise levels drawn per window when the whole split is evaluated; for reports
    early_stopping = True                              # the weights with the lowest bound are kept, not the last

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
        """Training loss of tokens x0 (B, T), nats per token: elbo is the bound itself; pooled the mean over all masked tokens
        of the batch, which is no bound but less noisy: where few are masked, few count. Networks trained on it have the lower bound (LOG.md)."""
        B, T = x0.shape
        mu, mass = self.levels_of(B, x0.device)
        k = (mu * T).ceil().clamp(1, T)                                               # ceil alone makes k uniform on 1..T
        ce = self.masked_ce(x0, k, torch.rand(B, T, device=x0.device)).sum(1)         # (B,)
        weight = {"elbo": mass / k / B, "pooled": 1 / k.sum()}[self.weight]
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

    levels, unit, noise, early_stopping = 1, "char", "share masked", True

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
            before = x[:, i - 1:i] if past else F.pad(x[:, :i], (1, 0), value=self.mask)
            token, prob = draw(predicted(self.net(before, shown, past)[:, -1:], s))   # (B, 1)
            free = ~known[:, i]
            x, sure = x.clone(), sure.clone()
            x[free, i], sure[free, i] = token[free, 0], prob[free, 0]
            yield x, sure
            if known[:, i + 1:].all():
                return


# ---------------------------------------------------------------------------------------------------------------------------------
# Gaussian diffusion. Forward: z = alpha x + sigma eps with gamma = -log SNR, alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma).
# With xhat the network's guess of x,
#
#     -log p(x) <= KL(q(z_1 | x) || N(0, I)) + E[-log p(x | z_0)] + 1/2 int_{gamma_0}^{gamma_1} e^-gamma E||x - xhat||^2 dgamma   (VDM)
#
# which depends on the ends gamma_0 and gamma_1 but not on the schedule between them.

ALPHA_BAR = {   # alpha^2 at t = 0, 1/1000, ..., 1, before it is clamped
    "linear": lambda t: torch.cat([t[:1] + 1, (1 - torch.linspace(1e-4, .02, 1000, dtype=t.dtype)).cumprod(0)]),    # DDPM's own steps
    "cosine": lambda t: torch.cos((t + .008) / 1.008 * math.pi / 2) ** 2 / math.cos(.008 / 1.008 * math.pi / 2) ** 2,
    "sqrt": lambda t: 1 - (t + 1e-4).sqrt(),                              # below 0 at the end: taken as it is, its root is not a number
}
XHAT = {   # the network's guess of x, from its output of each kind at z = alpha x + sigma eps
    "x0": lambda out, z, a, s: out,
    "eps": lambda out, z, a, s: (z - s * out) / a,
    "v": lambda out, z, a, s: a * z - s * out,                            # v = alpha eps - sigma x
}
PLAIN = {"x0": lambda snr: snr ** 0, "eps": lambda snr: snr, "v": lambda snr: snr + 1}   # |x - xhat|^2 times this: the error of the output


def scales(gamma):
    """alpha and sigma of gamma (B, 1) or (B, T) float64, with one more dimension for the numbers of a position."""
    return (-gamma).sigmoid().sqrt()[..., None], gamma.sigmoid().sqrt()[..., None]


class GaussianDiffusion(nn.Module):
    """Of numbers that are grey levels 0..V-1, spread over [-1, 1]; subclasses bring other codes (clean, denoise, reconstruction).

    net(x, t): x (B, T, K + extra), t the noise level (gamma - gamma_0) / (gamma_1 - gamma_0), (B, 1) or (B, T) -> (B, T, K). gamma has the
    shape of t throughout; all that is not the network is float64."""

    levels, unit, noise = 8, "number", "noise level"   # noise levels drawn per example when the whole split is evaluated; for reports
    V, extra = 256, 0                                  # grey levels; numbers beside each position that are known: labels
    early_stopping = False                             # noise finer than a grey level decides its bound, and nobody sees that

    def __init__(self, net, predict="v", schedule="cosine", weight="simple", ends=(-13.3, 10.0)):
        super().__init__()
        self.net, self.ends, self.weight, self.to_x, self.plain = net, ends, weight, XHAT[predict], PLAIN[predict]
        bar = ALPHA_BAR[schedule](torch.linspace(0, 1, 1001, dtype=torch.float64)).clamp(1e-12, 1 - 1e-12)
        knots = (torch.log1p(-bar) - bar.log()).clamp(*ends)                          # -log SNR
        knots[0], knots[-1] = ends
        self.register_buffer("knots", knots, persistent=False)

    def gamma(self, t):
        """-log SNR at t in [0, 1], linear between the knots, and its slope dgamma/dt, both in the shape of t."""
        k = (1000 * t).long().clamp(max=999)
        slope = self.knots[k + 1] - self.knots[k]
        return self.knots[k] + (1000 * t - k) * slope, 1000 * slope

    def clean(self, x0):
        """Grey levels (B, T, K) as numbers in [-1, 1], float64."""
        return x0.double() * 2 / (self.V - 1) - 1

    def output(self, z, gamma, extra):
        """What the network says of z (B, T, K) and what is known beside it, extra (B, T, N)."""
        level = (gamma - self.ends[0]) / (self.ends[1] - self.ends[0])
        return self.net(torch.cat([z, extra], -1).float(), level.float())

    def denoise(self, z, gamma, extra):
        """xhat (B, T, K), float64, for z (B, T, K) and what is known beside it, extra (B, T, N), all zeros where it is hidden."""
        return self.to_x(self.output(z, gamma, extra).double(), z, *scales(gamma))

    def noised(self, x0, t):
        """Tokens x0 at t: clean x and noisy z (B, T, K), gamma and its slope in the shape of t."""
        gamma, slope = self.gamma(t)
        x, (a, s) = self.clean(x0), scales(gamma)
        return x, a * x + s * torch.randn(x.shape, device=x.device), gamma, slope

    def forward(self, batch):
        """Training loss of a batch (x0 (B, T, K), extra (B, T, N)): the mean of weight * |x - xhat|^2 over t. simple: the plain error of
        what the network predicts; min-snr: Hang et al. 2023; elbo: the integral of the bound, nats per number."""
        x0, extra = batch
        x, z, gamma, slope = self.noised(x0, stratified(len(x0), x0.device))
        snr = (-gamma).exp()
        weight = {"simple": self.plain(snr), "elbo": snr * slope / 2, "min-snr": snr.clamp(max=5)}[self.weight]       # (B, 1)
        return (weight * (x - self.denoise(z, gamma, extra)).square().mean(2)).mean().float()

    def reconstruction(self, x0, z):
        """-log p(x0 | z) in nats (B,) at gamma_0: a softmax over the levels by their distance to z, of which only the 17 nearest count."""
        a, s = scales(z.new_tensor([self.ends[0]]))
        near = ((z / a + 1) * (self.V - 1) / 2).round().clamp(0, self.V - 1).long()[..., None] + torch.arange(-8, 9, device=z.device)
        logit = lambda level: ((z[..., None] - a * self.clean(level)) / s).square() / -2
        total = logit(near).masked_fill((near < 0) | (near >= self.V), -math.inf).logsumexp(-1)
        return (total - logit(x0[..., None])[..., 0]).sum((1, 2))

    def turns(self, t, u, known=None):
        """At time t (B, 1): each position's own time in [0, 1], (B, 1) or (B, T), and how fast it runs; u() draws uniform numbers (B, T)."""
        return t, 1

    def bound(self, x0, u, seeds):
        """One draw of the bound for each row of x0 (B, T, K) or (B, T), with nothing known beside it, at u (B,) in (0, 1] of the way from
        gamma_0 to gamma_1, or what `turns` makes of that -> (nats per number of x0 (B,), u)."""
        x, (low, high) = self.clean(x0), self.ends
        eps, eps0 = stream(seeds, lambda g: torch.randn(2, *x.shape[1:], generator=g)).to(x.device).unbind(1)
        order = lambda: stream([i + 1 for i in seeds], lambda g: torch.rand(x.size(1), generator=g)).to(x.device)
        own, speed = self.turns(u.double()[:, None], order)
        gamma = low + own * (high - low)
        (a, s), (a0, s0), (a1, s1) = scales(gamma), *(scales(torch.full_like(gamma, end)) for end in (low, high))
        xhat = self.denoise(a * x + s * eps, gamma, x.new_zeros(*x.shape[:2], self.extra))
        integral = (high - low) / 2 * (speed * (-gamma).exp() * (x - xhat).square().sum(2)).sum(1)
        prior = ((a1 * x).square() + s1 ** 2 - 1 - 2 * s1.log()).sum((1, 2)) / 2
        return (integral + prior + self.reconstruction(x0, a0 * x + s0 * eps0)) / x0[0].numel(), u

    def step(self, z, xhat, gamma, to, s):
        """From z at gamma to noise level `to`, by DDIM or with the ancestral posterior q(z_to | z, xhat)."""
        (a, sd), (b, sd_to) = scales(gamma), scales(to)
        if s.sampler == "ddim":
            return b * xhat + sd_to * (z - a * xhat) / sd
        c = -torch.expm1(to - gamma)[..., None]
        return (1 - c) * b / a * z + c * b * xhat + c.sqrt() * sd_to * torch.randn_like(z)

    @torch.no_grad()
    def sample(self, z, extra, s):
        """From noise z (B, T, K) to numbers in s.steps network calls (twice as many passes where s.guidance is neither 0 nor 1); yields
        (z, xhat) after each, the last being (xhat, xhat). s.td: the state is taken so many steps further than its label says."""
        z, hidden = z.double(), torch.zeros_like(extra)
        for i in range(s.steps, 0, -1):
            (gamma, _), (to, _) = (self.gamma(z.new_full((len(z), 1), max(at / s.steps, 0))) for at in (i, i - 1 - s.td))
            xhat = self.denoise(z, gamma, extra if s.guidance else hidden)
            if s.guidance not in (0, 1):
                free = self.denoise(z, gamma, hidden)
                xhat = free + s.guidance * (xhat - free)                              # classifier-free guidance (Ho & Salimans 2022)
            xhat = xhat.clamp(-1, 1) if s.clip else xhat
            z = self.step(z, xhat, gamma, to, s) if i > 1 else xhat
            yield z, xhat


class CodeDiffusion(GaussianDiffusion):
    """Of tokens 0..V-1 through their codes, the rows of a table (V, K): grey levels, bits or embeddings; a position holds N tokens.

    net(x, t): x (B, T, N K + extra) -> logits (B, T, N V): what the context says of each token. What z itself says of it is known exactly
    and added (the analytic prior), so that an untrained network has the bound log V; xhat is the mean code, softmax(logits) C. With hint
    the network is shown the probabilities of the tokens by z alone, N V more numbers, with selfcond an earlier xhat of its own, or zeros
    (Chen et al. 2022): in training for half the batches, then always. A share `prompts` of the training examples have clean parts
    (`clean_part`), which do not count. spread: see `turns`."""

    early_stopping = True

    def __init__(self, net, table, schedule="cosine", weight="ce", ends=(-13.3, 10.0), selfcond=False, prior=True, prompts=0.0,
                 spread=0.0, hint=False):
        super().__init__(net, "x0", schedule, weight, ends)
        self.register_buffer("rows", table, persistent=False)
        self.selfcond, self.prior, self.prompts, self.spread, self.hint = selfcond, prior, prompts, spread, hint
        self.noise = "time" if spread else self.noise                                 # at one time noise levels differ

    @property
    def table(self):
        """The codes, (V, K); a subclass may learn them."""
        return self.rows

    def clean(self, x0):
        """Tokens (B, T, N) as codes (B, T, N K), float64."""
        return self.table[x0].flatten(2).double()

    def told(self, z, gamma):
        """log N(z; alpha C, sigma^2), but for a constant: what z (B, T, N K) says of its tokens, (B, T, N, V) float64."""
        q, C = (z / scales(gamma)[0]).unflatten(2, (-1, self.table.size(1))), self.table.double()
        return (q @ C.T - C.square().sum(1) / 2) * (-gamma).exp()[..., None, None]

    def turns(self, t, u, known=None):
        """Position i, at place p_i in (0, 1) of the order of u, is at its own time (1 + spread) t - spread p_i, between 0 and 1. With spread
        0 all are equally noisy; with more, fewer are on their way at once, the others clean or all noise, which leads from the papers'
        Gaussian diffusion towards masked diffusion. The bound holds for any order. Known positions (B, T) take no turns."""
        if not self.spread:
            return t, 1
        u = u()
        known = torch.zeros_like(u, dtype=torch.bool) if known is None else known
        rank = u.masked_fill(known, 2).argsort(1).argsort(1)                          # the known behind all others, so always clean
        own = (1 + self.spread) * t - self.spread * (rank + .5) / (~known).sum(1, keepdim=True).clamp(min=1)
        return own.clamp(0, 1), (1 + self.spread) * ((own > 0) & (own < 1))

    def logits(self, z, gamma, extra, before=None):
        """log p(token | z, extra) (B, T, N, V), fp32, but for a constant; before (B, T, N K): an earlier xhat."""
        if self.selfcond:
            extra = torch.cat([torch.zeros_like(z) if before is None else before, extra], -1)
        told = self.told(z, gamma) if self.prior or self.hint else None
        if self.hint:
            extra = torch.cat([told.softmax(-1).flatten(2), extra], -1)
        out = self.output(z, gamma, extra).view(*z.shape[:2], -1, len(self.table))
        return told.sub_(told.detach().amax(-1, keepdim=True)).float() + out if self.prior else out

    def mean(self, logits):
        """xhat (B, T, N K), float64, of logits (B, T, N, V): the mean code."""
        return (logits.softmax(-1) @ self.table.float()).flatten(2).double()

    def guess(self, z, gamma, extra, before=None):
        """The network's guess of the codes, xhat (B, T, N K), and the probabilities of the tokens, (B, T, N, V)."""
        logits = self.logits(z, gamma, extra, before)
        return self.mean(logits), logits.softmax(-1)

    def decide(self, z, gamma, extra, before, s):
        """The guess that the sampler s goes on with, as `guess`."""
        return self.guess(z, gamma, extra, before)

    def regularizer(self, logits):
        """What a subclass adds to the cross-entropy."""
        return 0

    def denoise(self, z, gamma, extra):
        """xhat (B, T, N K); with selfcond, of a second pass that is shown the xhat of a first at the same z."""
        before = self.guess(z, gamma, extra)[0] if self.selfcond else None
        return self.guess(z, gamma, extra, before)[0]

    def forward(self, batch):
        """Training loss of a batch (x0 (B, T, N), extra): ce, the mean cross-entropy over t of the tokens above gamma_0, no bound; or
        elbo, the integral of the bound in nats per token. Known positions are clean and do not count."""
        x0, extra = batch
        known, order = clean_part(*x0.shape[:2], self.prompts, x0.device), torch.rand(x0.shape[:2], device=x0.device)   # (B, T) each
        own, speed = self.turns(stratified(len(x0), x0.device), lambda: order, known)
        x, z, gamma, slope = self.noised(x0, own)
        z, gamma = torch.where(known[..., None], x, z), torch.where(known, self.ends[0], gamma)
        before = None
        if self.selfcond and torch.rand(()) < .5:
            with torch.no_grad():
                before = self.guess(z, gamma, extra)[0]
        logits, counts = self.logits(z, gamma, extra, before), gamma > self.ends[0] if self.weight == "ce" else ~known
        counts = counts / counts.sum().clamp(min=1) / x0.size(2)                      # (B, T)
        if self.weight == "ce":
            nats = F.cross_entropy(logits.flatten(0, 2), x0.flatten(), reduction="none").view(x0.shape).sum(2)
            return (nats * counts).sum() + self.regularizer(logits)
        return (counts * speed * (-gamma).exp() * slope / 2 * (x - self.mean(logits)).square().sum(2)).sum().float()

    def reconstruction(self, x0, z):
        """-log p(x0 | z) in nats (B,) at gamma_0, by what z says alone."""
        told = self.told(z, z.new_tensor([self.ends[0]])).log_softmax(-1)
        return -told.flatten(0, 2).gather(1, x0.reshape(-1, 1)).view(len(x0), -1).sum(1)

    @torch.no_grad()
    def sample(self, x, known, s, later=None):
        """Write tokens x (B, T, N) where they are not known (B, T), in s.steps steps; yields (tokens, probabilities), (B, T, N) each, after
        every step: the likeliest of each, and how likely. z itself is never the result: at t = 0 it is no token. later (B, T) stays noise.

        The network is shown the xhat of the step before, or with s.twice of a first pass at the same z. Known positions are clean, as in
        training, or with s.replace as noisy as the others, for a network that never saw a clean one. s.td: see GaussianDiffusion."""
        codes, before, order, later = self.clean(x), None, torch.rand(known.shape).to(x.device), known & False if later is None else later
        eps, z, extra = torch.randn(2, *codes.shape, dtype=torch.float64).to(x.device).unbind(0) + (codes.new_zeros(*codes.shape[:2], 0),)
        turns = lambda t: self.turns(z.new_full((len(z), 1), t), lambda: order, None if s.replace else known | later)[0].expand(known.shape)
        level_at = lambda i: self.gamma(turns(max(i / s.steps, 0)).masked_fill(later, 1))[0]
        here = level_at(s.steps)
        for i in range(s.steps, 0, -1):
            gamma, to = level_at(i), level_at(i - 1 - s.td)
            a, sd = scales(here)                                                      # where the last step went: with td, beyond its label
            z = torch.where(known[..., None], a * codes + sd * eps if s.replace else codes, z)
            level = gamma if s.replace else torch.where(known, self.ends[0], gamma)
            if s.twice:
                before = self.guess(z, level, extra)[0]
            before, p = self.decide(z, level, extra, before, s)
            p, token = p.max(-1)                                                      # (B, T, N)
            z, here = self.step(z, before, gamma, to, s), to
            yield torch.where(known[..., None], x, token), torch.where(known[..., None], 1., p)


class Characters(CodeDiffusion):
    """Of characters, one to a position: logits over the alphabet, so that no code is invalid (softmax factorisation)."""

    unit, tokens = "char", True                           # the network predicts probabilities of tokens
    spelled = staticmethod(lambda x0: x0[..., None])      # the tokens (B, T, N) of characters (B, T)
    read = staticmethod(lambda tokens: tokens[..., 0])    # and back
    mask = property(lambda self: len(self.rows))          # what `generate.write` puts where nothing is written yet

    def forward(self, x0):
        """Training loss of characters x0 (B, T), in nats per token."""
        return super().forward((self.spelled(x0), x0.new_zeros(*x0.shape, 0)))

    def bound(self, x0, u, seeds):
        """One draw of the bound for each row of x0 (B, T), as above: (nats per character (B,), u)."""
        nats, u = super().bound(tokens := self.spelled(x0), u, seeds)
        return nats * tokens.size(2), u

    def sample(self, x, known, s, later=None):
        """Write x (B, T) where it is not known (B, T), nor comes later; yields (characters, confidence) after each step."""
        for y, p in super().sample(self.spelled(x.masked_fill(~known, 0)), known, s, later):
            yield self.read(y), p.prod(-1)


def clean_part(B, T, share, device):
    """Positions (B, T) that are known, in a share of the rows and never all, a third each: a beginning of any length; all but a span; or both, a
    beginning and, after a blank, a piece of what follows. So a prompt with a blank is known in training, too."""
    at, row = torch.arange(T, device=device), torch.rand(B, 1, device=device)
    a, b, c = (torch.rand(3, B, 1, device=device).sort(0).values * T).long()          # a <= b <= c < T
    c = torch.where(row < share / 3, 0, torch.where(row < share * 2 / 3, T, c))
    return ((at < a) | (at > b) & (at < c)) & (row < share)

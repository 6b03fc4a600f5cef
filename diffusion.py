"""Masked (absorbing-state) diffusion over tokens, and its autoregressive baseline.

Both are nn.Modules around a network net(x, t) -> logits (B, T, V), t = k / T the share masked:

    forward(x0)            training loss, nats per token
    bound(x0, u, seeds)    for each row an estimate of the bound on -log p(x0) / T, in nats (B,), at
                           the noise level that u (B,) in [0, 1] chooses, and that level (B,)
    sample(x, known, s)    yields (x, confidence) after every network call; s: config.Sample

B batch, T positions, V vocabulary size; token V is MASK.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn


def mask_rate(schedule, t):
    """m(t): the probability that a token is masked at time t in [0, 1]."""
    if schedule == "linear":
        return t
    if schedule == "square":
        return t ** 2
    if schedule == "cosine":
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        alpha_bar_0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar / alpha_bar_0).clamp(0, 0.999)
    if schedule == "logit-normal":
        return logit_normal(t)


class MaskedDiffusion(nn.Module):
    """At time t each token is MASK with probability m(t). With CE(m) the expected cross-entropy of
    a masked token at mask rate m,

        -log p(x0) <= T int_0^1 CE(m) dm = T mean_{k=1..T} E[mean CE over exactly k masked]

    (MDLM, MD4, RADD; ARDM). Here exactly k are masked. With loss=elbo the schedule changes only
    the variance, with loss=pooled also the weight of the mask rates. MASK is never predicted.
    """
    eval_levels = 16         # mask rates per window in the last evaluation of a run
    early_stopping = True    # best.pt has the lowest bound, not the last step
    noise_name = "share masked"

    def __init__(self, net, vocab_size, schedule="linear", loss="elbo"):
        super().__init__()
        self.net = net
        self.mask_id = vocab_size
        self.schedule = schedule
        self.loss = loss

    def masked_ce(self, x0, k, rand):
        """Cross-entropy (B, T) where the k (B,) smallest of rand (B, T) are masked, else 0."""
        T = x0.size(1)
        masked = rank(rand) < k[:, None]                               # (B, T)
        xt = x0.masked_fill(masked, self.mask_id)
        logits = self.net(xt, k / T)                                   # (B, T, V)
        return F.cross_entropy(logits.transpose(1, 2), x0, reduction="none") * masked

    def sample_mask_rates(self, B, device):
        """One rate in each of B strata, uniform from m(i / B) to m((i + 1) / B) -> rates (B,) and
        importance weights (B,). So with few rows, their density is flatter than the schedule's."""
        borders = mask_rate(self.schedule, torch.linspace(0, 1, B + 1, device=device))
        borders[-1:].fill_(1)                              # cosine is clipped at 0.999
        return one_per_stratum(borders)

    @torch.compiler.disable              # compiled, it would draw other numbers
    def draw(self, B, T, device):
        """What is random in a training step: mask rates and weights (B,), and uniform (B, T)."""
        rate, weight = self.sample_mask_rates(B, device)
        return rate, weight, torch.rand(B, T, device=device)

    def forward(self, x0):
        """elbo: the bound. pooled: mean CE over all masked tokens of the batch. It is no bound, but
        less noisy, and a network that is trained on it reaches a lower bound (docs/LOG.md)."""
        rate, weight, rand = self.draw(*x0.shape, x0.device)
        k = num_masked(rate, x0.size(1))
        ce = self.masked_ce(x0, k, rand).sum(1)
        if self.loss == "elbo":
            return (weight / k * ce).mean()
        return ce.sum() / k.sum()

    def bound(self, x0, u, seeds):
        """At mask rate u (B,) in [0, 1] -> nats per token (B,), k/T (B,).
        Row i is masked by seeds[i], whatever batch it is in."""
        T = x0.size(1)
        k = num_masked(u, T)
        rand = per_row_noise(seeds, torch.rand, (T,)).to(x0.device)
        return self.masked_ce(x0, k, rand).sum(1) / k, k / T

    def reveal(self, x, n_total, steps_left, s, locked=None):
        """What one call of the network reveals of x (B, T), of which n_total (B,) positions were
        to be written at the start: which positions (B, T), none of them locked, and the
        log-probabilities of their tokens (B, T, V). Neither depends on what is drawn, so a text
        can be scored as well as written."""
        masked = x == self.mask_id                                     # (B, T)
        t = masked.sum(1).clamp(min=1) / x.size(1)
        if locked is not None:
            masked = masked & ~locked
        n_masked = masked.sum(1)                                       # (B,)
        logits = self.net(x, t)                                        # (B, T, V)
        log_probs = token_log_probs(logits, s.temperature, s.top_k)

        # which positions come first; the EB sampler, counts=entropy, has an order of its own
        if s.counts == "entropy":
            score = position_scores(log_probs.exp(), "entropy")
        else:
            score = position_scores(logits.softmax(-1), s.order)
        score = score.masked_fill(~masked, -math.inf)                  # (B, T)
        if s.min_distance:
            score = keep_apart(score, s.min_distance)

        # how many of them
        if steps_left == 1:
            n = n_masked
        elif s.counts == "entropy":
            n = entropy_bounded_count(log_probs.exp(), score, s.entropy_bound)
        else:
            n = num_to_reveal(s.counts, n_masked, n_total, steps_left, s.steps)
        n = torch.minimum(n.clamp(min=1), n_masked)
        return rank(-score) < n[:, None], log_probs

    @torch.no_grad()
    def sample(self, x, known, s, locked=None):
        """Fill the positions of x (B, T) that are not known (B, T), in at most s.steps calls, with
        remask in all of them; 0 means two for each unknown position. Locked ones (B, T) stay MASK.
        confidence (B, T): the probability of each token when revealed, after temperature and top_k.

        Exact samples of the model: order=random, counts=even, temperature=1, top_k=0, remask=0 and
        steps=T."""
        if locked is None:
            locked = torch.zeros_like(known)
        x = torch.where(known, x, self.mask_id)
        confidence = known.float()
        n_total = (~known & ~locked).sum(1)                            # (B,)
        s = replace(s, steps=s.steps or 2 * n_total.max().item())
        for steps_left in range(s.steps, 0, -1):
            revealed, log_probs = self.reveal(x, n_total, steps_left, s, locked)
            tokens, token_prob = sample_tokens(log_probs)
            x = torch.where(revealed, tokens, x)
            confidence = torch.where(revealed, token_prob, confidence)
            if s.remask and steps_left > 1:
                again = self.least_confident(x, confidence, known | locked, s.remask)
                x = x.masked_fill(again, self.mask_id)
                confidence = confidence.masked_fill(again, 0)
            yield x, confidence
            if not ((x == self.mask_id) & ~locked).any():
                return

    @torch.no_grad()
    def sampler_nll(self, x0, known, s):
        """Nats (B,) float64: -log of the probability that sample writes the part of x0 that is not
        known (B, T). x0 is put through the sampler, each call pays for what it reveals (DUEL).
        Exact, for the order depends on predictions alone; with order=random it is that of the one
        order that is drawn, and the mean over orders is an upper bound."""
        if s.remask:
            raise SystemExit("a sampler with remask > 0 has no likelihood: pass --remask=0")
        x = torch.where(known, x0, self.mask_id)
        n_total = (~known).sum(1)                                      # (B,)
        s = replace(s, steps=s.steps or 2 * n_total.max().item())
        nats = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for steps_left in range(s.steps, 0, -1):
            revealed, log_probs = self.reveal(x, n_total, steps_left, s)
            log_p = log_probs.gather(-1, x0[..., None])[..., 0]        # (B, T), of the true tokens
            nats -= log_p.masked_fill(~revealed, 0).double().sum(1)
            x = torch.where(revealed, x0, x)
            if not (x == self.mask_id).any():
                break
        return nats

    def least_confident(self, x, confidence, fixed, share):
        """ReMDM: which tokens to mask again (B, T), none of them fixed: a share, rounded down, of
        all that are written, the least probable when they were drawn; if no MASK is left, at least
        one. What the network now says of them is no guide: it is trained on MASKs alone."""
        revealed = (x != self.mask_id) & ~fixed
        at_least = (revealed | fixed).all(1).long()
        n = torch.maximum((share * revealed.sum(1)).long(), at_least)  # (B,)
        worst_first = rank(confidence.masked_fill(~revealed, math.inf))
        return revealed & (worst_first < n[:, None])


class Autoregressive(nn.Module):
    """The baseline: the same network, causal, with MASK as start token and a constant t. Its
    likelihood is exact, -log p(x0) = -sum_i log p(x_i | x_<i), and all T tokens are scored."""
    eval_levels = 1
    early_stopping = True
    noise_name = ""          # there is none

    def __init__(self, net, vocab_size):
        super().__init__()
        self.net = net
        self.mask_id = vocab_size

    def logits(self, x):
        """(B, T) -> (B, T, V): position i is predicted from x[:, :i]."""
        shifted = F.pad(x[:, :-1], (1, 0), value=self.mask_id)
        return self.net(shifted, torch.ones(len(x), device=x.device))

    def forward(self, x0):
        return self.bound(x0)[0].mean()

    def bound(self, x0, u=None, seeds=None):
        """Exact, so nothing is drawn; the noise level is 1, for all tokens are predicted."""
        logits = self.logits(x0)
        nats = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none").mean(1)
        return nats, torch.ones_like(nats)

    @torch.no_grad()
    def sample(self, x, known, s, locked=None):
        """Write x (B, T) from left to right. What is known (B, T) is kept; where only known or
        locked positions (B, T) follow, it ends."""
        B, T = x.shape
        fixed = known
        if locked is not None:
            fixed = known | locked
        x = torch.where(known, x, self.mask_id)
        confidence = known.float()
        t = torch.ones(B, device=x.device)
        kv_cache = {}
        if fixed.all():
            return
        first = (~fixed).any(0).int().argmax().item()
        for i in range(first, T):
            # the first call reads the whole prefix, later calls the last token
            if i == first:
                inputs = F.pad(x[:, :i], (1, 0), value=self.mask_id)
            else:
                inputs = x[:, i - 1:i]
            logits = self.net(inputs, t, kv_cache)[:, -1:]             # (B, 1, V)
            log_probs = token_log_probs(logits, s.temperature, s.top_k)
            tokens, token_prob = sample_tokens(log_probs)              # (B, 1)
            revealed = ~fixed & (torch.arange(T, device=x.device) == i)
            x = torch.where(revealed, tokens, x)
            confidence = torch.where(revealed, token_prob, confidence)
            yield x, confidence
            if fixed[:, i + 1:].all():
                return


# -------------------------------------------------------------------------------------------------
# the formulas

def per_row_noise(seeds, draw, shape):
    """One row of noise per seed, (len(seeds), *shape), on the CPU; draw: torch.rand or randn."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([draw(shape, generator=g) for g in generators])


def logit_normal(u):
    """u uniform in [0, 1] -> a number whose logit is normal with deviation 0.8 (in SD3 it is 1)."""
    return (0.8 * torch.special.ndtri(u)).sigmoid()


def one_per_stratum(borders):
    """Uniform draws, one between each two borders (B + 1, ...), and B times the widths (B, ...)."""
    width = borders.diff(dim=0)
    return borders[:-1] + width * torch.rand_like(width), len(width) * width


def num_masked(rate, T):
    """How many of T to mask (B,), as floats. Rounded up: uniform rates give all of 1..T alike."""
    return (rate * T).ceil().clamp(1, T)


def rank(x):
    """Rank of each element in its row, 0 for the smallest, of equals the leftmost first: (B, T) ->
    (B, T)."""
    return x.argsort(dim=1, stable=True).argsort(1)


def entropy(probs):
    """(..., V) -> (...), in nats."""
    return torch.special.entr(probs).sum(-1)


def token_log_probs(logits, temperature, top_k):
    """Log-softmax with temperature (0 is argmax) and top-k (0 is all): (..., V) -> (..., V)."""
    if temperature == 0:
        top_k = 1
        temperature = 1
    if top_k:
        kth_best = logits.topk(min(top_k, logits.size(-1))).values[..., -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    logits = logits - logits.amax(-1, keepdim=True)        # no overflow at a tiny temperature
    return (logits / temperature).log_softmax(-1)


def sample_tokens(log_probs):
    """(B, T, V) -> tokens (B, T) and their probabilities (B, T)."""
    probs = log_probs.exp()
    tokens = torch.multinomial(probs.flatten(0, 1), 1).view(probs.shape[:2])
    return tokens, probs.gather(-1, tokens[..., None]).squeeze(-1)


def position_scores(probs, order):
    """How early to reveal each position, (B, T), the higher the earlier, from what is predicted
    there, (B, T, V). Scoring the token that was drawn instead would favour likely draws."""
    if order == "random":
        return torch.rand(probs.shape[:2], device=probs.device)
    if order == "left":
        return -torch.arange(float(probs.size(1)), device=probs.device).expand(probs.shape[:2])
    if order == "confidence":
        return probs.amax(-1)
    if order == "margin":
        top2 = probs.topk(2).values
        return top2[..., 0] - top2[..., 1]
    if order == "entropy":
        return -entropy(probs)


def num_to_reveal(counts, n_masked, n_total, steps_left, steps):
    """How many of the n_masked (B,) positions to reveal in this call, of n_total at the start."""
    if counts == "even":                       # rounded up: the first calls take the remainder
        return -(-n_masked // steps_left)
    if counts == "documents":                  # rounded down: the last calls take it
        return n_masked // steps_left
    if counts == "cosine":                     # MaskGIT: few first
        still_masked = n_total * math.sin(math.pi / 2 * (steps_left - 1) / steps)
        return n_masked - still_masked.long()


def entropy_bounded_count(probs, score, bound):
    """The EB sampler: reveal in order of score while sum of entropies - the largest <= bound."""
    sorted_score, order = score.sort(dim=1, descending=True, stable=True)
    nats = entropy(probs).gather(1, order).masked_fill(sorted_score == -math.inf, math.inf)
    # behind the masked positions this is inf - inf = nan, and nan <= bound is False
    return (nats.cumsum(1) - nats.cummax(1).values <= bound).sum(1)


def keep_apart(score, min_distance):
    """Reorder scores (B, T) so that the positions revealed first are > min_distance apart.

    Greedy: take the best, drop its neighbourhood, repeat; the others follow in their old order.
    Of equals the leftmost comes first.
    Tokens revealed in one call are drawn independently, which hurts most between neighbours.
    Positions with score -inf are no candidates and stay -inf."""
    T = score.size(1)
    ranks = T - 1.0 - rank(-score)                                     # (B, T), 0 is the worst
    candidate = score > -math.inf
    # all local maxima at once: the same choice as one at a time, in fewer rounds
    free = candidate
    chosen = torch.zeros_like(candidate)
    while free.any():
        best_nearby = window_max(ranks.masked_fill(~free, -1), min_distance)
        peak = free & (ranks == best_nearby)
        chosen = chosen | peak
        free = free & (window_max(peak.float(), min_distance) == 0)
    return (ranks + T * chosen).masked_fill(~candidate, -math.inf)


def window_max(x, radius):
    """The maximum of x (B, T) over each position and its neighbours up to radius away."""
    return F.max_pool1d(x, 2 * radius + 1, stride=1, padding=radius)

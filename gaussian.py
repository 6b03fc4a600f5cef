"""Gaussian diffusion of numbers, and of tokens through a table of codes.

Both are nn.Modules around a network, with the interface of diffusion.py: forward(x0), bound(x0, u,
seeds) and sample(x, known, s). But GaussianDiffusion.sample takes noise z and yields (z, xhat).

x0 (B, T) are tokens 0..V-1: characters, or grey levels of pixels. Their codes x (B, T, K) are rows
of a table (V, K). The forward process is z = alpha x + sigma eps, with gamma = -log SNR, so that
alpha^2 = sigmoid(-gamma), DDPM's alpha-bar, and sigma^2 = sigmoid(gamma). z_0 is z at gamma_min,
z_1 at gamma_max. With xhat(z, gamma) predicting x (VDM; predict=x0 and predict_x0 mean x, too),

    -log p(x0) <= KL(q(z_1 | x) || N(0, I)) + E[-log p(x0 | z_0)]
                  + 1/2 int_{gamma_min}^{gamma_max} e^-gamma E|x - xhat|^2 dgamma

which depends on the two ends of gamma but not on the schedule between them.
t in [0, 1] and gamma are (B, 1), or (B, T) where each position has its own. z, gamma, xhat are
float64, for noise near gamma_min is finer than fp32; network, logits and losses are fp32.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import logit_normal, one_per_stratum, per_row_noise, rank


def alpha_bar(schedule, t):
    """alpha^2 at t (1001,) = 0, 1/1000, ..., 1, before it is clipped."""
    if schedule == "linear":        # the thousand steps of DDPM
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=t.dtype)
        return F.pad((1 - beta).cumprod(0), (1, 0), value=1)
    if schedule == "cosine":        # Nichol & Dhariwal 2021
        start = math.cos(0.008 / 1.008 * math.pi / 2)
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / start ** 2
    if schedule == "sqrt":          # Diffusion-LM, Li et al. 2022
        return 1 - (t + 1e-4).sqrt()


def alpha_sigma(gamma):
    """gamma (B, 1) or (B, T) -> alpha and sigma with one more dimension, for the K numbers."""
    alpha = (-gamma).sigmoid().sqrt()
    sigma = gamma.sigmoid().sqrt()
    return alpha[..., None], sigma[..., None]


def q_sample(x, gamma, eps):
    """The forward process: x (B, T, K) -> z (B, T, K) at noise level gamma."""
    alpha, sigma = alpha_sigma(gamma)
    return alpha * x + sigma * eps


def reverse_step(z, xhat, gamma, gamma_next, sampler):
    """From z at gamma to gamma_next, by DDIM or the ancestral posterior q(z_next | z, xhat)."""
    alpha, sigma = alpha_sigma(gamma)
    alpha_next, sigma_next = alpha_sigma(gamma_next)
    if sampler == "ddim":
        eps = (z - alpha * xhat) / sigma
        return alpha_next * xhat + sigma_next * eps
    c = -torch.expm1(gamma_next - gamma)[..., None]                    # 1 - SNR / SNR_next
    mean = (1 - c) * alpha_next / alpha * z + c * alpha_next * xhat
    return mean + c.sqrt() * sigma_next * torch.randn_like(z)


def x0_from_output(predict, out, z, gamma):
    """xhat from what the network predicts: x (the setting x0), eps, or v = alpha eps - sigma x."""
    alpha, sigma = alpha_sigma(gamma)
    if predict == "x0":
        return out
    if predict == "eps":
        return (z - sigma * out) / alpha
    if predict == "v":
        return alpha * z - sigma * out


def loss_weight(loss, predict, gamma, slope):
    """Weight of |x - xhat|^2 in the loss, in the shape of gamma; slope is dgamma/dt."""
    snr = (-gamma).exp()
    if loss == "elbo":              # the integral of the bound, nats per number
        return snr * slope / 2
    if loss == "min-snr":           # Hang et al. 2023
        return snr.clamp(max=5)
    # simple: the plain squared error of what the network predicts
    if predict == "x0":
        return torch.ones_like(snr)
    if predict == "eps":
        return snr
    if predict == "v":
        return snr + 1


class GaussianDiffusion(nn.Module):
    """Of numbers: the network predicts x, eps or v, (B, T, K), as net(z, level) or net(z, level,
    cond). level is gamma moved to [0, 1]: 0 at gamma_min, clean; 1 at gamma_max, noise."""
    eval_levels = 8           # noise levels per example when the whole split is evaluated
    early_stopping = False    # the bound is decided at the clean end, where no picture changes
    noise_name = "noise level"
    stagger = 0.0             # TokenDiffusion sets it

    def __init__(self, net, table, predict="v", schedule="cosine", loss="simple",
                 gamma_min=-13.3, gamma_max=10.0):
        super().__init__()
        self.net = net
        if not isinstance(table, nn.Parameter):
            table = nn.Buffer(table)
        self.table = table                                             # (V, K)
        self.predict = predict
        self.loss = loss
        self.gamma_min = gamma_min
        self.gamma_max = gamma_max
        # gamma at t = 0, 1/1000, ..., 1; its ends are set, so that all schedules have one bound
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        bar = alpha_bar(schedule, t).clamp(1e-12, 1 - 1e-12)
        knots = (torch.log1p(-bar) - bar.log()).clamp(gamma_min, gamma_max)
        knots[0] = gamma_min
        knots[-1] = gamma_max
        self.knots = nn.Buffer(knots, persistent=False)

    def gamma(self, t):
        """-log SNR at t, linear between the knots, and its slope dgamma/dt, in the shape of t."""
        k = (1000 * t).long().clamp(max=999)
        slope = self.knots[k + 1] - self.knots[k]
        return self.knots[k] + (1000 * t - k) * slope, 1000 * slope

    def embed_tokens(self, x0):
        return self.table[x0].double()                                 # (B, T, K)

    def call_net(self, inputs, gamma, cond):
        level = (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)
        if cond is None:
            return self.net(inputs.float(), level.float())
        return self.net(inputs.float(), level.float(), cond)

    def predict_x0(self, z, gamma, cond=None):
        """xhat (B, T, K), float64."""
        out = self.call_net(z, gamma, cond).double()
        return x0_from_output(self.predict, out, z, gamma)

    def forward(self, x0, cond=None):
        return self.squared_error(x0, cond)

    def squared_error(self, x0, cond=None):
        """Mean over t of weight |x - xhat|^2."""
        t, _, eps = draw_noise(*x0.shape, self.table.size(1), x0.device)   # uniform t
        gamma, slope = self.gamma(t)                                   # (B, 1)
        x = self.embed_tokens(x0)
        z = q_sample(x, gamma, eps)
        error = (x - self.predict_x0(z, gamma, cond)).square().mean(2)  # (B, T)
        weight = loss_weight(self.loss, self.predict, gamma, slope)
        return (weight * error).mean().float()

    def bound(self, x0, u, seeds):
        """At time u (B,) in [0, 1], gamma linear in it -> nats per position (B,), u."""
        x = self.embed_tokens(x0)
        B, T, K = x.shape
        eps, eps_0 = per_row_noise(seeds, torch.randn, (2, T, K)).to(x.device).unbind(1)
        rand = per_row_noise([seed + 1 for seed in seeds], torch.rand, (T,)).to(x.device)

        # the integral, at one gamma
        gamma_range = self.gamma_max - self.gamma_min
        known = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        t_pos, dt_pos = position_times(u.double()[:, None], rand, self.stagger, known)
        gamma = self.gamma_min + t_pos * gamma_range
        xhat = self.predict_x0(q_sample(x, gamma, eps), gamma)
        error = (x - xhat).square().sum(2)                             # (B, T)
        # dgamma is gamma_range dt_pos for a position whose own time is t_pos
        integral = gamma_range / 2 * (dt_pos * (-gamma).exp() * error).sum(1)  # (B,)

        # KL(q(z_1 | x) || N(0, I))
        alpha, sigma = alpha_sigma(torch.full_like(gamma, self.gamma_max))
        kl = ((alpha * x).square() + sigma ** 2 - 1 - 2 * sigma.log()).sum((1, 2)) / 2

        # -log p(x0 | z_0)
        gamma_0 = torch.full_like(gamma, self.gamma_min)
        reconstruction = self.reconstruction(x0, q_sample(x, gamma_0, eps_0), gamma_0)
        return (integral + kl + reconstruction) / T, u

    def reconstruction(self, x0, z, gamma):
        """-log p(x0 | z) in nats (B,), by what z alone says of its tokens."""
        log_probs = log_likelihood(z, gamma, self.table.double()).log_softmax(-1)  # (B, T, V)
        return -log_probs.gather(-1, x0[..., None]).sum((1, 2))

    @torch.no_grad()
    def sample(self, z, s, predict_x0=None):
        """From noise z (B, T, K) to numbers in s.steps steps; yields (z, xhat) after each, at last
        (xhat, xhat). predict_x0(z, gamma), to guide, replaces the method. s.td (Chen et al. 2022):
        step i ends at time (i - 1 - td) / steps, but the next call is told (i - 1) / steps."""
        predict_x0 = predict_x0 or self.predict_x0
        z = z.double()
        for i in range(s.steps, 0, -1):
            t = torch.full((len(z), 1), i / s.steps, dtype=z.dtype, device=z.device)
            t_next = torch.full_like(t, max((i - 1 - s.td) / s.steps, 0))
            gamma, _ = self.gamma(t)
            gamma_next, _ = self.gamma(t_next)
            xhat = predict_x0(z, gamma)
            if i == 1:
                z = xhat
            else:
                z = reverse_step(z, xhat, gamma, gamma_next, s.sampler)
            yield z, xhat


class TokenDiffusion(GaussianDiffusion):
    """Of tokens: net(inputs, level) -> logits (B, T, V), and xhat is the expected embedding,
    softmax(logits) @ table. The inputs are z (B, T, K) and, behind it, what two options add.

    output_prior: what z itself says of its token is added to the logits, by Bayes' rule (Plaid):
        an untrained network has the bound log V
    feed_posterior: the network is shown the probabilities of the tokens by z alone, V more numbers
    self_cond: the network is shown an earlier xhat of its own, K more numbers, zeros in half of the
        rows of a training batch (Chen et al. 2022)
    prompts: share of the training examples with known, clean positions, which do not count
    stagger: see position_times
    times: how t is drawn in training, uniform or logit-normal; the bound takes all t alike"""
    early_stopping = True

    def __init__(self, net, table, schedule="cosine", loss="ce", gamma_min=-13.3, gamma_max=10.0,
                 self_cond=False, output_prior=True, feed_posterior=False, prompts=0.0,
                 stagger=0.0, times="uniform"):
        super().__init__(net, table, "tokens", schedule, loss, gamma_min, gamma_max)
        self.self_cond = self_cond
        self.output_prior = output_prior
        self.feed_posterior = feed_posterior
        self.prompts = prompts
        self.stagger = stagger
        self.times = times
        if stagger:
            self.noise_name = "time"        # at one time, positions have different noise levels
        self.mask_id = len(table)           # shown where nothing is written yet

    def logits(self, z, gamma, cond=None, x_prev=None):
        """log p(token | z) up to a constant, fp32; x_prev (B, T, K) is an earlier xhat."""
        log_lik = log_likelihood(z, gamma, self.table.double())        # (B, T, V)
        inputs = [z]
        if self.feed_posterior:
            inputs.append(log_lik.softmax(-1))
        if self.self_cond:
            shown = torch.zeros_like(z) if x_prev is None else x_prev
            inputs.append(shown)
        logits = self.call_net(torch.cat(inputs, -1), gamma, cond)
        if self.output_prior:
            logits = logits + (log_lik - log_lik.detach().amax(-1, keepdim=True)).float()
        return logits

    def expected_embedding(self, probs):
        return (probs @ self.table.float()).double()                   # (B, T, K)

    def predict_tokens(self, z, gamma, cond=None, x_prev=None):
        """xhat (B, T, K) and the probabilities of the tokens (B, T, V)."""
        probs = self.logits(z, gamma, cond, x_prev).softmax(-1)
        return self.expected_embedding(probs), probs

    def predict_x0(self, z, gamma, cond=None):
        """xhat; with self_cond of a second pass that is shown the xhat of a first."""
        xhat, _ = self.predict_tokens(z, gamma, cond)
        if self.self_cond:
            xhat, _ = self.predict_tokens(z, gamma, cond, xhat)
        return xhat

    @torch.compiler.disable
    def draw(self, B, T, device):
        """What is random in a training step: known positions (B, T); uniform numbers (B, T) that
        order the turns; t, its weights (B, 1); noise (B, T, K); 0 or 1 (), for half_of_x_prev."""
        known = prompt_mask(B, T, self.prompts, device)
        rand = torch.rand(B, T, device=device)
        t, weight, eps = draw_noise(B, T, self.table.size(1), device, self.times)
        return known, rand, t, weight, eps, torch.randint(2, (), device=device)

    def forward(self, x0, cond=None):
        """ce: mean cross-entropy of the tokens that are not clean; no bound, but networks trained
        on it reach a lower bound (LOG.md). elbo: the integral of the bound, nats per token."""
        known, rand, t, t_weight, eps, parity = self.draw(*x0.shape, x0.device)
        t_pos, dt_pos = position_times(t, rand, self.stagger, known)
        gamma, slope = self.gamma(t_pos)

        # noise, but not where the text is known
        x = self.embed_tokens(x0)
        z = torch.where(known[..., None], x, q_sample(x, gamma, eps))
        gamma = torch.where(known, self.gamma_min, gamma)              # (B, T)

        # predict
        x_prev = self.half_of_x_prev(z, gamma, parity) if self.self_cond else None
        logits = self.logits(z, gamma, cond, x_prev)

        # loss
        if self.loss == "ce":
            counts = gamma > self.gamma_min     # not what is clean, for its code can be read off
            nats = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")   # (B, T)
        if self.loss == "elbo":
            counts = ~known
            error = (x - self.expected_embedding(logits.softmax(-1))).square().sum(2)
            nats = t_weight * dt_pos * (-gamma).exp() * slope / 2 * error
        weight = counts / counts.sum().clamp(min=1)                    # (B, T)
        return (weight * nats).sum().float() + self.regularizer(logits)

    @torch.no_grad()
    def half_of_x_prev(self, z, gamma, parity):
        """Earlier predictions xhat (B, T, K) in rows parity, parity + 2, ..., parity () is 0 or 1;
        zeros in the others. Half of the rows, so the shapes never change."""
        B = len(z)
        rows = torch.arange(0, B, 2, device=z.device) + parity
        exists = rows < B                                  # in an odd batch the last may not
        rows = rows.clamp(max=B - 1)
        xhat, _ = self.predict_tokens(z[rows], gamma[rows])
        return torch.zeros_like(z).index_copy(0, rows, xhat * exists[:, None, None])

    def regularizer(self, logits):
        return 0                            # EmbeddingDiffusion adds something

    @torch.no_grad()
    def sample(self, x, known, s, locked=None, predict_tokens=None):
        """Write the positions of x (B, T) where known (B, T) is False; yields (x, confidence) after
        each of s.steps steps. Confidence (B, T) is an age: the share of the steps since a token
        last changed, 1 if known. Locked positions (B, T) stay noise; without stagger they are
        written, too: the network then knows one noise level at a time. predict_tokens, to steer,
        replaces the method of that name. The network is shown the xhat of the step before, or with
        s.two_pass that of a first pass at the same z. s.td: as of numbers."""
        predict_tokens = predict_tokens or self.predict_tokens
        if locked is None or not self.stagger:
            locked = torch.zeros_like(known)
        codes = self.embed_tokens(x.masked_fill(~known, 0))
        rand = torch.rand(known.shape).to(x.device)
        z = torch.randn(codes.shape, dtype=torch.float64).to(x.device)
        z = torch.where(known[..., None], codes, z)

        def gamma_at(step):
            t = torch.full((len(x), 1), max(step / s.steps, 0), dtype=z.dtype, device=z.device)
            t_pos, _ = position_times(t, rand, self.stagger, known | locked)
            t_pos = t_pos.expand(x.shape).masked_fill(known, 0).masked_fill(locked, 1)
            return self.gamma(t_pos)[0]                                # (B, T)

        x_prev = None
        written = x.masked_fill(~known, self.mask_id)
        age = torch.zeros_like(x)                                      # in steps
        for i in range(s.steps, 0, -1):
            gamma = gamma_at(i)
            if s.two_pass:
                x_prev, _ = self.predict_tokens(z, gamma)
            xhat, probs = predict_tokens(z, gamma, x_prev=x_prev)
            z = reverse_step(z, xhat, gamma, gamma_at(i - 1 - s.td), s.sampler)
            x_prev = xhat
            tokens = torch.where(known, x, probs.argmax(-1))           # (B, T)
            age = (age + 1) * (tokens == written)
            written = tokens
            yield written, torch.where(known, 1.0, age / s.steps)


# -------------------------------------------------------------------------------------------------
# the formulas

def log_likelihood(z, gamma, table):
    """log p(z | token) up to a constant, for every token: (B, T, K) -> (B, T, V)."""
    alpha, _ = alpha_sigma(gamma)
    snr = (-gamma).exp()[..., None]
    if table.size(1) == 1:          # grey levels: (B, 784, 256) is large, so in fp32 and in place
        difference = (z / alpha).float() - table[:, 0].float()
        return difference.square_().mul_((snr / -2).float())
    return ((z / alpha) @ table.T - table.square().sum(1) / 2) * snr


def position_times(t, rand, stagger, known):
    """Each position's own time t_pos and dt_pos/dt at time t (B, 1): both (B, 1) or (B, T).

    stagger 0: all have time t. Else they take turns, each 1 / (1 + stagger) of the time: the
    smallest of rand (B, T) turns to noise first, so it is written last. With a large stagger most
    are clean or all noise, as in masked diffusion. The bound holds for any order. Known positions
    (B, T) take no turn."""
    if not stagger:
        return t, torch.ones_like(t)
    turn = rank(rand.masked_fill(known, 2))                            # the known behind all
    n_unknown = (~known).sum(1, keepdim=True).clamp(min=1)
    t_pos = (1 + stagger) * t - stagger * (turn + 0.5) / n_unknown     # (B, T)
    moving = (t_pos > 0) & (t_pos < 1)
    return t_pos.clamp(0, 1), (1 + stagger) * moving


def prompt_mask(B, T, share, device):
    """Known positions (B, T) in a share of the rows, never all of a row. Of these rows a third have
    a known beginning, a third all but one span, a third a beginning and a piece further on."""
    position = torch.arange(T, device=device)
    row = torch.rand(B, 1, device=device)
    a, b, c = (torch.rand(3, B, 1, device=device).sort(0).values * T).long()  # a <= b <= c < T
    c = torch.where(row < share / 3, 0, torch.where(row < share * 2 / 3, T, c))
    known = (position < a) | ((position > b) & (position < c))
    return known & (row < share)


@torch.compiler.disable          # compiled, it would draw other numbers
def draw_noise(B, T, K, device, times="uniform"):
    """What is random in a training step: t and its weights (B, 1), noise (B, T, K)."""
    t, weight = stratified_times(B, device, times)
    return t, weight, torch.randn(B, T, K, device=device)


def stratified_times(B, device, times="uniform"):
    """One t in each of B strata, and importance weights (B, 1), float64."""
    borders = torch.linspace(0, 1, B + 1, device=device, dtype=torch.float64)
    if times == "logit-normal":
        borders = logit_normal(borders)
    return one_per_stratum(borders[:, None])

"""The training step: Muon in batches, no waiting for the device, a compiled loss, and
self-conditioning in every second row."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import training_step
from torch._dynamo.utils import counters

import analog_bits
import config
import embed_diffusion
import mnist_ddpm
import step
import train
from checkpoint import load_optimizer
from config import Bits, Embed, Masked, Mnist
from gaussian import TokenDiffusion
from step import Muon, get_lr, reseed

V = 20
TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=4, warmup_iters=0,
            dropout=0.0)
METHODS = {
    "masked": (train, Masked(**TINY)),
    "elbo": (train, Masked(**TINY, loss="elbo", schedule="cosine", time=True)),
    "ar": (train, Masked(**TINY, objective="ar")),
    "bits": (analog_bits, Bits(**TINY)),
    "embed": (embed_diffusion, Embed(**TINY)),
    "diffusion-lm": (embed_diffusion, Embed(**TINY | embed_diffusion.RECIPES["diffusion-lm"])),
    "pixels": (mnist_ddpm, Mnist(**TINY, patch=14)),
    "levels": (mnist_ddpm, Mnist(**TINY, patch=14, predict="levels", loss="ce")),
}


class RandomBatches:
    """Text or images that are drawn."""

    def __init__(self, script, T):
        self.is_images = script is mnist_ddpm
        self.T = T

    def batch(self, n):
        if self.is_images:
            return torch.randint(256, (n, 784)), torch.randint(-1, 10, (n,))
        return torch.randint(V, (n, self.T))


def build(name):
    """-> method, whose outputs are not zero, data, settings"""
    script, c = METHODS[name]
    reseed(3)
    method = script.build(c, {"alphabet": "".join(map(chr, range(97, 97 + V)))}).train()
    for p in method.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return method, RandomBatches(script, c.block_size), c


# -------------------------------------------------------------------------------------------------
# Muon

SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128)] * 3      # qkv, proj, fc, proj of three layers


def test_muon_is_torchs_with_rows_of_one_length_and_goes_on_with_its_momentum():
    """The momentum to the bit. torch's direction is read off weights that are zero before a step of
    rate 1; then, matrix by matrix, each row is divided by the root of its running mean square, of a
    wide matrix each column, and all by what keeps the norm. A run that torch.optim.Muon trained is
    resumed."""
    torch.manual_seed(0)
    probes = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    theirs = torch.optim.Muon(probes, lr=1.0, weight_decay=0.0, momentum=0.9,
                              adjust_lr_fn="match_rms_adamw")
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    opt = Muon(ours, lr=0.0, weight_decay=0.1)
    expected = [p.detach().double() for p in ours]
    for i in range(10):
        if i in (0, 5):
            means = [0.0 for _ in SHAPES]
        if i == 5:
            opt = Muon(ours, lr=0.0, weight_decay=0.1)
            opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for p, probe in zip(ours, probes, strict=True):
            p.grad = torch.randn_like(p)
            probe.grad = p.grad.clone()
        lr = 0.01 / (1 + i)
        opt.param_groups[0].update(lr=lr, weight_decay=0.1)
        opt.step()
        theirs.step()
        for j, (p, probe) in enumerate(zip(ours, probes, strict=True)):
            direction = -probe.detach().double()
            probe.detach().zero_()
            rows, columns = direction.shape
            along = 1 if rows >= columns else 0
            means[j] = 0.95 * means[j] + 0.05 * direction.pow(2).mean(along, keepdim=True)
            change = direction / means[j].sqrt()
            change *= direction.norm() / change.norm()
            expected[j] = (1 - 0.1 * lr) * expected[j] - lr * change
            assert torch.allclose(p.double(), expected[j], rtol=0, atol=3e-6)
            momenta = [o.state[x]["momentum_buffer"] for o, x in ((opt, p), (theirs, probe))]
            assert torch.equal(*momenta)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_overflows_leaves_all_state_to_the_bit(bad):
    """One bad number, in a matrix of Muon's or in a parameter of AdamW's: weights, momenta and
    AdamW's count of steps stay."""
    method, data, c = build("masked")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    train_step = training_step(method, data, c, scaler)
    for i in range(3):
        train_step(i)

    def everything():
        state = [x for opt in train_step.opts for s in opt.state.values() for x in s.values()]
        return [x.clone() for x in [*method.parameters(), *state]]

    before = everything()
    for p in (method.net.head.weight, method.net.blocks[0].mlp.fc.weight):
        scale = scaler.get_scale()
        first = torch.zeros_like(p)
        first[0, 0] = bad
        hook = p.register_hook(lambda grad, first=first: grad + first)
        train_step(3)
        hook.remove()
        assert scaler.get_scale() == scale / 2
        for a, b in zip(before, everything(), strict=True):
            assert torch.equal(a, b)
    train_step(4)
    for a, b in zip(before, everything(), strict=True):
        assert not torch.equal(a, b)


def test_a_resumed_optimizer_keeps_its_own_settings():
    """The file has the weight decay of then, and a rate that is another tensor."""
    method, data, c = build("masked")
    old = training_step(method, data, replace(c, weight_decay=0.5))
    new = training_step(method, data, c)
    for opt, before in zip(new.opts, old.opts, strict=True):
        load_optimizer(opt, copy.deepcopy(before.state_dict()))
        assert opt.param_groups[0]["lr"] is (new.lr if isinstance(opt, Muon) else new.adamw_lr)
        assert opt.param_groups[0]["weight_decay"] == c.weight_decay


@pytest.mark.parametrize("name, optimizer, factor", [
    ("masked", "muon", 3), ("masked", "adamw", 1), ("pixels", "muon", 1)])
def test_beside_muon_adamw_has_three_times_the_rate_but_for_pixels(name, optimizer, factor):
    method, data, c = build(name)
    step = training_step(method, data, replace(c, optimizer=optimizer))
    step(0)
    rates = [float(opt.param_groups[0]["lr"]) for opt in step.opts]
    lr = get_lr(0, c)
    assert rates == pytest.approx([factor * lr, lr][:len(step.opts)])


@pytest.mark.parametrize("name", METHODS)
def test_processes_sum_gradients_in_place(monkeypatch, name):
    """A CUDA graph reads the tensors that it was recorded with."""
    train_step = training_step(*build(name))
    train_step.micro_batch()
    grads = [p.grad for p in train_step.method.parameters()]
    before = [grad.clone() for grad in grads]
    loss = train_step.loss.clone()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    assert train_step.all_reduce(True) == 2
    assert train_step.loss == 2 * loss
    for p, grad, old in zip(train_step.method.parameters(), grads, before, strict=True):
        assert p.grad is grad and torch.equal(grad, 2 * old)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_step_is_recorded_after_a_whole_one(monkeypatch, grad_accum):
    """What a first step makes, states, scale and gradients, a graph would make at each replay. A
    recorder that runs its functions stands in for CUDA; one that fails is gone on without."""
    made = []

    class Recorder:
        def __init__(self, *functions):
            train_step = functions[0].__self__
            made.append(all(opt.state for opt in train_step.opts))
            are_gone = {p.grad is None for p in train_step.method.parameters()}
            assert are_gone == {grad_accum == 1}
            if fails:
                train_step.scaler.unscale_(train_step.opts[0])
                raise RuntimeError("no CUDA here")

        def __call__(self, f):
            f()

    monkeypatch.setattr(step, "Replay", Recorder)
    for fails in (False, True):
        method, data, c = build("masked")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
        train_step = training_step(method, data, replace(c, grad_accum=grad_accum), scaler)
        train_step.to_record = True
        losses = [train_step(i)[0].item() for i in range(3)]
        assert (train_step.run is step.call) == fails
        plain = training_step(*build("masked")[:2], replace(c, grad_accum=grad_accum), scaler)
        assert losses == pytest.approx([plain(i)[0].item() for i in range(3)], rel=1e-4)
    assert made == [True, True]


# -------------------------------------------------------------------------------------------------
# the host

@pytest.mark.parametrize("name", METHODS)
def test_the_host_reads_nothing_in_a_step(monkeypatch, name):
    """Each of these waits until the device has done all that came before."""
    train_step = training_step(*build(name))
    train_step(0)                                          # AdamW makes its state
    reads = []
    for read in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__",
                 "nonzero"):
        honest = getattr(torch.Tensor, read)

        def watched(x, *args, read=read, honest=honest):
            reads.append(read)
            return honest(x, *args)

        monkeypatch.setattr(torch.Tensor, read, watched)
    train_step(1)
    assert not reads
    bool(torch.ones(()))
    assert reads == ["__bool__"]


# -------------------------------------------------------------------------------------------------
# the compiler

@pytest.mark.parametrize("name", ["masked", "embed", "pixels"])
def test_compiled_is_eager_and_compiled_once(monkeypatch, name):
    """Traced, and one of them by the compiler, the same losses, in fp32, of six steps with other
    mask counts and rates."""
    monkeypatch.setattr(config, "AMP", torch.float32)
    losses = []
    for compiled in (False, True):
        train_step = training_step(*build(name))
        torch._dynamo.reset()
        counters.clear()
        if compiled:                                       # on a GPU TrainingStep.compile does
            backend = "inductor" if name == "masked" else "eager"
            train_step.method.compile(dynamic=False, backend=backend)
        losses.append([train_step(step)[0].item() for step in range(6)])
    eager, compiled = losses
    assert compiled == pytest.approx(eager, rel=1e-4)     # Muon computes in bf16
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


# -------------------------------------------------------------------------------------------------
# self-conditioning in every second row

class Reader(torch.nn.Module):
    """A network whose prediction depends on what it is shown of an earlier one."""

    def forward(self, inputs, level):
        z, x_prev = inputs.chunk(2, -1)
        return 3 * z.flip(-1) * level[..., None] + 5 * x_prev


def self_conditioned(loss):
    table = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    return TokenDiffusion(Reader(), table, "cosine", loss, -4, 8, self_cond=True,
                          output_prior=False, prompts=0.3)


@pytest.mark.parametrize("loss", ["ce", "elbo"])
@pytest.mark.parametrize("B", [1, 2, 3, 32])
def test_half_of_the_rows_cost_on_average_what_a_coin_costs(B, loss):
    """For each draw the loss is an average over the parity: it equals that over a coin which shows
    all rows an earlier prediction, or none. An odd batch needs both parities for its last row."""
    method = self_conditioned(loss)
    x0 = torch.randint(3, (B, 12), generator=torch.Generator().manual_seed(B))

    def mean_loss(x_prevs):
        losses = []
        for x_prev in x_prevs:
            torch.manual_seed(4)
            method.half_of_x_prev = x_prev
            losses.append(method(x0).item())
        return sum(losses) / 2

    honest = method.half_of_x_prev

    def with_parity(parity):
        return lambda z, gamma, _: honest(z, gamma, torch.tensor(parity))

    def coin(shown):
        return lambda z, gamma, _: shown * method.predict_tokens(z, gamma)[0]

    assert mean_loss([coin(0), coin(0)]) != mean_loss([coin(1), coin(1)])
    by_rows = mean_loss([with_parity(0), with_parity(1)])
    assert by_rows == pytest.approx(mean_loss([coin(0), coin(1)]), rel=1e-6)


def test_the_parity_is_a_fair_coin_that_does_not_look_at_the_times():
    torch.manual_seed(0)
    m = TokenDiffusion(None, torch.eye(3), prompts=0.3)
    draws = [m.draw(5, 4, "cpu") for _ in range(400)]
    parity = torch.stack([draw[-1] for draw in draws]).double()
    times = torch.stack([draw[2][:, 0] for draw in draws])
    assert set(parity.tolist()) == {0, 1}
    assert abs(parity.mean() - 0.5) < 4 * 0.5 / 400 ** 0.5
    correlation = torch.corrcoef(torch.cat([parity[:, None], times], 1).T)[0, 1:]
    assert correlation.abs().max() < 4 / 400 ** 0.5

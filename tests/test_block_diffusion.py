"""experiments/block_diffusion.py: its ends, autoregression and masked diffusion; what positions see
of both streams; the cache; its bound and what it writes, enumerated."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, last_line, run
from torch import nn

import config
from diffusion import MaskedDiffusion
from experiments import block_diffusion
from experiments.block_diffusion import Blocks, BlockSampler
from model import Transformer
from step import reseed

V = 5
T = 12


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(config, "AMP", torch.float32)


def randomised(method):
    """None of whose weights are zero, those of the convolutions included."""
    reseed(3)
    for p in method.parameters():
        nn.init.normal_(p, std=0.4)
    return method.eval()


def model(block, T=T, V=V):
    c = Blocks(block=block, block_size=T, n_layer=2, n_head=2, n_embd=16)
    return randomised(block_diffusion.build(c, {"alphabet": range(V)}))


def texts(B, T=T, V=V):
    reseed(5)
    return torch.randint(V, (B, T))


def logits_of(m, x0, xt):
    """Of both streams at once, as in training: (B, T, V)."""
    cache = {}
    m.net(x0.unflatten(1, (-1, m.block)), 0, cache, False)
    return m.net(xt.unflatten(1, (-1, m.block)), 0, cache, True).flatten(1, 2)


def test_one_block_is_masked_diffusion():
    """The same weights, the same masks; the same parameters, by name."""
    m = model(T)
    c = Blocks(block_size=T, n_layer=2, n_head=2, n_embd=16)
    masked = MaskedDiffusion(Transformer(c, nn.Embedding(V + 1, 16), V), V).eval()
    masked.load_state_dict(m.state_dict())
    x0 = texts(6)
    rand = torch.rand(6, T)
    k = torch.tensor([1.0, 2, 5, 8, 11, 12])
    ours = m.masked_ce(x0, k[:, None], rand).flatten(1)
    theirs = masked.masked_ce(x0, k, rand)
    assert theirs.max() > 0.5
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_blocks_of_one_are_the_chain_rule():
    """Whatever u is, the bound is -log p, of prefixes that are read one character at a time."""
    m = model(1)
    x0 = texts(4)
    nats = torch.zeros(4)
    for i in range(T):
        cache = {}
        for j in range(i):
            m.net(x0[:, None, j:j + 1], j, cache, False)
        logits = m.net(torch.full((4, 1, 1), V), i, cache, True)[:, 0, 0]
        nats += F.cross_entropy(logits, x0[:, i], reduction="none")
    bound, share = m.bound(x0, torch.tensor([0.1, 0.4, 0.7, 1.0]), range(4))
    assert torch.allclose(bound, nats / T, atol=1e-5) and share.eq(1).all()
    assert m.eval_levels == 1


@pytest.mark.parametrize("block", [1, 2, 4])
def test_who_sees_whom(block):
    """Where one character of one stream is changed, exactly the logits change that may see it."""
    m = model(block)
    x0 = texts(1)
    xt = x0.masked_fill(torch.arange(T) % 2 == 0, V)
    before = logits_of(m, x0, xt)
    of = torch.arange(T) // block
    for i in range(T):
        other = x0.clone()
        other[:, i] = (other[:, i] + 1) % V
        changed = (logits_of(m, other, xt) - before).abs().amax((0, 2)) > 1e-5
        assert torch.equal(changed, of > of[i]), f"clean {i}"
        noisy = xt.clone()
        noisy[:, i] = (noisy[:, i] + 1) % V
        changed = (logits_of(m, x0, noisy) - before).abs().amax((0, 2)) > 1e-5
        assert torch.equal(changed, of == of[i]), f"noisy {i}"


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_convolutions_see_neighbours_that_attention_sees(block):
    """Of a noisy position: noisy in its own block, clean before it, nothing after it."""
    m = model(block)
    conv = m.net.blocks[0].attn_conv
    clean = torch.randn(1, T, 16)
    noisy = torch.randn(1, T, 16)
    for stream, cache in ((clean, {}), (noisy, {"key": clean})):
        y = m.net.convolve(conv, stream.unflatten(1, (-1, block)), 0, cache, "key").flatten(1, 2)
        for i in range(T):
            truth = stream[0, i].clone()
            for weight, d in zip(conv.weight, (-2, -1, 1, 2), strict=True):
                if 0 <= i + d and (i + d) // block < i // block:
                    truth += weight * clean[0, i + d]
                if i + d < T and (i + d) // block == i // block:
                    truth += weight * stream[0, i + d]
            assert torch.allclose(y[0, i], truth, atol=1e-5)


def written(m, x, known, s):
    """The frames of m.sample, and the calls of the network: (x, start, noisy, logits) of each."""
    calls = []

    def keep(net, inputs, logits):
        x, start, _, noisy = inputs
        calls.append((x[:, 0], start, noisy, logits[:, 0]))

    with m.net.register_forward_hook(keep):
        frames = list(m.sample(x, known, s))
    return frames, calls


@pytest.mark.parametrize("block", [1, 3, 12])
def test_with_the_cache_it_writes_by_what_both_streams_predict(block):
    """One call a character and one a block, behind a prompt. Of two windows the first is compared.
    """
    m = model(block)
    x0 = texts(2, 2 * T)
    known = (torch.arange(2 * T) < 3).expand(2, -1)
    frames, calls = written(m, x0, known, BlockSampler())
    assert frames[0][0].eq(V).sum(1).tolist() == [2 * T - 4] * 2       # not written yet
    x, confidence = frames[-1]
    assert torch.equal(x[:, :3], x0[:, :3]) and (confidence[:, :3] == 1).all() and (x < V).all()
    assert len(frames) == 2 * T - 3 and len(calls) == len(frames) + 2 * T // block
    first = calls[:T - 3 + T // block]
    assert sum(noisy for _, _, noisy, _ in first) == T - 3
    for block_now, start, noisy, logits in first:
        part = slice(start, start + block)
        if noisy:
            xt = x[:, :T].clone()
            xt[:, part] = block_now
            expected = logits_of(m, x[:, :T], xt)[:, part]
            assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("silent", ["conv", "attn.proj"])
def test_a_long_text_goes_on_with_the_last_of_it(silent):
    """What is cached of a layer without convolutions, or without attention, is of characters near
    by alone, so a window that has moved is a window."""
    c = Blocks(block=4, block_size=T, n_layer=1, n_head=2, n_embd=16)
    m = randomised(block_diffusion.build(c, {"alphabet": range(V)}))
    for name, p in m.named_parameters():
        if silent in name:
            nn.init.zeros_(p)
    x = texts(1, 28)
    _, calls = written(m, x, torch.arange(28)[None] < 24, BlockSampler(steps=1))
    last, start, noisy, logits = calls[-2]
    assert noisy and start == 8 and (last == V).all()
    window = torch.cat([x[:, 16:24], last], 1)
    assert torch.allclose(logits, logits_of(m, window, window)[:, 8:], atol=1e-5)


def exact_bound(m, x0):
    """The mean over k and over all masks of k in a block, summed over the blocks, / T."""
    L = m.block
    masks = torch.tensor(list(itertools.product([False, True], repeat=L)))[1:]
    total = 0
    for b in range(x0.size(1) // L):
        part = slice(b * L, b * L + L)
        for mask in masks:
            xt = x0.clone()
            xt[:, part] = xt[:, part].masked_fill(mask, V)
            ce = F.cross_entropy(logits_of(m, x0, xt)[0, part], x0[0, part], reduction="none")
            k = int(mask.sum())
            total += ce[mask].mean().item() / math.comb(L, k)
    return total / x0.size(1)


def test_draws_average_to_the_bound_and_to_the_pooled_loss(monkeypatch):
    """The bound of every u and all orders of a block; training masks k of every block, each k as
    often as the others in every column of blocks, and blocks of a row are independent."""
    m = model(3, T=6)
    x0 = texts(1, 6)
    orders = torch.tensor(list(itertools.permutations(range(3)))).float()
    rand = orders.repeat(1, 2)
    monkeypatch.setattr(block_diffusion, "per_row_noise", lambda *_: rand.repeat(3, 1))
    u = torch.tensor([0.2, 0.5, 1.0]).repeat_interleave(6)
    nats, share = m.bound(x0.expand(18, -1), u, range(18))
    assert nats.mean().item() == pytest.approx(exact_bound(m, x0), abs=1e-5)
    assert torch.equal(share, (3 * u).ceil() / 3)

    k, rand = m.draw(3000, 6, "cpu")
    assert rand.shape == (3000, 6) and torch.bincount(k.long()[:, 0]).tolist()[1:] == [1000] * 3
    k = torch.cat([m.draw(3, 6, "cpu")[0] for _ in range(1000)])
    pairs = torch.bincount((3 * k[:, 0] + k[:, 1] - 4).long(), minlength=9)
    assert (pairs - 3000 / 9).abs().max() < 5 * (3000 / 9) ** 0.5

    monkeypatch.setattr(m, "draw", lambda *_: (k[:18], rand[:18]))
    ce = m.masked_ce(x0.expand(18, -1), k[:18], rand[:18])
    assert (ce > 0).sum((2,)).tolist() == k[:18].tolist()
    assert m(x0.expand(18, -1)).item() == pytest.approx(ce[ce > 0].mean().item(), abs=1e-5)


def test_samples_are_distributed_as_enumerated():
    """Of three characters, four positions, blocks of two, the first known: a chain of blocks, each
    a mean over both orders."""
    m = model(2, T=4, V=3)
    S = torch.tensor(list(itertools.product(range(3), repeat=4)))
    S = S[S[:, 0] == 1]                                                # (27, 4)

    def of_one(at, masked):
        """p(character at | x0 but the masked), for every text."""
        xt = S.index_fill(1, torch.tensor(masked), 3)
        probs = logits_of(m, S, xt)[:, at].softmax(-1)
        return probs.gather(1, S[:, at:at + 1])[:, 0]

    forwards = of_one(2, [2, 3]) * of_one(3, [3])
    backwards = of_one(3, [2, 3]) * of_one(2, [2])
    p = of_one(1, [1]) * (forwards + backwards) / 2
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    n = 20_000
    reseed(1)
    known = (torch.arange(4) == 0).expand(n, -1)
    *_, (x, confidence) = m.sample(torch.ones(n, 4).long(), known, BlockSampler())
    counts = torch.bincount(x @ torch.tensor([0, 9, 3, 1]), minlength=27)
    assert x[:, 0].eq(1).all() and confidence[:, 0].eq(1).all() and (confidence > 0).all()
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 26 + 5 * math.sqrt(2 * 26)


def test_it_trains_and_writes(corpus, tmp_path):
    """As it is typed; a text longer than the window goes on from the prompt, and is refused after a
    blank. A block must divide the window."""
    script = ["-m", "experiments.block_diffusion"]
    out = f"--out={tmp_path}/run"
    said = run(*script, corpus, *TINY, "--block=4", "--max_iters=3", out).stdout
    assert said.splitlines()[-1] == f"done: python -m experiments.block_diffusion sample {out}"
    said = run(*script, "sample", out, "--prompt=9 is the square of", "--length=41", "--steps=2")
    assert said.stdout.startswith("9 is the square of") and len(said.stdout) == 42
    # 4 blocks are known, two characters of the next are not, 5 blocks and one character follow
    assert "\n17 network calls" in said.stderr
    for args, message in ((["sample", out, "--prompt={3} is"], "blocks are written in order"),
                          ([corpus, *TINY, "--block=5"], "block=5 must divide block_size=16")):
        with pytest.raises(SystemExit) as e:
            block_diffusion.main(args)
        assert message in last_line(e.value)

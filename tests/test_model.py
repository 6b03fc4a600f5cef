"""The transformer against its formulas: each part by hand, shapes, precision, time, the cache."""
import math

import pytest
import torch
from torch import nn

import config
import model
from config import Masked
from model import Transformer


@pytest.fixture
def fp32(monkeypatch):
    monkeypatch.setattr(config, "AMP", torch.float32)


def net(embed=None, causal=False, std=0.3, **k):
    """A transformer of 3 outputs, none of whose weights are zero."""
    torch.manual_seed(0)
    c = Masked(**{**dict(block_size=12, n_layer=2, n_head=2, n_embd=16, time=True), **k})
    m = Transformer(c, embed or nn.Embedding(6, 16), 3, causal)
    for p in m.parameters():
        nn.init.normal_(p, std=std)
    return m.eval()


def test_vectors_in_fp32_out():
    y = net(nn.Linear(7, 16))(torch.randn(2, 12, 7), torch.rand(2, 12))
    assert y.shape == (2, 12, 3) and y.dtype == torch.float32


@pytest.mark.parametrize("n, n_embd, time, millions", [
    (6, 384, False, 10.7), (6, 384, True, 11.7), (4, 128, False, 0.81), (4, 128, True, 0.92)])
def test_full_size_parameter_counts(n, n_embd, time, millions):
    c = Masked(n_layer=n, n_head=n, n_embd=n_embd, time=time)
    with torch.device("meta"):
        m = Transformer(c, nn.Embedding(66, n_embd), 65)
    n_parameters = sum(p.numel() for p in m.parameters())
    assert n_parameters / 1e6 == pytest.approx(millions, rel=0.007)


def test_untrained_blocks_are_the_identity():
    c = Masked(block_size=12, n_layer=2, n_head=2, n_embd=16, time=True)
    m = Transformer(c, nn.Embedding(6, 16), 3)
    x = torch.randn(2, 12, 16)
    assert torch.equal(m.blocks[0](x, m.rope, [0.0] * 6), x)
    assert not any(part.any() for part in m.time(torch.rand(2)))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand(causal, fp32):
    """Each head and pair of positions alone. RoPE is a rotation in the complex plane: of pair d, by
    the position times 10000^(-2d / D). The length of queries and keys does not matter."""
    m = net(causal=causal, n_head=3, n_embd=24)
    attn = m.blocks[0].attn
    x = torch.randn(2, 12, 24)
    freq = 10000 ** (-2 * torch.arange(4) / 8)
    truth = torch.zeros(2, 12, 24)
    for b in range(2):
        for h in range(3):
            q, k, v = (x[b] @ w[8 * h:8 * h + 8].T for w in attn.qkv.weight.split(24))
            for i in range(12):
                scores = []
                for j in range(i + 1 if causal else 12):
                    a = torch.complex(q[i, :4], q[i, 4:]) / q[i].square().mean() ** 0.5
                    c = torch.complex(k[j, :4], k[j, 4:]) / k[j].square().mean() ** 0.5
                    turned = (a * c.conj() * torch.exp(1j * (i - j) * freq)).sum().real
                    scores.append(turned / math.sqrt(8))
                p = torch.stack(scores).softmax(0)
                truth[b, i, 8 * h:8 * h + 8] = p @ v[:len(p)]
    truth = truth @ attn.proj.weight.T
    assert torch.allclose(attn(x, m.rope), truth, atol=1e-4)
    with torch.no_grad():
        attn.qkv.weight[:24] *= 5
        attn.qkv.weight[24:48] *= 7
    assert torch.allclose(attn(x, m.rope), truth, atol=1e-4)


@pytest.mark.parametrize("causal, reach", [(False, 3), (True, 2)])
def test_neighbours_against_the_sum(causal, reach):
    torch.manual_seed(0)
    m = model.NeighbourConv(Masked(n_embd=16, n_head=2), causal, reach)
    x = torch.randn(2, 9, 16)
    assert torch.equal(m(x), x)                                        # before training
    nn.init.normal_(m.weight)
    offsets = [d for d in range(-reach, reach + 1) if d < 0 or d > 0 and not causal]
    y = x.clone()
    for weight, d in zip(m.weight, offsets, strict=True):
        for i in range(9):
            if 0 <= i + d < 9:
                y[:, i] += weight * x[:, i + d]
    assert torch.allclose(m(x), y, atol=1e-5)


def test_a_block_is_its_formula(fp32):
    """MLP: squared ReLU. Both parts: modulated, after their own convolution, gated by 1 + gate."""
    m = net()
    block = m.blocks[0]
    x = torch.randn(2, 12, 16)
    w = block.mlp
    truth = ((x @ w.fc.weight.T).clamp(min=0) ** 2) @ w.proj.weight.T
    assert torch.allclose(w(x), truth, rtol=1e-4, atol=1e-5)

    def part(x, f, conv, mod):
        scale, bias, gate = mod
        h = (1 + scale) * x / x.square().mean(-1, keepdim=True).sqrt() + bias
        return x + (1 + gate) * f(conv(h))

    mod = torch.randn(6, 2, 12, 16)
    truth = part(x, lambda h: block.attn(h, m.rope), block.attn_conv, mod[:3])
    truth = part(truth, block.mlp, block.mlp_conv, mod[3:])
    assert torch.allclose(block(x, m.rope, mod), truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("time", [False, True])
def test_the_transformer_is_its_blocks_between_norms(time, fp32):
    m = net(time=time)
    x = torch.randint(6, (2, 12))
    t = torch.rand(2, 12)
    mod = m.time(t) if time else [0.0] * 6
    h = model.norm(m.embed(x))
    for block in m.blocks:
        h = block(h, m.rope, mod)
    truth = model.norm(h) @ m.head.weight.T
    assert torch.allclose(m(x, t), truth, atol=1e-5)


def test_the_noise_level_by_hand(fp32):
    """Of each position, or one for all: cosines and sines of up to 1000 radians, SiLU between."""
    m = net(n_embd=64)
    t = torch.rand(2, 12)
    angle = t[..., None] * torch.logspace(3, 0, 32)
    h = torch.cat([angle.cos(), angle.sin()], -1) @ m.time.fc.weight.T
    truth = (h * h.sigmoid()) @ m.time.proj.weight.T
    assert torch.allclose(torch.cat(m.time(t), -1), truth, atol=1e-3)
    assert torch.allclose(torch.cat(m.time(t[:, 0]), -1), truth[:, :1], atol=1e-3)


@pytest.mark.parametrize("first", [1, 5, 11])
def test_with_a_cache_positions_are_what_they_are_without(first, fp32):
    """Read at once up to any position, then one by one; a second text has its own cache."""
    m = net(causal=True)
    for x in torch.randint(6, (2, 3, 12)):
        cache = {}
        t = torch.ones(3)
        parts = [m(x[:, :first], t, cache)]
        parts += [m(x[:, i:i + 1], t, cache) for i in range(first, 12)]
        assert torch.allclose(torch.cat(parts, 1), m(x, t), atol=1e-5)
        assert cache["length"] == 12


def test_dropout_is_on_in_training_only(fp32):
    m = net(dropout=0.5)
    for f in (m.blocks[0].mlp, lambda x: m.blocks[0].attn(x, m.rope)):
        x = torch.randn(50, 12, 16)
        m.eval()
        whole = f(x)
        m.train()
        kept = f(x) != 0
        assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
        m.eval()
        assert torch.equal(f(x), whole) and (whole != 0).all()

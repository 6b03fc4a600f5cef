"""The transformer as a function: shapes, precision, positions, time."""
import pytest
import torch
from torch import nn

import model
from config import Masked
from model import Transformer, attention


def net(inp, n_out=3, causal=False, **k):
    torch.manual_seed(0)
    c = Masked(**{"block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, "time": True, **k})
    m = Transformer(c, inp, n_out, causal)
    for p in m.parameters():
        nn.init.normal_(p, std=.3)
    return m.eval()


@pytest.mark.parametrize("inp, x", [(nn.Embedding(6, 16), torch.randint(6, (2, 12))), (nn.Linear(7, 16), torch.randn(2, 12, 7))])
def test_tokens_or_vectors_in_fp32_out(inp, x):
    for t in (torch.rand(2), torch.rand(2, 12)):
        y = net(inp)(x, t)
        assert y.shape == (2, 12, 3) and y.dtype == torch.float32


def test_full_size_parameter_counts():
    """The sizes in the README: 6 x 6 x 384 has 10.7M parameters, 11.7M with time; 4 x 4 x 128 .81M and .92M."""
    def count(**k):
        c = Masked(**k)
        return sum(p.numel() for p in Transformer(c, nn.Embedding(66, c.n_embd), 65).parameters()) / 1e6

    big, little = dict(n_layer=6, n_head=6, n_embd=384), dict(n_layer=4, n_head=4, n_embd=128)
    assert [round(count(**big, time=t), 1) for t in (False, True)] == [10.7, 11.7]
    assert [round(count(**little, time=t), 2) for t in (False, True)] == [.81, .92]


def test_untrained_blocks_are_the_identity():
    c = Masked(block_size=12, n_layer=2, n_head=2, n_embd=16, time=True)
    m = Transformer(c, nn.Embedding(6, 16), 3)
    x = torch.randn(2, 12, 16)
    assert torch.equal(m.blocks[0](x, m.rope, [0.0] * 6), x)


def test_time_reaches_every_position_and_only_its_own():
    m, x, t = net(nn.Embedding(6, 16), n_layer=1), torch.randint(6, (1, 12)), torch.full((1, 12), .5)
    assert torch.equal(m(x, t), m(x, t[:, 0]))                     # one level for all = the same level at each
    other = t.clone()
    other[0, 3] = .9
    assert ((m(x, other) - m(x, t)).abs().amax(-1)[0] > 0)[3]


def test_attention_is_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    for causal in (False, True):
        assert torch.allclose(attention(q, k, v, causal), nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), atol=1e-5)


def test_neighbours_against_the_sum():
    torch.manual_seed(0)
    for causal, reach in ((False, 1), (True, 1), (False, 3)):
        m, x = model.Neighbours(Masked(n_embd=16, n_head=2), causal, reach), torch.randn(2, 9, 16)
        assert torch.equal(m(x), x)                                 # nothing is mixed in before training
        nn.init.normal_(m.mix)
        y = x.clone()
        for a, d in zip(m.mix, m.offsets, strict=True):
            for i in range(9):
                y[:, i] += a * x[:, i + d] if 0 <= i + d < 9 else 0
        assert torch.allclose(m(x), y, atol=1e-5) and (max(m.offsets) < 0) == causal


def test_rotation_depends_on_the_distance_only(monkeypatch):
    m = net(nn.Embedding(6, 16))
    q, k = torch.randn(2, 8)
    rope = m.rope.float()
    def score(i, j):
        return (model.rotate(q, rope[:, i]) * model.rotate(k, rope[:, j])).sum().item()
    assert score(3, 5) == pytest.approx(score(7, 9), abs=.05) and abs(score(3, 5) - score(3, 8)) > .1

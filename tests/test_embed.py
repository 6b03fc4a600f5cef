"""embed_diffusion.py: the ladder, what a network without positions cannot know, rounding,
Diffusion-LM, fluency, and the script. Its tables are in test_tables.py, its control in
test_control.py."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_bits import TINY
from test_diffusion import descend
from torch import nn

import embed_diffusion
import train
from config import Embed, EmbedSampler, parse
from embed_diffusion import LADDER, RECIPES, build
from gaussian import alpha_sigma
from step import reseed

ABC = {"alphabet": "abcdefgh"}


def tiny(recipe="best", **k):
    return Embed(**{**RECIPES[recipe], **dict(block_size=12, n_layer=1, n_head=1, n_embd=16,
                                              dim=6), **k})


def settings(*argv):
    return Embed(**parse(list(argv), Embed, RECIPES))


# ---- recipes

def test_the_ladder_changes_one_thing_at_a_time_and_ends_at_the_default():
    rungs = list(LADDER)
    assert list(RECIPES)[:len(rungs)] == rungs
    for before, name in zip(rungs, rungs[1:], strict=False):
        a = RECIPES[before]
        b = RECIPES[name]
        assert {k for k in b if a[k] != b[k]} == set(LADDER[name]), name
    assert Embed(**RECIPES["best"]) == Embed() == settings("--recipe=best")
    for name, recipe in RECIPES.items():
        assert settings("--dim=8", f"--recipe={name}", "--seed=3") == Embed(**recipe, dim=8, seed=3)
    typed = settings("--time=False", "--recipe=baseline")
    assert typed == Embed(**{**RECIPES["baseline"], "time": False})


@pytest.mark.parametrize("args", ["--predict=eps", "--loss=simple", "--predict=x0 --loss=simple",
                                  "--loss=diffusion-lm", "--table=t.txt --table_init=free"])
def test_what_does_not_go_together_is_one_line(args):
    with pytest.raises(SystemExit, match="has loss=|need predict=tokens|needs table_init"):
        settings(*args.split())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_and_writes_and_only_a_learned_table_moves(recipe, monkeypatch):
    """And with the prior begins with the bound log V."""
    reseed(0)
    c = tiny(recipe)
    m = build(c, ABC)
    before = m.table.detach().clone()
    if c.output_prior:
        e = train.evaluate(m, torch.randint(8, (300, 12)), 4)
        assert e["bound"] == pytest.approx(math.log(8), abs=4 * e["stderr"] + 0.02)
    descend(m, torch.randint(8, (16, 12)), monkeypatch)
    assert torch.equal(before, m.table) != c.train_table
    if c.table_init == "unit":
        assert torch.allclose(m.table.norm(dim=1), torch.full((8,), c.row_norm), atol=1e-5)
    else:
        std = 0.02 if c.table_init == "small" else 1
        assert before.std().item() == pytest.approx(std, rel=0.3)
    assert any("table" in name for name in m.state_dict())
    x0 = torch.randint(8, (4, 12))
    assert m.bound(x0, torch.rand(4), range(4))[0].isfinite().all()
    *_, (y, p) = m.sample(x0, x0 < 3, EmbedSampler(steps=2))
    assert torch.equal(y[x0 < 3], x0[x0 < 3]) and (p[x0 < 3] == 1).all()
    assert (p <= 1 + 1e-6).all() and (p >= 0).all()


def test_a_network_without_positions_cannot_tell_the_order():
    z = torch.randn(3, 12, 6).double()
    gamma = torch.zeros(3, 1).double()
    turn = torch.randperm(12)
    for use_positions in (False, True):
        m = build(tiny("orderless", use_positions=use_positions), ABC).eval()
        reseed(1)
        for p in m.net.parameters():
            nn.init.normal_(p, std=0.3)
        turned = m.predict_x0(z[:, turn], gamma)
        same = torch.allclose(m.predict_x0(z, gamma)[:, turn], turned, rtol=0.02, atol=0.02)
        assert same != use_positions


# ---- rounding, losses

@pytest.mark.parametrize("recipe", ["unit", "x0", "learned"])
@pytest.mark.parametrize("rounding", ["learned", "cosine", "clamp"])
def test_oracles_write_their_text_by_every_rounding(recipe, rounding):
    """Of networks that predict eps, x0 and tokens."""
    x0 = torch.randint(8, (3, 12))
    m = build(tiny(recipe), ABC)

    class Oracle(nn.Module):
        def forward(self, x, t):
            a, s = alpha_sigma(m.gamma_min + t.double() * (m.gamma_max - m.gamma_min))
            row = m.table[x0]
            out = {"eps": (x - a * row) / s, "x0": row, "tokens": 1e4 * F.one_hot(x0, 8)}
            return out[m.predict].float()

    m.net = Oracle()
    *_, (y, _) = m.sample(x0 * 0, x0 < 0, EmbedSampler(steps=4, rounding=rounding))
    assert torch.equal(y, x0)


def test_roundings_by_hand():
    m = build(tiny("diffusion-lm"), ABC)
    xhat = torch.randn(2, 12, 6).double()
    p = torch.randn(2, 12, 8).softmax(-1)
    x, q = m.round(xhat, p, "learned")
    assert x is xhat and q is p
    # of rows that differ in length the nearest, not the likeliest, when numbers are predicted
    nearest = (xhat[:, :, None].float() - m.table).square().sum(-1).argmin(-1)
    assert (nearest != (xhat.float() @ m.table.T).argmax(-1)).any()
    x, q = m.round(xhat, p, "clamp")
    assert torch.equal(x, m.table[nearest].double()) and q is p
    tokens = build(tiny(), ABC)
    x, _ = tokens.round(xhat, p, "clamp")
    assert torch.equal(x, tokens.table[p.argmax(-1)].double())
    x, q = m.round(xhat, p, "cosine")
    angle = F.cosine_similarity(xhat[:, :, None].float(), m.table, dim=-1)
    assert x is xhat and torch.equal(q.argmax(-1), angle.argmax(-1))
    assert torch.allclose(q.sum(-1), angle.amax(-1).clamp(0, 1), atol=1e-6)
    # nothing has taught the first two to round
    for recipe, learned in (("baseline", 0), ("x0", 0), ("diffusion-lm", 1), ("best", 1)):
        assert (build(tiny(recipe), ABC).round(xhat, p, "")[1] is p) == learned


def test_diffusion_lm_is_its_three_terms():
    """With f = 0: |x|^2 + |alpha_T x|^2 + CE(x C^T), x = C + 0.121 eps."""
    reseed(0)
    m = build(tiny("diffusion-lm", gamma_max=0.0), ABC)    # alpha_T^2 = 1/2: its term is seen
    x0 = torch.randint(8, (400, 12))
    loss = sum(m(x0).item() for _ in range(5)) / 5
    x = (m.table[x0] + 0.121 * torch.randn(400, 12, 6)).detach()
    rounding = F.cross_entropy((x @ m.table.T).flatten(0, 1), x0.flatten())
    truth = x.square().mean() * 1.5 + rounding
    assert loss == pytest.approx(truth.item(), rel=0.01)


def test_fluency_is_the_expected_surprise_of_predicted_pairs():
    m = build(tiny(fluency=2.0), ABC).eval()
    train_ids = torch.tensor([0, 1, 0, 1, 7, 7], dtype=torch.uint8)
    embed_diffusion.count_bigrams(m, SimpleNamespace(train=train_ids, tokenizer=ABC["alphabet"]))
    counts = m.bigrams - 1
    assert counts.sum() == 5 and counts[0, 1] == 2
    assert counts[1, 0] == counts[1, 7] == counts[7, 7] == 1
    x0 = torch.randint(8, (5, 12))
    m.bigrams.copy_(torch.rand(8, 8) + 0.1)
    surprise = -(m.bigrams / m.bigrams.sum(1, keepdim=True)).log()
    certain = 100.0 * F.one_hot(x0, 8)
    truth = 2 * surprise[x0[:, :-1], x0[:, 1:]].mean().item()
    assert m.regularizer(certain).item() == pytest.approx(truth, rel=1e-4)
    truth = 2 * surprise.mean().item()
    assert m.regularizer(0 * certain).item() == pytest.approx(truth, rel=1e-4)
    reseed(0)
    loss = m(x0)
    m.fluency = 0
    reseed(0)
    assert loss.item() - m(x0).item() == pytest.approx(truth, rel=0.05)   # untrained: uniform
    assert build(tiny(), ABC).regularizer(certain) == 0


# ---- the script

def test_train_sample_and_resume(tmp_path, capsys):
    out = f"--out={tmp_path}/embed"
    r = run("embed_diffusion.py", *TINY, out)
    assert "nats/char" in r.stdout and "done: python embed_diffusion.py sample" in r.stdout
    for how, calls in (("--rounding=clamp", 3), ("--rounding=cosine", 3), ("--two_pass", 6),
                       ("--prompt=def {9} (self)", 3)):
        embed_diffusion.main(["sample", out, "--steps=3", how])
        shown = capsys.readouterr()
        assert f"\n{calls} network calls" in shown.err and shown.out.strip()
    assert shown.out.startswith("def ") and shown.out.endswith(" (self)\n")
    with pytest.raises(SystemExit, match="which cannot become"):
        embed_diffusion.main(["--resume", "--recipe=baseline", out])
    embed_diffusion.main(["--resume", "--max_iters=25", out])
    assert "max_iters: 20 -> 25" in capsys.readouterr().out

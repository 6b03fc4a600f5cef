"""embed_diffusion.py: the ladder, tables frozen and learned, what a network without positions cannot know, rounding, the diagnosis."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from torch import nn

import model
import train
from config import EMBED, LADDER, Embed, EmbedSampler, parse
from diffusion import scales
from embed_diffusion import begin, build, cross_entropy, tells
from train import reseed

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8", "--max_iters=120", "--eval_interval=60",
        "--train_size=20000"]
ABC = {"alphabet": "abcdefgh"}


def tiny(recipe="best", **k):
    return Embed(**{**EMBED[recipe], "block_size": 12, "n_layer": 1, "n_head": 1, "n_embd": 16, "dim": 6, **k})


def alive(m):
    """m with a network that is not silent: weights drawn, not zero."""
    reseed(1)
    for p in m.net.parameters():
        nn.init.normal_(p, std=.3)
    return m.eval()


def test_the_ladder_changes_one_thing_at_a_time_and_ends_at_the_default():
    assert list(EMBED)[:len(LADDER)] == list(LADDER)
    for (_, before), (name, after) in zip(list(EMBED.items())[:len(LADDER) - 1], list(EMBED.items())[1:], strict=False):
        assert {k for k in after if after[k] != before[k]} == set(LADDER[name]), name
    assert Embed(**EMBED["best"]) == Embed() and set(EMBED["baseline"]) < set(Embed.__dataclass_fields__)
    for name, recipe in EMBED.items():
        c = parse(["--dim=8", f"--recipe={name}", "--seed=3"], Embed())
        assert c == Embed(dim=8, seed=3, **recipe) and parse([f"--seed={c.seed}", "--dim=8"], c) == c
    assert parse(["--time=False", "--recipe=baseline"], Embed()) == Embed(**EMBED["baseline"] | {"time": False})
    assert parse([], Embed(spread=1.0)).spread == 1                                   # an edited config.py holds


@pytest.mark.parametrize("args", ["--predict=eps", "--weight=simple", "--predict=x0 --weight=simple", "--weight=diffusion-lm", "--low=9"])
def test_what_does_not_go_together_is_one_line(args):
    with pytest.raises(SystemExit, match="does not go with|needs predict|low="):
        parse(args.split(), Embed())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("recipe", EMBED)
def test_every_parameter_gets_a_gradient_and_only_a_learned_table_moves(recipe, half, monkeypatch):
    """In fp16 with a scaler, which begins where training's does, too."""
    if half:
        monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.float16))
    reseed(0)
    m, scaler = build(tiny(recipe), ABC), torch.amp.GradScaler("cpu", enabled=half)
    before, opt = m.rows.detach().clone(), torch.optim.AdamW(m.parameters(), 1e-2)
    for _ in range(6):
        opt.zero_grad()
        scaler.scale(m(torch.randint(8, (16, 12)))).backward()
        scaler.step(opt)
        scaler.update()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert torch.equal(before, m.rows) != EMBED[recipe]["learned"] and "rows" in m.state_dict()
    if EMBED[recipe]["rows"] == "unit":
        assert torch.allclose(m.table.norm(dim=1), torch.full((8,), EMBED[recipe]["norm"]), atol=1e-5)
    if recipe == "baseline":
        assert m.table.std().item() == pytest.approx(.02, rel=.3)


@pytest.mark.parametrize("recipe", ["baseline", "orderless"])
def test_a_network_without_positions_cannot_tell_the_order(recipe):
    m, other = alive(build(tiny(recipe), ABC)), alive(build(tiny(recipe, positions=True), ABC))
    z, gamma, turn = torch.randn(3, 12, 6).double(), torch.zeros(3, 1).double(), torch.randperm(12)
    nothing = z.new_zeros(3, 12, 0)
    same = lambda m: torch.allclose(m.guess(z, gamma, nothing)[0][:, turn], m.guess(z[:, turn], gamma, nothing)[0], rtol=.02, atol=.02)
    assert same(m) and not same(other)


@pytest.mark.parametrize("recipe", ["prior", "turns", "best", "orderless"])
def test_an_untrained_network_with_the_prior_has_the_bound_log_V(recipe):
    m = build(tiny(recipe), ABC).eval()
    e = train.evaluate(m, torch.randint(8, (800, 12), generator=torch.Generator().manual_seed(0)), 8)
    assert e["bound"] == pytest.approx(math.log(8), abs=4 * e["stderr"] + .02)


@pytest.mark.parametrize("predict", ["eps", "x0", "tokens"])
@pytest.mark.parametrize("rounding", ["learned", "cosine", "clamp"])
def test_oracles_write_their_text_by_every_rounding(predict, rounding):
    x0 = torch.randint(8, (3, 12))
    recipe = {"eps": "unit", "x0": "x0", "tokens": "learned"}[predict]
    m = build(tiny(recipe), ABC)

    class Oracle(nn.Module):
        def forward(self, x, t):
            z, (a, s) = x.double(), scales(m.ends[0] + t.double() * (m.ends[1] - m.ends[0]))
            return {"eps": (z - a * m.table[x0]) / s, "x0": m.table[x0], "tokens": 1e4 * F.one_hot(x0, 8)}[predict].float()

    m.net = Oracle()
    for sampler in ("ddim", "ancestral"):
        *_, (y, _) = m.sample(torch.zeros_like(x0), torch.zeros(3, 12) > 0, EmbedSampler(steps=4, sampler=sampler, rounding=rounding))
        assert torch.equal(y, x0)


def test_roundings_by_hand():
    m = build(tiny("diffusion-lm"), ABC)
    xhat = torch.randn(2, 12, 6).double()
    p = torch.randn(2, 12, 1, 8).softmax(-1)
    how = lambda r: m.rounded(xhat, p, EmbedSampler(rounding=r))
    assert how("learned")[0] is xhat and how("learned")[1] is p
    nearest = (xhat[:, :, None].float() - m.table).square().sum(-1).argmin(-1)        # of rows that differ in length, not the likeliest
    assert torch.equal(how("clamp")[0], m.table[nearest].double()) and how("clamp")[1] is p
    assert (nearest != (xhat.float() @ m.table.T).argmax(-1)).any()
    tokens = build(tiny(), ABC)
    assert torch.equal(tokens.rounded(xhat, p, EmbedSampler(rounding="clamp"))[0], tokens.table[p.argmax(-1)[..., 0]].double())
    x, cosine = how("cosine")
    assert x is xhat and torch.equal(cosine.argmax(-1)[..., 0], F.cosine_similarity(xhat[:, :, None].float(), m.table, dim=-1).argmax(-1))
    by_default = [build(tiny(r), ABC).rounded(xhat, p, EmbedSampler())[1] is p for r in ("baseline", "x0", "diffusion-lm", "best")]
    assert by_default == [False, False, True, True]                                   # nothing has taught the first two to round
    far = m.table * torch.linspace(1, 9, 8)[:, None]                                  # the angle does not care how long a row is
    assert torch.equal(m.rounded(far[None].double(), p[:1, :8], EmbedSampler(rounding="cosine"))[1].argmax(-1).flatten(), torch.arange(8))


def test_diffusion_lm_is_its_three_terms():
    """With f = 0: |x|^2 + |alpha_T x|^2 + CE(x C^T), x = C + .121 eps; the rounding term has a gradient for the table, none for the network."""
    reseed(0)
    m, x0 = build(tiny("diffusion-lm", high=0.), ABC), torch.randint(8, (400, 12))    # alpha_T^2 = 1/2: its term is seen
    loss = sum(m(x0).item() for _ in range(5)) / 5
    aT, _ = scales(m.gamma(torch.ones(1, 1).double())[0])
    x = (m.table[x0] + .121 * torch.randn(400, 12, 6)).detach()
    truth = x.square().mean() * (1 + aT.item() ** 2) + F.cross_entropy((x @ m.table.T).flatten(0, 1), x0.flatten())
    assert loss == pytest.approx(truth.item(), rel=.01)


def test_fluency_is_the_expected_surprise_of_predicted_pairs():
    m, x0 = build(tiny(fluency=2.), ABC).eval(), torch.randint(8, (5, 12))
    m.pairs.copy_(torch.rand(8, 8) + .1)
    surprise = -(m.pairs / m.pairs.sum(1, keepdim=True)).log()
    certain = 100. * F.one_hot(x0, 8)[:, :, None].float()
    assert m.regularizer(certain).item() == pytest.approx(2 * surprise[x0[:, :-1], x0[:, 1:]].mean().item(), rel=1e-4)
    assert m.regularizer(0 * certain).item() == pytest.approx(2 * surprise.mean().item(), rel=1e-4)
    assert build(tiny(), ABC).regularizer(certain) == 0


def test_fluency_counts_the_pairs_of_the_training_text():
    data = SimpleNamespace(train=torch.tensor([0, 1, 0, 1, 7, 7], dtype=torch.uint8), alphabet="abcdefgh")
    m = build(tiny(fluency=2.), ABC)
    begin(m, data, tiny(fluency=2.))
    counts = m.pairs - 1
    assert counts.sum() == 5 and counts[0, 1] == 2 and counts[1, 0] == counts[1, 7] == counts[7, 7] == 1


def test_the_diagnosis_knows_nothing_where_the_network_does_not():
    """Numbers that say nothing score the frequencies of the characters, whatever the scale of the table; the text itself scores 0."""
    p = torch.tensor([.4, .2, .1, .1, .08, .06, .04, .02]).double()
    x0 = torch.multinomial(p, 200 * 12, replacement=True, generator=torch.Generator().manual_seed(0)).view(200, 12)
    for recipe in ("baseline", "x0"):
        m = build(tiny(recipe), ABC).eval()
        m.to_x = lambda out, z, a, s: torch.zeros_like(z)
        nats, own = cross_entropy(m, x0, p, torch.Generator().manual_seed(0))
        assert nats.mean().item() == pytest.approx(-p.log()[x0].mean().item(), abs=.01) and own.shape == x0.shape
        m.to_x = lambda out, z, a, s: m.table[x0].double()                            # noqa: B023
        assert cross_entropy(m, x0, p, torch.Generator().manual_seed(0))[0].mean() < .01


def test_what_a_character_tells_of_the_next():
    order = torch.arange(4000).view(40, 100) % 2
    assert tells(order) == pytest.approx(1, abs=.01)
    assert abs(tells(torch.randint(2, (40, 100), generator=torch.Generator().manual_seed(0)))) < .01


def test_train_diagnose_sample_and_resume(tmp_path):
    out = f"--out={tmp_path}/embed"
    r = run("embed_diffusion.py", *TINY, out)
    for line in ("done: python embed_diffusion.py sample", "know-nothing line: 4", "of the predicted text", "table: norm 2.650", "samples: "):
        assert line in r.stdout, r.stdout
    for how in ("--rounding=clamp", "--rounding=cosine", "--prompt=def {9} (self)"):
        r = run("embed_diffusion.py", "sample", out, "--steps=3", how)
        assert "3 network calls" in r.stderr and r.stdout.strip()
    assert "def " in r.stdout and " (self)" in r.stdout
    assert "which cannot change" in run("embed_diffusion.py", "--resume", "--recipe=baseline", out, code=1).stderr
    r = run("embed_diffusion.py", "--resume", "--max_iters=130", out)
    assert "max_iters: 120 -> 130" in r.stdout
    r = run("embed_diffusion.py", *TINY, "--recipe=baseline", f"--out={tmp_path}/baseline", "--max_iters=20")
    assert "nats/char" in r.stdout and "table: norm 0.0" in r.stdout
    r = run("-m", "evaluation", f"--out={tmp_path}/embed,{tmp_path}/baseline", "--n=4", "--gaussian_steps=2",
            "--judge=" + str(tmp_path / "none"), code=1)
    assert "none" in r.stderr

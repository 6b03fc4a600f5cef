"""Steering by gradients, a twin's guidance and writing in blocks (embed_diffusion.py sample)."""
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_embed import ABC, TINY, tiny
from torch import nn

import embed_diffusion
import generate
from config import EmbedSampler
from data import Alphabet
from diffusion import scales
from embed_diffusion import Embeddings, build, prepare, wish
from train import reseed

ABCDEFGH = Alphabet("abcdefgh")


class Smooth(nn.Module):
    """A network of positions that see each other, smooth and in fp32."""

    def __init__(self, width):
        super().__init__()
        self.read, self.say = nn.Linear(width, 20), nn.Linear(20, 8)

    def forward(self, x, t):
        return 3 * self.say(torch.tanh(self.read(x) + self.read(x).mean(1, keepdim=True)))


def smooth(**k):
    reseed(3)
    m = build(tiny("turns", **k), ABC).eval()
    m.net = Smooth(6 * (1 + m.selfcond) + 8 * m.hint)
    return m


def test_what_wishes_allow():
    at = torch.arange(7)
    say = lambda steer: ["".join(ch for ch, ok in zip("ab\nd", row, strict=True) if ok) for row in wish(steer, Alphabet("ab\nd"))(at)]
    assert say("no:a") == ["b\nd"] * 7 and say("no:ab") == ["\nd"] * 7 and say("only:ad") == ["ad"] * 7 and say("only:\\n") == ["\n"] * 7
    assert say("at:2=b") == ["ab\nd", "ab\nd", "b", *["ab\nd"] * 4]
    assert say("line:2") == ["abd", "abd", "\n", "abd", "abd", "\n", "abd"]
    for bad in ("", "e", "no:", "no:ab\\nd", "only:", "at:b", "at:1=", "at:-1=a", "line:0", "line:a", "some:a"):
        with pytest.raises(SystemExit, match="write no:e, only:abc, at:5=T or line:40"):
            wish(bad, Alphabet("ab\nd"))
    with pytest.raises(SystemExit, match="ASCII"):
        wish("no:é", Alphabet("".join(map(chr, range(256))), raw=True))
    with pytest.raises(SystemExit, match="never seen 'z'"):
        wish("no:z", Alphabet("ab\nd"))(at)


@pytest.mark.parametrize("steer", ["no:ab", "only:cdef", "at:3=h"])
def test_the_pull_is_the_gradient_by_finite_differences(steer):
    m = smooth()
    m.wish = wish(steer, ABCDEFGH)
    z, before, gamma, nothing = *torch.randn(2, 2, 12, 6).double(), torch.rand(2, 12).double() * 4 - 1, torch.zeros(2, 12, 0).double()
    how = lambda strength: m.decide(z, gamma, nothing, before, EmbedSampler(strength=strength, steer=steer))[0]
    a, s = scales(gamma)
    pull = (how(3.) - how(0.)) / 3 * a / s ** 2
    allowed = m.wish(torch.arange(12))
    odds = lambda z: m.logits(z, gamma, nothing, before)[:, :, 0].double().softmax(-1).mul(allowed).sum(-1).log().sum()
    for _ in range(5):
        way = torch.randn_like(z)
        assert (pull * way).sum().item() == pytest.approx(((odds(z + .003 * way) - odds(z - .003 * way)) / .006).item(), rel=.02, abs=.02)


def test_an_exact_denoiser_steered_at_strength_1_draws_from_what_is_allowed():
    """The untrained network is the exact denoiser of independent, uniform characters; p(text | wish) is then uniform over what is allowed."""
    m = build(tiny("turns", spread=0., schedule="cosine"), ABC).eval()
    m.wish = wish("only:bcg", ABCDEFGH)
    x = torch.zeros(400, 12, dtype=torch.long)
    for sampler in ("ddim", "ancestral"):
        reseed(0)
        *_, (y, _) = m.sample(x, x > 0, EmbedSampler(steps=100, steer="only:bcg", strength=1., sampler=sampler))
        share = torch.bincount(y.flatten(), minlength=8) / y.numel()
        assert share[[1, 2, 6]].sum() > .995 and (share[[1, 2, 6]] - 1 / 3).abs().max() < .03, share
    m.wish = None
    *_, (y, _) = m.sample(x, x > 0, EmbedSampler(steps=20))
    assert (torch.bincount(y.flatten(), minlength=8) / y.numel()).max() < .15


def test_guidance_multiplies_probabilities_and_at_weight_1_the_twin_writes():
    m, logits = smooth(), torch.randn(2, 12, 8)
    args = torch.randn(2, 12, 6).double(), torch.zeros(2, 12).double(), torch.zeros(2, 12, 0).double(), None
    alone, read = m.guess(*args)[1], []
    m.twin = lambda text: (read.append(text), logits)[1]
    for weight, truth in ((0., alone), (1., logits.softmax(-1)[:, :, None]), (.3, F.softmax(.7 * alone.log() + .3 * logits[:, :, None], -1))):
        xhat, p = m.decide(*args, EmbedSampler(mode="guided", weight=weight))
        assert torch.allclose(p, truth, atol=1e-5) and torch.allclose(xhat, (truth[:, :, 0] @ m.table).double(), atol=1e-5)
    assert torch.equal(read[0], alone[:, :, 0].argmax(-1))                            # the twin reads what is likeliest


def test_blocks_are_written_from_left_to_right_and_what_comes_later_stays_noise():
    m, seen, x0 = smooth(), [], torch.arange(31) % 8
    inner = m.net

    class Oracle(nn.Module):
        def forward(self, x, t):
            seen.append((m.start, t))
            return inner(x, t) * 0 + 50. * F.one_hot(x0[(m.start + torch.arange(12)).clamp(max=30)], 8)

    m.net = Oracle()
    s = EmbedSampler(mode="blocks", block=5, steps=3, n=2)
    known = torch.zeros(31, dtype=torch.bool)
    known[:3] = True
    frames = list(generate.write(m, x0 * known, known, 12, s))
    assert torch.equal(frames[-1][0], x0.expand(2, 31)) and len(frames) == 7 * 3
    assert [start for start, _ in seen[::3]] == [0, 0, 3, 8, 13, 18, 19]             # the last window ends with the text
    for i, (x, sure) in enumerate(frames):
        until = 5 * (i // 3 + 1)
        assert (x[:, until:] == m.mask).all() and (sure[:, until:] == 0).all() and (x[:, :until] != m.mask).all()
    first = torch.stack([t for _, t in seen[:3]])                                  # (3, 2, 12): the noise levels of the first block
    assert (first[:, :, :3] == 0).all() and (first[:, :, 5:] == 1).all() and (first[1:, :, 3:5] < 1).any()


def test_long_blocks_leave_half_a_window_for_what_was_written_before():
    m, given = smooth(), []
    sample = m.sample
    m.sample = lambda x, known, s, later=None: (given.append(known.sum().item()), sample(x, known, s, later))[1]
    for block in (6, 1000):
        given.clear()
        *_, (x, _) = generate.write(m, torch.zeros(30, dtype=torch.long), torch.zeros(30) > 0, 12, EmbedSampler(mode="blocks", block=block, steps=2))
        assert given == [0, 6, 6, 6, 6] and (x < 8).all()


def test_what_is_known_does_not_count_in_the_wish():
    """A prompt that breaks it cannot be changed, and must not pull at the others."""
    m, known, free, wished = smooth(), torch.arange(12) < 6, [], Embeddings.wished
    m.wish, how = wish("no:a", ABCDEFGH), EmbedSampler(steer="no:a", strength=1., steps=2)
    m.wished = lambda *args: (free.append(m.free), wished(m, *args))[1]
    list(generate.write(m, torch.zeros(10, dtype=torch.long), known[:10], 12, how))
    assert all(f.equal((torch.arange(12) >= 6) & (torch.arange(12) < 10) & torch.ones(1, 12).bool()) for f in free) and len(free) == 2
    z, gamma, nothing, xhat = torch.randn(1, 12, 6).double(), torch.zeros(1, 12).double(), torch.zeros(1, 12, 0).double(), []
    for m.free in (..., ~known[None], known[None]):
        xhat.append(m.decide(z, gamma, nothing, None, how)[0] - m.guess(z, gamma, nothing)[0])
    assert torch.allclose(xhat[0], xhat[1] + xhat[2], atol=1e-4) and xhat[1].abs().max() > .01 < xhat[2].abs().max()


def test_preparing_anew_forgets_the_last_wish_and_twin():
    m = smooth()
    prepare(m, ABCDEFGH, EmbedSampler(steer="no:a"), 12)
    assert m.wish and not m.twin
    m.twin, m.start = len, 5
    prepare(m, ABCDEFGH, EmbedSampler(), 12)
    assert m.wish is m.twin is None and m.start == 0


def test_a_block_as_long_as_the_text_is_plain_diffusion():
    m = smooth()
    nothing = torch.zeros(12, dtype=torch.bool)
    texts = []
    for how in (dict(mode="blocks", block=12), dict(mode="blocks", block=99), dict()):
        reseed(5)
        *_, (x, _) = generate.write(m, torch.zeros(12, dtype=torch.long), nothing, 12, EmbedSampler(steps=8, n=3, **how))
        texts.append(x)
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])


def test_control_from_the_command_line(tmp_path):
    run("embed_diffusion.py", *TINY, "--max_iters=20", "--eval_interval=20", f"--out={tmp_path}/embed")
    run("embed_diffusion.py", *TINY, "--max_iters=20", "--eval_interval=20", "--recipe=x0", f"--out={tmp_path}/x0")
    run("train.py", *TINY, "--max_iters=20", "--eval_interval=20", "--objective=ar", f"--out={tmp_path}/ar")
    out = f"--out={tmp_path}/embed"
    r = run("embed_diffusion.py", "sample", out, "--steer=only:ab", "--length=70")
    assert sum(ch in "ab" for ch in r.stdout) > 60 and len(r.stdout) == 71
    r = run("embed_diffusion.py", "sample", out, "--mode=blocks", "--block=16", "--length=70", "--steps=3")
    assert "15 network calls" in r.stderr
    run("embed_diffusion.py", "sample", out, "--mode=guided", f"--twin={tmp_path}/ar", "--steps=3", "--steer=line:9")
    for args, line in ((["--mode=guided"], "^the twin results/judge.pt reads other characters"), (["--steer=e"], "write no:e"),
                       (["--steer=no:\u4e00"], "never seen"),
                       (["--mode=guided", f"--twin={tmp_path}/none"], "no checkpoint"), (["--weight=2"], "at most 1"), (["--block=0"], "1 or more"),
                       (["--steer=no:e", "--rounding=clamp"], "takes it back"), (["--steer=at:99999999999999999999=a"], "write no:e"),
                       (["--steer=at:32=a"], "allows everything in a text of 32"),
                       ([f"--out={tmp_path}/x0", "--steer=no:e"], "predicts probabilities")):
        with pytest.raises(SystemExit, match=line):                                   # one line, exit code 1
            embed_diffusion.main(["sample", out, *args])

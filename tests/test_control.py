"""Steering by gradients, guidance by the baseline and writing in blocks: embed_diffusion.py sample.
"""
import pytest
import torch
import torch.nn.functional as F
from test_bits import TINY
from test_embed import ABC, tiny
from test_tokens import Context
from torch import nn

import embed_diffusion
import train
from config import EmbedSampler
from data import CharTokenizer
from embed_diffusion import block_windows, build, steer_mask, write_controlled
from gaussian import alpha_sigma
from step import reseed

ABCDEFGH = CharTokenizer("abcdefgh")
NOTHING = torch.zeros(12, dtype=torch.bool)


def smooth():
    """A network in fp32, so that it has a slope, whose positions see each other."""
    reseed(3)
    m = build(tiny("turns"), ABC).eval()
    m.net = Context(6 + 6 + 8, 8, 12)
    return m


def write(m, s, ids=None, known=NOTHING, allowed=None, ar=None):
    """The frames of m's texts in windows of 12, by default from nothing."""
    ids = torch.zeros(len(known), dtype=torch.long) if ids is None else ids
    return list(write_controlled(m, ids, known, 12, s, allowed, ar))


# ---- steering

def test_what_steering_allows():
    tokenizer = CharTokenizer("ab\nd")
    for steer, allowed in (
            ("no:a", ["b\nd"] * 7), ("no:ab", ["\nd"] * 7), ("only:ad", ["ad"] * 7),
            ("only:\\n", ["\n"] * 7), ("at:2=b", ["ab\nd", "ab\nd", "b", *["ab\nd"] * 4]),
            ("at:0=\\n", ["\n", *["ab\nd"] * 6]), ("at:9=a", ["ab\nd"] * 7),
            ("line:2", ["abd", "abd", "\n", "abd", "abd", "\n", "abd"])):
        rows = steer_mask(steer, tokenizer, 7).tolist()
        chars = ["".join(ch for ch, ok in zip("ab\nd", row, strict=True) if ok) for row in rows]
        assert chars == allowed, steer
    for bad in ("", "e", "no:", "no:ab\\nd", "only:", "at:b", "at:1=", "at:-1=a", "line:0",
                "line:a", "some:a"):
        with pytest.raises(SystemExit, match="write no:e, only:abc, at:5=T or line:40"):
            steer_mask(bad, tokenizer, 7)
    with pytest.raises(SystemExit, match="ASCII"):
        steer_mask("no:é", CharTokenizer("".join(map(chr, range(256))), is_bytes=True), 7)
    with pytest.raises(SystemExit, match="never seen 'z'"):
        steer_mask("no:z", tokenizer, 7)


@pytest.mark.parametrize("steer", ["no:ab", "only:cdef", "at:3=h"])
def test_the_pull_is_the_gradient_by_finite_differences(steer):
    m = smooth()
    z, before = torch.randn(2, 2, 12, 6).double()
    gamma = torch.rand(2, 12).double() * 4 - 1
    allowed = steer_mask(steer, ABCDEFGH, 12)

    def steered(strength):
        s = EmbedSampler(strength=strength)
        return m.guided_prediction(z, gamma, before, s, allowed, None)[0]

    def log_p_y(z):
        probs = m.logits(z, gamma, x_prev=before).double().softmax(-1)
        return (probs * allowed).sum(-1).log().sum()

    a, s = alpha_sigma(gamma)
    pull = (steered(3.0) - steered(0.0)) / 3 * a / s ** 2
    plain, _ = m.predict_tokens(z, gamma, x_prev=before)
    assert torch.allclose(steered(0.0), plain, atol=1e-5)
    for _ in range(5):
        way = torch.randn_like(z)
        slope = (log_p_y(z + 0.003 * way) - log_p_y(z - 0.003 * way)) / 0.006
        assert (pull * way).sum().item() == pytest.approx(slope.item(), rel=0.02, abs=0.02)


def test_an_exact_denoiser_steered_at_strength_1_draws_from_what_is_allowed():
    """The untrained network is the exact denoiser of independent, uniform characters; given what is
    asked, they are uniform over what is allowed."""
    m = build(tiny("turns", stagger=0.0, schedule="cosine"), ABC).eval()
    x = torch.zeros(200, 12, dtype=torch.long)
    allowed = steer_mask("only:bcg", ABCDEFGH, 12)
    reseed(0)
    *_, (y, _) = m.sample(x, x > 0, EmbedSampler(steps=50, strength=1.0), allowed=allowed)
    share = torch.bincount(y.flatten(), minlength=8) / y.numel()
    assert share[[1, 2, 6]].sum() > 0.995
    assert (share[[1, 2, 6]] - 1 / 3).abs().max() < 0.03, share
    *_, (y, _) = m.sample(x, x > 0, EmbedSampler(steps=20))
    assert (torch.bincount(y.flatten(), minlength=8) / y.numel()).max() < 0.15


def test_what_is_known_or_locked_does_not_count_in_steering(monkeypatch):
    """A prompt that breaks it cannot be changed, and must not pull at the others; and each window
    of a long text has its own part of what is allowed."""
    m = smooth()
    seen = []
    inner = m.guided_prediction

    def spy(z, gamma, x_prev, s, allowed, ar):
        seen.append(allowed)
        return inner(z, gamma, x_prev, s, allowed, ar)

    monkeypatch.setattr(m, "guided_prediction", spy)
    allowed = steer_mask("line:4", CharTokenizer("abcdef\ng"), 30)
    known = torch.arange(30) % 3 == 0
    write(m, EmbedSampler(steps=1, mode="blocks", block=6), known=known, allowed=allowed)
    # (start, end) of the windows: in the last 6 before end, what is not known is written
    windows = [(0, 6), (0, 12), (6, 18), (12, 24), (18, 30)]
    for (start, end), part in zip(windows, seen, strict=True):
        position = torch.arange(start, start + 12)
        editable = ~known[position] & (position < end) & (position >= end - 6)
        assert torch.equal(part[0], allowed[position] | ~editable[:, None])


# ---- guidance

@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_guidance_multiplies_probabilities(weight):
    """At weight 1 the baseline writes; it reads what is likeliest."""
    m = smooth()
    logits = torch.randn(2, 12, 8)
    z = torch.randn(2, 12, 6).double()
    gamma = torch.zeros(2, 12).double()
    alone = m.predict_tokens(z, gamma)[1]
    read = []

    def ar(text):
        read.append(text)
        return logits

    s = EmbedSampler(ar_weight=weight)
    xhat, p = m.guided_prediction(z, gamma, None, s, None, ar)
    truth = ((1 - weight) * alone.log() + weight * logits.log_softmax(-1)).softmax(-1)
    assert torch.allclose(p, truth, atol=1e-5)
    assert torch.allclose(xhat, (truth @ m.table).double(), atol=1e-5)
    assert torch.equal(read[0], alone.argmax(-1))
    write(m, EmbedSampler(steps=3, ar_weight=weight), ar=lambda text: ar(text)[:1])
    assert len(read) == 4                                  # once a step


# ---- blocks

def test_blocks_are_written_from_left_to_right_and_what_comes_later_stays_noise():
    m = smooth()
    x0 = torch.arange(31) % 8
    starts = [0, 0, 3, 8, 13, 18, 19]                      # the last window ends with the text
    calls = []

    class Oracle(nn.Module):
        def forward(self, x, t):
            calls.append(t)
            start = starts[(len(calls) - 1) // 3]
            return 50.0 * F.one_hot(x0[start:start + 12], 8).expand(len(x), -1, -1)

    m.net = Oracle()
    known = torch.arange(31) < 3
    frames = write(m, EmbedSampler(mode="blocks", block=5, steps=3, n=2), x0 * known, known)
    assert torch.equal(frames[-1][0], x0.expand(2, 31)) and len(frames) == len(calls) == 7 * 3
    for i, (x, p) in enumerate(frames):
        end = 5 * (i // 3 + 1)
        assert (x[:, end:] == m.mask_id).all() and (p[:, end:] == 0).all()
        assert (x[:, :end] != m.mask_id).all() and torch.equal(x[:, :3], x0[:3].expand(2, 3))
    first = torch.stack(calls[:3])                         # (3, 2, 12): levels of the first block
    assert (first[:, :, :3] == 0).all() and (first[:, :, 5:] == 1).all()
    assert (first[1:, :, 3:5] < 1).any()


def test_windows_of_blocks():
    """A text of one block is one window, as without blocks; in a text that is longer than a window
    half of each but the first two was written before."""
    for block in (6, 1000):
        assert block_windows(30, 12, block) == [(0, 6), (0, 12), (6, 18), (12, 24), (18, 30)]
    assert block_windows(12, 12, 5) == [(0, 5), (0, 10), (0, 12)]
    assert block_windows(8, 12, 99) == [(0, 12)]


# ---- the script

def test_control_from_the_command_line(tmp_path, capsys):
    out = f"--out={tmp_path}/embed"
    embed_diffusion.main([*TINY, out])
    embed_diffusion.main([*TINY, "--recipe=x0", f"--out={tmp_path}/x0"])
    train.main([*TINY, "--objective=ar", f"--out={tmp_path}/ar"])

    def sample(*args):
        capsys.readouterr()
        embed_diffusion.main(["sample", out, *args])
        return capsys.readouterr()

    text, _ = sample("--steer=only:ab", "--length=70")
    assert sum(ch in "ab" for ch in text) > 60 and len(text) == 71
    _, said = sample("--mode=blocks", "--block=16", "--length=70", "--steps=3")
    assert "15 network calls" in said
    _, said = sample("--mode=guided", f"--ar={tmp_path}/ar", "--steps=3", "--steer=line:9")
    assert "6 network calls" in said
    for args, line in (
            (["--mode=guided"], "results/judge.pt reads other characters"),
            (["--mode=guided", f"--ar={tmp_path}/none"], "no checkpoint"),
            (["--mode=guided", f"--ar={tmp_path}/x0"], "is a embed checkpoint, not ar"),
            (["--steer=e"], "write no:e"), (["--steer=no:\u4e00"], "never seen"),
            (["--block=0"], "1 or more"), (["--steer=no:e", "--rounding=clamp"], "moves it back"),
            (["--steer=at:99999999999999999999=a"], "write no:e"),
            (["--steer=at:32=a"], "allows everything in a text of 32"),
            ([f"--out={tmp_path}/x0", "--steer=no:e"], "predicts tokens"),
            ([f"--out={tmp_path}/x0", "--mode=guided"], "predicts tokens")):
        with pytest.raises(SystemExit, match=line):        # one line, exit code 1
            sample(*args)

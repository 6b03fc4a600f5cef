"""Blanks of unknown length: what {a-b} may be, the evidence against the chain rule by hand, and networks that know the answer."""
import itertools
import math
import re

import pytest
import torch
from conftest import run

import generate
from config import Sample
from data import Alphabet
from experiments import blanks
from generate import evidence, plan, settle

EIGHT = Alphabet("abcdefgh")


class Method:   # a masked model as generate.py sees it, of a function net(x (B, T), t (B,)) -> logits (B, T, V)
    def __init__(self, net, V):
        self.mask, self.seen, self.net = V, [], lambda x, t: self.seen.append(x) or net(x, t)


def periodic(x, t):
    """The text is abcdefgh over and over: the first character that is known tells all the others."""
    first = (x < 8).int().argmax(1)
    phase = x.gather(1, first[:, None]) - first[:, None]
    return 9. * torch.nn.functional.one_hot((phase + torch.arange(x.size(1))) % 8, 8)


def uniform(x, t):
    return torch.zeros(*x.shape, 8)


def ids(text):
    return EIGHT.prompt(text)[0]


# ---- what may be written

def test_pieces():
    a = Alphabet("ab{3-5}\n")
    assert a.pieces("a{{b{3}{20-60}") == [("a{{b", range(0)), ("{3}", range(3, 4)), ("{20-60}", range(20, 61))]
    assert "".join(text for text, _ in a.pieces(r"a{{{2-3}{{3-5}b\n{1}")) == r"a{{{2-3}{{3-5}b\n{1}"
    x, known = a.prompt("{{3-5}{4-4}")                              # a brace; and a length that is known after all
    assert a.decode(x[:5].tolist()) == "{3-5}" and known.tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize("bad", ["{5-3}", "{0-4}", "{0-0}", "{-3}", "{3-}", "{-}", "{3-5", "{3--5}", "{3-5-7}", "{ 3-5}", "{1-9999999}", "{a-b}"])
def test_what_is_no_range_is_one_line(bad):
    with pytest.raises(SystemExit, match=r"a blank is written \{12\} or \{20-60\}, a brace \{\{$"):
        settle(Method(uniform, 8), EIGHT, f"ab{bad}cd", 32, 1)


def test_whoever_cannot_choose_a_length_refuses():
    with pytest.raises(SystemExit, match=r"^\{3-5\}: a blank of unknown length needs a masked checkpoint$"):
        EIGHT.prompt("a{2}{3-5}b")


# ---- the evidence

def test_evidence_is_the_chain_rule():
    """Against a loop over the characters, for a network that is a random table of all states, told the share that is masked; T = 6, V = 2."""
    T, V, L, S = 6, 2, 2, 3
    table = torch.randn(3 ** T, T, V, generator=torch.Generator().manual_seed(0))
    net = lambda x, t: table[(x * 3 ** torch.arange(T)).sum(1)] * (1 + t)[:, None, None]
    before, after = torch.tensor([1, 0, 2, 0]), torch.tensor([0, 1, 1])                # 2 is MASK, a blank before
    every = list(itertools.permutations(range(S)))
    for orders in (every, every[1:3], every[4:5]):
        nats = 0
        for order in orders:
            for i, now in enumerate(order):
                x = torch.full((1, T), 2)
                x[0, 0] = before[-1]                                                  # one character of what is before fits
                for then in order[:i]:
                    x[0, 1 + L + then] = after[then]
                p = net(x, (x == 2).sum(1) / T)[0, 1 + L + now].softmax(-1)
                nats -= p[after[now]].log() / len(orders)
        got = evidence(Method(net, V), before, after, range(L, L + 1), torch.tensor(orders), T)
        assert got.shape == (1,) and got.dtype == torch.float64 and abs(got.item() - nats.item()) < 1e-5
    rest = evidence(Method(net, V), before[:0], after, range(3, 4), torch.tensor(every), T)      # nothing before, no room for more
    assert rest.isfinite().all() and len(rest) == 1


def test_who_knows_nothing_finds_all_lengths_alike():
    orders = torch.rand(4, 32).argsort(1)
    got = evidence(Method(uniform, 8), ids("abc"), ids("abcdefgh" * 4), range(1, 40), orders, 128)
    assert torch.allclose(got, torch.full((39,), 32 * math.log(8), dtype=torch.float64), atol=1e-4)


def test_all_lengths_are_asked_the_same_questions():
    """The blank and what follows the evidence are MASK; the evidence is masked in the same orders for each length; few windows a call."""
    T, before, after, m = 40, ids("abc"), ids("defgh"), Method(uniform, 8)
    evidence(m, before, after, range(2, 12), torch.rand(16, 5).argsort(1), T)
    assert max(map(len, m.seen)) <= generate.ROWS and {x.size(1) for x in m.seen} == {T}
    x = torch.cat(m.seen).view(10, 80, T)
    for L, rows in zip(range(2, 12), x, strict=True):
        asked = rows[:, 3 + L:][:, :5]
        assert (rows[:, :3] == before).all() and (rows[:, 3:3 + L] == 8).all() and (rows[:, 8 + L:] == 8).all()
        assert torch.equal(asked, x[0][:, 5:10]) and ((asked == after) | (asked == 8)).all()
        assert (asked == 8).sum(1).tolist() == [5, 4, 3, 2, 1] * 16


@pytest.mark.parametrize("true", [1, 4, 8])
def test_who_knows_the_text_finds_the_length(true, capsys):
    follows = ("abcdefgh" * 9)[4 + true:]
    assert settle(Method(periodic, 8), EIGHT, "abcd{1-8}" + follows, 64, 1) == f"abcd{{{true}}}{follows}"
    assert re.search(rf"\{{1-8\}}: {true} characters \(next best \d, [\d.]+ nats behind, by 32 that follow\)\n", capsys.readouterr().err)
    nats = evidence(Method(periodic, 8), ids("abcd"), ids(follows)[:32], range(1, 21), torch.rand(4, 32).argsort(1), 64)
    right = torch.arange(1, 21) % 8 == true % 8
    assert nats[right].max() < .1 and nats[~right].min() > 8


def test_from_left_to_right_and_what_is_settled_counts():
    """The second blank is right only if the first, and the {2} of a known length, are as many MASKs before it."""
    assert settle(Method(periodic, 8), EIGHT, "abc{1-8}gh{2}c{1-8}gh", 64, 1) == "abc{3}gh{2}c{3}gh"
    m = Method(periodic, 8)
    settle(m, EIGHT, "abc{3}gh{1-8}cd{5}ef", 64, 1)
    assert all((x[:, 3:6] == 8).all() and (x[:, 18:] == 8).all() for x in m.seen)      # what is after the next blank is no evidence


def test_what_does_not_fit_is_left_out(capsys):
    assert settle(Method(periodic, 8), EIGHT, "abcdefgh" * 50 + "a{1-8}" + "efgh" + "abcdefgh" * 50, 64, 1)[401:404] == "{3}"
    assert settle(Method(periodic, 8), EIGHT, "a{1-8}" + "efghabcd" * 9, 24, 1).startswith("a{3}")
    assert "by 12 that follow" in capsys.readouterr().err                             # half a small window at most
    assert settle(Method(uniform, 8), EIGHT, "a{1-62}bc", 64, 1)                      # as long as can be: no room for what is before
    with pytest.raises(SystemExit, match="^with the 2 characters that follow a blank may have 62, not 63: a window has 64$"):
        settle(Method(uniform, 8), EIGHT, "a{1-63}bc", 64, 1)


@pytest.mark.parametrize("prompt", ["ab{3-7}", "ab{3-7}{2}cd", "{3-7}"])
def test_without_evidence_the_length_is_drawn_and_it_says_so(prompt, capsys):
    m = Method(periodic, 8)
    drawn = [settle(m, EIGHT, prompt, 32, seed) for seed in range(60)]
    assert {int(re.search(r"\{(\d)\}", text)[1]) for text in drawn} == {3, 4, 5, 6, 7} and not m.seen
    assert drawn == [settle(m, EIGHT, prompt, 32, seed) for seed in range(60)]        # the same seed, the same length
    assert capsys.readouterr().err.count("nothing known follows it, so there is no evidence") == 120


def test_drawn_lengths_differ_in_one_prompt():
    assert len(set(re.findall(r"\d+", settle(Method(uniform, 8), EIGHT, "{1-999999}" * 4, 32, 1)))) == 4


def test_length_adds_what_is_unknown_at_the_end():
    prompt = settle(Method(periodic, 8), EIGHT, "abc{1-8}ghab", 32, 1)
    known = plan(EIGHT, Sample(prompt=prompt, length=20), 32)[1]
    assert known.tolist() == [True] * 3 + [False] * 3 + [True] * 4 + [False] * 10


# ---- as it is typed

def test_romeo_and_juliet():
    r = run("generate.py", "--out=results/masked.pt", "--prompt=ROMEO:{20-30}JULIET:", "--n=2", "--steps=8", "--length=50")
    L = int(re.search(r"^\{20-30\}: (\d+) characters \(next best \d+, [\d.]+ nats behind, by 7 that follow\)$", r.stderr, re.M)[1])
    text = r.stdout
    assert 20 <= L <= 30 and len(text) == 2 * 50 + 3 and "·" not in text
    assert all(t.startswith("ROMEO:") and t[6 + L:].startswith("JULIET:") for t in (text, text[52:]))


def test_chance_is_exact():
    pairs = list(itertools.product(blanks.LENGTHS, blanks.LENGTHS))
    by_hand = [sum(abs(a - b) <= d for a, b in pairs) / 400 for d in range(3)] + [sum(abs(a - b) for a, b in pairs) / 400]
    assert blanks.chance(blanks.LENGTHS) == " | ".join(f"{v:.3f}" for v in by_hand)
    assert blanks.chance([10]) == "0.050 | 0.150 | 0.250 | 5.000"

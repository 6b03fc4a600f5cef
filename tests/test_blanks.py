"""Blanks of unknown length: what {a-b} may be, the likelihood of a length against the chain rule by
hand, and networks that know the answer."""
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import run

import generate
from data import CharTokenizer
from generate import infer_blank_lengths, lay_out, length_log_likelihood, parse_prompt

EIGHT = CharTokenizer("abcdefgh")


class Method:
    """A masked model as generate.py sees it, of a function (x (B, T), t (B,)) -> logits (B, T, V).
    It remembers what it read."""

    def __init__(self, logits, V=8):
        self.mask_id = V
        self.logits = logits
        self.seen = []

    def net(self, x, t):
        self.seen.append(x)
        return self.logits(x, t)


def periodic(x, t):
    """The text is abcdefgh over and over: the first known character tells all the others."""
    first = (x < 8).int().argmax(1)
    phase = x.gather(1, first[:, None]) - first[:, None]
    return 9.0 * F.one_hot((phase + torch.arange(x.size(1))) % 8, 8)


def uniform(x, t):
    return torch.zeros(*x.shape, 8)


def ids(text):
    return torch.from_numpy(EIGHT.encode(text))


def infer(method, prompt, T, seed=1):
    """The prompt, with the lengths that are chosen."""
    pieces = infer_blank_lengths(method, parse_prompt(prompt, EIGHT), T, seed)
    text = ""
    for piece in pieces:
        if isinstance(piece, list):
            text += EIGHT.decode(piece)
        else:
            assert len(piece) == 1
            text += f"{{{piece[0]}}}"
    return text


# -------------------------------------------------------------------------------------------------
# what may be written

def test_pieces():
    tokenizer = CharTokenizer("ab{3-5}\n")
    pieces = parse_prompt(r"a{{{3}b{{3-5}{4-4}\n{20-60}", tokenizer)
    texts = [tokenizer.decode(p) if isinstance(p, list) else p for p in pieces]
    assert texts == ["a{", range(3, 4), "b{3-5}", range(4, 5), "\n", range(20, 61)]


@pytest.mark.parametrize("bad", ["{5-3}", "{0-4}", "{0-0}", "{-3}", "{3-}", "{-}", "{3-5", "{3--5}",
                                 "{3-5-7}", "{ 3-5}", "{1-9999999}", "{a-b}"])
def test_what_is_no_range_is_one_line(bad):
    with pytest.raises(SystemExit, match=r"a blank is written \{12\} or \{20-60\}, a brace \{\{$"):
        parse_prompt(f"ab{bad}cd", EIGHT)


def test_without_a_masked_model_a_length_is_refused():
    with pytest.raises(SystemExit, match="of unknown length needs a masked checkpoint$"):
        lay_out(parse_prompt("a{2}{3-5}b", EIGHT), 0, 8, 8)


# -------------------------------------------------------------------------------------------------
# the likelihood of a length

def test_the_likelihood_of_a_length_is_the_chain_rule():
    """Against a loop over the characters, for a network that is a random table of all states, told
    the share that is masked; T = 6, V = 2."""
    T, V, L, A = 6, 2, 2, 3
    table = torch.randn(3 ** T, T, V, generator=torch.Generator().manual_seed(0))

    def net(x, t):
        return table[(x * 3 ** torch.arange(T)).sum(1)] * (1 + t)[:, None, None]

    before = torch.tensor([1, 0, 2, 0])                    # 2 is MASK: a blank before
    after = torch.tensor([0, 1, 1])
    every = list(itertools.permutations(range(A)))
    for orders in (every, every[1:3], every[4:5]):
        expected = 0.0
        for order in orders:
            for i, now in enumerate(order):
                x = torch.full((1, T), 2)
                x[0, 0] = before[-1]                       # one character of it has room
                for then in order[:i]:
                    x[0, 1 + L + then] = after[then]
                log_p = net(x, (x == 2).sum(1) / T)[0, 1 + L + now].log_softmax(-1)
                expected += log_p[after[now]].item() / len(orders)
        method = Method(net, V)
        found = length_log_likelihood(method, before, after, [L], torch.tensor(orders), T)
        assert found.shape == (1,) and found.dtype == torch.float64
        assert found.item() == pytest.approx(expected, abs=1e-5)
    method = Method(net, V)
    found = length_log_likelihood(method, before[:0], after, [3], torch.tensor(every), T)
    assert found.isfinite().all()                          # nothing before, no room for more


def test_who_knows_nothing_finds_all_lengths_alike():
    orders = torch.rand(4, 32).argsort(1)
    found = length_log_likelihood(Method(uniform), ids("abc"), ids("abcdefgh" * 4), range(1, 40),
                                  orders, 128)
    assert found == pytest.approx([-32 * math.log(8)] * 39, abs=1e-4)


def test_all_lengths_are_asked_the_same_questions():
    """The blank and what follows the evidence are MASK; the evidence is masked in the same orders
    for each length; few windows a call."""
    T = 40
    before = ids("abc")
    after = ids("defgh")
    method = Method(uniform)
    orders = torch.rand(16, 5).argsort(1)
    length_log_likelihood(method, before, after, range(2, 12), orders, T)
    assert max(map(len, method.seen)) <= generate.BATCH
    assert {x.size(1) for x in method.seen} == {T}
    for L, rows in zip(range(2, 12), torch.cat(method.seen).view(10, 80, T), strict=True):
        asked = rows[:, 3 + L:8 + L]
        assert (rows[:, :3] == before).all()
        assert (rows[:, 3:3 + L] == 8).all() and (rows[:, 8 + L:] == 8).all()
        if L == 2:
            first = asked
        assert torch.equal(asked, first) and ((asked == after) | (asked == 8)).all()
        assert (asked == 8).sum(1).tolist() == [5, 4, 3, 2, 1] * 16


# -------------------------------------------------------------------------------------------------
# which length is chosen

@pytest.mark.parametrize("true", [1, 4, 8])
def test_who_knows_the_text_finds_the_length(true, capsys):
    follows = ("abcdefgh" * 9)[4 + true:]
    assert infer(Method(periodic), "abcd{1-8}" + follows, 64) == f"abcd{{{true}}}{follows}"
    said = (rf"\{{1-8\}}: {true} characters \(next best \d, ([\d.]+) nats behind, by 32 that "
            r"follow\)\n")
    assert float(re.fullmatch(said, capsys.readouterr().err)[1]) > 8
    orders = torch.rand(4, 32).argsort(1)
    found = length_log_likelihood(Method(periodic), ids("abcd"), ids(follows)[:32], range(1, 21),
                                  orders, 64)
    right = torch.arange(1, 21) % 8 == true % 8
    assert found[right].min() > -0.1 and found[~right].max() < -8


def test_from_left_to_right_and_what_is_chosen_counts():
    """The second blank is right only if the first, and the {2} of a known length, are as many MASKs
    before it."""
    assert infer(Method(periodic), "abc{1-8}gh{2}c{1-8}gh", 64) == "abc{3}gh{2}c{3}gh"
    method = Method(periodic)
    infer(method, "abc{3}gh{1-8}cd{5}ef", 64)
    for x in method.seen:                                  # what is after the next blank: unused
        assert (x[:, 3:6] == 8).all() and (x[:, 18:] == 8).all()


def test_what_does_not_fit_is_left_out(capsys):
    long = "abcdefgh" * 50
    assert infer(Method(periodic), long + "a{1-8}efgh" + long, 64)[401:404] == "{3}"
    assert infer(Method(periodic), "a{1-8}" + "efghabcd" * 9, 24).startswith("a{3}")
    assert "by 12 that follow" in capsys.readouterr().err  # half a small window at most
    assert infer(Method(uniform), "a{1-62}bc", 64)         # no room for what is before
    with pytest.raises(SystemExit, match="^with the 2 characters that follow, a blank may have 62, "
                                         "not 63: a window has 64$"):
        infer(Method(uniform), "a{1-63}bc", 64)


@pytest.mark.parametrize("prompt", ["ab{3-7}", "ab{3-7}{2}cd", "{3-7}"])
def test_without_evidence_the_length_is_drawn_and_it_says_so(prompt, capsys):
    method = Method(periodic)
    drawn = [infer(method, prompt, 32, seed) for seed in range(60)]
    assert {int(re.search(r"\{(\d)\}", text)[1]) for text in drawn} == {3, 4, 5, 6, 7}
    assert not method.seen
    assert drawn == [infer(method, prompt, 32, seed) for seed in range(60)]   # of the same seed
    said = capsys.readouterr().err
    assert said.count("nothing known follows it: any length is as likely") == 120


def test_drawn_lengths_differ_in_one_prompt():
    assert len(set(re.findall(r"\d+", infer(Method(uniform), "{1-32}" * 6, 32)))) > 2


def test_length_adds_what_is_unknown_at_the_end():
    pieces = infer_blank_lengths(Method(periodic), parse_prompt("abc{1-8}ghab", EIGHT), 32, 1)
    _, known = lay_out(pieces, 20, 32, 8)
    assert known.tolist() == [True] * 3 + [False] * 3 + [True] * 4 + [False] * 10


def test_romeo_and_juliet():
    done = run("generate.py", "--out=results/masked.pt", "--prompt=ROMEO:{20-30}JULIET:", "--n=2",
               "--steps=8", "--length=50")
    said = r"^\{20-30\}: (\d+) characters \(next best \d+, [\d.]+ nats behind, by 7 that follow\)$"
    L = int(re.search(said, done.stderr, re.M)[1])
    text = done.stdout
    assert 20 <= L <= 30 and len(text) == 2 * 50 + 3 and "·" not in text
    for one in (text[:50], text[52:]):
        assert one.startswith("ROMEO:") and one[6 + L:].startswith("JULIET:")

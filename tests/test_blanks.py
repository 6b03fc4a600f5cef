"""Blanks of unknown length: what {a-b} may be, the likelihood of a length against the chain rule by
hand, and networks that know the answer."""
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import generate
from data import CharTokenizer
from generate import infer_blank_lengths, length_log_likelihood, parse_prompt

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
    tokenizer = CharTokenizer("\n -35ablnx{}\\")
    for typed, meant in [
            ("", []), (r"a{{{3}b{{3-5}{4-4}\n{20-60}",
                       ["a{", range(3, 4), "b{3-5}", range(4, 5), "\n", range(20, 61)]),
            (r"\nabla", ["\nabla"]), (r"\\nabla", [r"\nabla"]), (r"\\\nx", ["\\\nx"]),
            (r"a\b", [r"a\b"]), (r"{{\\n", [r"{\n"]), ("\ufeffa\r\nb", ["a\nb"])]:
        pieces = parse_prompt(typed, tokenizer)
        found = [tokenizer.decode(p) if isinstance(p, list) else p for p in pieces]
        assert found == meant, typed


def test_what_is_no_range_is_one_line():
    for bad in ("{", "{x}", "{}", "{0}", "{-3}", "{12", "{5-3}", "{0-4}", "{3-}", "{3-5", "{3--5}",
                "{3-5-7}", "{ 3-5}", "{1-9999999}"):
        with pytest.raises(SystemExit, match=r"a blank is written \{12\} or \{20-60\}, a brace"):
            parse_prompt(f"ab{bad}cd", EIGHT)


# -------------------------------------------------------------------------------------------------
# the likelihood of a length

def test_the_likelihood_of_a_length_is_the_chain_rule(monkeypatch):
    """Against a loop over the characters, for a network that is a random table of all states, told
    the share that is masked; few windows a call; T = 8, V = 2. Of what is before, three characters
    have room."""
    monkeypatch.setattr(generate, "BATCH", 4)
    T, V, L, A = 8, 2, 2, 3
    table = torch.randn(3 ** T, T, V, generator=torch.Generator().manual_seed(0))

    def net(x, t):
        return table[(x * 3 ** torch.arange(T)).sum(1)] * (1 + t)[:, None, None]

    after = torch.tensor([0, 1, 1])
    every = list(itertools.permutations(range(A)))
    some = [every, every[1:3], every[4:5]]
    for orders, before in itertools.product(some, ([], [1, 0], [1, 0, 1, 2, 0])):   # 2: MASK
        start = len(before[-3:]) + L
        expected = 0.0
        for order in orders:
            for i, now in enumerate(order):
                x = torch.full((1, T), 2)
                x[0, :start - L] = torch.tensor(before[-3:])
                for then in order[:i]:
                    x[0, start + then] = after[then]
                log_p = net(x, (x == 2).sum(1) / T)[0, start + now].log_softmax(-1)
                expected += log_p[after[now]].item() / len(orders)
        method = Method(net, V)
        found = length_log_likelihood(method, torch.tensor(before, dtype=torch.long), after, [L],
                                      torch.tensor(orders), T)
        assert found.shape == (1,) and found.dtype == torch.float64
        assert found.item() == pytest.approx(expected, abs=1e-5)
        assert max(map(len, method.seen)) <= 4


# -------------------------------------------------------------------------------------------------
# which length is chosen

@pytest.mark.parametrize("true", [1, 8])
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
    assert len(set(re.findall(r"\d+", infer(Method(uniform), "{1-32}" * 6, 32)))) > 2

"""analog_bits.py: every code there and back, per-bit and factorised heads against each other, the script as it is typed."""
import math
import re

import pytest
import torch
from conftest import run
from torch import nn

import analog_bits
import model
import train
from analog_bits import bits, build, table, unbits
from config import Bits, CodeSampler
from data import Alphabet
from evaluation import evaluate
from train import reseed

TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8", "--max_iters=120", "--eval_interval=60",
        "--train_size=20000"]


def test_every_code_there_and_back():
    for width in (1, 6, 8, 13):
        every = torch.arange(2 ** width)
        x = bits(every, width)
        assert torch.equal(unbits(x), every) and set(x.flatten().tolist()) == {-1.0, 1.0}
        assert torch.equal(unbits(x + torch.empty_like(x).uniform_(-.99, .99)), every)


@pytest.mark.parametrize("code", ["index", "bytes", "random"])
@pytest.mark.parametrize("chars", ["ab", "\n !abcdefgh", "".join(map(chr, range(256)))])
def test_tables_have_a_row_for_each_character_and_no_two_alike(code, chars):
    C = table(code, Alphabet(chars, raw=True))
    assert C.shape == (len(chars), 8 if code == "bytes" else max(1, math.ceil(math.log2(len(chars)))))
    assert len({tuple(row) for row in C.tolist()}) == len(chars) and torch.equal(C, table(code, Alphabet(chars, raw=True)))
    if code == "bytes":
        assert "".join(map(chr, unbits(C).tolist())) == chars


def test_bytes_that_are_no_utf8_are_shown_not_raised():
    alphabet = Alphabet("".join(map(chr, range(256))), raw=True)
    ids = torch.tensor(list("Наташа é".encode()))
    assert alphabet.decode(ids.tolist()) == "Наташа é"
    assert alphabet.decode([0xC3, 0x28, 0xFF, 0x41]) == "\ufffd(\ufffdA"


def tiny(**k):
    return Bits(**{"block_size": 12, "n_layer": 1, "n_head": 1, "n_embd": 16, **k})


@pytest.mark.parametrize("head,truth", [("softmax", math.log(8)), ("bits", math.log(8))])
def test_an_untrained_network_has_the_bound_log_V(head, truth):
    """8 characters, 3 bits: log 8 over the alphabet and over all codes alike."""
    m = build(tiny(head=head), {"alphabet": "abcdefgh"}).eval()
    x0 = torch.randint(8, (800, 12), generator=torch.Generator().manual_seed(0))
    e = train.evaluate(m, x0, 8)
    assert e["bound"] == pytest.approx(truth, abs=4 * e["stderr"] + .01)
    assert build(tiny(head="bits"), {"alphabet": "abcde"}).bound(x0[:2] % 5, torch.tensor([.3, .6]), [0, 1])[0].shape == (2,)


def test_factorised_and_lone_bits_see_the_same_noise():
    """With what z says alone, the mean code over all 2^K codes is that of the bits one by one, so the bounds agree draw by draw."""
    c, x0 = tiny(), torch.randint(8, (20, 12))
    a, b = (build(tiny(head=h), {"alphabet": "abcdefgh"}).eval() for h in ("softmax", "bits"))
    u = torch.rand(20)
    assert c.selfcond and torch.allclose(a.bound(x0, u, range(20))[0], b.bound(x0, u, range(20))[0], atol=1e-6)


@pytest.mark.parametrize("spread", [0, 2])
@pytest.mark.parametrize("head", ["softmax", "bits"])
def test_oracles_write_their_text(head, spread):
    codes, x0 = table("index", Alphabet("abcde")), torch.randint(5, (3, 9))

    class Oracle(nn.Module):
        def forward(self, x, t):
            one_hot = nn.functional.one_hot(x0, 5) if head == "softmax" else nn.functional.one_hot((codes[x0] > 0).long(), 2).flatten(2)
            return 1e4 * one_hot.float()

    m = build(tiny(head=head, selfcond=False, spread=spread), {"alphabet": "abcde"})
    m.net = Oracle()
    for sampler in ("ddim", "ancestral"):
        *_, (y, p) = m.sample(torch.full_like(x0, 5), torch.zeros(3, 9) > 0, CodeSampler(steps=3, sampler=sampler, td=1))
        assert torch.equal(y, x0) and (p == 1).all()
    e = m.bound(x0, torch.rand(3), [0, 1, 2])[0]
    a2, s2 = torch.sigmoid(torch.tensor([-8.0, 8.0]).double())
    assert torch.allclose(e, (3 * (a2 + s2 - 1 - s2.log()) / 2).expand(3), atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("coin", [0.0, 0.9])
@pytest.mark.parametrize("k", [{}, {"head": "bits"}, {"weight": "elbo", "schedule": "sqrt"}, {"prior": False}], ids=str)
def test_every_parameter_gets_a_gradient(k, coin, half, monkeypatch):
    """With a guess shown and without, in fp16 with a scaler too, from the zero outputs a network starts with."""
    if half:
        monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", torch.float16))
    reseed(0)
    m, rand = build(tiny(**k), {"alphabet": "abcdefg"}), torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: rand(*size, **kw) if size != ((),) else torch.tensor(coin))
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=2. ** 10, enabled=half), []
    m.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    opt = torch.optim.AdamW(m.parameters(), 1e-2)
    for _ in range(4):
        opt.zero_grad()
        loss = m(torch.randint(7, (16, 12)))
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert loss.isfinite() and scaler.get_scale() >= (2. ** 10 if half else 1) and len(seen) == (8 if coin == 0 else 4)
    without = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_train_sample_resume_and_the_wrong_script(tmp_path):
    out = f"--out={tmp_path}/bits"
    r = run("analog_bits.py", *TINY, out)
    assert "nats/char" in r.stdout and "a bound" in r.stdout and "masked CE" not in r.stdout and "done: python analog_bits.py sample" in r.stdout
    r = run("analog_bits.py", "sample", out, "--prompt=The {5} is", "--n=2", "--steps=3", "--td=1", "--sampler=ddim")
    assert r.stdout.count("The ") == 2 and r.stdout.count(" is") >= 2 and "3 network calls" in r.stderr
    assert "{3-5}: a blank of unknown length needs a masked" in run("analog_bits.py", "sample", out, "--prompt=The {3-5} is", code=1).stderr
    assert len(run("analog_bits.py", "sample", out, "--length=70", "--steps=2", "--twice", "--watch").stdout) >= 70
    assert "is finished, at step 120" in run("analog_bits.py", "--resume", out, code=1).stderr
    assert "is a bits checkpoint: python analog_bits.py sample --out=" in run("generate.py", out, code=1).stderr
    assert "which cannot change" in run("analog_bits.py", "--resume", out, "--code=bytes", code=1).stderr
    assert "one of index, bytes, random" in run("analog_bits.py", "--code=gray", code=1).stderr
    assert "no checkpoint at" in run("analog_bits.py", "sample", f"--out={tmp_path}/none", code=1).stderr


def test_bytes_of_a_text_that_is_not_ascii(tmp_path):
    (tmp_path / "t.txt").write_text("Война и мир. " * 400, encoding="utf-8")
    analog_bits.main([*TINY[1:], f"--dataset={tmp_path}/t.txt", "--code=bytes", "--max_iters=3", "--eval_interval=3", f"--out={tmp_path}/b"])
    r = run("analog_bits.py", "sample", f"--out={tmp_path}/b", "--prompt=Война{9}", "--steps=2")
    assert r.stdout.startswith("Война")
    alphabet = Alphabet("".join(map(chr, range(256))), raw=True)
    painted = alphabet.paint([*"Война".encode(), 256, 0xFF], [.5] * 12)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == "Война·\ufffd" == alphabet.decode([*"Война".encode(), 256, 0xFF])


def test_a_judge_of_other_characters_does_not_judge(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("Il était une fois - Война и мир. " * 200, encoding="utf-8")
    common = [*TINY[1:], f"--dataset={tmp_path}/t.txt", "--max_iters=3", "--eval_interval=3"]
    train.main([*common, "--objective=ar", f"--out={tmp_path}/ar"])
    for code in ("index", "bytes"):
        analog_bits.main([*common, f"--code={code}", f"--out={tmp_path}/{code}"])
    capsys.readouterr()
    evaluate.main([f"--out={tmp_path}/index,{tmp_path}/bytes", f"--judge={tmp_path}/ar", f"--dataset={tmp_path}/t.txt", "--n=3",
                   "--gaussian_steps=2"])
    told = capsys.readouterr()
    assert "does not judge" in told.err and f"{tmp_path}/index," not in told.err and told.out.count("t.txt, held out") == 2

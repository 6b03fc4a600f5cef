"""analog_bits.py: codes, a head that predicts each bit alone, and the script."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from test_diffusion import descend

import analog_bits
import embed_diffusion
import generate
from analog_bits import BitHead, bit_table, bits, build
from config import Bits
from gaussian import TokenDiffusion
from step import reseed
from train import evaluate

TINY = [f"--dataset={ROOT}/config.py", "--block_size=32", "--n_layer=1", "--n_head=1",
        "--n_embd=16", "--batch_size=8", "--max_iters=20", "--eval_interval=20"]


def tiny(**k):
    return Bits(**{**dict(block_size=12, n_layer=1, n_head=1, n_embd=16), **k})


@pytest.mark.parametrize("code", ["index", "bytes"])
@pytest.mark.parametrize("chars", ["a", "ab", "\n !abcdefgh", "".join(map(chr, range(256)))])
def test_a_code_is_the_bits_of_its_number(code, chars):
    table = bit_table(code, chars)
    width = 8 if code == "bytes" else max(1, math.ceil(math.log2(len(chars))))
    assert table.shape == (len(chars), width) and set(table.flatten().tolist()) <= {-1.0, 1.0}
    numbers = [ord(ch) for ch in chars] if code == "bytes" else list(range(len(chars)))
    assert ((table > 0).float() @ 2.0 ** torch.arange(width)).tolist() == numbers


def test_over_all_codes_the_bit_head_is_each_bit_alone():
    """Its cross-entropy is the sum of the bits', its expected code their means."""
    codes = bits(torch.arange(16), 4)
    out = torch.randn(3, 9, 4)
    logits = BitHead(lambda x, t: out, codes)(None, None)
    p1 = (2 * out).sigmoid()                               # of +1, against exp(-out) of -1
    expected = TokenDiffusion(None, codes).expected_embedding(logits.softmax(-1))
    assert torch.allclose(expected, (2 * p1 - 1).double(), atol=1e-5)
    x0 = torch.randint(16, (3, 9))
    b = (codes[x0] > 0).float()
    alone = -(b * p1.log() + (1 - b) * (1 - p1).log()).sum(-1)
    ce = F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view(3, 9)
    assert torch.allclose(ce, alone, atol=1e-5)


def test_the_clean_end_tells_every_bit_and_the_other_none():
    """A sign is wrong once in 10^13; all 7 bits of a character together tell 0.001 nats."""
    m = build(tiny(), {"alphabet": "ab"})
    wrong = math.erfc((math.exp(-m.gamma_min) / 2) ** 0.5) / 2
    assert 0.5e-13 < wrong < 1.5e-13
    assert 7 * math.exp(-m.gamma_max) / 2 == pytest.approx(0.001, rel=0.25)


@pytest.mark.parametrize("V, k", [
    (5, dict(head="bits")), (8, dict(code="bytes")), (7, dict(loss="elbo"))], ids=str)
def test_an_untrained_network_has_the_bound_log_V_and_every_parameter_trains(V, k, monkeypatch):
    """Also where some codes are no characters; with two passes a step, of which the first is for
    every second row."""
    reseed(0)
    m = build(tiny(**k), {"alphabet": "abcdefgh"[:V]})
    e = evaluate(m, torch.randint(V, (500, 12)), 8)
    assert e["bound"] == pytest.approx(math.log(V), abs=4 * e["stderr"] + 0.01)
    calls = []
    m.net.register_forward_pre_hook(lambda *_: calls.append(1))
    descend(m, torch.randint(V, (16, 12)), monkeypatch)
    assert len(calls) == 8


def test_train_sample_resume_and_the_wrong_script(tmp_path, capsys):
    out = f"--out={tmp_path}/bits"
    said = run("analog_bits.py", *TINY, out).stdout
    assert "nats/char" in said and "| bound " in said and " CE " not in said
    assert "done: python analog_bits.py sample" in said
    analog_bits.main(["sample", out, "--prompt=The {5} is", "--n=2", "--steps=3", "--td=1",
                      "--sampler=ddim"])
    text, said = capsys.readouterr()
    assert text.count("The ") == 2 and text.count(" is") >= 2 and "3 network calls" in said
    analog_bits.main(["sample", out, "--length=70", "--steps=2", "--two_pass", "--watch"])
    text, said = capsys.readouterr()
    assert len(text) >= 70 and "16 network calls" in said
    for script, args, line in (
            (analog_bits, ["sample", "--prompt=The {3-5} is"], "blank of unknown length needs a m"),
            (analog_bits, ["--resume", "--code=bytes"], "which cannot become bytes"),
            (analog_bits, ["--code=gray"], "gray"),
            (generate, [], "is a bits checkpoint, not masked or ar"),
            (embed_diffusion, ["sample"], "is a bits checkpoint, not embed")):
        with pytest.raises(SystemExit, match=line):
            script.main([*args, out])
    analog_bits.main(["--resume", out, "--max_iters=21"])
    assert torch.load(tmp_path / "bits/ckpt.pt", weights_only=True)["step"] == 21


def test_bytes_of_a_text_that_is_not_ascii(tmp_path, capsys):
    path = tmp_path / "t.txt"
    path.write_text("Война и мир. " * 400, encoding="utf-8")
    out = f"--out={tmp_path}/bytes"
    analog_bits.main([*TINY, f"--dataset={path}", "--code=bytes", "--max_iters=3", out])
    assert "nats/byte" in capsys.readouterr().out
    analog_bits.main(["sample", out, "--prompt=Война{9}", "--steps=2"])
    assert capsys.readouterr().out.startswith("Война")

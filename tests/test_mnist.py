"""mnist_ddpm.py: pictures that are what was drawn, and the script as a newcomer types it, on digits drawn by the program."""
import struct
import zlib

import pytest
import torch
from conftest import run

import data
import mnist_ddpm
from config import Mnist, Picture, parse
from evaluation import digits as judge_digits
from evaluation import evaluate, metrics
from mnist_ddpm import build, draw, grey, grid, png

TINY = ["--dataset=digits", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8", "--max_iters=120", "--eval_interval=60", "--train_size=500"]


def chunks(raw):
    """The chunks of a PNG, their checksums verified: [(kind, data)]."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, out = 8, []
    while at < len(raw):
        n, kind = struct.unpack(">I4s", raw[at:at + 8])
        data, crc = raw[at + 8:at + 8 + n], struct.unpack(">I", raw[at + 8 + n:at + 12 + n])[0]
        assert crc == zlib.crc32(kind + data)
        out.append((kind, data))
        at += 12 + n
    return out


def pixels(body, width, height):
    rows = torch.tensor(list(zlib.decompress(body)), dtype=torch.uint8).view(height, width + 1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:]


def test_a_png_holds_its_pixels():
    x = torch.randint(256, (1, 5, 7), dtype=torch.uint8)
    (h, head), (d, body), end = chunks(png(x))
    assert (h, d, end) == (b"IHDR", b"IDAT", (b"IEND", b"")) and struct.unpack(">IIBBBBB", head) == (7, 5, 8, 0, 0, 0, 0)
    assert torch.equal(pixels(body, 7, 5), x[0])


def test_a_moving_png_holds_every_frame_in_order():
    x = torch.randint(256, (3, 4, 6), dtype=torch.uint8)
    parts = chunks(png(x, seconds=.1, hold=2))
    assert [k for k, _ in parts] == [b"IHDR", b"acTL", b"fcTL", b"IDAT", b"fcTL", b"fdAT", b"fcTL", b"fdAT", b"IEND"]
    assert struct.unpack(">II", parts[1][1]) == (3, 0)
    order = [struct.unpack(">I", d[:4])[0] for k, d in parts if k in (b"fcTL", b"fdAT")]
    assert order == list(range(5))
    bodies = [d if k == b"IDAT" else d[4:] for k, d in parts if k in (b"IDAT", b"fdAT")]
    assert all(torch.equal(pixels(b, 6, 4), f) for b, f in zip(bodies, x, strict=True))
    delays = [struct.unpack(">HH", d[20:24]) for k, d in parts if k == b"fcTL"]
    assert delays == [(100, 1000), (100, 1000), (2000, 1000)]


def test_grids_and_greys():
    x = torch.arange(5)[:, None, None].expand(5, 28, 28) / 4 * 2 - 1
    g = grey(grid(x, 3))
    assert g.shape == (56, 84) and [g[i // 3 * 28, i % 3 * 28].item() for i in range(6)] == [0, 64, 128, 191, 255, 0]
    assert grey(torch.tensor([-9., 9.])).tolist() == [0, 255]


def test_a_recipe_is_what_the_settings_are_where_they_are_not_typed():
    parts = lambda c: (build(c, {}).to_x, build(c, {}).weight, build(c, {}).knots[500].item())
    ddpm = parse(["--recipe=ddpm", "--n_layer=1"], Mnist())
    assert parts(ddpm) == parts(Mnist(predict="eps", schedule="linear", weight="simple", n_layer=1))
    assert parse(["--recipe=best"], Mnist()) == Mnist() and parts(Mnist(n_layer=1)) != parts(ddpm)
    assert build(parse(["--weight=elbo", "--recipe=ddpm"], Mnist()), {}).weight == "elbo"


def test_labels_reach_the_network_and_are_dropped_as_often_as_said(monkeypatch):
    m, seen = build(Mnist(n_layer=1, n_head=1, n_embd=16, drop_label=.3), {}), []
    monkeypatch.setattr(m.net, "forward", lambda x, t: (seen.append(x[:, 0, 16:]), x[..., :16] * 0)[1])
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(200)
    m((torch.randint(256, (2000, 49, 16)), labels))
    cond = seen[0]
    hidden = cond.sum(1) == 0
    assert abs(hidden.float().mean().item() - .3) < .05 and (cond.argmax(1) == labels)[~hidden].all() and set(cond.unique().tolist()) == {0, 1}
    m.bound(torch.randint(256, (4, 49, 16)), torch.rand(4), range(4))
    assert not seen[1].any()                                          # the bound is unconditional


@pytest.mark.parametrize("c", [Mnist(), Mnist(predict="eps", schedule="linear", weight="simple", patch=7), Mnist(weight="elbo", predict="x0")])
def test_every_parameter_gets_a_gradient(c):
    torch.manual_seed(0)
    m = build(c, {})
    for p in m.parameters():
        torch.nn.init.normal_(p, std=.05)
    x = mnist_ddpm.Images(Mnist(dataset="digits", train_size=100, patch=c.patch)).batch(8)
    loss = m(x)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in m.parameters())


def test_the_same_seed_draws_the_same_pictures():
    c = Mnist(n_layer=1, n_head=1, n_embd=16)
    m = build(c, {}).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=.3)
    a, b, other = ([x for x, _ in draw(m, torch.arange(3), c, Picture(steps=3, sampler="ancestral", seed=s))] for s in (1, 1, 2))
    assert len(a) == 3 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], other[0])


def test_train_sample_resume_and_the_wrong_script(tmp_path):
    out = f"--out={tmp_path}/mnist"
    r = run("mnist_ddpm.py", *TINY, out)
    assert "nats/pixel" in r.stdout and "masked CE" not in r.stdout and "by noise level" in r.stdout
    assert "done: python mnist_ddpm.py sample" in r.stdout
    assert (tmp_path / "mnist/samples.png").exists()
    r = run("mnist_ddpm.py", "sample", out, "--n=6", "--digit=7", "--guidance=2", "--steps=4", "--trace", f"--png={tmp_path}/a.png")
    assert "6 digits, 4 ddim steps, guidance 2" in r.stdout
    (_, head), *_ = chunks((tmp_path / "a.png").read_bytes())
    assert struct.unpack(">II", head[:8]) == (6 * 28, 28)
    assert struct.unpack(">II", chunks((tmp_path / "strip.png").read_bytes())[0][1][:8]) == (4 * 28, 28)
    assert sum(k == b"fcTL" for k, _ in chunks((tmp_path / "moving.png").read_bytes())) == 4
    assert "is finished, at step 120" in run("mnist_ddpm.py", "--resume", out, code=1).stderr
    assert "is a mnist checkpoint: python mnist_ddpm.py sample --out=" in run("generate.py", out, code=1).stderr
    for change in ("--predict=x0", "--recipe=ddpm"):
        assert "which cannot change" in run("mnist_ddpm.py", "--resume", out, change, "--max_iters=200", code=1).stderr
    assert "a digit is 0 to 9" in run("mnist_ddpm.py", "sample", out, "--digit=10", code=1).stderr
    assert "patch=5 does not divide 28" in run("mnist_ddpm.py", "--patch=5", code=1).stderr


@pytest.mark.parametrize("args", [["--predict=levels"], ["--recipe=levels", "--weight=simple"], ["--weight=ce"], ["--recipe=levels", "--predict=v"]])
def test_a_loss_that_does_not_go_with_the_prediction_is_refused(args):
    with pytest.raises(SystemExit, match="does not go with predict="):
        parse(args, Mnist())


def test_the_table_of_digits(tmp_path, monkeypatch, capsys):
    """evaluate.py on two recipes, with its floors; readers are trained once, kept, and told when they belong to other digits."""
    few = data.digits(1500, 200)
    monkeypatch.setattr(data, "digits", lambda: few)
    monkeypatch.setattr(judge_digits, "HERE", tmp_path)
    monkeypatch.setattr(judge_digits, "train_reader", lambda images, labels, seed: metrics.train_reader(images, labels, seed, epochs=1))
    for recipe in ("best", "levels"):
        mnist_ddpm.main([*TINY, f"--recipe={recipe}", f"--out={tmp_path}/{recipe}", "--max_iters=10", "--train_size=100"])
    capsys.readouterr()
    for _ in range(2):
        judge_digits.real_digits.cache_clear()
        evaluate.main([f"--out={tmp_path}/best,{tmp_path}/levels", "--digits=20", "--gaussian_steps=3", "--guidance=1.5"])
        told = capsys.readouterr()
        bounds, rows = ([line.split(" | ") for line in t.splitlines() if line.startswith("| ")] for t in told.out.split("\n\nguidance"))
        assert len(bounds) == 6 and all(float(x.strip(" |")) > 0 for r in bounds[1:3] for x in r[3:])    # bounds, and where they come from
        assert len(rows) == 6 and len({len(r) for r in rows}) == 1 and " 1.5, 3 ddim steps" in told.out
        assert [r[1] for r in rows[1:]] == ["20"] * 5 and rows[1][4] == "1.0" and rows[2][2] == ""
    assert "training two readers" not in told.err and len(list((tmp_path / "out").glob("readers-*.pt"))) == 1
    distances = iter(map(float, range(10)))                                           # of ten draws of real digits: the floor is their mean
    monkeypatch.setattr(judge_digits, "frechet", lambda *_: next(distances))
    real = judge_digits.real_digits("digits", "", evaluate.open_checkpoint(tmp_path / "best").meta["data"]["sha256"])
    assert judge_digits.digit_floor(real, 100, 0)[1] == 4.5 and "| 4.500 ± 3.028 | 1.0 |" in capsys.readouterr().out
    evaluate.main([f"--out={tmp_path}/best", "--digits=0"])
    assert "bits/dim" in (told := capsys.readouterr().out) and "Frechet" not in told
    monkeypatch.setattr(data, "FONT", ("another",))
    judge_digits.pictures.cache_clear()
    with pytest.raises(SystemExit, match="are others than"):
        evaluate.main([f"--out={tmp_path}/best"])

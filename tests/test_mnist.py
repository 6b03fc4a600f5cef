"""mnist_ddpm.py: pictures that are what was drawn, labels and guidance, and the script as it is
typed, on digits drawn by the program."""
import re
import struct
import zlib
from dataclasses import replace

import pytest
import torch

import generate
import mnist_ddpm
from checkpoint import try_to_write
from config import MNIST_RECIPES, ImageSampler, Mnist
from mnist_ddpm import build, grid, noise_to_digit, png, sample_images, to_bytes

NET = dict(n_layer=1, n_head=1, n_embd=16)


def randomized(c, std=0.1):
    torch.manual_seed(0)
    method = build(c, {})
    for p in method.parameters():
        torch.nn.init.normal_(p, std=std)
    return method


def read_png(raw):
    """The grey levels (height, width) of a PNG, its checksums verified."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = []
    at = 8
    while at < len(raw):
        n, kind = struct.unpack(">I4s", raw[at:at + 8])
        body = raw[at + 8:at + 8 + n]
        assert struct.unpack(">I", raw[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + n
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 0, 0, 0, 0]
    rows = torch.tensor(list(zlib.decompress(chunks[1][1]))).view(height, width + 1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:]


def test_a_png_holds_its_pixels():
    x = torch.randint(256, (5, 7))
    assert torch.equal(read_png(png(x / 127.5 - 1)), x)
    assert to_bytes(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


WIDE = png(torch.zeros(28, 280))
FILTERED = zlib.compress(b"\1" + 280 * b"\0")
NOT_OURS = {"empty": b"", "text": b"not a picture" * 9, "cut": WIDE[:-20],
            "narrower": png(torch.zeros(28, 140)),
            "filtered": WIDE[:33] + mnist_ddpm.png_chunk(b"IDAT", FILTERED) + WIDE[-12:]}


@pytest.mark.parametrize("raw", NOT_OURS.values(), ids=NOT_OURS)
def test_a_progress_png_of_another_tool_stays_and_training_goes_on(raw, tmp_path, capsys):
    path = tmp_path / "progress.png"
    path.write_bytes(raw)
    try_to_write(mnist_ddpm.add_below, path, torch.zeros(28, 280))
    line, = capsys.readouterr().out.splitlines()
    assert line == ("training goes on, but something was not written: "
                    f"{path} was changed or cut; it stays as it is")
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]


def test_a_grid_is_filled_row_by_row():
    x = torch.arange(5)[:, None, None].expand(5, 28, 28) / 2 - 1
    levels = to_bytes(grid(x, 3))
    assert levels.shape == (56, 84)
    corners = [levels[i // 3 * 28, i % 3 * 28].item() for i in range(6)]
    assert corners == [0, 64, 128, 191, 255, 0]
    picture = torch.rand(1, 28, 28)
    assert torch.equal(grid(picture, 1), picture[0])


@pytest.mark.parametrize("patch", [4, 14])
def test_patches_are_squares_and_come_back_where_they_were(patch):
    """What a pixel says reaches its own place through the network, and one patch of its input."""
    net = randomized(Mnist(**NET, patch=patch)).net
    seen = []
    net.transformer.forward = lambda x, t: seen.append(x) or x[..., :patch ** 2]
    x = torch.arange(2 * 784.0).view(2, 784, 1)
    assert torch.equal(net(x, torch.zeros(2, 1)), x)
    squares = x.view(2, 28, 28).unfold(1, patch, patch).unfold(2, patch, patch)
    assert torch.equal(seen[0][..., :patch ** 2], squares.reshape(2, -1, patch ** 2))


def test_labels_reach_the_network_and_the_bound_has_none():
    method = randomized(Mnist(**NET))
    seen = []
    method.net.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 16:]))
    labels = torch.tensor([3, -1, 0, 9])
    x = torch.randint(256, (4, 784))
    method((x, labels))
    expected = torch.zeros(4, 10)
    expected[[0, 2, 3], [3, 0, 9]] = 1
    assert torch.equal(seen[0], expected[:, None].expand(4, 49, 10))
    method.bound(x, torch.rand(4), range(4))
    assert not seen[1].any()


def test_guidance_exaggerates_the_label():
    """At every step the predicted picture is without + guidance (with - without)."""
    method = randomized(Mnist(**NET), std=0.3)
    s = ImageSampler(steps=3, clip=False)
    labels = torch.tensor([2, 7])

    def first(guidance, labels=labels):
        z, xhat = next(iter(sample_images(method, labels, replace(s, guidance=guidance))))
        return xhat

    without = first(0.0)
    with_labels = first(1.0)
    assert torch.equal(first(1.0, torch.tensor([-1, -1])), without)
    assert (with_labels - without).abs().max() > 0.01
    expected = without + 1.5 * (with_labels - without)
    assert torch.allclose(first(1.5), expected, atol=1e-4)
    *_, (_, clipped) = sample_images(method, labels, ImageSampler(steps=3, guidance=9.0))
    assert clipped.abs().max() <= 1


@pytest.mark.parametrize("recipe", MNIST_RECIPES)
def test_every_parameter_gets_a_gradient(recipe):
    method = randomized(Mnist(**NET, **MNIST_RECIPES[recipe], patch=7), std=0.05)
    loss = method((torch.randint(256, (4, 784)), torch.tensor([1, 2, 3, -1])))
    loss.backward()
    assert loss.isfinite()
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_a_strip_is_looks_at_one_digit_from_noise_on():
    method = randomized(Mnist(**NET), std=0.3)
    s = ImageSampler(steps=20)
    frames = [z[0] for z, _ in sample_images(method, torch.tensor([7]), s)]
    strip = noise_to_digit(method, torch.tensor([7]), s, n=4)      # of the same seed
    assert torch.equal(strip, torch.cat([frames[i] for i in (0, 6, 13, 19)], 1))
    assert not torch.equal(strip, noise_to_digit(method, torch.tensor([7]), replace(s, seed=2), 4))


def test_drawn_digits_have_the_size_of_handwritten_ones():
    """16 pixels wide and 21 high on average, around the middle."""
    images, _, _, _ = mnist_ddpm.draw_digits(2000, 1)
    ink = torch.from_numpy(images) > 127
    columns = ink.any(1).float()
    rows = ink.any(2).float()
    pixel = torch.arange(28.0)
    for lines, size in [(columns, 15.8), (rows, 20.8)]:
        n = lines.sum(1)
        assert n.mean().item() == pytest.approx(size, abs=0.3)
        assert ((lines * pixel).sum(1) / n).mean().item() == pytest.approx(13.5, abs=0.2)


def test_train_sample_resume_and_the_wrong_script(tmp_path, monkeypatch, capsys):
    few = mnist_ddpm.draw_digits(100, 20)
    monkeypatch.setattr(mnist_ddpm, "draw_digits", lambda: few)
    out = f"--out={tmp_path}/mnist"
    small = [f"--{name}={value}" for name, value in NET.items()]
    mnist_ddpm.main([*small, "--dataset=digits", "--batch_size=8", "--max_iters=4", out])
    said = capsys.readouterr().out
    assert re.search(r"\| train bound [\d.]+, val bound [\d.]+ \| bound [\d.]+ .* nats/pixel", said)
    assert "by noise level" in said
    assert f"a hundred digits: {tmp_path}/mnist/samples.png\n" in said
    assert f"done: python mnist_ddpm.py sample {out}\n" in said
    rows = []
    for n, more in enumerate([[], ["--resume", "--max_iters=6"]], 1):
        if more:
            mnist_ddpm.main([*more, out])
        samples = read_png((tmp_path / "mnist/samples.png").read_bytes())
        assert samples.shape == (280, 280)
        rows.append(samples[:28])
        progress = read_png((tmp_path / "mnist/progress.png").read_bytes())
        assert torch.equal(progress, torch.cat(rows)) and len(progress) == 28 * n
    assert not torch.equal(*rows)
    (tmp_path / "mnist/progress.png").write_bytes(b"another")
    mnist_ddpm.main(["--resume", "--max_iters=7", out])
    assert f"{tmp_path}/mnist/progress.png was changed or cut; it stays" in capsys.readouterr().out
    assert (tmp_path / "mnist/progress.png").read_bytes() == b"another"
    mnist_ddpm.main(["sample", out, "--n=6", "--digit=7", "--guidance=2", "--steps=4", "--trace",
                     f"--png={tmp_path}/a.png"])
    assert "6 digits, 4 ddim steps, guidance 2\n" in capsys.readouterr().out
    assert read_png((tmp_path / "a.png").read_bytes()).shape == (28, 6 * 28)
    assert read_png((tmp_path / "strip.png").read_bytes()).shape == (28, 4 * 28)
    asked = []

    def sample_batches(method, labels, s):
        asked.append(labels.tolist())
        return torch.zeros(len(labels), 28, 28)

    monkeypatch.setattr(mnist_ddpm, "sample_batches", sample_batches)
    for args, shape in ((["--n=12"], (56, 280)), (["--n=2", "--digit=0"], (28, 56))):
        mnist_ddpm.main(["sample", out, *args])
        assert read_png((tmp_path / "mnist/samples.png").read_bytes()).shape == shape
    assert asked == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], [0, 0]]

    # what is shipped stays as it is, by whatever path it is named
    monkeypatch.setattr(mnist_ddpm, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    shipped = (tmp_path / "mnist/best.pt").rename(tmp_path / "results/mnist.pt")
    for path in (shipped, "results/mnist.pt", "mnist/../results/mnist.pt"):
        mnist_ddpm.main(["sample", f"--out={path}", "--n=1"])
        (tmp_path / "out/samples.png").unlink()
        assert [*shipped.parent.iterdir()] == [shipped]
    shipped.rename(tmp_path / "mnist/best.pt")
    with pytest.raises(SystemExit, match="is a mnist checkpoint, not masked or ar$"):
        generate.main([out])
    for change in ("--predict=x0", "--recipe=ddpm"):
        with pytest.raises(SystemExit, match="this run has predict=v, which cannot become"):
            mnist_ddpm.main(["--resume", out, change, "--max_iters=200"])

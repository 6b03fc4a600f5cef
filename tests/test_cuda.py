"""The device the project is written for: fp16, its scaler, the compiler, no waiting. Collected by
`pytest tests/test_cuda.py` alone, where there is a CUDA device."""
import contextlib

import pytest
import torch
from conftest import TINY, end, read_log, read_state, start, tensors

import mnist_ddpm
import train
from config import DEVICE, Mnist
from test_step import METHODS, RandomBatches, build

class OnDevice(RandomBatches):
    def batch(self, n):
        if self.is_images:
            images = torch.randint(256, (n, 784), device=DEVICE)
            return images, torch.randint(-1, 10, (n,), device=DEVICE)
        return torch.randint(20, (n, self.T), device=DEVICE)


def on_device(name):
    method, c, data, _ = build(name)
    method.to(DEVICE)
    data = OnDevice(METHODS[name][0], c.block_size)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0 ** 10)
    return method, c, data, train.build_optimizers(method, c), scaler


def losses(name, n, prepare=None):
    method, c, data, opts, scaler = on_device(name)
    if prepare:
        prepare(method)
    out = []
    for step in range(n):
        loss, _ = train.train_step(method, data, c, step, opts, scaler, False)
        out.append(loss)
    return torch.stack(out)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_in_fp16_are_those_in_fp32(monkeypatch, name):
    gradients = []
    for precision in ("fp16", "fp32"):
        if precision == "fp32":
            monkeypatch.setattr("model.autocast", contextlib.nullcontext)
        method, c, data, _, scaler = on_device(name)
        train.reseed(1)
        loss = method(data.batch(c.batch_size))
        scaler.scale(loss).backward()
        flat = torch.cat([p.grad.flatten() for p in method.parameters()]) / scaler.get_scale()
        gradients.append(flat)
    ours, exact = gradients
    assert ours.isfinite().all() and exact.norm() > 0
    assert (ours - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", ["masked", "ar", "bits", "embed", "pixels"])
def test_fifty_steps_in_fp16_are_fifty_in_fp32(monkeypatch, name):
    ours = losses(name, 50)
    monkeypatch.setattr("model.autocast", contextlib.nullcontext)
    exact = losses(name, 50)
    assert (ours[-10:].mean() / exact[-10:].mean() - 1).abs() < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_the_host_does_not_wait_in_a_step(name):
    """torch itself says where it would."""
    method, c, data, opts, scaler = on_device(name)
    ema = on_device(name)[0].requires_grad_(False)
    train.train_step(method, data, c, 0, opts, scaler, False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_step(method, data, c, 1, opts, scaler, False)
        train.update_ema(ema, method, 1, c.ema)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["masked", "embed", "levels"])
def test_compiled_losses_are_those_of_eager(name):
    torch._dynamo.reset()
    eager = losses(name, 10)
    compiled = losses(name, 10, lambda method: method.compile(dynamic=False))
    assert torch.allclose(eager, compiled, rtol=1e-3)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    method, c, data, opts, _ = on_device("masked")
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0 ** 40)
    before = [p.clone() for p in method.parameters()]
    train.train_step(method, data, c, 0, opts, scaler, False)
    assert scaler.get_scale() == 2.0 ** 39
    for a, b in zip(before, method.parameters(), strict=True):
        assert torch.equal(a, b)
    for step in range(40):
        train.train_step(method, data, c, step, opts, scaler, False)
    assert all(p.isfinite().all() for p in method.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_a_huge_loss_of_pixels_trains(monkeypatch):
    """predict=x0 loss=elbo weighs the clean end by 10^6: the scale falls until it fits."""
    c = Mnist(n_layer=1, n_head=2, n_embd=32, batch_size=16, patch=7, predict="x0",
              schedule="sqrt", loss="elbo")
    monkeypatch.setitem(METHODS, "huge", (mnist_ddpm, c))
    method, c, data, opts, _ = on_device("huge")
    scaler = torch.amp.GradScaler(DEVICE)
    before = [p.clone() for p in method.parameters()]
    for step in range(60):
        train.train_step(method, data, c, step, opts, scaler, False)
    print("scale", scaler.get_scale())
    assert all(p.isfinite().all() for p in method.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_a_run_that_is_resumed_says_how_far_it_is_from_one_that_was_not(corpus, tmp_path):
    args = ["train.py", corpus, *TINY, "--eval_interval=20", "--max_iters=40"]
    code, out = end(start(*args, f"--out={tmp_path}/straight"))
    assert code == 0, out
    code, out = end(start(*args[:-1], "--max_iters=20", f"--out={tmp_path}/cut"))
    assert code == 0, out
    code, out = end(start("train.py", "--resume", "--max_iters=40", f"--out={tmp_path}/cut"))
    assert code == 0, out
    bounds = [float(read_log(tmp_path / name)[-1]["bound"]) for name in ("straight", "cut")]
    weights = [torch.cat([x.flatten() for x in tensors(read_state(tmp_path / name)["model"])])
               for name in ("straight", "cut")]
    print("resumed: bounds", bounds, "weights differ by", (weights[0] - weights[1]).norm() /
          weights[0].norm())
    assert bounds[0] == pytest.approx(bounds[1], rel=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_it_evaluates(name):
    method, c, data, _, _ = on_device(name)
    batch = data.batch(6)
    x0 = batch[0] if data.is_images else batch
    e = train.evaluate(method.eval(), x0, 2)
    assert 0 < e["bound"] < 100

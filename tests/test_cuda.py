"""The device the project is written for: fp16, its scaler, the compiler, no waiting. Collected by
`pytest tests/test_cuda.py` alone, where there is a CUDA device."""
from dataclasses import replace

import pytest
import torch
from conftest import TINY, end, read_log, read_state, start, tensors, training_step

import config
import mnist_ddpm
import train
from config import DEVICE, Mnist, Sample
from generate import Recorded, texts
from step import call, reseed
from test_step import METHODS, RandomBatches, build

class OnDevice(RandomBatches):
    def batch(self, n):
        if self.is_images:
            images = torch.randint(256, (n, 784), device=DEVICE)
            return images, torch.randint(-1, 10, (n,), device=DEVICE)
        return torch.randint(20, (n, self.T), device=DEVICE)


def on_device(name, init_scale=2.0 ** 10):
    """A training step that has not been compiled."""
    method, _, c = build(name)
    data = OnDevice(METHODS[name][0], c.block_size)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=init_scale)
    return training_step(method.to(DEVICE), data, c, scaler)


def losses(train_step, n):
    return torch.stack([train_step(step)[0] for step in range(n)])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_in_fp16_are_those_in_fp32(monkeypatch, name):
    gradients = []
    for precision in ("fp16", "fp32"):
        if precision == "fp32":
            monkeypatch.setattr(config, "AMP", torch.float32)
        train_step = on_device(name)
        reseed(1)
        train_step.micro_batch()
        flat = torch.cat([p.grad.flatten() for p in train_step.method.parameters()])
        gradients.append(flat / train_step.scaler.get_scale())
    ours, exact = gradients
    assert ours.isfinite().all() and exact.norm() > 0
    assert (ours - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("name", ["masked", "ar", "bits", "embed", "pixels"])
def test_fifty_steps_in_fp16_are_fifty_in_fp32(monkeypatch, name):
    ours = losses(on_device(name), 50)
    monkeypatch.setattr(config, "AMP", torch.float32)
    exact = losses(on_device(name), 50)
    assert (ours[-10:].mean() / exact[-10:].mean() - 1).abs() < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_the_host_does_not_wait_in_a_step(name):
    """torch itself says where it would."""
    train_step = on_device(name)
    train_step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_recorded_step_is_the_step(monkeypatch, name, grad_accum):
    """CUDA graphs, of what is not compiled: losses, weights, averages and the count of steps are
    the same, whatever the seed, the rate and the weight of the average."""
    script, c = METHODS[name]
    monkeypatch.setitem(METHODS, name, (script, replace(c, grad_accum=grad_accum, dropout=0.1)))
    steps = []
    for recorded in (False, True):
        train_step = on_device(name)
        out = losses(train_step, 3)
        if recorded:
            train_step.record()
        out = torch.cat([out, losses(train_step, 10)])
        steps.append((train_step, out))
    (eager, eager_losses), (recorded, recorded_losses) = steps
    assert recorded.run is not call
    assert torch.allclose(eager_losses, recorded_losses, rtol=1e-3)
    assert recorded_losses.unique().numel() == len(recorded_losses)
    for a, b in zip(eager.ema.parameters(), recorded.ema.parameters(), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("name", ["masked", "embed", "levels"])
def test_compiled_losses_are_those_of_eager(name):
    torch._dynamo.reset()
    eager = losses(on_device(name), 10)
    train_step = on_device(name)
    train_step.compile()
    compiled = losses(train_step, 10)
    assert torch.allclose(eager, compiled, rtol=1e-3)
    assert train_step.run is not call


def test_a_method_that_waits_goes_on_without_graphs(capsys):
    train_step = on_device("masked")
    honest = train_step.micro_batch

    def waits():
        honest()
        train_step.loss.item()

    train_step.micro_batch = waits
    losses(train_step, 1)
    train_step.record()
    assert losses(train_step, 3).isfinite().all()
    assert "going on without CUDA graphs" in capsys.readouterr().out


@pytest.mark.parametrize("recorded", [False, True])
def test_an_overflow_skips_the_step_and_halves_the_scale(recorded):
    train_step = on_device("masked", init_scale=2.0 ** 40)
    before = [p.clone() for p in train_step.method.parameters()]
    if recorded:
        train_step(0)                                      # AdamW makes its state
        train_step.scaler.update(2.0 ** 40)
        train_step.record()
    train_step(0)
    assert train_step.scaler.get_scale() == 2.0 ** 39
    for a, b in zip(before, train_step.method.parameters(), strict=True):
        assert torch.equal(a, b)
    losses(train_step, 40)
    for a, b in zip(before, train_step.method.parameters(), strict=True):
        assert b.isfinite().all() and not torch.equal(a, b)


def test_a_huge_loss_of_pixels_trains(monkeypatch):
    """predict=x0 loss=elbo weighs the clean end by 10^6: the scale falls until it fits."""
    c = Mnist(n_layer=1, n_head=2, n_embd=32, batch_size=16, patch=7, predict="x0",
              schedule="sqrt", loss="elbo")
    monkeypatch.setitem(METHODS, "huge", (mnist_ddpm, c))
    train_step = on_device("huge", init_scale=2.0 ** 16)
    before = [p.clone() for p in train_step.method.parameters()]
    losses(train_step, 60)
    print("scale", train_step.scaler.get_scale())
    for a, b in zip(before, train_step.method.parameters(), strict=True):
        assert b.isfinite().all() and not torch.equal(a, b)


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
    code, out = end(start("-m", "evaluation", f"--out={tmp_path}/straight", "--n=2", "--exact=2"))
    assert code == 0, out
    print(out)


@pytest.mark.parametrize("name", METHODS)
def test_it_evaluates(monkeypatch, name):
    """The bound in fp16 is that in fp32."""
    train_step = on_device(name)
    method = train_step.method.eval()
    x0 = train_step.data.batch(6)
    if train_step.data.is_images:
        x0, _ = x0
    ours = train.evaluate(method, x0, 2)["bound"]
    monkeypatch.setattr(config, "AMP", torch.float32)
    assert ours == pytest.approx(train.evaluate(method, x0, 2)["bound"], rel=0.01)


@pytest.mark.parametrize("n", [1, 3])
def test_a_recorded_network_is_the_network(n):
    """For each shape of its inputs, and again when they change; gradients go past the graph."""
    method = on_device("masked").method.eval()
    recorded = Recorded(method.net)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randint(21, (n, 16), device=DEVICE)
            t = torch.rand(n, device=DEVICE)
            out = recorded(x, t)
            assert torch.equal(out, method.net(x, t))
    assert len(recorded.recorded) == 1
    assert recorded(x, t).requires_grad


def test_texts_are_written_on_the_device():
    for out in ("results/masked.pt", "results/judge.pt"):
        text, again = [texts(Sample(out=out, prompt="ROMEO:", length=150)) for _ in range(2)]
        assert text == again and text[0].startswith("ROMEO:") and len(text[0]) == 150

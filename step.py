"""One training step: gradients, Muon and AdamW, the moving average; compiled, and on CUDA recorded.

The host never waits for the device in it. What changes from step to step, the learning rate and the
weight of the average, is in tensors, and what is random has a seed that the host sets.
"""
import math

import torch
import torch.distributed as dist
from numpy.random import SeedSequence     # at once: numpy imports it late, and Ctrl-C is lost
from torch import nn

from config import AMP, CUDA_GRAPHS, DEVICE, GPU, RANK, WORLD_SIZE, first_line, print0


def get_lr(step, c):
    """Linear warm-up, constant, and over the second half a linear decay to zero."""
    warmup = (step + 1) / (c.warmup_iters + 1)
    decay = 2 * (1 - step / c.max_iters)
    return c.learning_rate * min(warmup, decay, 1)


def orthogonalize(x, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """Newton-Schulz: matrices (n, A, B) -> about U V^T of each U S V^T, all in one batch, bf16."""
    is_tall = x.size(1) > x.size(2)
    x = x.bfloat16()
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)        # b gram + c gram^2
        x = torch.baddbmm(x, gram, x, beta=a)                          # a x + gram x
    if is_tall:
        x = x.mT
    return x


def normalize_rows(x, mean_square):
    """NorMuon: matrices x (n, A, B) with each row divided by the root of its mean_square (n, A, 1),
    or each column where that is (n, 1, B). The norm of the whole matrix stays."""
    y = x / (mean_square.sqrt() + 1e-8)
    size = x.norm(dim=(1, 2), keepdim=True)
    return y * (size / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), as torch.optim.Muon with
    adjust_lr_fn="match_rms_adamw"; then its rows, here of a wide matrix its columns, are divided by
    their root mean square over the steps (NorMuon, arXiv 2510.05491). Matrices of one shape go in
    one batch, a few kernels for all layers where torch has some twenty for each matrix."""
    # GradScaler then calls step after an overflow, too, with found_inf 1, else 0
    _step_supports_amp_scaling = True
    found_inf = None

    def __init__(self, params, lr, weight_decay, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in params:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self.update(params, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, params, lr, weight_decay, momentum):
        """One step of matrices of one shape."""
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        average = torch.stack(buffers)                                 # (n, A, B)
        grad = torch.stack([p.grad for p in params])
        weight = 0.05                          # of this step in mean_square
        if self.found_inf is not None:
            # a gradient that equals the average leaves it as it is; a product would keep the NaN
            grad = torch.where(self.found_inf > 0, average, grad)
            lr = lr * (1 - self.found_inf)
            weight = weight * (1 - self.found_inf)
        average = average.lerp(grad, 1 - momentum)
        direction = orthogonalize(grad.lerp(average, momentum)).float()

        # the mean of the squares along the shorter side, over the steps
        dim = -1 if direction.size(1) >= direction.size(2) else -2
        square = direction.square().mean(dim, keepdim=True)
        for p, start in zip(params, torch.zeros_like(square), strict=True):
            self.state[p].setdefault("mean_square", start)     # in the first step
        squares = [self.state[p]["mean_square"] for p in params]
        mean_square = torch.stack(squares).lerp(square, weight)
        direction = normalize_rows(direction, mean_square)

        scale = 0.2 * math.sqrt(max(direction.shape[1:]))              # to about AdamW's RMS
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_sub_(params, list((scale * lr * direction).unbind()))
        torch._foreach_copy_(buffers + squares, [*average, *mean_square])


def build_optimizers(method, c, lr, adamw_lr):
    """AdamW, or with optimizer=muon Muon for the matrices of the blocks and AdamW for the rest, at
    the rates adamw_lr and lr, tensors ()."""
    matrices = []
    rest = []
    for name, p in method.named_parameters():
        is_matrix = "blocks." in name and "conv" not in name
        if is_matrix and c.optimizer == "muon":
            matrices.append(p)
        else:
            rest.append(p)
    opts = [torch.optim.AdamW(rest, adamw_lr, betas=(0.9, 0.98), weight_decay=c.weight_decay,
                              fused=True, capturable=GPU)]
    if matrices:
        opts.append(Muon(matrices, lr, c.weight_decay))
    return opts


class TrainingStep:
    """An update of method, whose forward(batch) is its loss, and of its moving average ema."""

    def __init__(self, method, ema, data, c):
        self.method = method
        self.ema = ema
        self.data = data
        self.c = c
        self.loss = torch.zeros((), device=DEVICE)
        self.lr = torch.zeros((), device=DEVICE)
        self.adamw_lr = torch.zeros((), device=DEVICE)
        self.ema_weight = torch.zeros((), device=DEVICE)
        self.adamw_factor = c.adamw_factor if c.optimizer == "muon" else 1
        self.opts = build_optimizers(method, c, self.lr, self.adamw_lr)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=AMP == torch.float16)
        self.run = call
        self.to_record = False

    def __call__(self, step, stop=False):
        """-> the mean loss () over the micro-batches of all processes, and whether to stop: with
        several processes a tensor, not 0 if one of them is to."""
        c = self.c
        self.lr.fill_(get_lr(step, c))
        self.adamw_lr.copy_(self.adamw_factor * self.lr)
        self.ema_weight.fill_(1 - min(c.ema, (1 + step) / (10 + step)))  # a smaller decay at first
        self.loss.zero_()
        for i in range(RANK, c.grad_accum, WORLD_SIZE):
            reseed(c.seed, step, i)
            self.run(self.micro_batch)
        if WORLD_SIZE > 1:
            stop = self.all_reduce(stop)
        self.run(self.update)
        if self.to_record:
            self.record()
        return self.loss.clone(), stop

    def micro_batch(self):
        """Add the gradients and the loss of one micro-batch."""
        loss = self.method(self.data.batch(self.c.batch_size)) / self.c.grad_accum
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def update(self):
        """Clip the gradients, update the weights, then their average."""
        # clip; in fp16 one overflow makes the norm NaN and so every gradient, and both optimizers,
        # each of which looks at its own gradients, skip the step
        params = list(self.method.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in params])
        norm = torch.where(norm.isfinite(), norm, math.nan)
        norm = norm / self.scaler.scale(torch.ones_like(norm))
        nn.utils.clip_grads_with_norm_(params, self.c.grad_clip or math.inf, norm)

        for opt in self.opts:
            self.scaler.unscale_(opt)
            self.scaler.step(opt)
        self.scaler.update()
        self.zero_grad()

        # ema <- ema + weight (method - ema)
        with torch.no_grad():
            averages = list(self.ema.parameters())
            difference = torch._foreach_sub(params, averages)
            torch._foreach_mul_(difference, self.ema_weight)
            torch._foreach_add_(averages, difference)

    def zero_grad(self):
        """Gradients of several micro-batches are added in tensors that stay, for a graph knows
        their addresses; those of one are made anew."""
        self.method.zero_grad(set_to_none=self.c.grad_accum == 1)

    def all_reduce(self, stop):
        """Sum gradients, loss and the wish to stop over all processes, in one message."""
        grads = [p.grad for p in self.method.parameters()]
        flags = torch.stack([self.loss, torch.full_like(self.loss, stop)])
        flat = torch.cat([nn.utils.parameters_to_vector(grads), flags])
        try:
            dist.all_reduce(flat)
        except RuntimeError:
            raise SystemExit("another process has ended, so this one does") from None
        parts = flat[:-2].split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        self.loss.copy_(flat[-2])
        return flat[-1]

    def compile(self):
        """Compile the loss in place, on a CPU the network alone: 11% faster there. Where it fails
        (no C++ compiler), training goes on without. Graphs are recorded after the next step."""
        # so that resuming is exact: a compiled gradient of an embedding sums in any order
        torch.use_deterministic_algorithms(DEVICE == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False
        module = self.method if GPU else self.method.net
        try:
            module.compile(dynamic=False)
            self.micro_batch()
        except Exception as error:
            module._compiled_call_impl = None
            say_without("torch.compile", error)
        self.zero_grad()
        self.to_record = CUDA_GRAPHS

    def record(self):
        """Record micro_batch and update as CUDA graphs, or go on without. A whole step comes first:
        what it makes, states and scale, a graph would make anew at each replay."""
        self.to_record = False
        try:
            self.run = Replay(self.micro_batch, self.update)
        except RuntimeError as error:
            self.scaler.update(self.scaler.get_scale())    # it forgets the step that failed
            say_without("CUDA graphs", error)
        self.zero_grad()


# -------------------------------------------------------------------------------------------------
# seeds, graphs

def reseed(*key):
    """Seed torch with a tuple of integers. Micro-batch i of a step has a seed of its own, so that
    resuming is exact without a saved RNG state, evaluation changes nothing, and it does not
    matter which process takes which micro-batch."""
    torch.manual_seed(int(SeedSequence(key).generate_state(1)[0]))


class Replay:
    """Records what functions without arguments do on the GPU; a call then replays one of them. The
    host launches a graph, where it would launch a thousand kernels."""

    def __init__(self, *functions):
        # by name: f belongs to the step that owns this, and a cycle would keep graphs until a GC
        self.graphs = {}
        for f in functions:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                f()
            self.graphs[f.__name__] = graph

    def __call__(self, f):
        self.graphs[f.__name__].replay()


def call(f):
    f()


def say_without(what, error):
    print0(f"going on without {what}, which failed: {type(error).__name__}: {first_line(error)}")

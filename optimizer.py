"""The optimizers and their learning rate: Muon for the matrices of the blocks, AdamW for the rest.

Both skip a step on the device, without the host waiting for it, when GradScaler has set found_inf,
a tensor that is 1 after an fp16 overflow, else 0.
"""
import math

import torch


def get_lr(step, c):
    """Linear warm-up, constant, and over the second half a linear decay to zero."""
    warmup = (step + 1) / (c.warmup_iters + 1)
    decay = 2 * (1 - step / c.max_iters)
    return c.learning_rate * min(warmup, decay, 1)


def build_optimizers(method, c):
    """AdamW, or with optimizer=muon Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = []
    rest = []
    for name, p in method.named_parameters():
        is_matrix = "blocks." in name and "conv" not in name
        if is_matrix and c.optimizer == "muon":
            matrices.append(p)
        else:
            rest.append(p)
    opts = [torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=c.weight_decay, fused=True)]
    if matrices:
        opts.append(Muon(matrices, c.weight_decay))
    return opts


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


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), as torch.optim.Muon with
    adjust_lr_fn="match_rms_adamw"; but equal shapes go in one batch, a few kernels for all layers
    where torch has some twenty for each matrix."""
    _step_supports_amp_scaling = True        # GradScaler asks for this, and sets found_inf
    found_inf = None

    def __init__(self, params, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

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
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        average = torch.stack(buffers)                                 # (n, A, B)
        grad = torch.stack([p.grad for p in params])
        keep = 1.0
        if self.found_inf is not None:
            keep = 1 - self.found_inf
            # a gradient that equals the average leaves it as it is; a product would keep the NaN
            grad = torch.where(self.found_inf > 0, average, grad)
        average = average.lerp(grad, 1 - momentum)
        direction = keep * orthogonalize(grad.lerp(average, momentum)).float()
        rms = 0.2 * math.sqrt(max(direction.shape[1:]))                # that of AdamW's updates
        torch._foreach_mul_(params, 1 - lr * weight_decay * keep)
        torch._foreach_add_(params, list(direction.unbind()), alpha=-lr * rms)
        torch._foreach_copy_(buffers, list(average.unbind()))

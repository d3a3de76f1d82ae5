"""What turns gradients into steps: Muon for the large matrices, AdamW for all else."""

import torch
from torch import Tensor, nn

from config import Config


def make_optimizers(cfg: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the large matrices inside a UNet: the kernels of its convolutions, except the first
    and last, whose few channels are pixels, and its dense layer. AdamW for everything else: biases,
    norms, embeddings, and the small linear layers that the embedding passes through."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        kernel = parameter.ndim == 4 and not name.startswith(("stem", "head"))
        large = kernel or name in ("dense.read.weight", "dense.write.weight")
        (matrices if large else others).append(parameter)
    fused = others[0].device.type in ("cpu", "cuda")
    betas = cfg.adam_beta1, cfg.adam_beta2
    return [
        Muon(matrices, cfg.learning_rate, cfg.muon_momentum, cfg.weight_decay),
        torch.optim.AdamW(
            others, cfg.learning_rate, betas=betas, weight_decay=cfg.weight_decay, fused=fused
        ),
    ]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: every direction of a matrix moves equally far, the
    rare ones too. A convolution's kernel is (output channels, input channels · height · width).

    Jordan et al. 2024, "Muon: an optimizer for hidden layers", with Nesterov momentum. A step is
    scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable", eq. 4), so that both can
    share a learning rate.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}  # one batch of matrices a shape
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, matrices in alike.items():
                ahead = []
                for p in matrices:
                    state = self.state[p]
                    if not state:
                        state["average"] = torch.zeros_like(p)
                    state["average"].lerp_(p.grad, 1 - momentum)
                    ahead.append(p.grad.lerp(state["average"], momentum))
                steps = orthogonalize(torch.stack(ahead).reshape(-1, *shape))
                size = 0.2 * max(shape) ** 0.5
                for p, step in zip(matrices, steps, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(step.reshape(p.shape), alpha=-lr * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The matrices (N, rows, columns) with all their singular values brought near 1, between about
    0.7 and 1.2, by five Newton-Schulz steps with the coefficients of Jordan et al. 2024:
    x <- (a + b x xᵀ + c (x xᵀ)²) x.

    Every x is some square matrix times the first, so it is that factor which is iterated, on the
    smaller side: two to four times less work for our long, narrow matrices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    gram = x @ x.mT  # (N, rows, rows)
    factor = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
    for _ in range(5):
        now = factor @ gram @ factor.mT  # x xᵀ of the x that the factor stands for
        polynomial = torch.baddbmm(now, now, now, beta=b, alpha=c)
        factor = torch.baddbmm(factor, polynomial, factor, beta=a)
    x = factor @ x
    return x if wide else x.mT

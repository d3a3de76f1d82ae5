"""The optimizers: Muon for the inner convolutions and the dense layer, AdamW for the rest."""

import torch
from torch import Tensor, nn

from config import Config

STATES = {"average"}, {"step", "exp_avg", "exp_avg_sq"}  # what Muon and AdamW keep per parameter


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters for Muon: the dense layer's two matrices and all convolution kernels but those
    of stem, head and bypass, some of whose channels are pixels. For AdamW: everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner_kernel = parameter.ndim == 4 and not name.startswith(("stem", "head", "bypass"))
        dense = name in ("dense.read.weight", "dense.write.weight")
        (matrices if inner_kernel or dense else others).append(parameter)
    return matrices, others


def make_optimizers(cfg: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon and AdamW, each for its part of the parameters, keeping STATES. Their learning rate is
    set before each step, by train.training_step."""
    matrices, others = split_parameters(model)
    lr, betas, decay = cfg.learning_rate, (cfg.adam_beta1, cfg.adam_beta2), cfg.weight_decay
    fused = others[0].device.type in ("cpu", "cuda")
    return [
        Muon(matrices, lr, cfg.muon_momentum, decay),
        torch.optim.AdamW(others, lr, betas=betas, weight_decay=decay, fused=fused),
    ]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is orthogonalized, so that every direction of a
    matrix moves equally far, not only those that dominate the gradient. Jordan et al. 2024, "Muon:
    an optimizer for hidden layers in neural networks".

    A convolution's kernel counts as a matrix (output channels, input channels · height · width).
    The update is scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training", eq. 4), so that both optimizers can share a learning rate.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, decay = (group[key] for key in ("lr", "momentum", "weight_decay"))
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, parameters in by_shape.items():  # matrices of one shape form one batch
                updates = []
                for p in parameters:
                    state = self.state[p]
                    if not state:
                        state["average"] = torch.zeros_like(p)
                    state["average"].lerp_(p.grad, 1 - momentum)
                    updates.append(p.grad.lerp(state["average"], momentum).reshape(shape))
                orthogonal = orthogonalize(torch.stack(updates))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, orthogonal, strict=True):
                    p.mul_(1 - lr * decay).add_(update.reshape(p.shape), alpha=-lr * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of the matrices (N, rows, columns) to about 0.7 to 1.2 (tiny ones
    stay smaller), by five Newton-Schulz steps x <- (a + b x xᵀ + c (x xᵀ)²) x, Jordan et al. 2024.

    Every iterate is a square matrix times the input, so only that `factor`, as wide as the input's
    shorter side, is iterated. For these long, narrow matrices that at least halves the work.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    gram = x @ x.mT  # (N, rows, rows)
    factor = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
    for _ in range(5):
        current = factor @ gram @ factor.mT  # the iterate times its transpose
        polynomial = torch.baddbmm(current, current, current, beta=b, alpha=c)
        factor = torch.baddbmm(factor, polynomial, factor, beta=a)
    x = factor @ x
    return x if wide else x.mT

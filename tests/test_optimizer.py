import pytest
import torch

from config import Config
from model import UNet
from optimizer import Muon, make_optimizers, orthogonalize

SHAPES = [(8, 8), (8, 72), (72, 8)]


def matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def kernels(count: int, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(16, 8, 3, 3, generator=generator) for _ in range(2 * count)]
    parameters = [torch.nn.Parameter(draw) for draw in draws[:count]]
    for parameter, gradient in zip(parameters, draws[count:], strict=True):
        parameter.grad = gradient
    return parameters


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_orthogonalize_keeps_the_directions_and_evens_out_their_sizes(shape, size):
    given = size * matrices(shape)
    u, before, v = torch.linalg.svd(given, full_matrices=False)
    after = u.mT @ orthogonalize(given) @ v.mT  # diagonal if the directions are the same
    values = after.diagonal(dim1=1, dim2=2)
    assert (after - torch.diag_embed(values)).abs().max() < 1e-3
    clear = before > 0.02 * before.amax(dim=1, keepdim=True)  # the smallest take more steps
    assert values[clear].min() > 0.6
    assert values.max() < 1.3


def test_a_first_step_of_muon_against_its_formula():
    (kernel,) = kernels(1)
    before = kernel.detach().clone()
    Muon([kernel], lr=0.1, momentum=0.0, weight_decay=0.5).step()
    step = orthogonalize(kernel.grad.view(1, 16, 72)).view(16, 8, 3, 3)
    torch.testing.assert_close(kernel.data, before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 72**0.5 * step)


def test_a_step_is_as_large_as_adamws_whatever_the_gradients_size():
    for size in (1e-3, 1e3):
        (kernel,) = kernels(1)
        before = kernel.detach().clone()
        kernel.grad *= size
        Muon([kernel], lr=1.0, momentum=0.9, weight_decay=0.0).step()
        rms = (kernel - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2, rel=0.25)


def test_momentum_is_nesterovs():
    (kernel,) = kernels(1)
    muon = Muon([kernel], lr=0.1, momentum=0.8, weight_decay=0.0)
    first = kernel.grad.clone()
    muon.step()
    before, second = kernel.detach().clone(), torch.randn_like(first)
    kernel.grad = second.clone()
    muon.step()
    average = 0.8 * 0.2 * first + 0.2 * second
    ahead = 0.8 * average + 0.2 * second
    step = orthogonalize(ahead.view(1, 16, 72)).view(16, 8, 3, 3)
    torch.testing.assert_close(kernel.data, before - 0.1 * 0.2 * 72**0.5 * step)


def test_kernels_of_one_shape_are_updated_together_as_if_alone():
    together, alone = kernels(3), kernels(3)
    Muon(together, 0.1, 0.9, 0.01).step()
    for kernel in alone:
        Muon([kernel], 0.1, 0.9, 0.01).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.data, b.data)


def test_every_parameter_has_one_optimizer_and_muon_has_the_large_matrices():
    cfg = Config(widths=(8, 16), embedding_size=16, attention=True)
    model = UNet(cfg)
    muon, adamw = make_optimizers(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw)]
    assert sorted(of[0] + of[1]) == sorted(names.values())
    blocks = ("down.0.0", "down.1.0", "middle", "up.0.0", "up.1.0")
    assert set(of[0]) == {
        *(f"{block}.conv{i}.weight" for block in blocks for i in (1, 2)),
        *(f"{layer}.weight" for layer in ("shrink.0", "grow.0", "dense.read", "dense.write")),
        *(f"attention.{layer}.weight" for layer in ("qkv", "out")),
    }


def test_muon_leaves_a_parameter_without_a_gradient_alone():
    (kernel,) = kernels(1)
    kernel.grad, before = None, kernel.detach().clone()
    Muon([kernel], 0.1, 0.9, 0.01).step()
    assert torch.equal(kernel.data, before)


def test_a_dense_layer_and_a_kernel_may_make_matrices_of_one_shape():
    cfg = Config(img_size=12, widths=(8, 64), dense_size=64)  # both are 64 by 576
    model = UNet(cfg)
    assert model.dense.read.weight.shape == model.middle.conv1.weight.flatten(1).shape
    (muon, _) = make_optimizers(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = model.dense.read.weight.clone()
    muon.step()
    assert not torch.equal(model.dense.read.weight, before)

import pytest
import torch

import model
from config import Config
from model import Attention, UNet, modulated_group_norm, timestep_features, without_weights

TINY = {"widths": (8, 16), "embedding_size": 16}


def batch(cfg: Config, size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(size, cfg.img_channels, cfg.img_size, cfg.img_size)
    return x, torch.arange(1, size + 1), torch.arange(size) % (cfg.num_classes + 1)


def random_unet(cfg: Config) -> UNet:
    """A U-Net with random weights, also where a new one has zeros, so that every layer counts."""
    torch.manual_seed(0)
    model = UNet(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": 8},
        {"img_size": 36, "attention": True},
        {"img_channels": 3},
        {"dense_size": 0},
        {"patch_size": 1, "widths": (8, 8, 16)},
        {"widths": (8,), "blocks": 3},
    ],
)
def test_the_output_has_the_inputs_shape_and_depends_on_all_inputs(settings):
    cfg = Config(**(TINY | settings))
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    out = model(x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(out, model(x + 0.1, t, y))
    assert not torch.allclose(out, model(x, t + 100, y))
    assert not torch.allclose(out, model(x, t, torch.full_like(y, cfg.null_class)))


def test_every_parameter_gets_a_gradient():
    cfg = Config(**TINY, attention=True)
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    model(x, t, y).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_layout_of_memory_changes_only_rounding():
    cfg = Config(**TINY, attention=True)
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    expected = model(x, t, y)
    off = model.to(memory_format=torch.channels_last)(x, t, y) - expected
    assert off.abs().max() < 1e-3 * expected.abs().max()


def test_a_labels_picture_changes_only_images_of_that_label():
    cfg = Config(**TINY)
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    before = model(x, t, y)
    torch.nn.init.normal_(model.label_picture.weight[y[0]])
    after = model(x, t, y)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def test_a_new_network_predicts_zero():
    cfg = Config(**TINY)
    assert UNet(cfg)(*batch(cfg)).abs().max() == 0


def test_the_images_of_a_batch_do_not_influence_each_other():
    cfg = Config(**TINY, attention=True)
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    whole = model(x, t, y)
    for i in range(len(x)):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-4)


def test_modulated_group_norm_against_its_formula():
    h, scale, shift = torch.randn(3, 16, 5, 5), torch.randn(3, 16), torch.randn(3, 16)
    grouped = h.view(3, 8, 2 * 5 * 5)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).view(3, 16, 5, 5)
    expected = normed * scale[:, :, None, None] + shift[:, :, None, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        out = modulated_group_norm(h.to(memory_format=layout), scale, shift)
        torch.testing.assert_close(out, expected)


def test_a_label_out_of_range_is_an_error():
    cfg = Config(**TINY)
    x, t, y = batch(cfg)
    with pytest.raises(IndexError):
        UNet(cfg)(x, t, y + cfg.num_classes + 1)


def test_timestep_features_against_their_formula():
    features = timestep_features(torch.tensor([0, 3]), 4)
    angle = torch.tensor([[0.0, 0.0], [3.0, 3.0 / 100]])  # frequencies 1 and 10000^(-1/2)
    torch.testing.assert_close(features, torch.cat([angle.cos(), angle.sin()], dim=1))


def test_a_timestep_means_its_fraction_of_all_timesteps():
    x, t, y = batch(Config(**TINY))
    long, short = (random_unet(Config(**TINY, timesteps=T)) for T in (1000, 500))
    torch.testing.assert_close(short(x, t, y), long(x, 2 * t, y))
    assert not torch.allclose(short(x, t, y), long(x, t, y))


def test_the_default_network_is_small():
    assert sum(p.numel() for p in UNet(Config()).parameters()) < 4_000_000


def test_bf16_changes_the_output_only_by_rounding():
    cfg = Config(**TINY)
    model, (x, t, y) = random_unet(cfg), batch(cfg)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, t, y).float()
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03


def test_no_time_is_spent_on_initializing_weights_without_memory(monkeypatch):
    """For normal_ on the meta device torch imports its compiler, which takes more than a second."""

    def unexpected(*args, **options):
        raise AssertionError("normal_ was called")

    monkeypatch.setattr(torch.Tensor, "normal_", unexpected)
    assert all(parameter.is_meta for parameter in without_weights(Config(**TINY)).parameters())
    with pytest.raises(AssertionError):
        UNet(Config(**TINY))


def test_a_network_is_measured_before_there_is_memory_for_it(monkeypatch):
    whole, shapes = UNet(Config(**TINY)), without_weights(Config(**TINY))
    assert all(parameter.is_meta for parameter in shapes.parameters())
    named = ({k: v.shape for k, v in each.state_dict().items()} for each in (whole, shapes))
    assert next(named) == next(named)
    size = sum(parameter.numel() for parameter in whole.parameters())
    monkeypatch.setattr(model, "MAX_PARAMETERS", size)
    without_weights(Config(**TINY))
    monkeypatch.setattr(model, "MAX_PARAMETERS", size - 1)
    with pytest.raises(ValueError, match=rf"U-Net: {size:,} parameters; at most .*; reduce"):
        without_weights(Config(**TINY))
    monkeypatch.undo()
    largest = Config(img_size=256, patch_size=1, widths=(1024,) * 6, blocks=16, dense_size=8192)
    with pytest.raises(ValueError, match="parameters; at most 40,000,000"):
        without_weights(largest)


def test_attention_is_the_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, x = Attention(16), torch.randn(2, 16, 3, 5)
    torch.nn.init.normal_(layer.out.weight)
    q, k, v = (p.flatten(2).unflatten(1, (4, 4)) for p in layer.qkv(layer.norm(x)).chunk(3, dim=1))
    weights = torch.einsum("bhci,bhcj->bhij", q, k).div(2).softmax(dim=-1)  # 2 is sqrt(4)
    mixed = torch.einsum("bhij,bhcj->bhci", weights, v).flatten(1, 2).view(x.shape)
    torch.testing.assert_close(layer(x), x + layer.out(mixed))


def test_skips_lead_from_each_block_to_its_mirror_image():
    unet = random_unet(Config(widths=(8, 16), embedding_size=16, blocks=2, dense_size=0))
    seen = {}
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: (a[0], out)}))
    unet(torch.randn(2, 1, 28, 28), torch.tensor([1, 2]), torch.tensor([3, 4]))
    grown = torch.nn.functional.pixel_shuffle(seen["grow.0"][1], 2)
    for level, below in ((1, seen["middle"][1]), (0, grown)):
        for block, mirrored in ((0, 1), (1, 0)):
            before = below if block == 0 else seen[f"up.{level}.0"][1]
            skip = seen[f"down.{level}.{mirrored}"][1]
            assert torch.equal(seen[f"up.{level}.{block}"][0], before + skip)

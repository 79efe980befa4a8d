"""What every network here must do, whatever its layers."""

import inspect
from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lit_adv import models
from lit_adv.models import (
    VGG,
    DigitsNet,
    ModelA,
    ModelB,
    ModelC,
    ModelD,
    ResNet,
    SmallVGG,
    StdCNN,
    WideResNet,
)

# small enough to run in float64 in a moment; the full sizes are counted in the tests of their own files
BUILD: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "digits": (DigitsNet, (1, 8, 8)),
    "a": (lambda: ModelA(filters=(4, 6), hidden=10), (1, 28, 28)),
    "b": (lambda: ModelB(filters=(4, 6, 8)), (1, 28, 28)),
    "c": (lambda: ModelC(filters=(4, 6), hidden=10), (1, 28, 28)),
    "d": (lambda: ModelD(widths=(30, 20)), (1, 28, 28)),
    "std_cnn": (lambda: StdCNN(filters=(8, 12), hidden=(20, 10)), (3, 32, 32)),
    "resnet": (lambda: ResNet(blocks=(1, 2), widths=(4, 8)), (3, 16, 16)),
    "wide_resnet": (lambda: WideResNet(units=2, widths=(6, 10), stem=4), (3, 16, 16)),
    "vgg": (lambda: VGG(stages=((4,), (6, 6))), (3, 16, 16)),
    "vgg_padded": (lambda: VGG(in_channels=1, stages=((4,), (4,), (4,), (4,), (6,))), (1, 28, 28)),
    "small_vgg": (lambda: SmallVGG(image_size=16), (3, 16, 16)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = BUILD[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        images = torch.rand(4, *shape, dtype=torch.float64)
        for _ in range(20):  # batch norm learns the statistics: at 0 and 1 so narrow a network may be dead
            model(images)
        return model.eval(), images


@pytest.fixture(params=sorted(BUILD))
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return build(request.param)


def test_logits_have_one_column_per_class(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    assert model(x).shape == (4, 10)
    assert model.num_classes == 10
    assert model(x[:0]).shape == (0, 10)


def test_a_row_alone_equals_the_row_in_its_batch(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_finite_and_reaches_the_image(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    for start in (x, torch.zeros_like(x), torch.ones_like(x)):
        images = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
        assert gradient.isfinite().all()
        assert start is not x or gradient.flatten(1).norm(dim=1).min() > 0


def test_double_backward_agrees_with_differences_of_gradients(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    direction = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) - 0.5

    def slope(images: Tensor) -> Tensor:  # of log-probabilities, curved even where the network is linear
        (gradient,) = torch.autograd.grad(model(images).log_softmax(1)[:, 0].sum(), images, create_graph=True)
        return (gradient * direction).sum()

    start = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(slope(start), start)
    h = 1e-6  # small, so that no kink lies between
    ahead, behind = (slope((x + s * h * direction).requires_grad_()).detach() for s in (1, -1))
    expected = (ahead - behind) / (2 * h)
    assert expected != 0
    torch.testing.assert_close((second * direction).sum(), expected, rtol=1e-3, atol=0)


def test_func_gradients_equal_autograd(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def score(image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],))[0, 1]

    images = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(images)[:, 1].sum(), images)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(score))(x), expected, rtol=1e-9, atol=1e-12)


def test_channels_last_gives_the_same_logits_and_gradient(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=memory_format)
        images = x.clone(memory_format=memory_format).requires_grad_()
        logits = model(images)
        results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), images)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_bfloat16_autocast_stays_close(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    model, x = model.float(), x.float()
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = x.clone().requires_grad_()
        logits = model(images)
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), images)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert gradient.isfinite().all()


def test_wrong_channels_and_a_missing_batch_are_refused(made: tuple[nn.Module, Tensor]) -> None:
    model, x = made
    with pytest.raises(ValueError, match=r"must have shape .* got \(4, 2, "):
        model(x[:, :1].repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="batch dimension"):
        model(x[0])


@pytest.mark.parametrize("name", ["digits", "a", "b", "c", "d", "std_cnn", "small_vgg"])
def test_a_size_the_linear_layer_cannot_take_is_refused(name: str) -> None:
    model, x = build(name)
    side = x.shape[-1]
    with pytest.raises(ValueError, match=rf"{side}, {side}\), got"):
        model(x[..., 1:])


@pytest.mark.parametrize(
    "network", [DigitsNet, ModelA, ModelB, ModelC, ModelD, StdCNN, ResNet, WideResNet, VGG, SmallVGG]
)
class TestConstructors:
    def test_mean_and_std_are_applied_first(self, network: type[nn.Module]) -> None:
        channels = inspect.signature(network).parameters["in_channels"].default
        with torch.device("meta"):
            plain, normalised = network(), network(mean=[0.1] * channels, std=[0.2] * channels)
        assert next(iter(normalised.modules())) is normalised
        assert isinstance(next(iter(normalised.children())), models.ImageInput)
        added = set(normalised.state_dict()) - set(plain.state_dict())
        assert added == {"image_input.normalize.mean", "image_input.normalize.std"}

    @pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
    def test_sizes_below_one_are_refused_by_name(self, network: type[nn.Module], argument: str) -> None:
        with pytest.raises(ValueError, match=f"{argument} must hold positive whole numbers only, got 0"):
            network(**{argument: 0})

    def test_a_config_can_build_it_from_lists_and_numbers(self, network: type[nn.Module]) -> None:
        sequences = {
            name: _as_list(parameter.default)
            for name, parameter in inspect.signature(network).parameters.items()
            if isinstance(parameter.default, tuple)
        }
        config = {
            "class_path": f"lit_adv.models.{network.__name__}",
            "init_args": {"num_classes": 7, "mean": [0.5], "std": [0.25], **sequences},
        }
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--model", type=nn.Module)
        with torch.device("meta"):
            model = network(**vars(parser.parse_object({"model": config}).model.init_args))
        assert model.num_classes == 7


def _as_list(value: object) -> object:
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value

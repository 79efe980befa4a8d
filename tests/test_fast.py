"""Stand-ins: nearly the model's answers, nothing shared with it that changes, and a way to run for every network."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv import fast
from lit_adv.attacks import NAttack
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.fast import fast_copy, has_fast_bf16
from lit_adv.models import ModelB, ResNet
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 runs on every CPU, fast or not."""
    monkeypatch.setattr(fast, "has_fast_bf16", lambda device: True)


class Net(nn.Module):
    """Normalisation in buffers, convolutions, batch norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean: Tensor
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()
        )
        self.hidden, self.head = nn.Linear(16 * 3 * 3, 32), nn.Linear(32, 5)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.3
        self.seen.append(x.dtype)
        return self.head(self.hidden(self.features(x).flatten(1)).relu())


class Outside(nn.Module):
    """Weights outside layers: a product of float32 and bfloat16 that only autocast puts right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(12, 8), nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1)) @ self.weight)


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.lock = nn.Linear(12, 4), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class Refuses(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        if hidden.dtype != torch.float32:
            raise NotImplementedError("no bfloat16 here")  # as torch does where a kernel is missing
        return self.second(hidden)


class Noisy(Defense):
    stochastic = True
    reject = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 4
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        noise = torch.randn_like(x) if draws is None else draws.normal(*x.shape[1:], dtype=x.dtype)
        return self.net(x + 0.5 * noise)


def made(model: nn.Module, *arguments: Any, **more: Any) -> Any:
    copied = fast_copy(model, *arguments, **more)
    assert copied is not None
    return copied


def small(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_bf16_answers_nearly_as_the_model(channels_last: bool | None) -> None:
    model, x = Net().eval(), images()
    with torch.no_grad():
        exact, near = model(x), made(model, "bf16", channels_last)(x)
    assert near.dtype == torch.float32
    assert near.shape == exact.shape
    assert 0 < float((near - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("build", [lambda: ResNet(widths=(8, 8, 16, 16)), lambda: ModelB()])
def test_the_models_of_the_project_run_in_bf16(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    shape = (1, 28, 28) if isinstance(model, ModelB) else (3, 32, 32)
    x = torch.rand(16, *shape)
    copied = made(model, "bf16")
    with torch.no_grad():
        exact, near = model(x), copied(x)
    assert copied.way == "bf16"
    assert float((near - exact).abs().max()) < 0.03 * float(exact.abs().max())


def test_scores_and_normalisation_stay_in_float32() -> None:
    copied = made(Net().eval(), "bf16")
    copied(images(2))
    kinds = {name: value.dtype for name, value in copied.model.state_dict().items() if value.is_floating_point()}
    narrow = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    layers = ("features.0", "features.3", "hidden")
    assert narrow == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(copied.model.seen) == {torch.float32}
    scores = copied(images(256))
    assert not torch.equal(scores, scores.bfloat16().float())  # finer than bfloat16 could say


def test_the_model_is_left_as_it_is() -> None:
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = made(model, "bf16", True)
    copied(images())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert before["features.3.weight"].stride() == after["features.3.weight"].stride()


def test_the_copy_is_frozen_and_its_own() -> None:
    model = Net()
    copied = made(model, "bf16")
    assert not any(module.training for module in copied.model.modules())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    theirs = {value.data_ptr() for value in model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in copied.state_dict().values()}
    x = images(4)
    before = copied(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)


def test_weights_outside_layers_run_under_autocast() -> None:
    model = Outside().eval()
    copied = made(model, "bf16")
    with torch.no_grad():
        near, exact = copied(small()), model(small())
    assert copied.way == "autocast"
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).abs().max()) < 0.03 * float(exact.abs().max())
    assert torch.equal(copied(small()), near)


def test_what_cannot_be_copied_runs_under_autocast() -> None:
    model = Locked().eval()
    copied = made(model, "bf16")
    copied(small())
    assert copied.way == "autocast"
    assert copied.model is model


def test_what_runs_in_float32_alone_is_asked_as_it_is_with_a_warning() -> None:
    model = Refuses().eval()
    copied = made(model, "bf16")
    with pytest.warns(UserWarning, match="Refuses runs neither"):
        answer = copied(small())
    assert copied.way == "as it is"
    assert torch.equal(answer, model(small()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied(small())


def test_errors_of_a_way_that_has_worked_are_errors() -> None:
    copied = made(Net().eval(), "bf16")
    copied(images(2))
    with pytest.raises(RuntimeError):
        copied(torch.rand(2, 7, 8, 8))
    assert copied.way == "bf16"


def test_running_out_of_memory_is_no_reason_for_another_way() -> None:
    copied = made(Net().eval(), "bf16")
    short = [torch.OutOfMemoryError("out of memory")]

    def hook(module: nn.Module, inputs: Any) -> None:
        if short:
            raise short.pop()

    copied.model.register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        copied(images(2))
    copied(images(1))
    assert copied.way == "bf16"


def test_a_random_defence_keeps_its_draws() -> None:
    model = Noisy().eval()
    copied = made(model, "bf16")
    x, index = small(), torch.arange(64)
    draws = Draws(0, index, torch.zeros_like(index))
    assert copied.stochastic
    assert copied.reject == 4
    with torch.no_grad():
        exact = model(x, draws=Draws(0, index, torch.zeros_like(index)))
        near = copied(x, draws=draws)
        again = copied(x, draws=Draws(0, index, torch.zeros_like(index)))
        mean = copied.averaged(x, 7, draws=draws)
        exact_mean = model.averaged(x, 7, draws=Draws(0, index, torch.zeros_like(index)))
    assert copied.way == "bf16"
    assert torch.equal(near, again)
    assert float((near - exact).abs().max()) < 0.05
    assert float((mean - exact_mean).abs().max()) < 0.05
    assert not torch.equal(copied(x), copied(x))


@pytest.mark.parametrize("arguments", [(), ("fp32",), ("fp32", False)])
def test_nothing_to_gain_makes_no_copy(arguments: tuple[Any, ...]) -> None:
    assert fast_copy(Net(), *arguments) is None


def test_a_device_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "has_fast_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="not be faster on this cpu"):
        assert fast_copy(Net(), "bf16") is None
    with pytest.warns(UserWarning, match="not be faster"):
        copied = made(Net().eval(), "bf16", channels_last=True)
    copied(images(2))
    assert copied.way == "fp32"


def test_channels_last_alone_is_nearly_exact() -> None:
    model = Net().eval()
    copied = made(model, channels_last=True)
    with torch.no_grad():
        assert torch.allclose(copied(images()), model(images()), atol=1e-5)
    assert copied.way == "fp32"


def test_answers_have_the_type_of_the_images() -> None:
    model = Net().double().eval()
    assert made(model, "bf16")(images(4).double()).dtype == torch.float64


def test_compiling_is_one_way_and_the_plain_copy_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no compiler")

    def compile(module: nn.Module, dynamic: bool) -> nn.Module:
        asked.append(dynamic)
        return Broken()

    monkeypatch.setattr(torch, "compile", compile)
    copied = made(Net().eval(), "bf16", compile=True)
    copied(images(2))
    assert asked == [True]
    assert copied.way == "bf16"
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    copied = made(Net().eval(), compile=True)
    copied(images(2))
    assert copied.way == "fp32 compiled"


def test_bad_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'fp8'"):
        fast_copy(Net(), "fp8")  # type: ignore[arg-type]


def test_devices_are_told_apart() -> None:
    assert isinstance(has_fast_bf16(CPU), bool)
    assert not has_fast_bf16(torch.device("mps"))


def test_hits_of_a_search_are_confirmed_by_the_model() -> None:
    """The same attack, answered by the stand-in: every success holds on the model, and costs a check."""
    model, x = Net().eval(), images(8)
    y = model(x).argmax(1)
    attack = NAttack(ThreatModel("linf", 0.3), steps=10, samples=20, sigma=0.3, step_size=0.1, shrink=0.1)
    plain = attack(QueryOracle(model, 8), x, y)
    oracle = QueryOracle(model, 8, fast=made(model, "bf16"))
    quick = attack(oracle, x, y)
    assert quick.success.sum() >= plain.success.sum() - 1
    assert quick.success.any()
    with torch.no_grad():
        assert (model(quick.x_adv).argmax(1) != y)[quick.success].all()
    assert (quick.checks[quick.success] > 0).all()

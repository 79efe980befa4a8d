"""Gradient maps against the identity of softmax, differences, closed forms and double precision."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Linear, Small, images
from torch import Tensor, nn

from lit_adv.models import VGG, DigitsNet
from lit_adv.response import Response, answered

ODD = (3, 5, 7)


class Pair(nn.Module):
    """A linear model of two classes whose logits are 0 and ``w x + b``, in the type of its weights."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        gap = x.flatten(1) @ self.weight.flatten() + self.bias
        return torch.stack([torch.zeros_like(gap), gap], 1)


def test_the_map_is_the_mean_of_the_gaps_gradients_by_their_probabilities() -> None:
    """G = sum of p_i grad(a_i - a_y), each gradient by a backward of its own."""
    model, x = Small(5, ODD), images(4, 1, ODD)
    response = Response(model, x)
    for row in range(4):
        leaf = x[row : row + 1].clone().requires_grad_()
        logits = model(leaf)[0]
        own = int(logits.argmax())
        shares = [math.exp(value) for value in logits.tolist()]
        total = torch.zeros_like(leaf)
        for other in range(5):
            (slope,) = torch.autograd.grad(logits[other] - logits[own], leaf, retain_graph=True)
            total += shares[other] / sum(shares) * slope
        torch.testing.assert_close(response.gradient[row : row + 1], total, rtol=1e-12, atol=1e-14)
        assert response.label[row] == own


def test_the_map_is_the_slope_of_the_cross_entropy_by_differences() -> None:
    model, x = Small(4, ODD), images(2, 2, ODD)
    response = Response(model, x)
    label = model(x).argmax(1)
    rows, h = torch.arange(2), 1e-6

    def loss(x: Tensor) -> Tensor:
        return -model(x).double().log_softmax(1)[rows, label]

    for place in range(0, 105, 7):
        step = torch.zeros(105, dtype=x.dtype)
        step[place] = h
        step = step.view(ODD)
        slope = (loss(x + step) - loss(x - step)) / (2 * h)
        torch.testing.assert_close(response.gradient.flatten(1)[:, place], slope, rtol=1e-6, atol=1e-8)


def test_a_linear_pairs_sensitivity_is_the_closed_form_and_falls_with_the_distance() -> None:
    """S = |w| / (1 + exp |margin|), from the decision plane outwards on either side."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ODD, generator=generator, dtype=torch.float64)
    size = float(weight.norm())
    distance = torch.linspace(0, 2, 41, dtype=torch.float64)
    for side in (1, -1):
        x = 0.5 + side * distance[:, None, None, None] * weight / size
        model = Pair(weight, bias=-0.5 * float(weight.sum()))
        found = Response(model, x).sensitivity
        torch.testing.assert_close(found, size / (1 + (size * distance).exp()), rtol=1e-9, atol=0)
        assert (found.diff() < 0).all()


def test_on_points_about_two_parallel_lines_it_peaks_on_the_decision_line() -> None:
    """Figure 2 of the paper: a linear net on the plane; along its normal S falls from the line on both sides."""
    generator = torch.Generator().manual_seed(4)
    along, noise = torch.rand(400, generator=generator), 0.02 * torch.randn(400, generator=generator)
    label = torch.arange(400) % 2
    points = torch.stack([along, 0.35 + 0.3 * along / 2 + 0.25 * label + noise - 0.1], 1).view(400, 1, 1, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(points), label).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (net(points).argmax(1) == label).all()
    net.double()
    layer = net[1]
    assert isinstance(layer, nn.Linear)
    normal = (layer.weight[1] - layer.weight[0]).detach()
    offset = (layer.bias[1] - layer.bias[0]).detach()
    size = normal.norm()
    foot = torch.tensor([0.5, 0.0], dtype=torch.float64)
    foot = foot - (foot @ normal + offset) / size**2 * normal
    distance = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    line = (foot + distance[:, None] * normal / size).view(-1, 1, 1, 2)
    found = Response(net, line).sensitivity
    assert found.argmax() == 50
    assert (found[:51].diff() > 0).all()
    assert (found[50:].diff() < 0).all()
    far = Response(net, points.double()).sensitivity
    assert float(far.max()) < float(found[50])


@pytest.mark.parametrize("scale", [1.0, 20.0, 40.0])
def test_single_precision_keeps_the_map_of_a_sure_classifier(scale: float) -> None:
    """The network in float64 is the truth; the usual cross-entropy in float32 loses it."""
    precise, x = Small(5, ODD), images(6, 5, ODD)
    precise.second.data *= scale
    single = Small(5, ODD)
    single.second.data *= scale
    single.float()
    # the same weights and images to the last bit, so that only the arithmetic differs
    precise.load_state_dict({name: value.double() for name, value in single.state_dict().items()})
    x32 = x.float()
    truth = Response(precise, x32.double())
    found = Response(single, x32)
    error = (found.gradient.double() - truth.gradient).flatten(1).norm(dim=1) / truth.gradient.flatten(1).norm(dim=1)
    allowed = 1e-4 + 1e-6 * float(truth.logits.abs().max())  # exp of logits that are rounded themselves
    assert float(error.max()) < allowed
    if scale == 40:
        assert float(truth.logits.softmax(1).amax(1).max()) > 1 - 1e-7
        leaf = x32.clone().requires_grad_()
        usual = nn.functional.cross_entropy(single(leaf), truth.label, reduction="sum")
        (naive,) = torch.autograd.grad(usual, leaf)
        worse = (naive.double() - truth.gradient).flatten(1).norm(dim=1) / truth.gradient.flatten(1).norm(dim=1)
        assert float(worse.max()) > 0.01


def test_the_value_differentiated_is_the_cross_entropy() -> None:
    from lit_adv.losses import cross_entropy

    logits, label = torch.randn(50, 7, dtype=torch.float64) * 5, torch.arange(50) % 7
    usual = nn.functional.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, label), usual, rtol=1e-10, atol=1e-12)


def test_sensitivity_below_the_squares_of_single_precision() -> None:
    weight = torch.ones(1, 2, 2)
    model = Pair(weight, bias=58.0)
    found = Response(model, torch.full((1, 1, 2, 2), 0.5)).sensitivity
    assert float(found) == pytest.approx(2 / (1 + math.exp(60)), rel=1e-3)
    vanished = Response(Pair(weight, bias=500.0), torch.zeros(1, 1, 2, 2))
    assert float(vanished.sensitivity) == 0
    assert (vanished.gradient == 0).all()


def test_saliency_is_the_largest_slope_of_the_predicted_logit_over_the_channels() -> None:
    model, x = Linear(4, ODD), images(3, 6, ODD)
    found = Response(model, x).saliency
    assert found.shape == (3, 1, 5, 7)
    for row, label in enumerate(model(x).argmax(1).tolist()):
        torch.testing.assert_close(found[row, 0], model.weight[label].detach().view(ODD).abs().amax(0))


@pytest.mark.parametrize("x", [torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)])
def test_constant_images_have_finite_maps(x: Tensor) -> None:
    response = Response(DigitsNet(filters=(2, 2), hidden=4).eval(), x)
    assert response.gradient.isfinite().all()
    assert response.saliency.isfinite().all()


def test_where_all_logits_are_equal_the_first_class_counts() -> None:
    model = Linear(3, ODD)
    model.weight.data.zero_()
    response = Response(model, images(2, 0, ODD))
    assert response.label.tolist() == [0, 0]
    assert (response.sensitivity == 0).all()


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 9, 5)])
def test_a_row_alone_is_the_row_in_the_batch(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    model = VGG(in_channels=shape[0], stages=((4,), (4,))).double().train()
    model(images(16, 7, shape))  # statistics of something
    model.eval()
    x = images(5, 8, shape)
    together = Response(model, x)
    for row in range(5):
        alone = Response(model, x[row : row + 1])
        for name in ("logits", "label", "gradient", "sensitivity", "saliency"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], rtol=1e-11, atol=1e-14)
    none = Response(model, x[:0])
    assert none.gradient.shape == (0, *shape)
    assert none.saliency.shape == (0, 1, *shape[1:])
    assert none.sensitivity.shape == none.label.shape == (0,)


@pytest.mark.parametrize("first", ["logits", "gradient", "saliency"])
def test_what_is_asked_first_changes_nothing_and_each_is_asked_once(first: str) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = Small(4, ODD), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.net(x)
            return logits

    model, x = Counted(), images(3, 9, ODD)
    response = Response(model, x)
    getattr(response, first)
    found = {name: getattr(response, name) for name in ("logits", "label", "gradient", "sensitivity", "saliency")}
    asked = model.calls
    assert asked <= 3
    assert all(torch.equal(getattr(response, name), value) for name, value in found.items())
    assert model.calls == asked
    fresh = Response(Small(4, ODD), x)
    assert all(torch.equal(getattr(fresh, name), value) for name, value in found.items())
    model.calls = 0
    with_graph = Response(model, x.requires_grad_())
    assert torch.equal(with_graph.logits, found["logits"])
    assert torch.equal(with_graph.gradient, found["gradient"])
    assert torch.equal(with_graph.saliency, found["saliency"])
    assert model.calls == 1


def test_the_images_and_the_weights_are_left_as_they_were() -> None:
    model, x = DigitsNet(filters=(2, 2), hidden=4), torch.rand(2, 1, 8, 8)
    before = x.clone()
    for leaf in (x, x.clone().requires_grad_()):
        response = Response(model, leaf)
        asked = [response.gradient, response.saliency, response.logits]
        assert all(part.requires_grad == leaf.requires_grad for part in asked)
        assert response.x.requires_grad == leaf.requires_grad
        if leaf.requires_grad:
            torch.autograd.grad([part.sum() for part in asked], leaf)
        assert leaf.grad is None
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert model.training


def test_the_map_can_be_differentiated_again() -> None:
    """d |G|^2 / dx by differences of the map, the label fixed; nothing of it under no_grad."""
    model, x = Small(4, ODD), images(2, 10, ODD)
    leaf = x.clone().requires_grad_()
    (twice,) = torch.autograd.grad(Response(model, leaf).gradient.square().sum(), leaf)
    h = 1e-6
    for place in range(0, 105, 9):
        step = torch.zeros(105, dtype=x.dtype)
        step[place] = h
        above, below = (Response(model, x + sign * step.view(ODD)).gradient.square().sum() for sign in (1, -1))
        assert twice.flatten(1)[:, place].sum().item() == pytest.approx(float(above - below) / (2 * h), rel=1e-5)
    with torch.no_grad():
        assert not Response(model, leaf).gradient.requires_grad
    assert leaf.requires_grad


@pytest.mark.parametrize("made", ["inside", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_works_without_gradients_and_in_inference_mode(made: str, dtype: torch.dtype) -> None:
    model, x = DigitsNet(filters=(2, 2), hidden=4).eval(), torch.rand(2, 1, 8, 8).to(dtype)
    expected = Response(model, x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            response = Response(model, x.clone() if made == "inside" else x)
            for name in ("gradient", "saliency", "logits", "label"):
                assert torch.equal(getattr(response, name), getattr(expected, name))
    with torch.inference_mode():
        inference = x.clone()
    assert torch.equal(Response(model, inference).gradient, expected.gradient)


def test_autocast_does_not_touch_the_map() -> None:
    model, x = DigitsNet(filters=(2, 2), hidden=4).eval(), torch.rand(2, 1, 8, 8)
    expected = Response(model, x).gradient
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Response(model, x).gradient, expected)
        assert Response(model, x).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision_are_given_what_they_take(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model, x = DigitsNet(filters=(4, 4), hidden=8).eval(), torch.rand(4, 1, 8, 8).to(dtype)
    expected = Response(model, x)
    found = Response(model.to(dtype), x)
    assert found.x.dtype == found.logits.dtype == found.gradient.dtype == torch.float32
    close = torch.cosine_similarity(found.gradient.flatten(1), expected.gradient.flatten(1))
    assert float(close.min()) > 0.99
    leaf = x.float().requires_grad_()
    (slope,) = torch.autograd.grad(Response(model, leaf).gradient.square().sum(), leaf)
    assert slope.isfinite().all()
    assert slope.any()
    assert answered(model, x.float()).dtype == torch.float32


@pytest.mark.parametrize("answer", [torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 3, 4)])
def test_what_is_no_answer_of_a_classifier_is_refused(answer: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must return logits \(n, K >= 2\), got shape"):
        _ = Response(lambda x: answer + 0 * x.sum(), torch.rand(2, 1, 4, 4)).label


def test_two_classes_need_no_sum_of_others() -> None:
    """One other class: the map is that of its gap, weighted by its probability."""
    weight = torch.randn(ODD, dtype=torch.float64)
    x = images(1, 11, ODD)
    model = Pair(weight)
    gap = float(model(x)[0, 1])
    expected = weight * (1 / (1 + math.exp(-gap)) - float(gap > 0))
    torch.testing.assert_close(Response(model, x).gradient[0], expected, rtol=1e-9, atol=1e-12)

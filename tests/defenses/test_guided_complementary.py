"""The ensemble against literal entropies, the refusal's column, gradients through both detectors by differences."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from contracts.nets import Linear, Small, images
from defenses.complementary import ODD, Pixel, Told, smooth, told, with_margins
from torch import Tensor, nn

from lit_adv.defenses import GuidedComplementary
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.losses import detector_margin
from lit_adv.metrics import auc
from lit_adv.models import VGG, DigitsNet

SMALL: dict[str, Any] = {"filters": (2, 2), "hidden": 4}


def linear(least: float | None = None) -> Linear:
    """A linear classifier of five classes; with ``least`` all its logits on images lie below it."""
    model = Linear(5, ODD)
    model.num_classes = 5  # type: ignore[assignment]
    if least is not None:
        model.bias.data.fill_(least - float(model.weight.detach().abs().sum(1).max()))
    return model


def entropy(margin: float) -> float:
    """Of the two probabilities, in bits, as equation (10) has it."""
    shares = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
    return -sum(share * math.log2(share) for share in shares if share)


def grid() -> tuple[Tensor, Tensor]:
    """All pairs of margins from -28 to 28, ties and opposites among them."""
    steps = torch.arange(-28, 29, 2, dtype=torch.float64)
    return tuple(part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))  # type: ignore[return-value]


def test_the_detector_of_smaller_entropy_decides_and_ties_go_to_the_sensitivity() -> None:
    of_image, of_map = grid()
    x = with_margins(images(len(of_image), 1, ODD), of_image, of_map)
    found = told(linear()).judgement(x)
    for row, (o, s) in enumerate(zip(of_image.tolist(), of_map.tolist(), strict=True)):
        by_image = entropy(o) < entropy(s)
        assert bool(found.by_image[row]) == by_image, (o, s)
        assert float(found.margin[row]) == (o if by_image else s)
    assert torch.equal(found.image, of_image)
    assert torch.equal(found.sensitivity, of_map)
    assert (found.by_image == (of_image.abs() > of_map.abs())).all()


def test_where_entropies_saturate_the_surer_one_still_decides() -> None:
    """Beyond |m| = 17 a probability is 1 in float32, and literal entropies are both 0."""
    of_image, of_map = torch.tensor([31.0, -31.0, 20.0, -18.0]), torch.tensor([-20.0, 30.0, -25.0, -31.0])
    x = with_margins(images(4, 2, ODD, torch.float32), of_image, of_map)
    model = told(linear().float())
    shares = of_image.sigmoid()
    assert ((shares == 1) | (1 - shares == 1)).all()
    assert model.margin(x).tolist() == [31.0, -31.0, -25.0, -31.0]
    assert auc(torch.tensor([25.0, 26.0]), torch.tensor([30.0, 31.0])) == 1
    assert auc(torch.tensor([25.0, 26.0]).sigmoid(), torch.tensor([30.0, 31.0]).sigmoid()) == 0.5


@pytest.mark.parametrize("least", [None, -1.0])
@pytest.mark.parametrize("column", ["additive", "product", "product2"])
def test_the_last_column_wins_just_where_the_ensemble_says_adversarial(column: Any, least: float | None) -> None:
    of_image, of_map = (part / 8 for part in grid())  # from -3.5 to 3.5
    classifier = linear(least)
    x = with_margins(images(len(of_image), 3, ODD), of_image, of_map)
    answer = told(classifier, column=column)(x)
    logits, margin = classifier(x), torch.where(of_image.abs() > of_map.abs(), of_image, of_map)
    most = logits.amax(1)
    assert answer.shape == (len(x), 6)
    refused = answer.argmax(1) == 5
    if column == "product2":  # 2 (1 + m) max(M, 0) > M: from m = -1/2 on, and always where all logits are negative
        assert torch.equal(refused, (most < 0) | (margin > -0.5))
    else:
        assert torch.equal(refused, margin > 0)
        assert torch.equal(answer.argmax(1)[~refused], logits.argmax(1)[~refused])
    assert (most < 0).all() == (least is not None)
    if column == "additive":
        assert torch.equal(answer[:, :5], logits)
        torch.testing.assert_close(answer[:, 5], most + margin)
        torch.testing.assert_close(detector_margin(answer, 5), margin, rtol=0, atol=1e-9)
    if column == "product":
        torch.testing.assert_close(answer[:, :5].softmax(1), logits.softmax(1))


def test_no_margin_at_all_is_benign() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    x = with_margins(images(2, 4, ODD), zero, zero)
    for column in ("additive", "product"):
        assert (told(linear(), column=column)(x).argmax(1) < 5).all()
    assert torch.equal(told(linear(), rectifier=linear(), answer="rectify")(x), linear()(x))


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 1.5])
def test_the_threshold_shifts_the_decision_and_not_the_score(threshold: float) -> None:
    of_image, of_map = (part / 8 for part in grid())
    x = with_margins(images(len(of_image), 5, ODD), of_image, of_map)
    model = told(linear(), threshold=threshold)
    margin = torch.where(of_image.abs() > of_map.abs(), of_image, of_map)
    assert torch.equal(model.margin(x), margin)
    assert torch.equal(model(x).argmax(1) == 5, margin > threshold)


def test_one_detector_alone_decides_by_itself() -> None:
    of_image, of_map = torch.tensor([3.0, -5.0]).double(), torch.tensor([-4.0, 1.0]).double()
    both = told(linear())
    x = with_margins(images(2, 6, ODD), of_image, of_map)
    image_only, map_only = both.variant(sensitivity_detector=None), both.variant(image_detector=None)
    assert image_only.margin(x).tolist() == of_image.tolist()
    assert map_only.margin(x).tolist() == of_map.tolist()
    assert image_only.judgement(x).sensitivity.isnan().all()
    assert map_only.judgement(x).image.isnan().all()
    leaf = x.clone().requires_grad_()
    for model in (image_only, map_only):
        (slope,) = torch.autograd.grad(model(leaf).sum(), leaf)
        assert slope.isfinite().all()


def differences(ask: Any, x: Tensor, places: range, h: float = 1e-6) -> Tensor:
    """Central differences (n, len(places)) of values (n,)."""
    found = []
    for place in places:
        step = torch.zeros(x[0].numel(), dtype=x.dtype)
        step[place] = h
        step = step.view(x.shape[1:])
        found.append((ask(x + step) - ask(x - step)) / (2 * h))
    return torch.stack(found, 1).detach()


def test_gradients_pass_through_the_whole_defence() -> None:
    """Of every column of the refusing answer, in float64, through the gradient map too."""
    model, x = smooth(), images(6, 7, ODD)
    by_image = model.judgement(x).by_image
    assert by_image.any()
    assert not by_image.all()
    weights = torch.tensor([0.3, -1.0, 0.7, 0.2, 1.3], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((model.surrogate(leaf) @ weights).sum(), leaf)
    expected = differences(lambda x: model(x) @ weights, x, range(0, 105, 8))
    torch.testing.assert_close(slope.flatten(1)[:, ::8], expected, rtol=1e-5, atol=1e-7)
    (last,) = torch.autograd.grad(detector_margin(model(leaf), 4).sum(), leaf)
    assert last.isfinite().all()
    assert last.flatten(1).any(1).all()
    torch.testing.assert_close(
        last.flatten(1)[:, ::8], differences(model.margin, x, range(0, 105, 8)), rtol=1e-5, atol=1e-7
    )


def test_the_sensitivity_to_the_image_is_that_of_the_deciding_margin() -> None:
    model, x = smooth(), images(6, 8, ODD)
    found = model.sensitivity(x)
    assert not found.requires_grad
    expected = differences(model.margin, x, range(0, 105, 4)).abs()
    torch.testing.assert_close(found.flatten(1)[:, ::4], expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(model.sensitivity(x), found)
    with torch.inference_mode():
        assert torch.equal(model.sensitivity(x.clone()), found)


def test_the_other_reading_takes_the_slope_to_the_map() -> None:
    model, x = smooth(reading="map"), images(6, 9, ODD)
    detector = model.sensitivity_detector
    assert detector is not None
    found, by_image = model.sensitivity(x), model.judgement(x).by_image
    view = detector.view(detector.respond(x)).detach()
    of_map = differences(detector.judge, view, range(0, 105, 4)).abs()
    of_image = differences(model.margin, x, range(0, 105, 4)).abs()
    expected = torch.where(by_image[:, None], of_image, of_map)
    torch.testing.assert_close(found.flatten(1)[:, ::4], expected, rtol=1e-5, atol=1e-7)
    assert by_image.any()
    assert not by_image.all()
    alone = model.variant(image_detector=None).sensitivity(x)
    torch.testing.assert_close(alone.flatten(1)[:, ::4], of_map, rtol=1e-5, atol=1e-7)
    without = model.variant(sensitivity_detector=None).sensitivity(x)
    torch.testing.assert_close(without[by_image], found[by_image])


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 8, 6)])
@pytest.mark.parametrize("settings", [{}, {"reading": "map"}])
def test_a_row_alone_is_the_row_in_the_batch(shape: tuple[int, int, int], settings: dict[str, Any]) -> None:
    model, x = smooth(shape, **settings), images(5, 10, shape)
    for ask in (model, model.margin, model.sensitivity):
        whole = ask(x)
        for row in range(5):
            torch.testing.assert_close(ask(x[row : row + 1])[0], whole[row], rtol=1e-9, atol=1e-12)
        assert ask(x[:0]).shape == (0, *whole.shape[1:])
    assert torch.equal(model.suspects(x)[1], model.suspects(x[1:2])[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("answer", ["reject", "rectify"])
def test_constant_images_are_answered(value: float, answer: Any) -> None:
    model = smooth(answer=answer, threshold=-100.0)
    x = torch.full((2, *ODD), value, dtype=torch.float64).requires_grad_()
    found = model(x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all()
    assert slope.isfinite().all()


def batch_normed() -> GuidedComplementary:
    torch.manual_seed(20)
    nets = [VGG(num_classes, 1, ((4,), (4,))) for num_classes in (10, 2, 2)]
    for net in nets:
        net.train()(torch.rand(32, 1, 8, 8))
    classifier = nets[0].eval()
    return GuidedComplementary(
        classifier, ImageDetector(classifier, nets[1]), SensitivityDetector(classifier, nets[2], "image"),
        copy.deepcopy(classifier),
    )  # fmt: skip


def test_weights_modes_and_flags_stay_as_they_were() -> None:
    model = batch_normed().train().requires_grad_()
    assert model.rectifier is not None
    assert model.rectifier.training
    for network in (model.classifier, model.image_detector, model.sensitivity_detector):
        assert network is not None
        assert not any(module.training for module in network.modules())
        assert not any(weight.requires_grad for weight in network.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(4, 1, 8, 8).requires_grad_()
    model(x).sum().backward()
    model.sensitivity(x)
    model.eval().variant(answer="rectify", threshold=-100.0)(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(dtype: torch.dtype) -> None:
    model, x = batch_normed().eval(), torch.rand(8, 1, 8, 8)
    single = model(x.to(dtype).float())
    sensitivity = model.sensitivity(x.to(dtype).float())
    half = copy.deepcopy(model).to(dtype)
    for answer in ("reject", "rectify"):
        given = x.to(dtype).requires_grad_()
        found = half.variant(answer=answer)(given)
        assert found.dtype == torch.float32
        (slope,) = torch.autograd.grad(found.sum(), given)
        assert slope.isfinite().all()
        if answer == "reject":
            torch.testing.assert_close(found, single, rtol=0.1, atol=0.1)
    close = torch.cosine_similarity(half.sensitivity(x.to(dtype)).flatten(1), sensitivity.flatten(1))
    assert float(close.median()) > 0.99  # at single images a rounded ReLU takes the other side
    assert float(close.min()) > 0.5


def test_it_answers_alike_without_gradients_in_inference_mode_and_under_autocast() -> None:
    model, x = batch_normed().eval(), torch.rand(5, 1, 8, 8)
    expected = model(x.clone().requires_grad_()).detach()
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            found = model(x.clone())
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x)[:, :10], expected[:, :10], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)


def test_detectors_of_another_classifier_are_refused() -> None:
    torch.manual_seed(21)
    classifier, other = DigitsNet(**SMALL), DigitsNet(**SMALL)
    x = torch.rand(2, 1, 8, 8)
    for place, name in enumerate(("image_detector", "sensitivity_detector")):
        owners = [other if number == place else copy.deepcopy(classifier) for number in range(2)]
        two = [DigitsNet(num_classes=2, **SMALL) for _ in range(2)]
        model = GuidedComplementary(
            classifier, ImageDetector(owners[0], two[0]), SensitivityDetector(owners[1], two[1], "none")
        ).eval()
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{name} was trained for another classifier than the one given"):
                model(x)
        other.load_state_dict(classifier.state_dict())
        assert model(x).shape == (2, 11)
        assert model.image_detector is not None
        assert model.image_detector.classifier is model.classifier
        other = DigitsNet(**SMALL)


def test_weights_read_after_it_was_made_are_looked_at() -> None:
    def made(seed: int) -> GuidedComplementary:
        torch.manual_seed(seed)
        classifier = DigitsNet(**SMALL)
        two = [DigitsNet(num_classes=2, **SMALL) for _ in range(2)]
        return GuidedComplementary(
            classifier, ImageDetector(copy.deepcopy(classifier), two[0]),
            SensitivityDetector(copy.deepcopy(classifier), two[1], "none"),
        ).eval()  # fmt: skip

    first, second, x = made(1), made(2), torch.rand(2, 1, 8, 8)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    mixed = {**made(3).state_dict(), **{k: v for k, v in second.state_dict().items() if k.startswith("image_detector")}}
    fresh = made(4)
    fresh.load_state_dict(mixed)
    with pytest.raises(ValueError, match="image_detector was trained for another classifier"):
        fresh(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_detector": None, "sensitivity_detector": None}, "give image_detector, sensitivity_detector or both"),
        ({"answer": "rectify", "rectifier": None}, "answer='rectify' needs a rectifier"),
        ({"answer": "repair"}, "answer must be one of reject, rectify, got 'repair'"),
        ({"column": "sum"}, "column must be one of additive, product, product2, got 'sum'"),
        ({"mode": "top"}, "mode must be one of threshold, quantile, rate, got 'top'"),
        ({"reading": "pixel"}, "reading must be one of image, map, got 'pixel'"),
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1.1"),
        ({"alpha": math.nan}, "alpha must lie in"),
        ({"share": -0.1}, r"share must lie in \[0, 1\], got -0.1"),
        ({"threshold": math.inf}, "threshold must be finite, got inf"),
        ({"averages": 0}, "averages must be a whole number of at least 1, got 0"),
        ({"averages": 1.5}, "averages must be a whole number of at least 1, got 1.5"),
        ({"num_classes": None}, "num_classes"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smooth().variant(**settings)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.full((1, *ODD), math.nan).double(), ValueError, "NaN or inf"),
        (torch.full((1, *ODD), 255.0).double(), ValueError, r"must lie in \[0, 1\], got values in \[255, 255\]"),
        (torch.zeros(ODD).double(), ValueError, r"must be \(n, C, H, W\), got shape \(3, 5, 7\)"),
        (torch.zeros(1, *ODD, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
    ],
)
def test_what_is_no_image_is_refused(x: Tensor, error: type[Exception], message: str) -> None:
    model = smooth()
    for ask in (model, model.margin, model.sensitivity):
        with pytest.raises(error, match=message):
            ask(x)


def test_variants_share_the_networks_and_change_the_settings() -> None:
    model = smooth(alpha=0.3, share=0.25)
    other = model.variant(answer="rectify", averages=2, alpha=0.7)
    assert (other.alpha, other.share, other.averages, other.answer) == (0.7, 0.25, 2, "rectify")
    assert (other.reject, other.stochastic, model.reject, model.stochastic) == (None, True, 4, False)
    assert not model.variant(answer="rectify", share=0.0).stochastic
    for name in ("classifier", "image_detector", "sensitivity_detector", "rectifier"):
        assert getattr(other, name) is getattr(model, name)
    assert not other.training
    assert isinstance(Told(Small(4, ODD), Pixel(1)), nn.Module)

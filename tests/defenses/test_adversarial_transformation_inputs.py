"""What adversarial transformation is fed: modes of autograd, precisions, odd images, odd arguments, two processes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from contracts.nets import Small, images
from defenses.behind_g import CLASSES, DELTA, Counted, defended, keyed, linear_reference
from torch import Tensor, nn

from lit_adv.defenses import AdversarialTransformation
from lit_adv.models import VGG, DigitsNet, SmallVGG
from lit_adv.oracle import QueryOracle


def digits(**settings: Any) -> AdversarialTransformation:
    """f_a and f_b for the 8 x 8 digits, in float32."""
    torch.manual_seed(3)
    networks = DigitsNet(filters=(4, 8), hidden=16), VGG(in_channels=1, stages=[[8], [16]])
    return AdversarialTransformation(*networks, **settings).eval()


def pixels(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


# modes of autograd


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", [{}, {"random_start": False}, {"mode": "untargeted"}, {"norm": "l2"}])
def test_g_is_the_same_without_gradients(context: Any, settings: dict[str, Any]) -> None:
    model, x = digits(**settings), pixels()
    expected, logits = model.transform(x, keyed(6)), model(x, draws=keyed(6))
    with context():
        born_inside = x.clone()
        for given in (x, born_inside):
            torch.testing.assert_close(model.transform(given, keyed(6)), expected, rtol=0, atol=0)
            torch.testing.assert_close(model(given, draws=keyed(6)), logits)
            model.softsign(given)
            model.unrolled(given)
    assert not expected.requires_grad


def test_a_tensor_of_an_attackers_graph_stays_out_of_g() -> None:
    model, x = digits(), pixels()
    root = x.clone().requires_grad_()
    leafless = root * 1.0
    assert not model.transform(leafless, keyed(6)).requires_grad
    assert root.grad is None
    model(leafless, draws=keyed(6)).logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
    z = model.transform(x, keyed(6)).requires_grad_()
    (expected,) = torch.autograd.grad(model.classifier(z).logsumexp(1).sum(), z)
    assert root.grad is not None
    torch.testing.assert_close(root.grad, expected)
    assert not any(p.grad is not None for p in model.reference.parameters())


def test_second_derivatives_of_the_whole_pass_the_identity() -> None:
    """With the identity as the derivative of g, the Hessian at x is the classifier's at g(x)."""
    model, x = defended(linear_reference((1, 2, 2)), (1, 2, 2)), images(1, shape=(1, 2, 2))
    z = model.transform(x, keyed(1))
    found = torch.autograd.functional.hessian(lambda v: model(v, draws=keyed(1)).logsumexp(1).sum(), x)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(
        lambda v: model.classifier(v).logsumexp(1).sum(), z))  # fmt: skip


# precisions


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["transform", "softsign"])
def test_autocast_does_not_reach_g(half: torch.dtype, name: str) -> None:
    model, x = digits(), pixels()
    seen = Counted(model.classifier)
    model.classifier = seen
    expected = model.transform(x, keyed(6))
    with torch.autocast("cpu", half):
        if name == "transform":
            assert torch.equal(model.transform(x, keyed(6)), expected)
        logits = model.softsign(x.clone().requires_grad_(), draws=keyed(6)) if name == "softsign" else model(
            x, draws=keyed(6))  # fmt: skip
    assert logits.dtype == half  # f_a itself runs under autocast
    torch.testing.assert_close(seen.given[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_networks_and_half_images_work(half: torch.dtype) -> None:
    model, x = digits().to(half), pixels().to(half)
    z = model.transform(x, keyed(6))
    assert z.dtype == torch.float32
    assert float((z - x.float()).abs().max()) <= DELTA + 1e-6
    assert model(x, draws=keyed(6)).dtype == half
    leaf = x.clone().requires_grad_()
    for name in ("surrogate", "unrolled", "softsign"):
        (found,) = torch.autograd.grad(getattr(model, name)(leaf, draws=keyed(6)).float().logsumexp(1).sum(), leaf)
        assert found.isfinite().all()
        assert bool(found.any())


def test_double_precision_draws_the_same() -> None:
    model, x = defended(), images(3)
    start = model.variant(steps=0)
    single = copy.deepcopy(start).float().transform(x.float(), keyed(3))
    torch.testing.assert_close(single.double(), start.transform(x, keyed(3)), rtol=0, atol=1e-6)


# f_b is left alone


def test_4_g_leaves_no_trace_in_f_b() -> None:
    torch.manual_seed(0)
    network = SmallVGG(num_classes=CLASSES, image_size=16, width=4)  # dropout and batch norm
    model = AdversarialTransformation(SmallVGG(num_classes=CLASSES, image_size=16, width=4), network)
    before = copy.deepcopy(network.state_dict())
    assert model.train() is model
    holder = nn.Sequential(model).train()
    assert holder.training
    assert model.classifier.training
    assert not any(part.training for part in network.modules())
    assert model.train(False).classifier.training is False
    holder.train()
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(model.transform(x, keyed(4)), model.transform(x, keyed(4)))  # no dropout
    model.transform(x)
    for name in ("surrogate", "unrolled", "softsign"):
        leaf = x.clone().requires_grad_()
        getattr(model, name)(leaf).sum().backward()
        assert leaf.grad is not None
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(p.grad is not None for p in model.classifier.parameters())
    model.requires_grad_(True)
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


# images


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 255.0, -1.5])
def test_what_is_no_image_is_refused(value: float) -> None:
    model, x = digits(), pixels()
    x[2, 0, 3, 3] = value
    said = r"lie in \[0, 1\].*divide 8-bit" if abs(value) < 1e9 else "NaN or inf"
    for answer in (model, model.transform, model.surrogate, model.unrolled, model.softsign):
        with pytest.raises(ValueError, match=said):
            answer(x.clone().requires_grad_())


def test_other_shapes_and_types_are_refused_and_none_is_none() -> None:
    model, x = digits(), pixels()
    with pytest.raises(TypeError, match=r"uint8.*divide uint8 by 255"):
        model((x * 255).byte())
    for shape in ((1, 8, 8), (64,), (2, 3, 1, 8, 8)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            model(torch.zeros(shape))
    for name in ("__call__", "surrogate", "unrolled", "softsign", "tanh_scaled", "softsign_literal"):
        for given in (x[:0], x[:0].clone().requires_grad_()):
            assert getattr(model, name)(given).shape == (0, 10)
    assert model.transform(x[:0]).shape == (0, 1, 8, 8)
    for probe in (x - 0.9, x + 0.9):  # an estimator's probes leave the box
        model(probe)


def test_grey_images_of_odd_sizes_and_black_ones() -> None:
    torch.manual_seed(0)
    reference = SmallVGG(in_channels=1, image_size=28, width=4)
    model = AdversarialTransformation(VGG(in_channels=1, stages=[[4], [6]]), reference, delta=0.4).eval()
    x = torch.cat([torch.zeros(1, 1, 28, 28), torch.ones(1, 1, 28, 28), torch.rand(2, 1, 28, 28)])
    z = model.transform(x, keyed(4))
    assert z.shape == x.shape
    assert float((z - x).abs().max()) <= 0.4 + 1e-6
    assert model(x).isfinite().all()


def test_channels_last_and_compiled_networks_answer_alike() -> None:
    torch.manual_seed(0)
    reference = SmallVGG(num_classes=CLASSES, image_size=16, width=4)
    model = AdversarialTransformation(SmallVGG(num_classes=CLASSES, image_size=16, width=4), reference, steps=4).eval()
    x = torch.rand(3, 3, 16, 16)
    z = model.transform(x, keyed(3))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = other.transform(x.to(memory_format=torch.channels_last), keyed(3))
    assert float(((moved - z).abs() <= 1e-5).double().mean()) >= 0.999
    torch.compiler.reset()
    small = defended(Small(seed=5), steps=2)  # the networks alone: g's own loop is not worth a compiler
    compiled = small.variant(
        reference=torch.compile(small.reference, backend="eager"),
        classifier=torch.compile(small.classifier, backend="eager"),
    )
    x = images(3)
    torch.testing.assert_close(compiled(x, draws=keyed(3)), small(x, draws=keyed(3)))
    torch.compiler.reset()


# arguments


def test_no_radius_no_steps_and_no_step_size() -> None:
    x = images(4)
    for name in ("least_likely", "untargeted", "random_target", "noise", "spatial"):
        assert torch.equal(defended(delta=0, mode=name).transform(x), x)
    assert torch.equal(defended(mode="none").transform(x), x)
    assert torch.equal(defended(steps=0, random_start=False).transform(x), x)
    start = defended(steps=0).transform(x, keyed(4))
    assert torch.equal(defended(step_size=0).transform(x, keyed(4)), start)
    assert torch.equal(defended(step_size=0, random_start=False).transform(x), x)
    assert float((start - x).abs().min()) > 0


def test_constant_scores_leave_the_noise() -> None:
    network = linear_reference()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
    x, model = images(4), defended(network)
    assert torch.equal(model.transform(x, keyed(4)), model.variant(steps=0).transform(x, keyed(4)))
    # of equals the first is least likely: it alone is pulled up once there is a slope
    with torch.no_grad():
        network.weight[0] = 1e-12  # scores of all classes stay 0 to 10 digits, class 0 is largest by a hair
        network.bias[0] = -1e-6
    pulled = defended(network, random_start=False).transform(x) - x
    torch.testing.assert_close(pulled, torch.full_like(x, DELTA))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"delta": -0.1}, "delta must be a finite radius in pixel units, at least 0, got -0.1"),
        ({"delta": float("nan")}, "delta must be a finite"),
        ({"delta": float("inf")}, "delta must be a finite"),
        ({"steps": -1}, "steps must be a whole number, at least 0, got -1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"step_size": -1.0}, "step_size must be finite and at least 0, or None for delta / 6, got -1"),
        ({"step_size": float("nan")}, "step_size must be finite"),
        ({"mode": "most_likely"}, "mode must be one of least_likely, untargeted, .* got 'most_likely'"),
        ({"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
        ({"reference": []}, "reference must be a classifier or a list of some"),
        ({"num_classes": None}, "give num_classes"),
    ],
)
def test_faults_name_the_argument_and_the_remedy(changed: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"reference": Small(), "num_classes": 4, **changed}
    with pytest.raises(ValueError, match=said):
        AdversarialTransformation(Small(), **arguments)


def test_a_radius_of_more_than_half_is_worth_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"delta 0.6 is more than half of the pixel range") as caught:
        AdversarialTransformation(Small(), Small(), delta=0.6, num_classes=4)
    assert caught[0].filename == __file__
    AdversarialTransformation(Small(), Small(), delta=0.5, num_classes=4)
    AdversarialTransformation(Small(), Small(), delta=2.0, norm="l2", num_classes=4)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="same classes, got classifier 10, reference 0 5: take networks of the same"):
        AdversarialTransformation(DigitsNet(), DigitsNet(num_classes=5))
    with pytest.raises(ValueError, match="num_classes 4, classifier 10"):
        AdversarialTransformation(DigitsNet(), Small(), num_classes=4)
    silent = AdversarialTransformation(Small(4), Small(5), num_classes=4)  # neither says how many it knows
    with pytest.raises(ValueError, match="f_b answers 5 classes and f_a 4"):
        silent(images(2))


# processes and queries


def test_equally_seeded_processes_draw_different_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model, x, drawn = digits(steps=0), torch.full((2, 1, 8, 8), 0.5), []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(7)
        drawn.append(model.transform(x))
    assert int((drawn[0] == drawn[1]).sum()) < 3
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_images_of_one_query_number_draw_apart() -> None:
    """The oracle keys draws by image and query; equal pixels are moved to different places."""
    x = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    model = defended()
    seen = Counted(model.classifier)
    model.classifier = seen
    oracle = QueryOracle(model, 2)
    for _ in range(2):
        oracle.scores(x, torch.arange(2))
    first, second = seen.given
    moved = [*first, *second]
    assert all(not torch.equal(a, b) for i, a in enumerate(moved) for b in moved[:i])

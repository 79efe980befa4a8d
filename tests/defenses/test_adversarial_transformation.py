"""g of adversarial transformation against a plain loop over one image; the numbers are those of the exact checks.

What it is fed and how it is trained stand in the files beside this one, as do gradients.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from contracts.nets import Small, images
from defenses.behind_g import CLASSES, DELTA, Counted, Loop, defended, keyed, linear_reference
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.defenses import AdversarialTransformation
from lit_adv.estimators import Autograd
from lit_adv.models import SmallVGG
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

BALLS = ("least_likely", "untargeted", "random_target", "noise", "none")


def offsets(model: AdversarialTransformation, x: Tensor, seed: int = 0) -> Tensor:
    return model.transform(x, keyed(len(x), seed)) - x


def least_likely(network: nn.Module, x: Tensor) -> list[int]:
    """By a search through the scores, the first of equals."""
    with torch.no_grad():
        return [min(range(CLASSES), key=network(image[None])[0].tolist().__getitem__) for image in x]


def most_likely(network: nn.Module, x: Tensor) -> list[int]:
    with torch.no_grad():
        return [max(range(CLASSES), key=network(image[None])[0].tolist().__getitem__) for image in x]


# g itself


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mode", BALLS)
def test_1_images_stay_in_ball_and_box(mode: str, norm: str, random_start: bool, box: bool) -> None:
    x = images(16)
    x[0], x[1] = 0.0, 1.0
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = defended(mode=mode, norm=norm, random_start=random_start, box=box).to(dtype)
        z = model.transform(x.to(dtype), keyed(16))
        off = (z - x.to(dtype)).flatten(1)
        size = off.abs().amax(1) if norm == "linf" else off.norm(dim=1)
        assert float(size.max()) <= DELTA + slack
        assert float(size.max()) > 0.5 * DELTA or mode == "none" or (mode == "noise" and norm == "l2")
        if box:
            assert float(z.min()) >= 0
            assert float(z.max()) <= 1
        elif mode != "none":
            assert float(z.min()) < 0  # neither the paper nor its code clips
            assert float(z.max()) > 1


def test_1_a_spatial_map_makes_nothing_brighter_and_nothing_darker() -> None:
    x = images(6, shape=(1, 9, 7)) * 0.5 + 0.2
    model = defended(linear_reference((1, 9, 7)), (1, 9, 7), mode="spatial")
    z = model.transform(x, keyed(6))
    assert float((z - x).abs().max()) > 0.01
    for one, other in zip(z, x, strict=True):
        assert float(one.min()) >= float(other.min()) - 1e-12
        assert float(one.max()) <= float(other.max()) + 1e-12
    torch.testing.assert_close(torch.cat([model.transform(x[i : i + 1], keyed(1, first=i)) for i in range(6)]), z)


SETTINGS = [
    {"steps": 13, "step_size": None},
    {"steps": 3, "step_size": 0.07},
    {"steps": 1, "step_size": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mode", ["least_likely", "untargeted"])
@pytest.mark.parametrize("random_start", [False, True])
def test_g_is_the_plain_loop_over_one_image(
    mode: str, norm: str, box: bool, settings: dict[str, float | None], random_start: bool
) -> None:
    x, network = images(5), linear_reference()
    model = defended(network, mode=mode, norm=norm, box=box, random_start=random_start, **settings)
    start = offsets(model.variant(steps=0), x)
    assert bool(start.any()) == random_start
    size = DELTA / 6 if settings["step_size"] is None else settings["step_size"]
    assert isinstance(settings["steps"], int)
    loop = Loop(network, DELTA, settings["steps"], size, norm, box)
    targets = least_likely(network, x) if mode == "least_likely" else most_likely(network, x)
    assert len(set(targets)) > 1
    z = model.transform(x, keyed(5))
    for i in range(5):
        expected = loop.run(x[i].numpy(), start[i].numpy(), targets[i], ascend=mode == "untargeted")
        np.testing.assert_allclose(z[i].numpy(), expected, atol=1e-12)


def test_a_random_target_is_one_of_all_classes_and_the_loop_towards_it() -> None:
    x, network = images(12), linear_reference()
    model = defended(network, mode="random_target")
    start = offsets(model.variant(steps=0), x)
    loop = Loop(network, DELTA, 13, DELTA / 6, "linf", False)
    z = model.transform(x, keyed(12)).numpy()
    aims = []
    for i in range(12):
        made = [loop.run(x[i].numpy(), start[i].numpy(), target) for target in range(CLASSES)]
        errors = [float(abs(one - z[i]).max()) for one in made]
        aims.append(int(np.argmin(errors)))
        assert min(errors) < 1e-12
    assert len(set(aims)) == CLASSES
    assert not torch.equal(model.transform(x, keyed(12, seed=1)), model.transform(x, keyed(12)))


def test_the_start_is_uniform_in_the_ball() -> None:
    x = images(1).expand(400, -1, -1, -1)
    flat = offsets(defended(mode="noise"), x).flatten() / DELTA
    assert float(flat.abs().max()) <= 1 + 1e-9
    for edge in (-0.9, -0.5, 0.0, 0.3, 0.8):
        share = (flat < edge).double().mean().item()
        assert share == pytest.approx((edge + 1) / 2, abs=5 * 0.5 / len(flat) ** 0.5)
    # l2: P(length <= r) = (r / delta)^d, here of d = 3, and the directions cancel
    x = images(1, shape=(3, 1, 1)).expand(4000, -1, -1, -1)
    off = offsets(defended(linear_reference((3, 1, 1)), (3, 1, 1), mode="noise", norm="l2"), x).flatten(1) / DELTA
    for edge in (0.5, 0.8, 0.95):
        share = (off.norm(dim=1) < edge).double().mean().item()
        assert share == pytest.approx(edge**3, abs=5 * 0.5 / 4000**0.5)
    assert float(off.mean(0).abs().max()) < 5 * (0.6 / 3 / 4000) ** 0.5  # E r^2 = 3/5


def test_2_equal_states_draw_equally_and_others_do_not() -> None:
    x = images(4)
    model = defended()
    assert torch.equal(model.transform(x, keyed(4)), model.transform(x, keyed(4)))
    for other in (keyed(4, seed=1), keyed(4, step=1), keyed(4, first=1)):
        assert not torch.equal(model.transform(x, keyed(4)), model.transform(x, other))

    def seeded(defense: AdversarialTransformation, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return defense.transform(x)

    assert torch.equal(seeded(model, 3), seeded(model, 3))
    assert not torch.equal(seeded(model, 3), seeded(model, 4))
    again = seeded(model, 3)
    assert not torch.equal(model.transform(x), again)  # fresh in every call
    still = model.variant(random_start=False)
    assert not still.stochastic
    assert torch.equal(seeded(still, 3), seeded(still, 4))
    assert torch.equal(still.transform(x, keyed(4)), still.transform(x, keyed(4, seed=1)))
    state = torch.get_rng_state()
    model.transform(x, keyed(4))
    model(x, draws=keyed(4))
    assert torch.equal(state, torch.get_rng_state())  # keyed draws leave torch's generator alone


@pytest.mark.parametrize("mode", ["least_likely", "untargeted", "random_target", "noise"])
@pytest.mark.parametrize("several", [False, True])
def test_3_no_image_depends_on_its_batch_mates(mode: str, several: bool) -> None:
    x = images(6)
    networks = [Small(seed=s, scale=4.0) for s in (5, 6, 7)] if several else [Small(seed=5, scale=4.0)]
    model = defended(networks, mode=mode)
    z = model.transform(x, keyed(6))
    for i in range(6):
        torch.testing.assert_close(model.transform(x[i : i + 1], keyed(1, first=i)), z[i : i + 1], atol=1e-12, rtol=0)
    order = torch.tensor([4, 0, 5, 2])
    torch.testing.assert_close(model.transform(x[order], keyed(6)[order]), z[order], atol=1e-12, rtol=0)
    still = model.variant(random_start=False)
    if not still.stochastic:
        alone = torch.cat([still.transform(image[None]) for image in x])
        torch.testing.assert_close(alone, still.transform(x), atol=1e-12, rtol=0)


def test_3_nor_with_batch_norm_and_single_precision() -> None:
    torch.manual_seed(1)
    network = SmallVGG(num_classes=CLASSES, image_size=16, width=4)
    network.train()(torch.rand(32, 3, 16, 16))  # running statistics of some images
    x = torch.rand(8, 3, 16, 16)
    model = defended(network, (3, 16, 16)).float()
    whole = model.transform(x, keyed(8))
    alone = torch.cat([model.transform(x[i : i + 1], keyed(1, first=i)) for i in range(8)])
    assert float(((whole - alone).abs() <= 1e-5).double().mean()) >= 0.999


def test_8_the_target_is_the_least_likely_class_at_the_clean_image() -> None:
    """With a large step the random start changes which class is least likely there; the target stays."""
    x = images(40)
    network = linear_reference()
    with torch.no_grad():
        network.weight *= 3
    model = defended(network, delta=0.4, steps=1, step_size=0.4)
    start = offsets(model.variant(steps=0), x)
    loop = Loop(network, 0.4, 1, 0.4, "linf", False)
    clean, noisy = least_likely(network, x), least_likely(network, x + start)
    assert clean != noisy
    for random_start in (False, True):
        z = model.variant(random_start=random_start).transform(x, keyed(40)).numpy()
        for i in range(40):
            begun = start[i].numpy() * random_start
            np.testing.assert_allclose(z[i], loop.run(x[i].numpy(), begun, clean[i]), atol=1e-12)


def test_9_no_mean_of_g_leaves_the_ball() -> None:
    """The paper's table 1 reports 0.272 at delta 0.2, which the projection forbids."""
    x = images(4)
    for network in (linear_reference(), Small(seed=5, scale=8.0)):
        model = defended(network)
        total = torch.zeros_like(x)
        for count in range(1, 41):
            total += model.transform(x, keyed(4, step=count))
            assert float((total / count - x).abs().max()) <= DELTA + 1e-12
        assert float((total / 40 - x).abs().max()) > 0.9 * DELTA  # f_b's gradient decides, not the noise


@pytest.mark.parametrize("steps", [0, 1, 13])
def test_12_one_forward_for_the_target_and_one_pass_a_step(steps: int) -> None:
    x = images(3)
    network = Counted(Small(seed=5))
    model = defended(network, steps=steps)
    model.transform(x, keyed(3))
    assert (network.forwards, network.backwards) == (1 + steps, steps)
    torch.testing.assert_close(network.given[0], x)
    for _, images_given in zip(range(steps), network.given[1:], strict=True):
        assert float((images_given - x).abs().max()) <= DELTA + 1e-12
    noise = Counted(Small(seed=5))
    defended(noise, mode="noise").transform(x, keyed(3))
    assert noise.forwards == 0


@pytest.mark.filterwarnings("ignore:.*follows the gradient of one draw")
@pytest.mark.parametrize(("steps", "eot"), [(3, 1), (2, 5)])
def test_12_an_attack_of_t_steps_and_s_draws_asks_g_t_times_s_times(steps: int, eot: int) -> None:
    x, y = images(4), torch.zeros(4, dtype=torch.int64)
    network = Counted(Small(seed=5))
    model = defended(network, steps=2)
    oracle = QueryOracle(model, 4, known_right=True, chunk=64)
    attack = PGD(ThreatModel(eps=0.03), steps, stop_at_hit=False, estimator=Autograd(eot))
    result = attack(oracle, x, y)
    asked = int((result.queries - result.checks).sum())
    assert asked == 4 * steps * eot
    given = sum(len(part) for part in network.given)
    assert given == (1 + 2) * int(result.queries.sum())  # every query is one g, and the last image is looked at


def test_13_the_scale_of_the_scores_changes_the_loss_and_not_the_target() -> None:
    x = images(10)
    network, sharper = linear_reference(), linear_reference()
    with torch.no_grad():
        sharper.weight *= 7
        sharper.bias *= 7
    assert least_likely(network, x) == least_likely(sharper, x)
    one, other = (Loop(n, DELTA, 1, DELTA, "linf", False) for n in (network, sharper))
    targets = least_likely(network, x)
    assert one.loss(x[0].numpy(), targets[0]) != pytest.approx(other.loss(x[0].numpy(), targets[0]), rel=0.1)
    model = defended(sharper, steps=1, step_size=DELTA, random_start=False)
    z = model.transform(x)
    for i in range(10):
        np.testing.assert_allclose(z[i].numpy(), other.run(x[i].numpy(), np.zeros_like(x[i]), targets[i]), atol=1e-12)


def test_15_the_least_likely_class_becomes_likely() -> None:
    x = images(100)
    network = Small(seed=5, scale=4.0)
    model = defended(network)
    targets = torch.tensor(least_likely(network, x))
    start, end = model.variant(steps=0).transform(x, keyed(100)), model.transform(x, keyed(100))
    before, after = (nn.functional.cross_entropy(network(z), targets, reduction="none") for z in (start, end))
    assert float((after < before).double().mean()) > 0.95
    assert float((network(end).argmax(1) == targets).double().mean()) > 0.9


# ensembles and variants


def test_each_image_draws_one_network_and_stays_with_it() -> None:
    x = images(40)
    networks = [linear_reference(seed=s) for s in (6, 7, 8)]
    model = defended(list(networks), mode="least_likely", random_start=False)
    assert model.stochastic
    singles = [model.variant(reference=network).transform(x) for network in networks]
    z = model.transform(x, keyed(40))
    fits = torch.stack([(z - single).abs().flatten(1).amax(1) < 1e-12 for single in singles])
    assert fits.any(0).all()
    counts = fits.sum(1)
    assert int(counts.min()) >= 5  # of 40, 13.3 expected
    again = model.transform(x, keyed(40, seed=1))
    assert not torch.equal(again, z)


def test_a_variant_shares_the_networks_and_changes_what_is_asked() -> None:
    model = defended(box=True, steps=7)
    model.train()
    other = model.variant(steps=2, delta=0.1)
    assert other.classifier is model.classifier
    assert other.reference is model.reference
    assert (other.steps, other.delta, other.box, other.norm, other.mode) == (2, 0.1, True, "linf", "least_likely")
    assert (model.steps, model.delta) == (7, DELTA)
    assert other.training
    assert not other.reference.training
    several = defended([Small(seed=5), Small(seed=6)])
    assert [a is b for a, b in zip(several.reference, several.variant(steps=1).reference, strict=True)] == [True, True]


def test_what_is_random_says_so() -> None:
    random = {
        (mode, start): defended(mode=mode, random_start=start).stochastic
        for mode, start in itertools.product((*BALLS, "spatial"), (False, True))
    }
    still = {("least_likely", False), ("untargeted", False), ("none", False), ("none", True)}
    assert {key for key, value in random.items() if not value} == still
    assert not defended(delta=0).stochastic
    x = images(3)
    for (mode, start), value in random.items():
        model = defended(mode=mode, random_start=start)
        same = torch.equal(model.transform(x, keyed(3)), model.transform(x, keyed(3, seed=1)))
        assert same != value

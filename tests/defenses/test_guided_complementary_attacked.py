"""A trained complementary defence on digits, attacked by the engine with the refusal in sight; its checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lit_adv import evaluate
from lit_adv.attack import Attack
from lit_adv.attacks import DDN, PGD, CarliniWagner, DeepFool, HopSkipJump, NAttack, Square
from lit_adv.datamodules import Digits
from lit_adv.datamodules.attacked import AttackedBatch
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.draws import Draws
from lit_adv.losses import Combined
from lit_adv.metrics import summarize
from lit_adv.models import DigitsNet
from lit_adv.objectives import PairDetection
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol
from lit_adv.tasks import Checkpoint, Classification
from lit_adv.threat import ThreatModel

NET = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 8], "hidden": 32}}
TWO = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 8], "hidden": 16, "num_classes": 2}}
IMAGES = 12
FREE = ThreatModel("l2", "inf")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def train(network: nn.Module, batches: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad], 0.01)
    for rows in batches:
        optimizer.zero_grad()
        loss(rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> tuple[GuidedComplementary, Tensor, Tensor]:
    """The defence, and clean test images that it answers rightly, with their labels."""
    torch.manual_seed(0)
    digits = Digits(val_split=0).training_images(500)
    classifier = DigitsNet(**_init(NET))
    cross_entropy = nn.functional.cross_entropy
    train(classifier, torch.randint(500, (120, 64)),
          lambda rows: cross_entropy(classifier(digits.image[rows]), digits.label[rows]))  # fmt: skip
    classifier.eval().requires_grad_(False)
    right = classifier(digits.image).argmax(1) == digits.label
    image, label, index = (column[right] for column in digits)
    near = DDN(FREE, 15).perturb(classifier, image, label)
    far = PGD(ThreatModel("linf", 0.3), 10).perturb(classifier, image, label)
    twice = [torch.cat([column, column]) for column in (image, label, index)]
    x_adv, places = torch.cat([near, far]), torch.arange(2 * len(label))
    pairs = AttackedBatch(twice[0], x_adv, twice[1], twice[1], twice[2], places, places)
    detectors = []
    for kind in (ImageDetector, SensitivityDetector):
        detector = kind(classifier, DigitsNet(**_init(TWO))).train()
        detector.calibrate([pairs.image, x_adv])
        train(detector.network, torch.randint(len(places), (150, 64)), pair_loss(detector, pairs))
        detectors.append(detector)
    model = GuidedComplementary(classifier, detectors[0], detectors[1], copy.deepcopy(classifier)).eval()
    test = Digits().dataset("test").__getitems__(list(range(80)))
    answered = model(test.image).argmax(1) == test.label
    return model, test.image[answered][:IMAGES], test.label[answered][:IMAGES]


def pair_loss(detector: NetworkDetector, pairs: AttackedBatch) -> Callable[[Tensor], Tensor]:
    objective = PairDetection()
    return lambda rows: objective(detector, AttackedBatch(*(part[rows] for part in pairs)))[0]


def _init(recipe: dict[str, Any]) -> dict[str, Any]:
    return dict(recipe["init_args"])


def test_detectors_find_what_attacks_on_the_classifier_make(
    trained: tuple[GuidedComplementary, Tensor, Tensor],
) -> None:
    """The grey box: attacks that know f alone are mostly refused, clean images mostly not."""
    model, x, y = trained
    assert len(x) == IMAGES
    assert (model.margin(x) <= 0).all()
    for attack in (PGD(ThreatModel("linf", 0.3), 10), DDN(FREE, 20)):
        x_adv = attack.perturb(model.classifier, x, y)
        assert (model.classifier(x_adv).argmax(1) != y).float().mean() > 0.9
        assert (model(x_adv).argmax(1) == 10).float().mean() > 0.7


WHITE: dict[str, tuple[Attack, bool]] = {
    "pgd": (PGD(ThreatModel("linf", 0.4), 20, 0.04), False),
    "pgd-combined": (PGD(ThreatModel("linf", 0.4), 20, 0.04, loss=Combined(1.0)), False),
    "pgd-targeted": (PGD(ThreatModel("linf", 0.5), 20, 0.06), True),
    "cw": (CarliniWagner(FREE, 25, 2, 0.05, 1.0), False),
    "cw-beta": (CarliniWagner(FREE, 25, 2, 0.05, 1.0, beta=1.0), False),
    "cw-targeted": (CarliniWagner(FREE, 25, 2, 0.05, 1.0), True),
    "ddn": (DDN(FREE, 30), False),
    "ddn-combined": (DDN(FREE, 30, loss=Combined(1.0)), False),
    "ddn-targeted": (DDN(FREE, 30), True),
    "deepfool": (DeepFool(FREE, 20), False),
}
BLACK: dict[str, tuple[Attack, bool]] = {
    "nattack": (NAttack(ThreatModel("linf", 0.4), steps=20, samples=20, step_size=0.05, latent=8), False),
    "square": (Square(ThreatModel("linf", 0.4), steps=60), False),
    "square-targeted": (Square(ThreatModel("linf", 0.4), steps=30), True),
    "hopskipjump": (HopSkipJump(FREE, steps=2, samples=10, max_samples=20, init_tries=50), False),
}


@pytest.mark.parametrize("name", [*WHITE, *BLACK])
def test_success_is_fooling_the_classifier_unseen(
    trained: tuple[GuidedComplementary, Tensor, Tensor], name: str
) -> None:
    model, x, y = trained
    attack, targeted = {**WHITE, **BLACK}[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    target = (y + 1) % 10 if targeted else None
    oracle = QueryOracle(model, len(x), attack.access)
    assert oracle.reject == 10
    result = attack(oracle, x, y, target)
    label, margin = model.classifier(result.x_adv).argmax(1), model.margin(result.x_adv)
    fooled = label != y if target is None else label == target
    assert torch.equal(result.success, fooled & (margin <= 0) & result.distance.isfinite())
    assert result.x_adv.isfinite().all()
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    moved = (result.x_adv - x).flatten(1)
    size = moved.abs().amax(1) if attack.threat.norm == "linf" else moved.norm(dim=1)
    if attack.threat.radius != torch.inf:
        assert (size <= attack.threat.radius * (1 + 1e-5)).all()
    torch.testing.assert_close(result.distance[result.success], size[result.success].to(result.distance.dtype))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in WHITE and name != "deepfool":  # of which a defence of some blurred digits cannot rid itself
        assert result.success.any()


def test_the_refusal_lengthens_the_way(trained: tuple[GuidedComplementary, Tensor, Tensor]) -> None:
    """An image that fools f unseen fools f: no nearer one under both conditions, but for the search's slack."""
    model, x, y = trained
    attack = DDN(FREE, 50)
    both, alone = attack(model, x, y), attack(model.classifier, x, y)
    assert alone.success.all()
    assert both.success.float().mean() > 0.3
    found = both.success
    assert (both.distance[found] >= 0.9 * alone.distance[found]).all()
    assert both.distance[found].median() > 1.1 * alone.distance[found].median()
    grey = attack(QueryOracle(model, len(x), surrogate="classifier"), x, y)
    assert grey.success.sum() <= both.success.sum()


def test_the_gradient_attack_is_not_blind(trained: tuple[GuidedComplementary, Tensor, Tensor]) -> None:
    model, x, y = trained
    result = PGD(ThreatModel("linf", 0.2), 10)(model, x, y)
    assert not [name for name, (happened, _) in result.counts.items() if "gradients" in name and happened]


@pytest.mark.filterwarnings("ignore:PGD. the gradient was exactly 0")  # behind a sure refusal, in float16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reports_count_a_refused_clean_image_as_an_error(
    trained: tuple[GuidedComplementary, Tensor, Tensor], dtype: torch.dtype
) -> None:
    model, _, _ = trained
    test = Digits().dataset("test").__getitems__(list(range(24)))
    threshold = float(model.margin(test.image).sort().values[15:17].mean())
    guarded = copy.deepcopy(model).variant(threshold=threshold).to(dtype).eval()
    taken = test.image.to(dtype) if dtype != torch.float32 else test.image
    answer = guarded(taken).argmax(1)
    attacks = [
        Protocol(name="pgd", attack=PGD(ThreatModel("linf", 0.3), 5)),
        Protocol(name="grey", attack=DDN(FREE, 5), surrogate="classifier"),
    ]
    for mode in (torch.enable_grad(), torch.inference_mode()):
        with mode:
            report = evaluate(guarded, (test.image, test.label), attacks, audit=False)
            for outcome in report.outcomes:
                assert summarize(outcome.records).clean_accuracy == pytest.approx(
                    float((answer == test.label).float().mean())
                )
    assert (answer == 10).any()


def test_the_rectifying_defence_is_attacked_as_random(trained: tuple[GuidedComplementary, Tensor, Tensor]) -> None:
    model, x, y = trained
    repaired = model.variant(answer="rectify", alpha=0.3)
    x, y = x[:2], y[:2]
    attack = PGD(ThreatModel("linf", 0.3), 2, 0.1)
    oracle = QueryOracle(repaired, len(x), attack.access)
    assert oracle.stochastic
    result = attack(oracle, x, y)
    again = attack(QueryOracle(repaired, len(x), attack.access), x, y)
    assert torch.equal(result.x_adv, again.x_adv)
    assert (result.queries >= 20).all()  # gradients are averaged over draws


def test_a_checkpoint_holds_the_whole_defence(
    trained: tuple[GuidedComplementary, Tensor, Tensor], tmp_path: Path
) -> None:
    model, x, y = trained
    kinds = {"image_detector": "ImageDetector", "sensitivity_detector": "SensitivityDetector"}
    arguments: dict[str, Any] = {"classifier": NET, "rectifier": NET, "alpha": 0.3, "threshold": 0.25}
    for name, kind in kinds.items():
        own = {"classifier": NET, "network": TWO}
        arguments[name] = {"class_path": f"lit_adv.detectors.{kind}", "init_args": own}
    recipe = {"class_path": "lit_adv.defenses.GuidedComplementary", "init_args": arguments}
    task = Classification(model.variant(alpha=0.3, threshold=0.25))
    task.remember({"class_path": "lit_adv.tasks.Classification", "init_args": {"model": recipe}})
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(enable_checkpointing=False, inference_mode=True, **quiet)  # type: ignore[arg-type]
    data = Digits(batch_size=50, max_test=130)
    (tested,) = trainer.test(task, data, verbose=False)
    every = data.dataset("test").__getitems__(list(range(130)))
    accuracy = float((task.model(every.image).argmax(1) == every.label).float().mean())
    assert tested["test/accuracy"] == pytest.approx(accuracy)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "gcd.ckpt")
    found = Checkpoint(tmp_path / "gcd.ckpt")
    assert isinstance(found, GuidedComplementary)
    assert (found.alpha, found.threshold, found.reject) == (0.3, 0.25, 10)
    assert not any(module.training for module in found.modules())
    assert torch.equal(found(x), task.model(x))
    assert isinstance(task.model, GuidedComplementary)
    zeros = torch.zeros(len(x), dtype=torch.int64)
    first, second = (part.variant(answer="rectify", threshold=-100.0) for part in (found, task.model))
    draws = [Draws(0, torch.arange(len(x)), zeros) for _ in range(2)]
    assert torch.equal(first(x, draws=draws[0]), second(x, draws=draws[1]))
    content = torch.load(tmp_path / "gcd.ckpt", weights_only=True)
    name = "model.classifier.classifier.0.bias"  # cloned, for all three are one
    content["state_dict"][name] = content["state_dict"][name].clone() + 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="image_detector was trained for another classifier"):
        Checkpoint(tmp_path / "other.ckpt")(x)
    assert isinstance(found.image_detector, NetworkDetector)
    assert len(y) == IMAGES

"""The audit's probes: sound models pass, and each fault of a model is found by the check that is made for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Detached, Linear, Noisy, Small, Undeclared, decided, images
from torch import Tensor, nn

import lit_adv
from lit_adv.attacks import PGD, NAttack
from lit_adv.audit import Audited, Finding
from lit_adv.datamodules import Batch
from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws
from lit_adv.probes import Probing
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.threat import ThreatModel

X = images(16)
Y = decided(Small(), X)
NEAR = ThreatModel("linf", 0.05)


class Changed(Defense):
    """A small network behind a change of its images."""

    num_classes = 4

    def __init__(self, change: Callable[[Tensor], Tensor], gentle: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.change, self.gentle = Small(), change, gentle

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.change(x))
        return logits

    def surrogate(self, x: Tensor, **draws: Draws) -> Tensor:
        logits: Tensor = self.net((self.gentle or self.change)(x))
        return logits


class Scaled(torch.autograd.Function):
    """Nothing forwards; backwards the gradient times 1e-12."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1e-12


def rounded(x: Tensor) -> Tensor:
    return (x * 64).round() / 64


def report_of(model: nn.Module, threat: ThreatModel = NEAR, attack: Any = None, **others: Any) -> Report:
    attack = PGD(threat, steps=20, random_start=False) if attack is None else attack
    return lit_adv.evaluate(model.eval(), (X, Y), {"pgd": attack}, **others)


def findings(model: nn.Module, threat: ThreatModel = NEAR, attack: Any = None, **others: Any) -> dict[str, Finding]:
    (audit,) = report_of(model, threat, attack, **others).audits
    return {finding.check: finding for finding in audit.findings}


def status(found: dict[str, Finding], wanted: str) -> set[str]:
    return {name for name, finding in found.items() if finding.status == wanted}


@pytest.mark.parametrize("threat", [NEAR, ThreatModel("l2", 0.5)], ids=["linf", "l2"])
def test_a_plain_network_passes(threat: ThreatModel) -> None:
    found = findings(Small(), threat)
    assert status(found, "WARN") == set()
    assert status(found, "SKIP") == {"black_box", "surrogate", "null"}
    assert found["blind"].n == len(X)
    assert found["slope"].n == len(X)


def test_a_linear_network_rises_exactly_as_predicted() -> None:
    model = Linear(3)
    with torch.no_grad():
        model.weight[2:] = 0
        model.bias[2:] = -1e3  # two classes: the margin is linear
    x = 0.3 + 0.4 * images(8)
    report = lit_adv.evaluate(model.eval(), (x, decided(model, x)), [PGD(ThreatModel("linf", 0.01), steps=2)])
    (finding,) = [finding for finding in report.audits[0].findings if finding.check == "slope"]
    assert list(finding.figures) == ["0.0002", "0.0025"]
    assert list(finding.figures.values()) == pytest.approx([1.0, 1.0], abs=1e-9)


@pytest.mark.filterwarnings("ignore:PGD. the gradient was exactly 0")
def test_rounding_that_hides_the_gradient() -> None:
    found = findings(Changed(rounded))
    assert found["blind"].figures == {"margin": 1.0, "cross-entropy": 1.0}
    assert {"blind", "everything"} <= status(found, "WARN")
    assert found["everything"].figures["broken"] != 1.0
    assert (found["slope"].status, found["slope"].said) == ("SKIP", "no image has a gradient to follow")


def test_rounding_with_a_straight_through_surrogate_passes() -> None:
    found = findings(Changed(rounded, lambda x: straight_through(rounded(x), x)))
    assert status(found, "WARN") == set()
    assert found["surrogate"].figures == {"difference": 0.0}


def test_a_gradient_scaled_down_is_found_though_steps_by_its_sign_are_not_misled() -> None:
    found = findings(Changed(Scaled.apply))
    assert status(found, "WARN") == {"slope"}
    assert all(value == pytest.approx(1e12, rel=0.3) for value in found["slope"].figures.values() if value is not None)


def test_a_gradient_that_points_backwards() -> None:
    found = findings(Changed(lambda x: straight_through(x, -x)))
    assert {"slope", "everything"} <= status(found, "WARN")
    assert found["slope"].figures["0.001"] == pytest.approx(-1, rel=0.1)


def test_sure_networks_blind_the_cross_entropy_alone() -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x) * 1e4
            return logits

    found = findings(Sure(), attack=NAttack(NEAR, steps=1, samples=4))
    assert found["blind"].status == "WARN"
    assert found["blind"].figures["margin"] == 0.0
    assert (found["blind"].figures["cross-entropy"] or 0) > 0.5


def test_a_surrogate_that_differs_from_the_deployed_answers() -> None:
    model = Changed(lambda x: x, lambda x: 0.9 * x)
    found = findings(model)
    with torch.no_grad():
        deployed, gentle = model(X), model.surrogate(X)
    assert found["surrogate"].status == "WARN"
    expected = float((deployed - gentle).abs().max() / deployed.abs().max())
    assert found["surrogate"].figures["difference"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:.*answers the same images differently")
def test_randomness_that_is_not_declared() -> None:
    found = findings(Undeclared())
    assert found["repeats"].status == "WARN"
    assert (found["repeats"].figures["difference"] or 0) > 0.01
    assert found["null"].status in ("WARN", "PASS")
    assert "pgd: null" in found["null"].figures


@pytest.mark.filterwarnings("ignore:.*answers the same images differently")
def test_an_answer_that_depends_on_the_batch() -> None:
    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x) + 0.05 * x.mean() * len(x)
            return logits + 0.02 * torch.arange(4) * len(x)

    assert findings(Together())["repeats"].status == "WARN"


def test_a_random_defence_that_says_so() -> None:
    found = findings(Noisy(Small(), 4, 0.02), attack=PGD(NEAR, steps=4))
    assert {"repeats", "surrogate", "black_box"} == status(found, "SKIP")
    assert {"slope", "blind"} <= status(found, "PASS")
    assert found["slope"].n == 16  # a quarter of 64
    assert found["null"].figures["pgd: null"] is not None


def test_a_model_without_a_gradient_is_blind_and_one_from_afar_is_skipped() -> None:
    black = NAttack(NEAR, steps=1, samples=4)
    found = findings(Detached(Small()), attack=black)
    assert found["blind"].status == "WARN"
    assert "gives answers without a gradient" in found["blind"].said
    assert {"single_step", "growth", "everything", "gain", "noise", "slope"} <= status(found, "SKIP")

    far = Detached(nn.Identity())
    far.__dict__["hidden"] = Small()  # no part of the module: it has no parameters
    far.net.forward = lambda x: far.__dict__["hidden"](x)
    found = findings(far, attack=black)
    assert status(found, "WARN") == set()
    assert "asked from afar" in found["blind"].said


def test_a_model_that_tells_labels_only() -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def forward(self, x: Tensor) -> Tensor:
            labels: Tensor = self.net(x).argmax(1)
            return labels

    from lit_adv.attacks import RandomNoise

    found = findings(Labels(), attack=Protocol(name="noise", attack=RandomNoise(NEAR), output="labels"))
    assert found["repeats"].figures == {"labels": 0.0}
    assert found["blind"].said == found["slope"].said == "the model tells labels only"
    assert status(found, "WARN") == set()


def test_the_first_images_that_the_model_gets_right() -> None:
    wrong = Y.clone()
    wrong[[0, 3]] = (wrong[[0, 3]] + 1) % 4
    asked: list[int] = []
    model = Small().eval()
    model.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    probing = Probing(model, 5)
    probing.add(Batch(X, wrong, 100 + torch.arange(16)))
    assert probing.full
    held = torch.cat([part.index for part in probing._parts])
    assert held.tolist() == [101, 102, 104, 105, 106]
    assert sum(asked) == 10  # no more than are needed, in parts of five
    few = Probing(model, 5, limit=3)
    few.add(Batch(X, wrong, torch.arange(16)))
    assert few.full
    assert torch.cat([part.index for part in few._parts]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="audit_images must be at least 1, got 0"):
        Probing(model, 0)


def test_no_image_right_leaves_nothing_to_probe() -> None:
    report = lit_adv.evaluate(Small().eval(), (X, (Y + 1) % 4), [PGD(NEAR, steps=1)])
    found = {finding.check: finding for finding in report.audits[0].findings}
    assert found["slope"].said == found["repeats"].said == "the model gets no image right"


@pytest.mark.parametrize(
    ("threat", "said"),
    [
        (ThreatModel("linf", 0.0), "the radius is 0"),
        (ThreatModel("l1", 1.0), "probes are made for linf and l2, not for l1"),
    ],
)
def test_threat_models_that_cannot_be_probed(threat: ThreatModel, said: str) -> None:
    found = findings(Small(), threat, PGD(threat, steps=1, step_size=0.1, random_start=False))
    assert found["growth"].said == found["noise"].said == said
    assert found["everything"].status == "PASS"  # its radius is its own


def test_without_a_radius_the_successes_give_one() -> None:
    threat = ThreatModel("l2", "inf")
    attack = PGD(threat, steps=60, step_size=0.2, random_start=False)
    report = report_of(Small(), threat, attack)
    records = report.outcomes[0].records
    radius = float(records.distance[records.verified].median())
    found = {finding.check: finding for finding in report.audits[0].findings}
    assert f"(at {radius:.4g}, the median distance of the successes)" in found["single_step"].said
    assert f"% at {2 * radius:.4g}" in found["growth"].said
    assert 0 < radius < math.inf


def test_probes_resume_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = Small()
    model.train()
    before = [p.clone() for p in model.parameters()]
    report = lit_adv.evaluate(model.eval(), (X, Y), [PGD(NEAR, steps=3)], dirpath=tmp_path)
    assert len(list((tmp_path / "audit").iterdir())) == 8
    asked: list[int] = []
    model.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    again = lit_adv.evaluate(model, (X, Y), [PGD(NEAR, steps=3)], dirpath=tmp_path)
    assert again.audits == report.audits
    assert sum(asked) < 16 * 16  # the small attacks are not made again
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


def test_how_much_is_probed_can_be_said() -> None:
    def probed(**given: Any) -> int | None:
        return findings(Small(), **given)["blind"].n

    assert probed() == 16
    assert probed(audit=5) == 5
    assert probed(audit=False) is probed(audit=0) is None
    assert probed(max_samples=7) == 7  # no more than the attacks look at


def test_a_model_that_fails_on_a_question_costs_no_report() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 8:  # half of the images, as the audit asks
                raise RuntimeError("no eight")
            logits: Tensor = self.net(x)
            return logits

    attack = Protocol(name="pgd", attack=PGD(NEAR, steps=2), chunk=5)
    with pytest.warns(UserWarning, match=r"the audit's probes failed \(RuntimeError: no eight\)"):
        found = findings(Picky(), attack=attack, max_samples=15)
    assert (found["repeats"].status, found["repeats"].said) == ("SKIP", "the probe failed (RuntimeError: no eight)")
    assert found["slope"].status == found["above_clean"].status == "PASS"  # the others were asked all the same


def test_several_threat_models_share_what_depends_on_none() -> None:
    attacks = {"a": PGD(NEAR, steps=2), "b": PGD(ThreatModel("l2", 0.3), steps=2), "c": PGD(NEAR, steps=4)}
    audits: list[Audited] = lit_adv.evaluate(Small().eval(), (X, Y), attacks).audits
    assert [(audit.norm, audit.eps) for audit in audits] == [("linf", 0.05), ("l2", 0.3)]
    assert [f for f in audits[0].findings if f.check == "everything"] == [
        f for f in audits[1].findings if f.check == "everything"
    ]


def test_a_refusal_is_no_success_of_a_probe() -> None:
    class Suspicious(Defense):
        """Refuses whatever is not one of the clean images."""

        num_classes, reject = 4, 4

        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            nearest = torch.cdist(x.flatten(1), X.flatten(1), p=math.inf).amin(1)
            return torch.cat([logits, logits.amax(1, keepdim=True) + 1e3 * (nearest[:, None] - 1e-3)], 1)

    found = findings(Suspicious())
    assert found["blind"].status == "PASS"
    assert found["everything"].said == "plain grey is no success on any of these images"
    assert found["gain"].figures["steps"] == found["gain"].figures["restarts"] == 0.0


def test_grey_that_is_no_success_is_not_asked_for() -> None:
    class Threshold(nn.Module):
        """Bright or dark, by the mean of the image against 0.55: grey is dark."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            gap = self.weight * 20 * (x.flatten(1).mean(1) - 0.55)
            return torch.stack([-gap, gap], 1)

    x = torch.cat([0.1 * X[:6], 1 - 0.1 * X[:6]])
    y = torch.tensor([0] * 6 + [1] * 6)
    (audit,) = lit_adv.evaluate(Threshold().eval(), (x, y), {"pgd": PGD(NEAR, steps=2)}).audits
    found = {finding.check: finding for finding in audit.findings}["everything"]
    assert (found.status, found.n, found.figures) == ("PASS", 6, {"broken": 1.0})


@pytest.mark.filterwarnings("ignore:PGD. the gradient was exactly 0")
def test_the_surrogate_that_the_report_s_attacks_borrow_is_what_is_probed() -> None:
    class Rounded(Defense):
        num_classes = 4

        def __init__(self) -> None:
            super().__init__()
            self.classifier = Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier((x * 16).round() / 16)

    own = findings(Rounded())
    lent = findings(Rounded(), attack=Protocol(name="pgd", attack=PGD(NEAR, steps=2), surrogate="classifier"))
    assert own["blind"].status == "WARN"
    assert lent["blind"].status == lent["everything"].status == "PASS"
    assert lent["gain"].said.endswith("(through classifier)")


def test_another_box() -> None:
    class Shifted(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.5)

    threat = ThreatModel("linf", 0.05, (-0.5, 0.5))
    (audit,) = lit_adv.evaluate(Shifted().eval(), (X - 0.5, Y), {"pgd": PGD(threat, steps=2)}).audits
    found = {finding.check: finding.status for finding in audit.findings}
    assert found["everything"] == found["slope"] == "PASS"

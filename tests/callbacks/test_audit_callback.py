"""The audit as a callback: it gathers images on the way and probes when the attacks have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Small
from pytorch_lightning import Trainer

from lit_adv.attacks import PGD
from lit_adv.callbacks import AttackEvaluation, Audit
from lit_adv.datamodules import Batch, Digits
from lit_adv.models import DigitsNet
from lit_adv.objectives import Standard
from lit_adv.probes import Probing
from lit_adv.tasks import Classification
from lit_adv.threat import ThreatModel

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "inference_mode": False, "log_every_n_steps": 1,
}  # fmt: skip


def attack(eps: float, **arguments: Any) -> AttackEvaluation:
    return AttackEvaluation(f"pgd_{eps:g}", PGD(ThreatModel(eps=eps), steps=3), **arguments)


@pytest.fixture(scope="module")
def task() -> Classification:
    torch.manual_seed(0)
    task = Classification(DigitsNet(filters=(4, 8)), Standard(), lambda p: torch.optim.Adam(p, lr=0.01))
    Trainer(**QUIET, max_epochs=2).fit(task, Digits(batch_size=32, max_train=600))
    return task


def test_its_findings_are_those_of_the_front_door(task: Classification) -> None:
    attacks, audit = [attack(0.05), attack(0.1)], Audit(10)
    data = Digits(batch_size=16, max_test=40)
    Trainer(**QUIET, callbacks=[audit, *attacks]).test(task, data, verbose=False)  # wherever it stands
    assert [(each.norm, each.eps) for each in audit.probed] == [("linf", 0.05), ("linf", 0.1)]
    model = task.model
    assert isinstance(model, DigitsNet)
    probing = Probing(model.eval(), 10, data="digits/test")
    for batch in data.test_dataloader():
        probing.add(Batch(*batch))
    outcomes = [each.outcome for each in attacks if each.outcome is not None]
    assert audit.probed == probing.audited(outcomes)
    assert {finding.n for finding in audit.probed[0].findings if finding.status == "PASS"} == {10}


def test_it_looks_at_no_more_images_than_the_attacks(task: Classification, tmp_path: Path) -> None:
    audit = Audit(dirpath=tmp_path)
    Trainer(**QUIET, callbacks=[attack(0.05, max_samples=6), audit]).test(task, Digits(max_test=40), verbose=False)
    (found,) = [finding for finding in audit.probed[0].findings if finding.check == "blind"]
    assert found.n is not None
    assert found.n <= 6
    assert (tmp_path / "audit" / "linf_0.05_fgsm").is_dir()


def test_without_attacks_there_is_nothing_to_audit(task: Classification) -> None:
    audit = Audit()
    Trainer(**QUIET, callbacks=[audit]).test(task, Digits(max_test=20), verbose=False)
    assert audit.probed == []
    with pytest.raises(ValueError, match="audit_images must be at least 1, got 0: leave the audit out"):
        Audit(0)


def test_it_draws_no_random_numbers_that_others_would_miss(task: Classification) -> None:
    def after(*callbacks: Any) -> float:
        torch.manual_seed(3)
        Trainer(**QUIET, callbacks=list(callbacks)).test(task, Digits(max_test=20), verbose=False)
        return float(torch.rand(()))

    assert after(attack(0.05), Audit(5)) == after(attack(0.05))


def test_small_networks_of_any_kind_are_probed() -> None:
    probing = Probing(Small().eval(), 4)
    assert not probing.full
    assert probing.audited([]) == []

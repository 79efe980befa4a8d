"""The front door: any loader, any attacks, one report; models that cannot be evaluated are told why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Small, decided, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_adv
from lit_adv.attacks import PGD, NAttack
from lit_adv.datamodules import Batch, Digits
from lit_adv.metrics import Records
from lit_adv.models import DigitsNet
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.threat import ThreatModel

X = images(12)
Y = decided(Small(), X)
QUICK = PGD(ThreatModel(eps=0.008), steps=3)


def records(report: Report) -> Records:
    (outcome,) = report.outcomes
    return outcome.records


def same(one: Records, other: Records) -> bool:
    return all(torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9) for a, b in
               zip(one.columns().values(), other.columns().values(), strict=True))  # fmt: skip


def triples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for place in torch.arange(12).split(5):
        yield X[place], Y[place], place


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), batch_size=5),
        [(X[:5], Y[:5]), (X[5:], Y[5:])],
        [Batch(X[:7], Y[:7], torch.arange(7)), Batch(X[7:], Y[7:], torch.arange(7, 12))],
        triples(),
    ],
    ids=["dataset", "pairs", "batches", "triples"],
)
def test_loaders_of_every_kind_give_the_same_records(loader: Any) -> None:
    assert same(records(lit_adv.evaluate(Small().eval(), loader, [QUICK])),
                records(lit_adv.evaluate(Small().eval(), (X, Y), [QUICK])))  # fmt: skip


@pytest.mark.parametrize("loader", [[{"image": X, "label": Y}], [(X,)], [X], [(X, Y.tolist())]])
def test_other_batches_are_refused(loader: Any) -> None:
    with pytest.raises(TypeError, match=r"a loader must yield \(image, label\) or \(image, label, index\) tensors"):
        lit_adv.evaluate(Small().eval(), loader, [QUICK])


def test_images_outside_the_box_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        lit_adv.evaluate(Small().eval(), (X * 255, Y), [QUICK])


def test_no_image_gives_an_empty_report() -> None:
    report = lit_adv.evaluate(Small().eval(), (X[:0], Y[:0]), [QUICK])
    assert len(records(report)) == 0
    assert report.summaries[0].robust_accuracy is None


def test_a_data_module_gives_its_test_images() -> None:
    model = DigitsNet(filters=(2, 4), hidden=8).eval()
    data = Digits(batch_size=16, max_test=40)
    report = lit_adv.evaluate(model, data, [QUICK])
    assert records(report).index.tolist() == sorted(data.dataset("test").index.tolist())
    assert report.data == "digits"
    assert report.model == "DigitsNet"
    with torch.no_grad():
        right = sum(int((model(b.image).argmax(1) == b.label).sum()) for b in data.test_dataloader())
    assert report.summaries[0].clean_accuracy == right / 40


def test_max_samples_are_the_first() -> None:
    report = lit_adv.evaluate(Small().eval(), [(X[:5], Y[:5]), (X[5:], Y[5:])], [QUICK], max_samples=7)
    assert records(report).index.tolist() == list(range(7))


def names(attacks: Any) -> list[str]:
    return [outcome.name for outcome in lit_adv.evaluate(Small().eval(), (X, Y), attacks).outcomes]


def test_names_are_given_or_made() -> None:
    assert names({"a": QUICK, "b": QUICK}) == ["a", "b"]
    assert names([QUICK, QUICK, Protocol(name="mine", attack=QUICK)]) == ["pgd", "pgd-2", "mine"]


@pytest.mark.parametrize(
    "attacks",
    [
        [Protocol(name="pgd-2", attack=QUICK), QUICK, QUICK],
        [QUICK, Protocol(name="pgd", attack=QUICK)],
        [QUICK, QUICK, Protocol(name="pgd-2", attack=QUICK)],
    ],
)
def test_names_that_are_made_avoid_those_given(attacks: list[Any]) -> None:
    found = names(attacks)
    assert len(set(found)) == len(attacks)
    for attack, name in zip(attacks, found, strict=True):
        assert not isinstance(attack, Protocol) or attack.name == name


def test_names_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        names([Protocol(name="a", attack=QUICK), Protocol(name="a", attack=QUICK)])


def test_a_single_attack_is_a_list_of_one() -> None:
    assert names(QUICK) == ["pgd"]
    assert names(Protocol(name="a", attack=QUICK)) == ["a"]


def test_mapping_of_protocols_names_them() -> None:
    report = lit_adv.evaluate(Small().eval(), (X, Y), {"a": Protocol(name="b", attack=QUICK, budget=2)})
    assert (report.outcomes[0].name, report.outcomes[0].budget) == ("a", 2)


@pytest.mark.parametrize("attacks", [[], {}])
def test_no_attack_is_refused(attacks: Any) -> None:
    with pytest.raises(ValueError, match=r"attacks is empty: give at least one, e.g. \[PGD\(\)\]"):
        names(attacks)


@pytest.mark.parametrize("attacks", [[PGD], ["pgd"], {"a": lambda model, x, y: x}])
def test_what_is_no_attack_is_refused(attacks: Any) -> None:
    with pytest.raises(TypeError, match=r"attacks must be attacks of lit_adv\.attacks or protocols"):
        names(attacks)


def test_budget_is_that_of_attacks_without_a_protocol() -> None:
    attack = NAttack(ThreatModel(eps=0.001), steps=50, samples=10)
    own = Protocol(name="own", attack=attack, budget=30)
    report = lit_adv.evaluate(Small().eval(), (X, Y), [attack, own], budget=20)
    assert [outcome.budget for outcome in report.outcomes] == [20, 30]
    assert [int(outcome.records.queries.max()) for outcome in report.outcomes] == [20, 30]


def test_records_and_report_are_written_and_resumed_from(tmp_path: Path) -> None:
    first = lit_adv.evaluate(Counting(Small(), X).eval(), (X, Y), [QUICK], dirpath=tmp_path)
    assert {"report.html", "report.json", "report.csv", "records_pgd.csv"} <= {p.name for p in tmp_path.iterdir()}
    watched = Counting(Small(), X).eval()
    again = lit_adv.evaluate(watched, (X, Y), [QUICK], dirpath=tmp_path, audit=False)
    assert not watched.seen.any()
    assert same(records(first), records(again))


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written as ever, pictures and tables are not."""
    monkeypatch.setattr(Report, "write", lambda self, folder: {})


@pytest.mark.usefixtures("unwritten")
def test_other_images_in_the_same_folder_start_anew(tmp_path: Path) -> None:
    other = images(12, seed=5)
    y = decided(Small(), other)
    lit_adv.evaluate(Small().eval(), (X, Y), [QUICK], dirpath=tmp_path)
    found = lit_adv.evaluate(Small().eval(), (other, y), [QUICK], dirpath=tmp_path)
    assert same(records(found), records(lit_adv.evaluate(Small().eval(), (other, y), [QUICK])))

    asked: list[int] = []
    model = Small().eval()
    model.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    again = lit_adv.evaluate(model, (other, y), [QUICK], dirpath=tmp_path, audit=False)
    assert same(records(again), records(found))
    assert asked == []  # the newer records are known


@pytest.mark.usefixtures("unwritten")
def test_the_same_images_with_other_labels_start_anew(tmp_path: Path) -> None:
    lit_adv.evaluate(Small().eval(), (X, Y), [QUICK], dirpath=tmp_path)
    found = lit_adv.evaluate(Small().eval(), (X, (Y + 1) % 4), [QUICK], dirpath=tmp_path)
    assert not records(found).clean_correct.any()


class Normed(nn.Module):
    """Batch norm and dropout before the network: both act otherwise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.net = nn.BatchNorm2d(3).double(), nn.Dropout(0.2), Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(self.norm(x)))


@pytest.mark.parametrize("target", ["none", "least_likely"])
def test_model_in_training_mode_is_left_as_it_was(target: Any) -> None:
    model = Normed()
    model.drop.eval()  # some parts in one mode, some in the other
    y = decided(Normed().eval(), X)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    protocol = Protocol(name="pgd", attack=QUICK, target=target)
    with pytest.warns(UserWarning, match="Normed was in training mode: it is attacked in eval mode and restored"):
        report = lit_adv.evaluate(model, (X, y), [protocol])
    assert same(records(report), records(lit_adv.evaluate(Normed().eval(), (X, y), [protocol])))
    assert [module.training for module in (model, model.norm, model.drop, model.net)] == [True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_are_an_error_unless_announced() -> None:
    model = nn.Sequential(Small(), nn.Softmax(1)).eval()
    with pytest.raises(
        ValueError, match=r"Sequential returns probabilities .* remove its softmax, or say output='probs'"
    ):
        lit_adv.evaluate(model, (X, Y), [QUICK])
    attack = NAttack(ThreatModel(eps=0.02), steps=4, samples=10, step_size=0.1, sigma=0.5, shrink=0.1)
    announced = lit_adv.evaluate(model, (X, Y), [Protocol(name="a", attack=attack, output="probs")])
    # log-probabilities have the margins of logits
    logits = lit_adv.evaluate(Small().eval(), (X, Y), [Protocol(name="a", attack=attack, access="probs")])
    assert same(records(announced), records(logits))
    assert records(announced).verified.any()


def test_nan_weights_are_an_error() -> None:
    model = Small().eval()
    with torch.no_grad():
        model.first[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Small answers 12 of 12 images with NaN or inf; .* NaN or inf in first"):
        lit_adv.evaluate(model, (X, Y), [QUICK])


def test_nan_for_a_single_image_ends_that_image_alone() -> None:
    class Sick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Small()
            self.register_buffer("sick", X[3])

        def forward(self, x: Tensor) -> Tensor:
            close = (x - self.sick).abs().amax((1, 2, 3)) < 0.01
            return self.inner(x).masked_fill((close & (x != self.sick).flatten(1).any(1))[:, None], torch.nan)

    report = lit_adv.evaluate(Sick().eval(), (X, Y), [QUICK])
    healthy = records(lit_adv.evaluate(Small().eval(), (X, Y), [QUICK]))
    found = records(report)
    others = torch.arange(12) != 3
    assert same(found[others], healthy[others])
    assert bool(found.clean_correct[3])
    assert not bool(found.verified[3])
    assert any("held NaN and counted as no success" in note for note in report.outcomes[0].notes)


@pytest.mark.parametrize("wrong", [4, -1])
def test_labels_beyond_the_classes_are_an_error(wrong: int) -> None:
    y = Y.clone()
    y[7] = wrong
    with pytest.raises(ValueError, match="labels must be classes 0 to 3 of the model"):
        lit_adv.evaluate(Small().eval(), (X, y), [QUICK])


def test_a_model_of_another_data_set_is_an_error() -> None:
    model = DigitsNet(num_classes=7, filters=(2, 2), hidden=4).eval()
    with pytest.raises(ValueError, match="DigitsNet answers 7 classes and the data set has 10"):
        lit_adv.evaluate(model, Digits(max_test=20), [QUICK])


def test_accuracy_at_chance_is_remarked() -> None:
    x = images(200)
    own = decided(Small(), x)
    chance = lit_adv.evaluate(Small().eval(), (x, torch.arange(200) % 4), [PGD(ThreatModel(eps=0.0), steps=1)])
    assert any("that of guessing" in note for note in chance.outcomes[0].notes)
    right = lit_adv.evaluate(Small().eval(), (x, own), [PGD(ThreatModel(eps=0.0), steps=1)])
    assert right.outcomes[0].notes == ()


def test_too_few_images_say_nothing_of_chance() -> None:
    report = lit_adv.evaluate(Small().eval(), (X[:4], (Y[:4] + 1) % 4), [QUICK])
    assert report.outcomes[0].notes == ()


def test_the_number_of_images_holds_for_protocols_too() -> None:
    model, x = Small().eval(), images(12)
    protocols = [Protocol(name="all", attack=PGD(steps=1)), Protocol(name="few", attack=PGD(steps=1), max_samples=2)]
    report = lit_adv.evaluate(model, (x, decided(model, x)), protocols, max_samples=5, audit=False)
    assert [len(outcome.records) for outcome in report.outcomes] == [5, 2]


def test_an_unusable_folder_is_told_before_the_work_and_a_full_one_costs_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Counting(Small(), images(4)).eval(), images(4)
    data = (x, decided(Small(), x))
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(OSError, match="taken"):
        lit_adv.evaluate(model, data, PGD(steps=1), dirpath=taken)
    assert not model.seen.any()

    def full(*_: Any) -> None:
        raise OSError("cannot write the report (No space left on device)")

    monkeypatch.setattr(Report, "write", full)
    with pytest.warns(UserWarning, match="No space left on device.; the report is returned"):
        report = lit_adv.evaluate(model, data, PGD(steps=1), dirpath=tmp_path / "full", audit=False)
    assert len(report.outcomes) == 1

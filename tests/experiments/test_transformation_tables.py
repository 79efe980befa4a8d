"""Tables and figures of adversarial transformation: their cells, the paper's figures in them, and that they resume."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Digits
from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.draws import Draws
from lit_adv.experiments import (
    bpda_steps,
    choice_of_f_b,
    delta_sweep,
    eot_samples,
    transformation,
    transformation_blackbox,
)
from lit_adv.experiments.transformation import Bench, Standing, cosines, floor, robust, standing, within
from lit_adv.experiments.transformation_setup import FAMILIES, NETWORK, SIZES, Family, command_line
from lit_adv.losses import cross_entropy
from lit_adv.metrics import Records
from lit_adv.models import DigitsNet
from lit_adv.tasks.checkpoint import FORMAT, KEY
from lit_adv.trial import Trial

NET: dict[str, Any] = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [8, 8], "hidden": 16}}
SMALL: dict[str, Any] = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 4], "hidden": 8}}
DIGITS = Family(
    Digits, "digits", 0.1, 4, 0.05, (3, 0.05), 0.3, (0.1, 0.3), (0.1, 0.3), ("digits_standard", ()),
    ("digits_madry", ()), {"A net": ("digits_standard", ("--seed_everything=1",)), "B": ("digits_madry", ())},
)  # fmt: skip
TINY = ["--data", "digits", "--images", "4", "--judges", "3", "--steps", "2", "--eot", "2"]
COMMANDS: dict[str, tuple[Callable[[list[str]], list[Path]], list[str], int]] = {
    "choice_of_f_b": (choice_of_f_b.main, ["--trained_for", "1", "20", "--draws", "4"], 4),
    "bpda_steps": (bpda_steps.main, ["--of_g", "1", "3"], 2),
    "delta_sweep": (delta_sweep.main, ["--deltas", "0.1", "0.3"], 2),
    "eot_samples": (eot_samples.main, ["--samples", "1", "2"], 6),
    "transformation_blackbox": (transformation_blackbox.main, ["--budgets", "40", "20", "--attacked", "2"], 6),
}


@pytest.fixture(scope="module")
def digits_net() -> nn.Module:
    """A small network, trained for a second."""
    torch.manual_seed(0)
    data = Digits()
    data.setup()
    image, label, _ = data.training_images()
    network = DigitsNet(**NET["init_args"])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(60):
        part = slice(64 * step % 1024, 64 * step % 1024 + 64)
        optimizer.zero_grad()
        cross_entropy(network(image[part]), label[part]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.fixture
def calls(digits_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Nothing is trained: every classifier is one small network, before it g as the flags ask. What was asked for."""
    asked: list[tuple[str, ...]] = []

    def given(name: str, config: str, *flags: str, folder: Path) -> Path:
        asked.append((name, config, *flags))
        path = folder / f"{name}.ckpt"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        behind = "transformation" in config
        recipe = SMALL if "reference" in config else NET
        network: nn.Module = DigitsNet(filters=(4, 4), hidden=8) if "reference" in config else digits_net
        if behind:
            words = [flag.removeprefix(f"{NETWORK}.init_args.").split("=") for flag in flags if NETWORK in flag]
            changes = {name: float(value) for name, value in words if name in ("delta", "steps")}
            # two steps of g, not thirteen, for speed
            settings = {"delta": 0.3, **changes, "steps": int(changes.get("steps", 2))}
            network = AdversarialTransformation(digits_net, DigitsNet(filters=(4, 4), hidden=8), **settings)  # type: ignore[arg-type]
            place = f"{AdversarialTransformation.__module__}.{AdversarialTransformation.__name__}"
            recipe = {"class_path": place, "init_args": {"classifier": NET, "reference": SMALL, **settings}}
        weights = {f"model.{key}": value for key, value in network.state_dict().items()}
        torch.save({KEY: {"format": FORMAT, "model": recipe}, "state_dict": weights}, path)
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformation, "trained", given)
    monkeypatch.setitem(FAMILIES, "digits", DIGITS)
    return asked


def bench(*flags: str) -> Bench:
    return Bench(command_line("", {}, [*TINY, *flags]))


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_writes_its_table_and_figure_and_goes_on(
    name: str, calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags, rows = COMMANDS[name]
    files = main([*TINY, *flags])
    assert [path.name for path in files] == [f"{name}.md", f"{name}.csv", f"{name}.png"]
    text, table = files[0].read_text(), cells(files[1])
    assert len(table) == rows
    for word in ("Delta 0.3", "N 13", "mode least_likely", "random start", "box False", "first 4 test", "REDUCED SIZE",
                 "masking gradients", "seeds"):  # fmt: skip
        assert word in text
    assert files[2].read_bytes().startswith(b"\x89PNG")
    shares = [cell.split()[0] for row in table for head, cell in row.items() if "clean" in head and "paper" not in head]
    assert all(0 <= float(share) <= 100 for share in shares)

    def never(*_: object) -> None:
        raise AssertionError("this has been measured before")

    for owner, method in ((Trial, "_attack"), (Bench, "_right"), (Bench, "_drift"), (bpda_steps, "cosines")):
        monkeypatch.setattr(owner, method, never)
    again = main([*TINY, *flags])
    assert [path.read_bytes() for path in again[:2]] == [text.encode(), files[1].read_bytes()]


def test_a_broken_run_goes_on_with_what_is_missing(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, flags = delta_sweep.main, ["--deltas", "0.3"]
    attack, left = Trial._attack, [1]

    def breaks(trial: Trial) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        attack(trial)

    monkeypatch.setattr(Trial, "_attack", breaks)
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, *flags])
    left[0] = 1  # of two attacks one is done
    broken = main([*TINY, *flags])[1].read_text()
    monkeypatch.setattr(Trial, "_attack", attack)
    assert broken == main([*TINY, *flags, "--folder", "elsewhere"])[1].read_text()


def test_the_papers_table_of_f_b(calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "tried", lambda *_: records(clean_correct=[1, 0]))
    files = choice_of_f_b.main([*TINY, "--trained_for", "1", "2", "5", "10", "15", "20", "--draws", "2"])
    table = cells(files[1])
    clean = [81.8, 81.6, 82.4, 83.0, 82.4, 82.2, 82.7, 82.9]
    attacked = [30.6, 30.7, 40.0, 46.4, 62.3, 63.1, 62.9, 80.5]
    largest = [0.005, 0.033, 0.036, 0.067, 0.130, 0.133, 0.136, 0.272]
    assert [float(row["clean: paper"]) for row in table] == clean
    assert [float(row["BPDA-I: paper"]) for row in table] == attacked
    assert [float(row["largest: paper"]) for row in table] == largest
    assert [row["f_b"].split()[0] for row in table] == ["untrained", "1", "2", "5", "10", "15", "20", "adversarial"]
    text = files[0].read_text()
    assert "0.272" in text
    assert "impossible" in text
    assert all(float(row["x - E g(x): largest"]) <= 0.3 + 1e-6 for row in table)


def test_the_papers_table_of_black_box_attacks(calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = records(clean_correct=[1, 1], verified=[1, 1], first_hit=[15, 30])
    monkeypatch.setattr(Bench, "tried", lambda *_: broken)
    files = transformation_blackbox.main([*TINY, "--budgets", "20", "40", "--attacked", "2"])
    table = cells(files[1])
    paper = {"none": [92.9, 1.3, 3.6, 5.8], "Madry": [81.7, 77.5, 72.1, 78.4], "ours": [82.9, 78.1, 82.0, 81.9]}
    for row in table[1::2]:
        name, _, label = row["model"].partition(" ")
        assert label == "(paper, CIFAR-10)"
        assert [float(cell) for head, cell in row.items() if head != "model" and cell] == paper[name]
    assert [row["model"] for row in table[::2]] == ["none", "Madry", "ours"]
    walks = [[float(row[f"HopSkipJump, {budget} queries"]) for budget in (20, 40)] for row in table[::2]]
    assert walks == [[50.0, 0.0]] * 3
    text = files[0].read_text()
    assert "source A net:" in text
    assert "source B:" in text


def test_the_papers_claims_stand_beside_the_other_figures(calls: list[tuple[str, ...]]) -> None:
    told = {bpda_steps: "N > 5", delta_sweep: "0.2 is best", eot_samples: "up to about 100"}
    for module, claim in told.items():
        assert any("Paper" in note and claim in note for note in module.NOTES)
    assert command_line("", {}, []).eot == SIZES["eot"].small
    assert command_line("", {}, ["--full"]).eot == 500
    assert command_line("", eot_samples.SIZES, ["--full"]).samples[-1] == 500
    assert command_line("", choice_of_f_b.SIZES, ["--full"]).draws == 5000
    assert command_line("", bpda_steps.SIZES, []).of_g == (1, 2, 3, 5, 8, 13)
    assert command_line("", transformation_blackbox.SIZES, ["--full"]).budgets == (1000, 5000, 10000)
    family = FAMILIES["cifar10"]
    assert (family.eps, family.steps, family.step_size, family.transfer) == (0.031, 50, 0.002, (20, 0.003))
    assert (min(family.deltas), max(family.deltas), family.pair) == (0.05, 0.4, (0.1, 0.2))


def test_networks_are_named_by_their_size_and_full_ones_as_they_are_configured(calls: list[tuple[str, ...]]) -> None:
    bench("--full").defence(steps=13, delta=0.3)
    assert calls == [("digits_reference", "digits_reference"), ("digits_transformation", "digits_transformation")]
    calls.clear()
    bench("--full").defence(steps=5)
    assert calls[-1] == ("digits_transformation_steps5", "digits_transformation", f"{NETWORK}.init_args.steps=5")
    calls.clear()
    bench("--max_train", "300", "--epochs", "1").defence(delta=0.1)
    assert [call[1] for call in calls] == ["digits_reference", "digits_transformation"]
    tag = "1_epochs_300_max_train"
    assert [call[0] for call in calls] == [f"digits_reference_{tag}", f"digits_transformation_delta0.1_{tag}"]
    assert {"--data.max_train=300", "--epochs=1", f"{NETWORK}.init_args.delta=0.1"} < set(calls[1])
    path = "checkpoints/digits_reference_1_epochs_300_max_train.ckpt"
    assert f"{NETWORK}.init_args.reference.init_args.path={path}" in calls[1]


def test_a_further_configuration_sets_the_size_of_training(calls: list[tuple[str, ...]], tmp_path: Path) -> None:
    small = tmp_path / "tiny.yaml"
    small.write_text("epochs: 1\n")
    bench("--config", str(small)).reference()
    ((first, *rest),) = calls
    assert first.startswith("digits_reference_tiny_")
    assert rest == ["digits_reference", "--config", str(small)]
    calls.clear()
    small.write_text("epochs: 2\n")  # other content, other checkpoints
    bench("--config", str(small)).reference()
    assert calls[0][0].startswith("digits_reference_tiny_")
    assert calls[0][0] != first
    with pytest.raises(SystemExit):
        command_line("", {}, ["--config", "missing.yaml"])


def test_an_untrained_f_b_is_built_as_the_trained_one(calls: list[tuple[str, ...]]) -> None:
    bench().untrained()
    (flag,) = [word for word in calls[-1] if word.startswith(f"{NETWORK}.init_args.reference=")]
    assert json.loads(flag.split("=", 1)[1]) == SMALL
    assert transformation.without_nothing({"a": None, "b": {"c": None, "d": 0}}) == {"b": {"d": 0}}


def test_shares_over_draws_are_those_of_a_plain_loop(generator: torch.Generator) -> None:
    right = torch.rand(7, 5, generator=generator) < 0.6
    found = standing(right)
    shares = [sum(right[i, d].item() for i in range(7)) / 7 for d in range(5)]
    mean = sum(shares) / 5
    assert found.mean == pytest.approx(mean)
    assert found.spread == pytest.approx(math.sqrt(sum((share - mean) ** 2 for share in shares) / 4))
    assert found.majority == pytest.approx(sum(sum(row) > 2 for row in right.tolist()) / 7)
    assert found.all == pytest.approx(sum(all(row) for row in right.tolist()) / 7)
    assert standing(torch.tensor([[True], [False]])) == Standing(0.5, 0.0, 0.5, 0.5)


def records(**columns: list[Any]) -> Records:
    count = len(columns["clean_correct"])
    every = Records.empty().columns()
    return Records(**{name: torch.tensor(columns.get(name, [0] * count)) for name in every})


def test_robust_shares_count_images_wrong_at_first_as_broken() -> None:
    found = robust(
        records(
            clean_correct=[1, 1, 1, 1, 0],
            claimed=[0, 1, 1, 0, 0],
            verified=[0, 1, 0, 0, 0],
            verified_any=[0, 1, 1, 1, 0],
            verified_mean=[0.0, 0.8, 0.2, 0.6, 0.0],
        )
    )
    tie = robust(records(clean_correct=[1], verified_any=[1], verified_mean=[0.5]))
    assert tie.majority == 0  # no more than half of the draws are right
    assert found.mean == pytest.approx((1 + 0.2 + 0.8 + 0.4) / 5)
    assert found.majority == pytest.approx(2 / 5)  # the fourth falls in most draws, though no draw of the attack's did
    assert found.all == pytest.approx(1 / 5)


def test_budgets_are_read_off_one_run() -> None:
    found = records(
        clean_correct=[1, 1, 1, 1, 0], verified=[1, 1, 0, 0, 0], first_hit=[10, 30, 5, -1, -1], index=[0, 1, 2, 3, 4]
    )
    assert [within(found, budget) for budget in (9, 10, 29, 30)] == pytest.approx([0.8, 0.6, 0.6, 0.4])


def test_floor_is_what_the_mean_of_noise_shows() -> None:
    draws, values, delta = 50, 64, 0.2
    noise = delta * (2 * torch.rand(400, draws, values, dtype=torch.float64) - 1)
    off = noise.mean(1).abs()
    expected = floor(delta, draws, values)
    assert off.amax(1).median().item() == pytest.approx(expected.largest, rel=0.03)
    assert off.mean().item() == pytest.approx(expected.mean, rel=0.03)
    paper = floor(0.2, 5000, 3072)
    assert paper.largest == pytest.approx(3.7 * 0.2 / math.sqrt(3 * 5000), rel=0.01)


def test_drift_is_that_of_a_plain_loop_and_of_noise_alone(calls: list[tuple[str, ...]]) -> None:
    setup = bench()
    x, _, index = setup.images()
    defence = setup.defence()
    fixed = defence.variant(random_start=False)
    zero = torch.zeros_like(index)
    off = (fixed.transform(x, Draws(0, index, zero)) - x).double().flatten(1).abs()
    assert setup.drift(fixed, 3).largest == pytest.approx(off.amax(1).mean().item(), abs=1e-6)
    assert setup.drift(fixed, 3).mean == pytest.approx(off.mean().item(), abs=1e-6)
    noise = setup.drift(defence.variant(mode="noise"), 400)
    expected = floor(defence.delta, 400, 64)
    assert noise.mean == pytest.approx(expected.mean, rel=0.15)
    assert noise.largest == pytest.approx(expected.largest, rel=0.25)


def test_cosine_with_plain_autograd_is_one_and_with_a_scaled_sum_less(calls: list[tuple[str, ...]]) -> None:
    setup = bench()
    x, y, _ = setup.images()
    defence = setup.defence().variant(random_start=False)
    assert cosines(defence, x, y, "unrolled").min().item() == pytest.approx(1.0, abs=1e-5)
    found = cosines(defence, x, y, "tanh_scaled")

    def gradient(ask: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> Tensor:
        leaf = image[None].clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(ask(leaf), label[None]).sum(), leaf)[0].flatten()

    for place in range(3):
        own, other = (gradient(ask, x[place], y[place]) for ask in (defence, defence.tanh_scaled))
        assert found[place].item() == pytest.approx(torch.cosine_similarity(own, other, 0).item(), abs=1e-4)


def test_the_white_box_attack_goes_as_far_in_fewer_steps(calls: list[tuple[str, ...]]) -> None:
    few, all_ = bench("--steps", "2").pgd(), bench("--steps", "4").pgd()
    assert few.steps * few._step_size() == pytest.approx(all_.steps * all_._step_size())
    assert bench("--steps", "8").pgd().step_size == DIGITS.step_size


def test_figures_of_other_settings_or_weights_are_made_anew(calls: list[tuple[str, ...]]) -> None:
    setup, made = bench(), []

    def make() -> int:
        made.append(1)
        return len(made)

    defence = setup.defence()
    assert [setup.kept("n", defence, {"draws": draws}, make) for draws in (1, 1, 2)] == [1, 1, 2]
    assert setup.kept("n", defence.variant(steps=3), {"draws": 1}, make) == 3

"""Codes against their definition in plain Python, the ramps' gradient against differences, and what a code hides."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contracts.nets import images
from torch import Tensor, nn

from lit_adv.attacks import PGD, ZOO
from lit_adv.datamodules import Batch, Digits
from lit_adv.defenses import LSPGA, Thermometer
from lit_adv.defenses.thermometer import bucket, edges
from lit_adv.models import DigitsNet, ModelA
from lit_adv.objectives import Madry
from lit_adv.oracle import QueryOracle
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel

ROOT = Path(__file__).resolve().parents[2]
LEVELS = (2, 4, 8, 16, 32, 256)


class Weighted(nn.Module):
    """A random linear classifier of codes, float64."""

    num_classes = 3

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, code: Tensor) -> Tensor:
        return code.flatten(1) @ self.weight.T


def coded(levels: int = 16, channels: int = 1, side: int = 4, code: Any = "thermometer") -> Thermometer:
    return Thermometer(Weighted(channels * levels * side**2), levels, code, channels).eval()


def pixels(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_codes_are_those_of_the_definition(levels: int, channels: int) -> None:
    x = images(2, 3, (channels, 4, 4))
    thermometer, one_hot = (coded(levels, channels, code=code).encode(x) for code in ("thermometer", "one_hot"))
    assert thermometer.shape == one_hot.shape == (2, channels * levels, 4, 4)
    for n in range(2):
        for c in range(channels):
            for row in range(4):
                for column in range(4):
                    index = math.floor(0.99999 * x[n, c, row, column].item() * levels)
                    for level in range(levels):
                        place = n, c * levels + level, row, column
                        assert thermometer[place].item() == float(level <= index)
                        assert one_hot[place].item() == float(level == index)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_grow_with_the_pixel_and_change_at_the_edges_alone(levels: int, dtype: torch.dtype) -> None:
    model = coded(levels, side=1)
    x = torch.linspace(0, 1, 5001, dtype=dtype).view(-1, 1, 1, 1)
    code = model.encode(x).flatten(1)
    assert code.dtype == dtype
    assert (code.diff(dim=0) >= 0).all()
    assert (code.diff(dim=1) <= 0).all()
    assert torch.equal(code.sum(1), model.index(x).flatten() + 1)
    assert code.sum(1)[[0, -1]].tolist() == [1, levels]
    least, most = edges(levels, dtype, x.device)
    assert torch.equal(bucket(least, levels), torch.arange(levels, dtype=dtype))
    assert torch.equal(bucket(most, levels), torch.arange(levels, dtype=dtype))
    assert torch.equal(torch.nextafter(most[:-1], torch.tensor(2, dtype=dtype)), least[1:])
    assert least[0] == 0
    assert most[-1] == 1
    torch.testing.assert_close(least, torch.arange(levels, dtype=dtype) / levels / 0.99999)


def test_a_thermometer_is_the_sum_of_the_one_hot_code_from_above() -> None:
    x = images(3, 1, (2, 4, 4))
    one_hot = coded(8, 2, code="one_hot").encode(x).view(3, 2, 8, 4, 4)
    thermometer = coded(8, 2).encode(x).view(3, 2, 8, 4, 4)
    for level in range(8):
        assert torch.equal(thermometer[:, :, level], one_hot[:, :, level:].sum(2))


def test_pixels_outside_the_box_are_cut_to_it() -> None:
    model = coded(16, side=1)
    assert model.index(pixels(-0.3, -0.0, 1.0, 1.4)).flatten().tolist() == [0, 0, 15, 15]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_never_leaves_the_last_bucket(dtype: torch.dtype) -> None:
    model = coded(16, side=1)
    code = model.encode(pixels(0, 0.5, 1, dtype=dtype))
    assert code.dtype == dtype
    assert code.flatten(1).sum(1).tolist() == [1, 8, 16]  # 0.5 falls short of bucket 8 by the factor


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.full((1, 1, 4, 4), torch.nan), "mend what makes NaN"),
        (torch.full((1, 1, 4, 4), 255.0), r"values in \[255, 255\]: divide"),
        (torch.ones(1, 1, 4, 4, dtype=torch.uint8), "got torch.uint8: divide 8-bit images by 255"),
        (torch.rand(1, 3, 4, 4), r"shape \(n, 1, H, W\), got \(1, 3, 4, 4\)"),
        (torch.rand(1, 4, 4), r"got \(1, 4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(x: Tensor, told: str) -> None:
    for method in ("forward", "surrogate", "hard", "wide"):
        with pytest.raises(ValueError, match=told):
            getattr(coded(), method)(x)


def test_a_classifier_of_other_codes_is_refused() -> None:
    assert Thermometer(ModelA(in_channels=16)).channels == 1
    assert Thermometer(ModelA(in_channels=24), levels=8).channels == 3
    with pytest.raises(ValueError, match=r"a code of 16 levels .* takes 1 channels .* in_channels=16"):
        Thermometer(ModelA())
    with pytest.raises(ValueError, match="takes 16 channels"):
        Thermometer(ModelA(in_channels=16), levels=8, channels=3)
    with pytest.raises(ValueError, match="levels must be a whole number from 2 to 256, got 1"):
        Thermometer(ModelA(in_channels=16), levels=1)
    with pytest.raises(ValueError, match="code must be"):
        Thermometer(ModelA(in_channels=16), code="unary")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes must be given, for Linear"):
        Thermometer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="channels must be given, for Weighted"):
        Thermometer(Weighted(16))


@pytest.mark.parametrize("code", ["thermometer", "one_hot"])
def test_surrogates_have_the_value_of_the_model(code: Any) -> None:
    model, x = coded(code=code), images(5, 2, (1, 4, 4))
    for method in (model.surrogate, model.hard, model.wide):
        torch.testing.assert_close(method(x), model(x), rtol=0, atol=1e-12)
    soft = torch.rand(5, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(model.surrogate(soft), model.classifier(soft))
    assert torch.equal(model.surrogate(model.encode(x)), model(x))


@pytest.mark.parametrize("code", ["thermometer", "one_hot"])
@pytest.mark.parametrize(("below", "above"), [(1, 0), (2, 2)])
@pytest.mark.parametrize("levels", [4, 16])
def test_the_surrogates_gradient_is_that_of_the_ramp(code: Any, below: int, above: int, levels: int) -> None:
    """Differences of a ramp written down again, one pixel at a time."""
    model, x = coded(levels, 3, 2, code), images(1, 4, (3, 2, 2))

    def rising(value: float, level: int) -> float:
        return 1.0 if level == 0 else min(max((levels * value - (level - below)) / (below + above), 0.0), 1.0)

    def worth(x: Tensor, weight: Tensor) -> float:
        total = 0.0
        for c, row, column in ((c, i, j) for c in range(3) for i in range(2) for j in range(2)):
            for level in range(levels):
                value = rising(x[0, c, row, column].item(), level)
                if code == "one_hot" and level + 1 < levels:
                    value -= rising(x[0, c, row, column].item(), level + 1)
                total += value * weight[c * levels + level, row, column].item()
        return total

    leaf = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad((model.wide if above else model.surrogate)(leaf)[0, 1], leaf)
    assert isinstance(model.classifier, Weighted)
    weight = model.classifier.weight[1].detach().view(3 * levels, 2, 2)
    h = 1e-7
    for c, row, column in ((c, i, j) for c in range(3) for i in range(2) for j in range(2)):
        step = torch.zeros_like(x)
        step[0, c, row, column] = h
        slope = (worth(x + step, weight) - worth(x - step, weight)) / (2 * h)
        assert slopes[0, c, row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_the_code_has_no_gradient_of_its_own() -> None:
    model, x = coded(), images(4, 5, (1, 4, 4)).requires_grad_()
    (absent,) = torch.autograd.grad(model(x).sum(), x, allow_unused=True)
    assert absent is None
    (zero,) = torch.autograd.grad(model.hard(x).sum(), x)
    assert (zero == 0).all()
    (ramp,) = torch.autograd.grad(model.surrogate(x)[:, 0].sum(), x)
    below_the_last = model.index(x) < 15
    assert (ramp != 0)[below_the_last].all()
    assert (ramp == 0)[~below_the_last].all()
    (wide,) = torch.autograd.grad(model.wide(x)[:, 0].sum(), x)
    assert (wide != 0).all()


@pytest.mark.parametrize("code", ["thermometer", "one_hot"])
def test_on_an_edge_the_next_level_rises_and_black_pixels_can_move(code: Any) -> None:
    """Of a ramp over one bucket exactly one level has a slope at each pixel, and none in the last bucket."""
    model = coded(8, side=1, code=code)
    for eighth in range(9):
        x = pixels(eighth / 8).requires_grad_()
        slopes = [torch.autograd.grad(model.ramp(x)[0, level, 0, 0], x)[0].item() for level in range(8)]
        expected = [0.0] * 8
        if eighth < 7:
            expected[eighth + 1] = 8.0
            expected[eighth] = -8.0 if code == "one_hot" else 0.0
        assert slopes == expected
        (wide,) = torch.autograd.grad(model.wide(x)[0, 0], x)
        assert wide.item() != 0


def test_attacks_without_the_surrogate_move_nothing_and_with_it_do() -> None:
    model, x = coded(), 0.1 + 0.8 * images(6, 6, (1, 4, 4))
    y = model(x).argmax(1)
    attack = PGD(ThreatModel("linf", 0.3), 20, 0.03, random_start=False)
    with pytest.warns(UserWarning, match="gradient was exactly 0 or not finite for 6 of 6 images"):
        blind = attack(QueryOracle(model, 6, surrogate="hard"), x, y)
    assert not blind.success.any()
    assert torch.equal(blind.x_adv, x)
    with pytest.raises(ValueError, match=r"answers without a gradient .* give it a surrogate"):
        attack(QueryOracle(model, 6, surrogate="forward"), x, y)
    assert attack(model, x, y).success.any()


@pytest.mark.parametrize("levels", [4, 8, 16, 32])
@pytest.mark.parametrize("space", ["pixel", "tanh"])
def test_differences_of_zoo_do_not_see_a_code(levels: int, space: Any) -> None:
    """An 8-bit pixel lies further from every edge than h = 1e-4, so all slopes are zero and nothing moves."""
    model, x = coded(levels), (images(4, 7, (1, 4, 4)) * 255).round() / 255
    y = model(x).argmax(1)
    for sign in (-1e-4, 1e-4):
        assert torch.equal(model(x + sign), model(x))
    result = ZOO(ThreatModel("linf", "inf"), 3, 1, 16, space=space, constant=10.0)(model, x, y)
    assert not result.success.any()
    happened, times = result.counts["zero gradient estimates"]
    assert happened == times == 4 * 3 * 16


def test_a_training_step_on_codes_changes_the_weights_alone() -> None:
    torch.manual_seed(0)
    model = Thermometer(DigitsNet(in_channels=16, filters=(4, 8), hidden=8)).train()
    x, y = images(8, 8, (1, 8, 8), torch.float32), torch.arange(8)
    kept, before = x.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    objective = Madry(LSPGA(ThreatModel("linf", 0.2), 3, random_start=True), ramp_epochs=2)
    objective.epoch = 1.0
    moved = objective.perturb(model, x, y)
    assert 0 < (moved - x).abs().max().item() <= 0.1 + 1e-6
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training

    class Images:
        image, label = x, y

    loss, logs = objective(model, Images())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(logs["robust_accuracy"]) == 8
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert model.state_dict().keys() == before.keys()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_processes_train_it_and_one_measures_the_same(tmp_path: Path) -> None:
    """LS-PGA training on two CPU processes (gloo); one process loads the checkpoint alone."""
    task = yaml.safe_load((ROOT / "configs/task/therm_adv_model_a_narrow.yaml").read_text())
    task["init_args"]["model"]["init_args"]["classifier"] = {
        "class_path": "lit_adv.models.DigitsNet", "init_args": {"in_channels": 16, "filters": [4, 8], "hidden": 16},
    }  # fmt: skip
    task["init_args"]["objective"]["init_args"]["attack"]["init_args"]["steps"] = 2
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    train = {"data": str(ROOT / "configs/data/digits.yaml"), "model": "task.yaml", "epochs": 1,
             "trainer": str(ROOT / "configs/trainer/ddp.yaml"), "save_as": "therm.ckpt"}  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    command = [
        sys.executable, str(ROOT / "train.py"), "fit", "--config", "train.yaml", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--data.val_split=101", "--data.max_train=400", "--data.num_workers=0",
        "--trainer.num_sanity_val_steps=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "gloo" in done.stderr
    (last,) = tmp_path.rglob("last.ckpt")
    state = torch.load(last, weights_only=True)
    (keeper,) = [value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")]
    network = Checkpoint(tmp_path / "therm.ckpt")
    assert isinstance(network, Thermometer)
    data = Digits(batch_size=64, val_split=101, max_train=400)
    data.prepare_data()
    data.setup("fit")
    batches = [Batch(*batch) for batch in data.val_dataloader()]
    right = sum(int((network(b.image).argmax(1) == b.label).sum()) for b in batches)
    assert keeper["best_model_score"].item() == pytest.approx(right / 101, abs=1e-6)

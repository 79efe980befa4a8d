"""Every composition and every file of a group builds what it names."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from lit_adv.callbacks import AttackEvaluation
from lit_adv.cli import EvaluateCLI, TrainCLI
from lit_adv.datamodules import Batch
from lit_adv.datamodules.attacked import NOTE
from lit_adv.detector import Detector
from lit_adv.detectors import SensitivityDetector
from lit_adv.objectives import Objective
from lit_adv.tasks import Density, Detection, Regression, Task
from lit_adv.tasks.checkpoint import FORMAT, KEY
from lit_adv.tasks.recipe import build_module

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true", "--trainer.logger=false"]
DATA = f"--data={CONFIGS}/data/digits.yaml"
NETWORK = "--model.module=lit_adv.models.DigitsNet"
SMALLER = {"nattack_r_imagenet": ["--model.model.hidden=16"]}  # of 134 million weights

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|skip_none parameter was deprecated)"),
    pytest.mark.filterwarnings("ignore:Precision 32-true"),
]


def group(name: str) -> list[Path]:
    return sorted((CONFIGS / name).glob("*.yaml"))


def shown(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


class Built(TrainCLI):
    """Builds data, model and trainer and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in network.state_dict().items()}


def evaluation(*arguments: str) -> EvaluateCLI:
    return EvaluateCLI([*arguments, *HERE])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are named relative to the composition, so that the working directory does not matter."""
    monkeypatch.chdir(tmp_path)


def put_tiny_networks(text: str, sizes: dict[str, int]) -> None:
    """Where a configuration names networks that users train, tiny ones of its data."""
    few = {**sizes, "filters": [2, 2], "hidden": 4}
    tiny = {"class_path": "lit_adv.models.DigitsNet", "init_args": few}
    behind = {"class_path": "lit_adv.defenses.AdversarialTransformation", "init_args": {}}
    behind["init_args"] = {"classifier": tiny, "reference": tiny}
    own = build_module(tiny)
    tells = {**tiny, "init_args": {**few, "num_classes": 2}}
    for place in set(re.findall(r"checkpoints/\w+\.ckpt", text)):
        recipe = behind if "transformation" in place else tiny
        if "_detector_" in place:
            kind = f"lit_adv.detectors.{Path(place).stem.rpartition('_')[2].title()}Detector"
            recipe = {"class_path": kind, "init_args": {"classifier": tiny, "network": tells}}
        Path(place).parent.mkdir(exist_ok=True)
        network = own if recipe is tiny else build_module(recipe)
        if isinstance(network, Detector):  # they serve the very network beside them
            assert network.classifier is not None
            network.classifier.load_state_dict(own.state_dict())
        if isinstance(network, SensitivityDetector):
            network.calibrate([torch.rand(2, sizes["in_channels"], sizes["image_size"], sizes["image_size"])])
        content = {KEY: {"format": FORMAT, "model": recipe}, "state_dict": weights_of(network)}
        torch.save(content, place)


def put_note(dims: list[int]) -> None:
    """What an attack set says of itself, where one is to be trained on."""
    folder = Path("runs/attacked/ddn/train")
    folder.mkdir(parents=True)
    data = {"name": "images", "num_classes": 10, "dims": dims}
    note = {"split": "train", "model": "", "data": data, "attack": {"class_path": "lit_adv.attacks.DDN"}}
    (folder / NOTE).write_text(json.dumps(note))
    (folder.parent / "test").mkdir()
    (folder.parent / "test" / NOTE).write_text(json.dumps({**note, "split": "test"}))


@pytest.mark.parametrize("path", group("train"), ids=shown)
def test_training(path: Path) -> None:
    text = (path.parent / yaml.safe_load(path.read_text())["model"]).read_text()
    grey = {"in_channels": 1, "image_size": 28}
    put_tiny_networks(text, grey if "mnist" in path.stem else {"in_channels": 3, "image_size": 32})
    put_note([1, 28, 28] if "mnist" in path.stem else [3, 32, 32])
    cli = Built(["fit", "--config", str(path), *SMALLER.get(path.stem, ()), *HERE])
    assert isinstance(cli.model, Task)
    assert isinstance(cli.model.objective, Objective)
    assert cli.trainer.max_epochs == yaml.safe_load(path.read_text())["epochs"]
    assert cli.model.recipe["class_path"].startswith(("lit_adv.models.", "lit_adv.defenses.", "lit_adv.detectors."))
    channels = cli.model.recipe["init_args"].get("in_channels", 3)
    image = torch.rand(1, *getattr(cli.datamodule, "dims", (channels, 32, 32)))  # pairs take their images' size
    if isinstance(cli.model, Detection):
        cli.model.detector.calibrate([image])
    with torch.no_grad():
        answer = cli.model.eval()(image)
    if isinstance(cli.model, Detection):
        assert answer.shape == (1, 2)
    elif isinstance(cli.model, Density):
        assert answer.shape == (1,)
    else:
        assert answer.shape == (image.shape if isinstance(cli.model, Regression) else (1, cli.datamodule.num_classes))
    assert cli.run_name == path.stem
    assert str(cli.config["fit"].save_as) == f"checkpoints/{path.stem}.ckpt"


@pytest.mark.parametrize("path", group("task"), ids=shown)
def test_task_is_used_by_a_training(path: Path) -> None:
    used = {yaml.safe_load(other.read_text())["model"] for other in group("train")}
    assert f"../task/{path.name}" in used


@pytest.mark.parametrize("path", group("trainer"), ids=shown)
def test_trainer(path: Path) -> None:
    model = f"--model={CONFIGS}/task/digits_standard.yaml"
    settings = yaml.safe_load(path.read_text())
    further = "trainer" in settings  # it sets more than the trainer, and is given after a training's own configuration
    cli = Built(
        ["fit", *([DATA, model, "--config", str(path)] if further else [f"--trainer={path}", DATA, model]), *HERE]
    )
    assert cli.trainer.log_every_n_steps == 1
    assert cli.trainer.gradient_clip_val == settings.get("gradient_clip_val")


@pytest.mark.parametrize("path", group("probe"), ids=shown)
def test_probe_is_added_to_a_training(path: Path) -> None:
    train = CONFIGS / "train" / "digits_standard.yaml"
    cli = Built(["fit", "--config", str(train), "--config", str(path), *HERE])
    (keeper,) = cli.trainer.checkpoint_callbacks
    probes = [callback for callback in cli.trainer.callbacks if isinstance(callback, AttackEvaluation)]
    assert keeper.monitor == (f"val/robust_accuracy/{probes[0].name}" if probes else "val/accuracy")
    assert keeper.mode == "max"
    assert keeper._every_n_epochs == (probes[0].every_n_epochs if probes else 1)


@pytest.mark.parametrize("path", group("attack"), ids=shown)
def test_attack(path: Path) -> None:
    put_tiny_networks(path.read_text(), {})
    cli = evaluation(f"--trainer.callbacks+={path}", DATA, NETWORK)
    assert sum(isinstance(callback, AttackEvaluation) for callback in cli.trainer.callbacks) == 1


@pytest.mark.parametrize("path", group("evaluate"), ids=shown)
def test_evaluation(path: Path) -> None:
    cli = evaluation("--config", str(path), NETWORK)
    names = [callback.name for callback in cli.trainer.callbacks if isinstance(callback, AttackEvaluation)]
    assert names
    assert len(set(names)) == len(names)


def test_narrow_model_a_grows_its_radius_over_two_epochs() -> None:
    cli = Built(["fit", "--config", str(CONFIGS / "train" / "mnist_madry_narrow.yaml"), *HERE])
    model, objective = cli.model.model, cli.model.objective
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [16, 32]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [100, 10]
    assert objective.ramp_epochs == 2
    assert (objective.attack.steps, objective.attack.step_size) == (7, 0.1)
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([3, 4])
    for epoch, radius in ((0.5, 0.075), (1.0, 0.15), (5.0, 0.3)):
        objective.epoch = epoch
        moved: Tensor = (objective.perturb(model, x, y) - x).abs().amax()
        assert moved.item() == pytest.approx(radius, rel=1e-4)


def test_single_step_training_is_on_half_batches_against_the_own_answer() -> None:
    cli = Built(["fit", "--config", str(CONFIGS / "train" / "mnist_fgsm_adv.yaml"), *HERE])
    objective = cli.model.objective
    assert (objective.clean_share, objective.attack_label) == (0.5, "predicted")
    attack = objective.attack
    assert (attack.steps, attack.step_size, attack.random_start) == (1, attack.threat.radius, False)
    batch = Batch(torch.rand(4, 1, 28, 28), torch.arange(4), torch.arange(4))
    loss, logs = objective(cli.model.model, batch)
    assert loss.isfinite()
    assert len(logs["accuracy"]) == len(logs["robust_accuracy"]) == 4

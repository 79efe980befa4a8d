"""f_a trained through g: what training moves, what a checkpoint holds and refuses, two processes and one."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from defenses.behind_g import keyed
from pytorch_lightning import Trainer
from torch import nn

from lit_adv.cli import evaluate_main, train_main
from lit_adv.datamodules import Digits
from lit_adv.defenses import AdversarialTransformation
from lit_adv.models import VGG, DigitsNet
from lit_adv.objectives import Standard
from lit_adv.tasks import Checkpoint, CheckpointError, Classification
from lit_adv.tasks.checkpoint import FORMAT, KEY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = {"class_path": "lit_adv.models.VGG", "init_args": {"in_channels": 1, "stages": [[8], [16]]}}
NET = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 8], "hidden": 16}}
STEPS, SIZE = 3, 0.08

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using `torch.load`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # f_b, on purpose
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


def composed(folder: Path, name: str, model: dict[str, Any], objective: Any) -> Path:
    """A training of tiny networks on the digits, as a file of its own."""
    task = {"class_path": "lit_adv.tasks.Classification", "init_args": {"model": model, "objective": objective}}
    (folder / f"task_{name}.yaml").write_text(yaml.safe_dump(task))
    groups = {
        "data": f"{CONFIGS}/data/digits.yaml",
        "model": f"task_{name}.yaml",
        "trainer": f"{CONFIGS}/trainer/cpu.yaml",
    }
    config = {**groups, "epochs": 1, "save_as": f"checkpoints/{name}.ckpt"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder / f"{name}.yaml"


def behind_g(folder: Path) -> dict[str, Any]:
    reference = {"class_path": "lit_adv.tasks.Checkpoint", "init_args": {"path": str(folder / "f_b.ckpt")}}
    arguments = {"classifier": NET, "reference": reference, "steps": STEPS, "step_size": SIZE}
    return {"class_path": "lit_adv.defenses.AdversarialTransformation", "init_args": arguments}


def reference_file(folder: Path) -> VGG:
    torch.manual_seed(8)
    network = VGG(in_channels=1, stages=[[8], [16]])
    network.train()(torch.rand(64, 1, 8, 8))  # running statistics of something
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, KEY: {"format": FORMAT, "model": SMALL}}, folder / "f_b.ckpt")
    return network.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with f_b.ckpt and, trained behind it by train.py, checkpoints/f_a.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    reference_file(folder)
    config = composed(folder, "f_a", behind_g(folder), "lit_adv.objectives.Standard")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_main(["fit", "--config", str(config), "--data.max_train=300", *QUIET])
    return folder


def test_4_a_training_step_moves_f_a_and_nothing_of_f_b(tmp_path: Path) -> None:
    reference = reference_file(tmp_path)
    model = AdversarialTransformation(DigitsNet(filters=(4, 8), hidden=16), reference, steps=2)
    task = Classification(model, Standard(), torch.optim.SGD)
    optimizer = task.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.classifier.parameters()}
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(task, Digits(batch_size=32, max_train=96, val_split=40))
    after = model.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith("classifier.") for key in moved)
    assert {key for key, _ in model.classifier.named_parameters(prefix="classifier")} <= moved
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not any(part.training for part in reference.modules())


def test_the_checkpoint_needs_nothing_of_f_bs_file(trained: Path) -> None:
    reference = Checkpoint(trained / "f_b.ckpt")
    (trained / "f_b.ckpt").rename(trained / "away.ckpt")
    try:
        model = Checkpoint(trained / "checkpoints" / "f_a.ckpt")
    finally:
        (trained / "away.ckpt").rename(trained / "f_b.ckpt")
    assert isinstance(model, AdversarialTransformation)
    assert (model.steps, model.step_size, model.delta, model.random_start) == (STEPS, SIZE, 0.2, True)
    for key, value in model.reference.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key])
    x = torch.rand(4, 1, 8, 8)
    again = AdversarialTransformation(model.classifier, reference, steps=STEPS, step_size=SIZE).eval()
    assert torch.equal(model(x, draws=keyed(4)), again(x, draws=keyed(4)))
    content = torch.load(trained / "checkpoints" / "f_a.ckpt", weights_only=True)
    assert content[KEY]["model"]["init_args"]["reference"] == SMALL
    assert "f_b.ckpt" not in json.dumps(content[KEY])


def test_the_fingerprint_is_a_hash_of_weights_and_settings(trained: Path) -> None:
    state = torch.load(trained / "checkpoints" / "f_a.ckpt", weights_only=True)["state_dict"]
    settings = [0.2, STEPS, SIZE, "least_likely", "linf", True, False]
    expected = hashlib.sha256(repr(settings).encode())
    for key, value in state.items():
        if key.startswith("model.reference."):
            value = value.float() if value.is_floating_point() else value
            expected.update(f"{key.removeprefix('model.reference.')} {tuple(value.shape)}".encode())
            expected.update(value.numpy().tobytes())
    assert bytes(state["model.fingerprint"].tolist()) == expected.digest()


def tampered(source: Path, target: Path, how: str) -> Path:
    content = torch.load(source, weights_only=True)
    arguments = content[KEY]["model"]["init_args"]
    if how in arguments or how in ("delta", "mode", "box", "norm", "random_start"):
        changed = {"delta": 0.1, "steps": 13, "step_size": 0.05, "mode": "untargeted", "box": True, "norm": "l2",
                   "random_start": False}  # fmt: skip
        arguments[how] = changed[how]
    else:
        value = content["state_dict"][f"model.reference.{how}"]
        value.view(-1)[0] += 1
    torch.save(content, target)
    return target


@pytest.mark.parametrize(
    "how",
    ["delta", "steps", "step_size", "mode", "box", "norm", "random_start",
     "classifier.bias", "stages.0.1.running_mean", "stages.0.1.num_batches_tracked"],
)  # fmt: skip
def test_another_f_b_or_another_g_is_refused(trained: Path, tmp_path: Path, how: str) -> None:
    path = tampered(trained / "checkpoints" / "f_a.ckpt", tmp_path / "other.ckpt", how)
    with pytest.raises(CheckpointError, match=r"other.ckpt is refused: .*trained behind another g: .*delta"):
        Checkpoint(path)


def test_evaluation_refuses_it_in_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tampered(trained / "checkpoints" / "f_a.ckpt", tmp_path / "other.ckpt", "classifier.bias")
    evaluation = str(CONFIGS / "evaluate" / "digits.yaml")
    with pytest.raises(SystemExit) as exit_:
        evaluate_main(["--config", evaluation, f"--model.checkpoint={path}", *QUIET])
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    assert "other.ckpt is refused: these weights of f_a were trained behind another g" in lines[0]


def test_f_a_moves_to_another_g_by_name_alone(trained: Path) -> None:
    """A variant is an experiment and says so; its own state is signed anew and is no longer the trained one's."""
    model = Checkpoint(trained / "checkpoints" / "f_a.ckpt")
    assert isinstance(model, AdversarialTransformation)
    other = model.variant(steps=1)
    signed = other.state_dict()
    assert not torch.equal(signed["fingerprint"], model.state_dict()["fingerprint"])
    with pytest.raises(ValueError, match="another g"):
        model.load_state_dict(signed)
    model.load_state_dict(model.state_dict())
    half = copy.deepcopy(model).half()
    half.load_state_dict(half.state_dict())


def measured(network: nn.Module, split: str, most: int) -> dict[str, float]:
    """By one process, in batches of another size than in training."""
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = (
        Digits(batch_size=17, max_train=300, val_split=most) if split == "val" else Digits(batch_size=17, max_test=most)
    )
    run = trainer.validate if split == "val" else trainer.test
    return dict(run(Classification(network), data, verbose=False)[0])


def processes(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


MADRY = {
    "class_path": "lit_adv.objectives.Madry",
    "init_args": {
        "attack": {"class_path": "lit_adv.attacks.PGD",
                   "init_args": {"threat": {"norm": "linf", "eps": 0.05}, "steps": 2}},
    },
}  # fmt: skip
DDP = [f"--trainer={CONFIGS}/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]


@pytest.mark.parametrize("name", ["f_b", "f_a"])
def test_two_processes_train_and_count_as_one(tmp_path: Path, name: str) -> None:
    """f_b by adversarial training, f_a through a random g; each validation image draws the same in any process."""
    reference_file(tmp_path)
    model, objective = (behind_g(tmp_path), "lit_adv.objectives.Standard") if name == "f_a" else (SMALL, MADRY)
    config = composed(tmp_path, name, model, objective)
    few = ["--data.max_train=300", "--data.val_split=101", "--trainer.num_sanity_val_steps=0"]
    said = processes(tmp_path, str(ROOT / "train.py"), "fit", "--config", str(config), *DDP, *few, *QUIET)
    assert "gloo" in said
    assert "unused" not in said
    state = torch.load(tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
    (keeper,) = [value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")]
    network = Checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt")
    alone = measured(network, "val", 101)
    assert keeper["best_model_score"].item() == pytest.approx(alone["val/accuracy"], abs=1e-6)
    if name == "f_a":
        assert isinstance(network, AdversarialTransformation)
        assert all(
            torch.equal(value, state["state_dict"][f"model.reference.{key}"])
            for key, value in Checkpoint(tmp_path / "f_b.ckpt").state_dict().items()
        )


def test_two_processes_evaluate_as_one(trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "f_a.ckpt"
    attack = f"--trainer.callbacks+={CONFIGS}/attack/pgd_linf_digits.yaml"
    few = ["--trainer.callbacks.attack.steps=1", "--trainer.callbacks.attack.restarts=1", "--max_samples=4"]
    data = [f"--data={CONFIGS}/data/digits.yaml", "--data.max_test=101", "--data.batch_size=16"]
    processes(tmp_path, str(ROOT / "evaluate.py"), f"--model.checkpoint={path}", attack, *few, *data, "--audit=false",
              "--report=out", *DDP)  # fmt: skip
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    alone = measured(Checkpoint(path), "test", 101)["test/accuracy"]
    assert f"{100 * alone:.2f} % of 101 clean images" in json.dumps(facts)

"""The command lines: one training, one evaluation, and clear errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_adv.cli import evaluate_main, train_main
from lit_adv.datamodules import Digits
from lit_adv.tasks import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
STANDARD = str(CONFIGS / "train" / "digits_standard.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

pytestmark = pytest.mark.filterwarnings("ignore:You are using `torch.load`")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], main: object, *arguments: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))  # type: ignore[operator]
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_fast_dev_run_of_standard_training(tmp_path: Path) -> None:
    train_main(["fit", "--config", STANDARD, "--trainer.fast_dev_run=true", *QUIET])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_training_probe_checkpoint_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = str(CONFIGS / "probe" / "pgd10_digits.yaml")
    train = str(CONFIGS / "train" / "digits_madry.yaml")
    small = ["--data.max_train=200", "--model.model.filters=[4,8]", "--epochs=2", "--trainer.callbacks.max_samples=20"]
    train_main(["fit", "--config", train, "--config", probe, *small, *QUIET])

    run = tmp_path / "runs" / "digits_madry" / "version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["model"]["init_args"]["filters"] == [
        4,
        8,
    ]
    assert list(run.glob("events.*"))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert "last.ckpt" in kept
    assert len(kept) == 2
    state = torch.load(run / "checkpoints" / kept[0], weights_only=True)
    keepers = [value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")]
    assert keepers[0]["monitor"] == "val/robust_accuracy/pgd10"

    exported = tmp_path / "checkpoints" / "digits_madry.ckpt"
    assert "optimizer_states" not in torch.load(exported, weights_only=True)
    capsys.readouterr()
    attack = str(CONFIGS / "attack" / "pgd_linf_digits.yaml")
    data = [f"--data={CONFIGS}/data/digits.yaml", "--data.max_test=40"]
    few = [f"--trainer.callbacks+={attack}", "--trainer.callbacks.attack.steps=2", "--trainer.accelerator=cpu"]
    evaluate_main([f"--model.checkpoint={exported}", *data, *few, "--report=out", "--name=trial", *QUIET])
    assert "pgd20" in capsys.readouterr().out
    assert {"report.html", "report.json", "report.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "runs" / "trial" / "version_0").is_dir()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a run to go on with gets a folder of its own
def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    small = ["--data.max_train=100", "--model.model.filters=[2,2]", "--model.model.hidden=4", *QUIET]
    train_main(["fit", "--config", STANDARD, *small, "--epochs=1"])
    last = tmp_path / "runs" / "digits_standard" / "version_0" / "checkpoints" / "last.ckpt"
    train_main(["fit", "--config", STANDARD, *small, "--epochs=2", f"--ckpt_path={last}"])
    again = tmp_path / "runs" / "digits_standard" / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(again, weights_only=True)["epoch"] == 1


def test_any_module_can_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"--data={CONFIGS}/data/digits.yaml", "--data.max_test=20", "--trainer.accelerator=cpu"]
    attack = f"--trainer.callbacks+={CONFIGS}/attack/pgd_linf_digits.yaml"
    network = ["--model.module=lit_adv.models.DigitsNet", "--model.module.filters=[4,8]"]
    evaluate_main([*network, *data, attack, "--trainer.callbacks.attack.steps=1", *QUIET])
    assert "DigitsNet" in capsys.readouterr().out


def test_the_audit_is_part_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_main(["fit", "--config", STANDARD, "--data.max_train=400", "--epochs=3", *QUIET])
    data = [f"--data={CONFIGS}/data/digits.yaml", "--data.max_test=40", "--trainer.accelerator=cpu"]
    attack = [f"--trainer.callbacks+={CONFIGS}/attack/pgd_linf_digits.yaml", "--report=out"]
    network = f"--model.checkpoint={tmp_path}/checkpoints/digits_standard.ckpt"

    def findings(*arguments: str) -> dict[str, dict[str, Any]]:
        evaluate_main([network, *data, *attack, *QUIET, *arguments])
        (audit,) = json.loads((tmp_path / "out" / "report.json").read_text())["audit"]
        return {finding["check"]: finding for finding in audit["findings"]}

    found = findings("--audit_images=12")
    assert found["blind"]["n"] == 12
    assert {found[check]["status"] for check in ("blind", "slope", "growth", "repeats")} == {"PASS"}
    assert "audit: " in capsys.readouterr().out
    assert list((tmp_path / "runs" / "run" / "audit").glob("linf_0.15_pgd50/*/rank0.jsonl"))
    assert "not probed" in findings("--audit=false")["blind"]["said"]
    assert "audit_images must be at least 1, got 0" in refused(capsys, evaluate_main, network, *data, *attack,
                                                               "--audit_images=0")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.objective=lit_adv.objectives.Madri"], "did you mean lit_adv.objectives.Madry?"),
        (["--model.objective=Standart"], "did you mean lit_adv.objectives.Standard?"),
        (["--model.model=lit_adv.models.ModelAA"], "model.model: there is no class lit_adv.models.ModelAA; did you"),
        (["--model.model.hiden=3"], "lit_adv.models.DigitsNet has no argument hiden; did you mean hidden?"),
        (["--model.optimiser=Adam"], "Classification has no argument optimiser; did you mean optimizer?"),
        (["--trainr.max_epochs=3"], "there is no key trainr.max_epochs; did you mean trainer.max_epochs?"),
        (["--trainer.callbacks+=EarlyStoping"], "did you mean pytorch_lightning.callbacks.EarlyStopping?"),
        (["--data=configs/data/digits.yaml"], "there is no file configs/data/digits.yaml"),
        (["--data.val_split=7.5"], "val_split must lie in [0, 1) or be a whole number of images, got 7.5"),
        (["--data.batch_size=many"], "data.batch_size: expected int, got many"),
        (["--data.val_split=many"], "data.val_split: expected int or float, got many"),
    ],
)
def test_faults_are_told_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, train_main, "fit", "--config", STANDARD, *arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"dta": {"class_path": "Digits"}}, "there is no key dta; did you mean data?"),
        ({"trainer": {"max_epoch": 3}}, "there is no key trainer.max_epoch; did you mean trainer.max_epochs?"),
        ({"data": {"class_path": "lit_adv.datamodules.Digit"}}, "did you mean lit_adv.datamodules.Digits?"),
        ({"data": {"class_path": "lit_adv.datamodule.Digits"}}, "did you mean lit_adv.datamodules.Digits?"),
        (
            {"model": {"class_path": "lit_adv.tasks.Classification", "init_args": {"modle": 1}}},
            "lit_adv.tasks.Classification has no argument modle; did you mean model?",
        ),
    ],
)
def test_faults_in_a_file_are_told_in_one_line(
    content: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(content))
    assert said in refused(capsys, train_main, "fit", "--config", STANDARD, "--config", "faulty.yaml")


def test_missing_configuration_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, train_main, "fit", "--config", STANDARD.replace("standard", "standrd"))
    assert said.endswith(f"did you mean {STANDARD}?")


def test_evaluation_needs_something_to_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data={CONFIGS}/data/digits.yaml"
    assert "--model.checkpoint PATH or --model.module CLASS_PATH" in refused(capsys, evaluate_main, data)
    said = refused(capsys, evaluate_main, data, "--model.chekpoint=x")
    assert "there is no key model.chekpoint; did you mean model.checkpoint?" in said
    assert "checkpoint x.ckpt does not exist" in refused(capsys, evaluate_main, data, "--model.checkpoint=x.ckpt")


def test_errors_from_elsewhere_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Digits, *args: object, **kwargs: object) -> None:
        raise json_error

    json_error = OSError("disk on fire")
    monkeypatch.setattr(Digits, "train_dataloader", fail)
    with pytest.raises(OSError, match="disk on fire"):
        train_main(["fit", "--config", STANDARD, "--trainer.fast_dev_run=true", *QUIET])


def test_evaluation_imports_nothing_slow_that_lightning_does_not() -> None:
    code = (
        "import sys, pytorch_lightning, torchvision; before = set(sys.modules); import lit_adv.cli; "
        "print([m for m in ('sklearn', 'tensorboard', 'matplotlib.pyplot', 'scipy.stats', 'jinja2') "
        "if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_processes_train_one_network_and_count_every_image_once(tmp_path: Path) -> None:
    """Distributed training on two CPU processes (gloo); its checkpoint is loaded and measured by one process."""
    # 101 validation images: the sampler repeats one of them to give both processes 51
    command = [
        sys.executable, str(ROOT / "train.py"), "fit", "--config", STANDARD, f"--trainer={CONFIGS}/trainer/ddp.yaml",
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--epochs=1", "--data.val_split=101",
        "--data.max_train=400", "--trainer.num_sanity_val_steps=0", *QUIET,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "gloo" in done.stderr
    state = torch.load(tmp_path / "runs/digits_standard/version_0/checkpoints/last.ckpt", weights_only=True)
    (keeper,) = [value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")]

    network = Checkpoint(tmp_path / "checkpoints" / "digits_standard.ckpt")
    data = Digits(batch_size=64, val_split=101, max_train=400)
    data.prepare_data()
    data.setup("fit")
    right = sum(int((network(b.image).argmax(1) == b.label).sum()) for b in data.val_dataloader())
    assert keeper["best_model_score"].item() == pytest.approx(right / 101, abs=1e-6)


def test_a_flag_cut_short_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, train_main, "fit", "--config", STANDARD, "--trainer.max_epoch=3")
    assert "there is no key trainer.max_epoch; did you mean trainer.max_epochs?" in told


def test_a_network_of_other_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = str(CONFIGS / "evaluate" / "digits.yaml")
    network = ["--model.module=lit_adv.models.DigitsNet", "--model.module.num_classes=5"]
    told = refused(capsys, evaluate_main, "--config", evaluation, *network)
    assert "DigitsNet answers 5 classes and the data set has 10" in told


def test_a_place_that_cannot_be_written_is_told_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(
        capsys, train_main, "fit", "--config", STANDARD, "--save_as=/proc/nowhere/x.ckpt", "--epochs=1", *QUIET
    )
    assert "save_as /proc/nowhere/x.ckpt" in told


def test_a_misspelt_argument_of_the_threat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = yaml.safe_load((CONFIGS / "attack" / "pgd_linf_digits.yaml").read_text())
    attack["init_args"]["attack"]["init_args"]["threat"]["epps"] = 3
    config = {"data": str(CONFIGS / "data" / "digits.yaml"), "trainer": {"callbacks": [attack]}}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
    told = refused(capsys, evaluate_main, "--config", "e.yaml", "--model.module=lit_adv.models.DigitsNet")
    assert "threat has no argument epps; did you mean eps?" in told

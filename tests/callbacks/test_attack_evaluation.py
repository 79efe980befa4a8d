"""Attacks as callbacks: what is logged and when, what training notices of it, and two processes as one."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_adv
from lit_adv.attacks import PGD, NAttack
from lit_adv.callbacks import AttackEvaluation
from lit_adv.datamodules import Digits
from lit_adv.metrics import Records
from lit_adv.metrics.summary import robust_accuracy
from lit_adv.models import DigitsNet
from lit_adv.objectives import Madry, Standard
from lit_adv.tasks import Classification
from lit_adv.threat import ThreatModel

ROOT = Path(__file__).resolve().parents[2]
WEAK = ThreatModel(eps=0.05)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "inference_mode": False,
    "log_every_n_steps": 1,
}


class Net(nn.Sequential):
    """A small network in which training and eval mode differ in everything that can."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
        )


class Watched(PGD):
    """Notes the images of each call."""

    def __init__(self, threat: ThreatModel = WEAK, steps: int = 2, seed: int = 0) -> None:
        super().__init__(threat, steps=steps, seed=seed)
        self.calls: list[list[int]] = []

    def __call__(self, oracle: Any, x: Any, y: Any, target: Any = None, index: Any = None, finished: Any = None) -> Any:
        self.calls.append(index.tolist())
        return super().__call__(oracle, x, y, target, index, finished)


def digits(**arguments: Any) -> Digits:
    return Digits(**({"batch_size": 50, "val_split": 40, "max_train": 200, "max_test": 40} | arguments))


def probe(name: str = "pgd", attack: PGD | NAttack | None = None, **arguments: Any) -> AttackEvaluation:
    return AttackEvaluation(name, attack or PGD(WEAK, steps=2), **arguments)


def fit(*callbacks: Any, epochs: int = 1, task: Classification | None = None, **arguments: Any) -> Trainer:
    task = task or Classification(Net(), Standard())
    trainer = Trainer(**({**QUIET, "max_epochs": epochs, "callbacks": list(callbacks)} | arguments))
    trainer.fit(task, digits())
    return trainer


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network that is right about most digits."""
    seed_everything(3, verbose=False)
    arguments = {"filters": [4, 8], "hidden": 16}
    task = Classification(DigitsNet(filters=(4, 8), hidden=16), Standard(), lambda p: torch.optim.Adam(p, lr=0.01))
    network = {"class_path": "lit_adv.models.DigitsNet", "init_args": arguments}
    task.remember({"class_path": "lit_adv.tasks.Classification", "init_args": {"model": network}})
    trainer = Trainer(**QUIET, max_epochs=4)
    trainer.fit(task, Digits(batch_size=32, max_train=1000))
    path = tmp_path_factory.mktemp("trained") / "digits.ckpt"
    trainer.save_checkpoint(path)
    return path


def network(path: Path) -> nn.Module:
    net = DigitsNet(filters=(4, 8), hidden=16)
    state = torch.load(path, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")})
    return net.eval()


def run_test(path: Path, *callbacks: AttackEvaluation, **arguments: Any) -> dict[str, float]:
    trainer = Trainer(**({**QUIET, "callbacks": list(callbacks)} | arguments))
    (measured,) = trainer.test(Classification(network(path)), digits(batch_size=16), verbose=False)
    return dict(measured)


def found(callback: AttackEvaluation) -> Records:
    assert callback.outcome is not None
    return callback.outcome.records


def assert_same(one: Records, other: Records) -> None:
    for name, column in one.columns().items():
        torch.testing.assert_close(column, other.columns()[name], rtol=0, atol=1e-5, msg=name)


def test_arguments_are_those_of_a_protocol() -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        probe(every_n_epochs=0)
    with pytest.raises(ValueError, match="access 'logits' is less than PGD needs"):
        probe(access="logits")
    with pytest.raises(
        ValueError, match="a model with output 'labels' grants access 'label', and PGD needs 'gradient'"
    ):
        probe(output="labels")
    assert probe(budget=3, pool=7).protocol.budget == 3
    given = probe(precision="bf16", channels_last=True, compile=True, chunk=9).protocol
    assert (given.precision, given.channels_last, given.compile, given.chunk) == ("bf16", True, True, 9)
    assert given.hastened
    assert not probe().protocol.hastened


def test_test_measures_are_those_of_evaluate(trained: Path) -> None:
    attacks = [probe("pgd"), probe("n", NAttack(WEAK, steps=2, samples=10, step_size=0.1, shrink=0.1), pool=9)]
    measured = run_test(trained, *attacks)
    report = lit_adv.evaluate(network(trained), digits(), [a.protocol for a in attacks])
    for callback, outcome, summary in zip(attacks, report.outcomes, report.summaries, strict=True):
        assert_same(found(callback), outcome.records)
        assert measured[f"test/robust_accuracy/{callback.name}"] == pytest.approx(summary.robust_accuracy)
        assert measured[f"test/success_rate/{callback.name}"] == pytest.approx(summary.success_rate)
        assert measured[f"test/median_queries/{callback.name}"] == pytest.approx(summary.median_queries)
        assert measured[f"test/mean_linf/{callback.name}"] == pytest.approx(summary.mean_linf, rel=1e-5)
        assert summary.successes
    assert len(found(attacks[0])) == 40
    assert measured["test/accuracy"] == pytest.approx(report.summaries[0].clean_accuracy)


@pytest.mark.parametrize("attack", [PGD(WEAK, steps=2), NAttack(WEAK, steps=2, samples=10)], ids=["pgd", "nattack"])
@pytest.mark.parametrize("target", ["none", "least_likely"])
def test_inference_mode_changes_nothing(trained: Path, attack: Any, target: Any) -> None:
    plain, inference = probe("a", attack, target=target), probe("a", attack, target=target)
    run_test(trained, plain)
    run_test(trained, inference, inference_mode=True)
    assert_same(found(plain), found(inference))


def test_records_are_written_and_resumed_from(trained: Path, tmp_path: Path) -> None:
    first, second = Watched(), Watched()
    one, other = probe(attack=first, dirpath=tmp_path, pool=8), probe(attack=second, dirpath=tmp_path)
    run_test(trained, one)
    assert list((tmp_path / "attacks" / "pgd").rglob("rank0.jsonl"))
    run_test(trained, other)
    assert first.calls
    assert second.calls == []
    assert_same(found(one), found(other))


def test_records_go_beside_the_log(trained: Path, tmp_path: Path) -> None:
    run_test(trained, probe(), logger=CSVLogger(tmp_path, name="run", version=0))
    assert list((tmp_path / "run" / "version_0" / "attacks" / "pgd").rglob("*.jsonl"))


def test_without_logger_or_folder_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    run_test(trained, probe())
    assert list(tmp_path.iterdir()) == []


def test_pool_spans_loader_batches(trained: Path) -> None:
    attack = Watched()
    run_test(trained, probe(attack=attack, pool=1000))
    (index,) = attack.calls
    assert len(index) == len(set(index)) > 16  # more than a loader's batch at once


def test_probe_is_logged_in_due_epochs_only(tmp_path: Path) -> None:
    attack = Watched()
    fit(probe("a", attack, every_n_epochs=2), epochs=5, num_sanity_val_steps=2, logger=CSVLogger(tmp_path, "", 0))
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    due = [int(row["epoch"]) for row in rows if row.get("val/robust_accuracy/a")]
    assert due == [1, 3]
    assert [int(row["epoch"]) for row in rows if row.get("val/accuracy")] == [0, 1, 2, 3, 4]
    assert len(attack.calls) <= 2  # neither in the sanity check nor in other epochs


def test_sanity_check_is_not_attacked() -> None:
    attack = Watched()
    callback = probe(attack=attack, every_n_epochs=1)
    fit(callback, max_steps=0, epochs=1, num_sanity_val_steps=2)
    assert attack.calls == []
    assert callback.outcome is None


def test_validation_alone_is_always_due(trained: Path) -> None:
    callback = probe(every_n_epochs=7, max_samples=20)
    trainer = Trainer(**QUIET, callbacks=[callback])
    (measured,) = trainer.validate(Classification(network(trained)), digits(), verbose=False)
    assert measured["val/robust_accuracy/pgd"] == pytest.approx(robust_accuracy(found(callback)))
    assert found(callback).index.tolist() == sorted(digits().dataset("val").index[:20].tolist())


def test_checkpoint_of_the_most_robust_epoch_is_kept(tmp_path: Path) -> None:
    seen: list[float] = []

    class Listener(AttackEvaluation):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            if self.summary is not None:
                seen.append(self.summary.robust_accuracy or 0.0)

    keeper = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val/robust_accuracy/pgd", mode="max", auto_insert_metric_name=False
    )
    task = Classification(Net(), Standard(), lambda p: torch.optim.Adam(p, lr=0.01))
    fit(Listener("pgd", PGD(WEAK, steps=2)), keeper, epochs=4, enable_checkpointing=True, task=task,
        num_sanity_val_steps=0)  # fmt: skip
    assert len(seen) == 4
    assert keeper.best_model_score is not None
    assert keeper.best_model_score.item() == pytest.approx(max(seen))
    assert len(set(seen)) > 1
    assert Path(keeper.best_model_path).stem == str(seen.index(max(seen)))


def test_images_are_shown_in_tensorboard(tmp_path: Path, trained: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    callback = probe(attack=PGD(ThreatModel(eps=0.3), steps=5))
    trainer = Trainer(**{**QUIET, "logger": logger}, callbacks=[callback], max_epochs=1)
    task = Classification(network(trained).train(), Standard())
    trainer.fit(task, digits())
    trainer.test(task, digits(), verbose=False)
    logger.experiment.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    tags = events.Tags()
    assert {"val/adversarial/pgd", "test/adversarial/pgd"} <= set(tags["images"])
    assert {"val/robust_accuracy/pgd", "test/robust_accuracy/pgd"} <= set(tags["scalars"])
    (image,) = events.Images("val/adversarial/pgd")
    assert image.width > 3 * 8
    assert image.height >= 8


def trained_weights(*callbacks: AttackEvaluation) -> dict[str, Tensor]:
    seed_everything(11, verbose=False)
    # PGD in training draws from torch's global generator, dropout too: any number drawn by a probe would show
    task = Classification(Net(), Madry(PGD(WEAK, steps=2)))
    trainer = fit(*callbacks, epochs=2, task=task)
    return {**task.state_dict(), "after": torch.rand(3), "steps": torch.tensor(trainer.global_step)}


def test_a_probe_changes_nothing_in_training() -> None:
    plain = trained_weights()
    nattack = NAttack(WEAK, steps=2, samples=10)
    probed = trained_weights(probe("a"), probe("b", nattack, target="random", pool=4), probe("c", every_n_epochs=2))
    assert plain.keys() == probed.keys()
    assert [key for key in plain if not torch.equal(plain[key], probed[key])] == []


def test_several_attacks_stand_side_by_side(trained: Path, tmp_path: Path) -> None:
    strong = PGD(ThreatModel(eps=0.3), steps=10)
    pair = [probe("weak", dirpath=tmp_path), probe("strong", strong, dirpath=tmp_path)]
    measured = run_test(trained, *pair)
    assert measured["test/robust_accuracy/strong"] < measured["test/robust_accuracy/weak"]
    assert {path.name for path in (tmp_path / "attacks").iterdir()} == {"weak", "strong"}
    assert pair[0].state_key != pair[1].state_key
    alone = probe("weak")
    run_test(trained, alone)
    assert_same(found(alone), found(pair[0]))


def test_two_attacks_of_one_name_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        run_test(trained, probe("a"), probe("a", PGD(ThreatModel(eps=0.3), steps=3)))


def test_batches_without_places_are_refused(trained: Path) -> None:
    class Pairs(Classification):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    loader = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4)), batch_size=2)
    trainer = Trainer(**QUIET, callbacks=[probe()])
    with pytest.raises(TypeError, match=r"AttackEvaluation needs batches of \(image, label, index\), got list"):
        trainer.test(Pairs(network(trained)), loader, verbose=False)


def test_two_processes_make_the_records_of_one(trained: Path, tmp_path: Path) -> None:
    """evaluate.py on two CPU processes (gloo): 41 images, of which the sampler repeats one."""
    threat = ["--trainer.callbacks.attack.threat.eps=0.05", "--trainer.callbacks.attack.steps=2"]
    command = [
        sys.executable, str(ROOT / "evaluate.py"), f"--model.checkpoint={trained}",
        f"--data={ROOT}/configs/data/digits.yaml", "--data.max_test=41", "--data.batch_size=4",
        f"--trainer={ROOT}/configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.enable_progress_bar=false", "--name=pair",
        f"--trainer.callbacks+={ROOT}/configs/attack/pgd_linf_digits.yaml", *threat,
        f"--trainer.callbacks+={ROOT}/configs/attack/nattack_linf_digits.yaml", *threat,
        "--trainer.callbacks.budget=100", "--trainer.callbacks.max_samples=23",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "gloo" in done.stderr
    assert "sync_dist" not in done.stderr

    pgd = PGD(WEAK, steps=2, step_size=0.02, restarts=5)
    nattack = NAttack(WEAK, steps=2, samples=50, step_size=0.02, shrink=0.1)
    alone = [probe("pgd20", pgd), probe("nattack", nattack, budget=100, max_samples=23)]
    trainer = Trainer(**QUIET, callbacks=alone)
    trainer.test(Classification(network(trained)), digits(max_test=41, batch_size=4), verbose=False)
    for callback, count in zip(alone, (41, 23), strict=True):
        with (tmp_path / "runs" / "pair" / "version_0" / f"records_{callback.name}.csv").open() as file:
            records = Records.from_rows(list(csv.DictReader(file)))
        assert len(records) == count
        assert_same(records, found(callback))
        folder = tmp_path / "runs" / "pair" / "attacks" / callback.name
        shares = [len(path.read_text().splitlines()) for path in sorted(folder.rglob("rank?.jsonl"))]
        assert sum(shares) in (count, count + 1)  # the image that the sampler repeats
        assert min(shares) >= count // 2

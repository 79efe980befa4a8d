"""Checkpoints of experiments: trained once, gone on with, and refused where the settings differ."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lit_adv.experiments import trained as module
from lit_adv.experiments.trained import command, trained


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of trainings, which write an empty file instead."""
    seen: list[list[str]] = []

    def train(words: list[str]) -> None:
        seen.append(words)
        target = Path(words[words.index("--save_as") + 1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()

    monkeypatch.setattr(module, "train_main", train)
    return seen


def test_what_is_missing_is_trained_once(calls: list[list[str]], tmp_path: Path) -> None:
    path = trained("small", "digits_standard", "--epochs=2", folder=tmp_path / "c")
    assert path == tmp_path / "c" / "small.ckpt"
    assert path.is_file()
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "config": "digits_standard",
        "overrides": ["--epochs=2"],
    }
    assert trained("small", "digits_standard", "--epochs=2", folder=tmp_path / "c") == path
    assert len(calls) == 1
    words = calls[0]
    assert words[:2] == ["fit", "--config"]
    assert words[2].endswith("configs/train/digits_standard.yaml")
    assert Path(words[2]).is_file()
    assert "--epochs=2" in words
    assert sorted(file.name for file in path.parent.iterdir()) == ["small.ckpt", "small.json"]


def test_other_settings_are_refused(calls: list[list[str]], tmp_path: Path) -> None:
    trained("small", "digits_standard", "--epochs=2", folder=tmp_path)
    for config, overrides in (("digits_standard", []), ("digits_madry", ["--epochs=2"])):
        with pytest.raises(ValueError, match=r"small.ckpt was trained with digits_standard --epochs=2, and wanted is"):
            trained("small", config, *overrides, folder=tmp_path)
    assert len(calls) == 1


def test_what_learnt_from_something_else_is_refused_where_that_is_known(calls: list[list[str]], tmp_path: Path) -> None:
    def again(**hashes: str) -> Path:
        return trained("small", "digits_standard", folder=tmp_path, learnt_from=hashes)

    path = again(base="a", sets="b")
    assert json.loads(path.with_suffix(".json").read_text())["learnt_from"] == {"base": "a", "sets": "b"}
    assert again(base="a", sets="b") == again(base="a", further="c") == again() == path
    with pytest.raises(ValueError, match=r"small.ckpt learnt from another sets: move it away"):
        again(base="a", sets="c")
    note = {"config": "digits_standard", "overrides": []}
    path.with_suffix(".json").write_text(json.dumps(note))  # a note without hashes stays good
    assert again(base="z") == path
    assert len(calls) == 1


def test_a_file_put_there_by_hand_is_taken(calls: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "mine.ckpt").touch()
    assert trained("mine", "digits_standard", folder=tmp_path) == tmp_path / "mine.ckpt"
    assert not calls


def test_a_training_that_fails_leaves_no_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(words: list[str]) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "train_main", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        trained("small", "digits_standard", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_training_broken_off_goes_on_from_its_newest_state() -> None:
    plain = command("small", "digits_standard", Path("c.ckpt"))
    assert "--ckpt_path" not in plain
    run = plain[plain.index("--name") + 1]
    for age, version in ((10, 0), (20, 2), (5, 10)):
        state = Path("runs", run, f"version_{version}", "checkpoints", "last.ckpt")
        state.parent.mkdir(parents=True)
        state.touch()
        os.utime(state, (1e9 - age, 1e9 - age))
    words = command("small", "digits_standard", Path("c.ckpt"))
    assert words[words.index("--ckpt_path") + 1] == str(Path("runs", run, "version_10", "checkpoints", "last.ckpt"))
    # a run of other overrides has another name, so that it never goes on from this one's state
    other = command("small", "digits_standard", Path("c.ckpt"), "--epochs=3")
    assert "--ckpt_path" not in other
    third = command("small", "digits_madry", Path("c.ckpt"), "--epochs=3")
    assert len({run, other[other.index("--name") + 1], third[third.index("--name") + 1]}) == 3


def test_what_came_to_its_end_is_trained_anew_once_it_was_moved_away(tmp_path: Path) -> None:
    """By a real training."""
    words = [
        "--epochs=1",
        "--data.max_train=64",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    first = trained("small", "digits_standard", *words, folder=tmp_path)
    run = Path("runs", next(Path("runs").iterdir()).name)
    assert len(list(run.glob("version_*/checkpoints/last.ckpt"))) == 1
    for file in (first, first.with_suffix(".json")):
        file.unlink()
    assert "--ckpt_path" not in command("small", "digits_standard", first, *words)
    # broken off after that, it goes on; a checkpoint that is there says that what made it has come to its end
    state = run / "version_1" / "checkpoints" / "last.ckpt"
    state.parent.mkdir(parents=True)
    state.touch()
    later = command("small", "digits_standard", first, *words)
    assert later[later.index("--ckpt_path") + 1] == str(state)
    first.touch()
    trained("small", "digits_standard", *words, folder=tmp_path)
    assert "--ckpt_path" not in command("small", "digits_standard", first, *words)


def test_an_unknown_configuration_lists_the_known() -> None:
    with pytest.raises(FileNotFoundError, match=r"no training 'nothing' .*digits_standard"):
        command("x", "nothing", Path("x.ckpt"))

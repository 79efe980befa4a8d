"""Networks out of checkpoints, and every way in which that can fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_adv.models import DigitsNet
from lit_adv.tasks import Checkpoint, CheckpointError, export_checkpoint, load_weights
from lit_adv.tasks.checkpoint import describe

RECIPE = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [2, 3], "hidden": 5}}


def write(path: Path, network: nn.Module, recipe: Any = RECIPE, **changed: Any) -> Path:
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    note = {"format": 1, "model": recipe, "data": "digits", "num_classes": 10}
    torch.save({"state_dict": state, "lit_adv": note, "optimizer_states": [1], **changed}, path)
    return path


@pytest.fixture
def network() -> DigitsNet:
    return DigitsNet(filters=(2, 3), hidden=5)


@pytest.fixture
def path(tmp_path: Path, network: DigitsNet) -> Path:
    return write(tmp_path / "net.ckpt", network)


def test_gives_the_network_back(path: Path, network: DigitsNet) -> None:
    x = torch.rand(4, 1, 8, 8)
    rebuilt = Checkpoint(path)
    assert isinstance(rebuilt, DigitsNet)
    assert not rebuilt.training
    assert torch.equal(rebuilt(x), network.eval()(x))
    assert not any(p.requires_grad for p in rebuilt.parameters())
    to_train = Checkpoint(path, freeze=False)
    assert to_train.training
    assert all(p.requires_grad for p in to_train.parameters())


def test_weights_into_a_module_given(path: Path, network: DigitsNet) -> None:
    other = load_weights(DigitsNet(filters=(2, 3), hidden=5), path)
    for key, value in other.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


def test_missing_file_names_the_nearest(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nett.ckpt does not exist; did you mean .*net.ckpt\?"):
        Checkpoint(path.with_name("nett.ckpt"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_called_damaged(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"net.ckpt is damaged .*train again or copy it again"):
        Checkpoint(path)


def test_flipped_bytes_are_called_damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"data.pkl") + 80
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net.ckpt (is damaged|holds pickled)"):
        Checkpoint(path)


def test_foreign_checkpoint_names_keys_and_way_out(tmp_path: Path, network: DigitsNet) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save({"net": network.state_dict(), "acc": 93.0, "epoch": 3}, path)
    with pytest.raises(
        CheckpointError, match=r"expected .*'lit_adv' and 'state_dict', found acc, epoch, net; .*--model.module"
    ):
        Checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("a text")
    with pytest.raises(CheckpointError, match=r"is no file written by torch.save; .*--model.module"):
        Checkpoint(path)


class Bomb:
    """Would leave a trace when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickled_objects_are_never_run(tmp_path: Path, network: DigitsNet) -> None:
    trace = tmp_path / "trace"
    path = write(tmp_path / "bomb.ckpt", network, callbacks=Bomb(trace))
    with pytest.raises(CheckpointError, match="pickled Python objects, which could run code"):
        Checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"class_path": "subprocess.Popen", "init_args": {"args": "true"}},
        {"class_path": "lit_adv.tasks.checkpoint.torch.hub.load"},
        {"class_path": "lit_adv.cli.LightningCLI"},
        {"class_path": "lit_adv.tasks.checkpoint.export_checkpoint"},
        {"class_path": "lit_adv.models.Nothing"},
        {"class_path": "lit_adv.defense.Undefended", "init_args": {"classifier": "subprocess.Popen", "num_classes": 2}},
        {"class_path": "lit_adv.defense.Undefended", "init_args": {"classifier": {"class_path": "torch.nn.Flatten"}}},
    ],
)
def test_only_classes_of_this_package_are_built(tmp_path: Path, network: DigitsNet, recipe: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt: .*lit_adv"):
        Checkpoint(write(tmp_path / "evil.ckpt", network, recipe))


def test_further_packages_must_be_allowed(tmp_path: Path) -> None:
    recipe = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    path = write(tmp_path / "linear.ckpt", nn.Linear(2, 3), recipe)
    with pytest.raises(CheckpointError, match=r"'torch.nn.Linear' is not a class of lit_adv, .*allow its package"):
        Checkpoint(path)
    assert isinstance(Checkpoint(path, allow=["torch"]), nn.Linear)


def test_checkpoint_without_recipe_asks_for_the_module(tmp_path: Path, network: DigitsNet) -> None:
    with pytest.raises(CheckpointError, match=r"does not say how to build its network.*--model.module"):
        Checkpoint(write(tmp_path / "net.ckpt", network, None))


def test_other_network_names_the_weights(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another network than DigitsNet \(of another shape: .*classifier"):
        load_weights(DigitsNet(filters=(2, 3), hidden=6), path)
    with pytest.raises(CheckpointError, match=r"another network than Linear \(missing: bias, weight; unknown: "):
        load_weights(nn.Linear(2, 2), path)


def test_arguments_that_do_not_fit_are_told(tmp_path: Path, network: DigitsNet) -> None:
    recipe = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"width": 3}}
    with pytest.raises(CheckpointError, match="width"):
        Checkpoint(write(tmp_path / "net.ckpt", network, recipe))


def test_newer_format_is_refused(tmp_path: Path, network: DigitsNet) -> None:
    path = write(tmp_path / "net.ckpt", network, lit_adv={"format": 99})
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        Checkpoint(path)


def test_export_leaves_the_state_of_training_out(path: Path, tmp_path: Path, network: DigitsNet) -> None:
    target = tmp_path / "new" / "small.ckpt"
    export_checkpoint(path, target)
    content = torch.load(target, weights_only=True)
    assert set(content) == {"state_dict", "lit_adv"}
    assert [file.name for file in target.parent.iterdir()] == ["small.ckpt"]
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(Checkpoint(target)(x), network.eval()(x))


def test_networks_from_checkpoints_are_described_by_their_own_recipe(path: Path) -> None:
    inner = {"class_path": "lit_adv.tasks.Checkpoint", "init_args": {"path": str(path)}}
    outer = {"class_path": "lit_adv.defense.Undefended", "init_args": {"classifier": inner, "num_classes": 10}}
    described = describe(outer)
    path.unlink()
    assert described["init_args"] == {"classifier": RECIPE, "num_classes": 10}

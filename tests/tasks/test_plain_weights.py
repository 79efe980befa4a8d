"""Published weights: plain state dictionaries of any age, and what is refused."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_adv.models import DigitsNet, SmallVGG
from lit_adv.tasks import Checkpoint, CheckpointError, Classification, PlainWeights
from lit_adv.tasks.checkpoint import FORMAT, KEY, describe

SMALL = {"image_size": 16, "width": 2}


@pytest.fixture
def network() -> SmallVGG:
    torch.manual_seed(4)
    return SmallVGG(**SMALL)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path, network: SmallVGG) -> Path:
    """As weights of years ago lie about: an ordered dictionary in torch's legacy format."""
    path = tmp_path / "vgg0_adv.pth"
    torch.save(OrderedDict(network.state_dict()), path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_gives_the_network_its_weights(tmp_path: Path, network: SmallVGG, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    torch.manual_seed(5)
    other = SmallVGG(**SMALL)  # type: ignore[arg-type]
    filled = PlainWeights(other, path)
    assert filled is other
    assert not filled.training
    assert not any(p.requires_grad for p in filled.parameters())
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(filled(x), network.eval()(x))
    free = PlainWeights(other, path, freeze=False)
    assert free.training
    assert all(p.requires_grad for p in free.parameters())


def test_weights_saved_on_an_accelerator_are_mapped_to_the_cpu(tmp_path: Path, network: SmallVGG) -> None:
    """The legacy format names each storage's device as a text: a GPU's name is written into the file by hand."""
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    name = b"X\x03\x00\x00\x00cpu"  # a text of three letters in a pickle of protocol 2
    assert name in content
    path.write_bytes(content.replace(name, b"X\x06\x00\x00\x00cuda:0"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    filled = PlainWeights(SmallVGG(**SMALL), path)  # type: ignore[arg-type]
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in filled.state_dict().items())


def test_missing_file_names_the_nearest(path: Path, network: SmallVGG) -> None:
    with pytest.raises(FileNotFoundError, match=r"vgg0_adw.pth do not exist; did you mean .*vgg0_adv.pth\?"):
        PlainWeights(network, path.with_name("vgg0_adw.pth"))
    with pytest.raises(FileNotFoundError, match="correct the path"):
        PlainWeights(network, path.parent / "nowhere" / "x.pth")


def test_keys_and_shapes_that_do_not_fit_are_named(path: Path, network: SmallVGG) -> None:
    with pytest.raises(CheckpointError, match=r"another network than SmallVGG \(of another shape: classifier.1.bias"):
        PlainWeights(SmallVGG(image_size=16, width=3), path)
    with pytest.raises(CheckpointError, match=r"another network than DigitsNet \(missing: .*; unknown: classifier.1"):
        PlainWeights(DigitsNet(), path)
    state = network.state_dict()
    kept = {key: value for key, value in state.items() if key != "features.5.running_var"}
    torch.save(kept, path)
    with pytest.raises(CheckpointError, match=r"missing: features.5.running_var\); give the network they"):
        PlainWeights(network, path)


class Bomb:
    """Would leave a trace when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_never_run(tmp_path: Path, network: SmallVGG, legacy: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "bomb.pth"
    torch.save({**network.state_dict(), "x": Bomb(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pickled Python objects, which could run code .* tensors alone"):
        PlainWeights(network, path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_refused(path: Path, network: SmallVGG, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged"):
        PlainWeights(network, path)


def test_other_files_are_refused(tmp_path: Path, network: SmallVGG) -> None:
    path = tmp_path / "w.pth"
    path.write_text("a text")
    with pytest.raises(CheckpointError, match=r"no file of torch.save"):
        PlainWeights(network, path)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"tensors by name, found also epoch, state_dict: save the state"):
        PlainWeights(network, path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="found a list"):
        PlainWeights(network, path)
    torch.save({KEY: {"format": FORMAT}, "state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"is a checkpoint|are a checkpoint of lit_adv: .*tasks.Checkpoint"):
        PlainWeights(network, path)


@pytest.mark.parametrize("name", ["lit_adv.tasks.PlainWeights", "lit_adv.tasks.plain_weights.PlainWeights"])
def test_a_later_checkpoint_needs_the_file_no_more(tmp_path: Path, path: Path, network: SmallVGG, name: str) -> None:
    """In a recipe the network alone is left; its weights are the later checkpoint's."""
    inner = {"class_path": "lit_adv.models.SmallVGG", "init_args": dict(SMALL)}
    plain = {"class_path": name, "init_args": {"network": inner, "path": str(path), "freeze": True}}
    outer = {"class_path": "lit_adv.defense.Undefended", "init_args": {"classifier": plain, "num_classes": 10}}
    recipe = describe(outer)
    assert recipe["init_args"] == {"classifier": inner, "num_classes": 10}
    from lit_adv.defense import Undefended

    task = Classification(Undefended(PlainWeights(network, path), 10))
    task.recipe = recipe
    content: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(content)
    later = tmp_path / "later.ckpt"
    torch.save(content, later)
    path.unlink()
    rebuilt = Checkpoint(later)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(rebuilt(x), network.eval()(x))


def test_a_configuration_builds_it(path: Path, network: SmallVGG) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "module")
    inner = {"class_path": "lit_adv.models.SmallVGG", "init_args": dict(SMALL)}
    config = {"class_path": "lit_adv.tasks.PlainWeights", "init_args": {"network": inner, "path": str(path)}}
    built = parser.instantiate(parser.parse_object({"module": config})).module
    assert isinstance(built, SmallVGG)
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())

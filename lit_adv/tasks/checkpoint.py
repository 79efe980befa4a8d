"""The network in a checkpoint, rebuilt from plain data: no pickled object is ever run."""

import difflib
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adv.tasks.recipe import build_module, is_recipe

KEY = "lit_adv"
FORMAT = 1
_PREFIX = "model."
_ANY_MODULE = "a network of your own is evaluated with --model.module CLASS_PATH, its weights loaded by itself"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def Checkpoint(path: Path, freeze: bool = True, allow: Sequence[str] = ()) -> nn.Module:
    """The network in a checkpoint.

    Only tensors and plain data are read, and only classes of lit_adv are built.

    Args:
        path: Checkpoint written by training.
        freeze: Eval mode and weights without gradients; False: train mode, to be trained on.
        allow: Further packages whose classes the checkpoint may name, if you trust them.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, comes from elsewhere, or names a class that is not allowed.
    """
    content = read_checkpoint(path)
    recipe = content[KEY].get("model")
    if not is_recipe(recipe):
        raise CheckpointError(
            f"checkpoint {path} does not say how to build its network, since training was given a finished "
            f"module; name the module with --model.module beside --model.checkpoint"
        )
    try:
        network = build_module(recipe, allow)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} cannot be rebuilt: {error}") from None
    _fill(network, content["state_dict"], path)
    network.recipe = recipe  # plain data; a task that uses the network stores it
    return network.requires_grad_(not freeze).train(not freeze)


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Fill a network with the weights in a checkpoint and put it in eval mode.

    Args:
        network: Module of the class that was trained.
        path: Checkpoint written by training.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, comes from elsewhere, or holds another network's weights.
    """
    _fill(network, read_checkpoint(path)["state_dict"], path)
    return network.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The tensors and plain data in a checkpoint of this project.

    Args:
        path: Checkpoint written by training.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or comes from elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(_missing(path))
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_not_an_archive(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds pickled Python objects, which could run code when read, so it is not read; "
            f"{_ANY_MODULE} ({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, KeyError, zipfile.BadZipFile):
        raise CheckpointError(_damaged(path)) from None
    if not isinstance(content, dict) or not {KEY, "state_dict"} <= content.keys():
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else [type(content).__name__]
        raise CheckpointError(
            f"checkpoint {path} was not written by lit_adv: expected the keys '{KEY}' and 'state_dict', found "
            f"{', '.join(found) or 'none'}; {_ANY_MODULE}"
        )
    if content[KEY].get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {content[KEY].get('format')}, this version reads {FORMAT}; "
            f"train again or use the version of lit_adv that wrote it"
        )
    return content


def export_checkpoint(source: Path, target: Path) -> None:
    """Write the weights and the recipe in a checkpoint, without the state of training, to another file.

    Args:
        source: Checkpoint written by training.
        target: File to write; its folder is made.
    """
    content = read_checkpoint(source)
    kept = {key: content[key] for key in (KEY, "state_dict", "hyper_parameters", "pytorch-lightning_version")
            if key in content}  # fmt: skip
    # Lightning insists on these when it loads a checkpoint.
    kept |= {key: content[key] for key in ("epoch", "global_step") if key in content}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    torch.save(kept, part)
    os.replace(part, target)


def describe(recipe: Any) -> Any:
    """A copy of a recipe in which every network read from a file is replaced by its own recipe.

    The weights of such a network are in the new checkpoint, so that the file it came from is needed no more.
    """
    if is_recipe(recipe) and recipe["class_path"] in _OWN_PATHS:
        arguments = recipe["init_args"]
        return read_checkpoint(Path(arguments["path"]))[KEY]["model"]
    if is_recipe(recipe) and recipe["class_path"] in _PLAIN_PATHS:
        return describe(recipe["init_args"]["network"])
    if isinstance(recipe, Mapping):
        return {key: describe(value) for key, value in recipe.items()}
    if isinstance(recipe, (list, tuple)):
        return [describe(value) for value in recipe]
    return recipe


_OWN_PATHS = (f"{__package__}.{Checkpoint.__name__}", f"{__name__}.{Checkpoint.__name__}")
_PLAIN_PATHS = (f"{__package__}.PlainWeights", f"{__package__}.plain_weights.PlainWeights")  # which imports this file


def _fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    weights = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    fit_weights(
        network, weights, f"checkpoint {path}", "give the class and arguments it was trained with, or train again"
    )


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor], file: str, remedy: str) -> None:
    """Fill a network with weights that are its own to the last key.

    Raises:
        CheckpointError: If keys are missing, unknown or of another shape; they are named.
    """
    expected = network.state_dict()
    shapes = [key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape]
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if not (shapes or missing or extra):
        try:
            network.load_state_dict(weights)
        except ValueError as error:  # a defence refuses what it was not trained with
            raise CheckpointError(f"{file} is refused: {error}") from None
        return
    faults = {"missing": missing, "unknown": extra, "of another shape": shapes}
    listed = "; ".join(f"{name}: {', '.join(sorted(keys)[:4])}" for name, keys in faults.items() if keys)
    raise CheckpointError(
        f"{file} holds the weights of another network than {type(network).__name__} ({listed}); {remedy}"
    )


def _missing(path: Path) -> str:
    return f"checkpoint {path} does not exist{near(path, '*.ckpt') or '; train it first, or correct the path'}"


def near(path: Path, pattern: str = "*") -> str:
    """A hint at the file of a folder whose name is nearest to a path that does not exist, or nothing."""
    beside = [other.name for other in path.parent.glob(pattern)] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _not_an_archive(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"", b"PK"):  # the directory of a zip archive stands at its end: what is cut off has none
        return _damaged(path)
    return f"checkpoint {path} is no file written by torch.save; {_ANY_MODULE}"


def _damaged(path: Path) -> str:
    return f"checkpoint {path} is damaged ({path.stat().st_size} bytes); train again or copy it again"

"""Published weights: a plain state dictionary in a file, for a network that is given."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adv.tasks.checkpoint import KEY, CheckpointError, fit_weights, near


def PlainWeights(network: nn.Module, path: Path, freeze: bool = True) -> nn.Module:
    """A network with weights from elsewhere: names to tensors in a file of ``torch.save``, of any age or device.

    Only tensors are read. A later checkpoint holds the weights and the network's own recipe, and needs the file no
    more. Departures in names or normalisation are the network's matter: published weights mostly have the
    normalisation of images before them, not inside.

    Args:
        network: Module whose state dictionary has the file's keys and shapes.
        path: File that holds the state dictionary itself.
        freeze: Eval mode and weights without gradients; False: train mode, to be trained on.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, holds anything but tensors by name, or another network's weights.
    """
    path = Path(path)
    fit_weights(network, _weights(path), f"weights {path}", "give the network they were trained in")
    return network.requires_grad_(not freeze).train(not freeze)


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist{near(path) or '; correct the path'}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what an unpickler makes of other files is anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"weights {path} are damaged, or no file of torch.save, or hold pickled Python objects, which could run "
            f"code when read and so are not read: give a file of tensors alone ({reason})"
        ) from None
    if isinstance(content, Mapping) and KEY in content:
        raise CheckpointError(f"weights {path} are a checkpoint of lit_adv: read it by lit_adv.tasks.Checkpoint")
    plain = isinstance(content, Mapping) and bool(content)
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)] if plain else []
    if other or not plain:
        found = f"also {', '.join(sorted(other)[:8])}" if plain else f"a {type(content).__name__}"
        raise CheckpointError(
            f"weights {path} must be tensors by name, found {found}: save the state dictionary alone, e.g. "
            "torch.save(content['state_dict'], file)"
        )
    return {str(key): value for key, value in content.items()}

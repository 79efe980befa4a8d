"""What the inner layers of a network make of images: the spatial mean of each of their maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_adv.answers import dtype_of

_POOLINGS = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.FractionalMaxPool2d
)  # fmt: skip


class _Enough(BaseException):
    """Ends a forward whose last wanted layer has answered; no ``Exception``, which the network itself might catch."""


def inner_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the layers that tell most by default: all poolings, and all linear layers but the last.

    A pooling that ends an ``nn.Sequential`` goes by the name of that stage, whose output is the same.

    Raises:
        ValueError: the network has none.
    """
    modules = dict(network.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    names = []
    for name, module in modules.items():
        if isinstance(module, _POOLINGS):
            stage = name.rpartition(".")[0]
            parent = modules[stage]
            ends = stage != "" and isinstance(parent, nn.Sequential) and parent[-1] is module
            names.append(stage if ends else name)
        elif name in linear[:-1]:
            names.append(name)
    if not names:
        raise ValueError(
            f"{type(network).__name__} has neither poolings nor hidden linear layers: name the layers to look at"
        )
    return tuple(names)


def check_layers(network: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that are not those of layers of the network.

    Raises:
        ValueError: no name, one twice, or an unknown one.
    """
    known = [name for name, _ in network.named_modules() if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"layers must name layers of {type(network).__name__}, each once, got {list(names)}: it has "
            f"{', '.join(known)}"
        )


def features(network: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Outputs of the named layers, maps by their spatial mean, in the order of the names: (n, d) each.

    With a graph where grad is enabled and the images require it. The forward ends with the last layer that is named,
    so early layers cost less than the network does.

    Args:
        network: in eval mode.
        names: as in ``network.named_modules()``.
        x: images (n, C, H, W); given in half precision to a network in it.

    Raises:
        ValueError: a layer that takes no part in the forward, or whose output is no tensor (n, d, ...).
    """
    modules, found = dict(network.named_modules()), dict[str, Tensor]()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(x):
                raise ValueError(f"layer {name!r} must give one tensor (n, d, ...): name another one")
            # a copy either way: what follows may work in place
            found[name] = output.flatten(2).mean(2) if output.dim() > 2 else output.clone()
            if len(found) == len(names):
                raise _Enough

        return hook

    dtype = dtype_of(network)
    half = dtype in (torch.float16, torch.bfloat16)
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        network(x.to(dtype) if half else x)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{type(network).__name__} does not pass images through {', '.join(missing)}: name others")
    return [found[name] for name in names]


@torch.no_grad()
def features_of_many(network: nn.Module, names: Sequence[str], x: Tensor, chunk: int = 256) -> list[Tensor]:
    """The same of many images, ``chunk`` at a time, without a graph and in float64: (n, d) each."""
    parts = [[one.double() for one in features(network, names, part)] for part in torch.split(x, chunk)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]

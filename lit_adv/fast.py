"""A cheaper stand-in for a model, that answers a search whose hits the model itself then confirms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip


def fast_copy(
    model: nn.Module, precision: Precision = "fp32", channels_last: bool | None = None, compile: bool = False
) -> nn.Module | None:
    """A stand-in whose answers are nearly those of the model, for ``QueryOracle(fast=...)``.

    In bfloat16 every convolution and linear layer but the last holds rounded weights and casts what comes in, so that
    normalisation, scores and whatever is no such layer stay in float32. A network that cannot run so (weights outside
    layers, say) runs under autocast instead, and if that fails too, as it is; the first forward tells. The copy is
    frozen, in eval mode, and made of the weights of now: make a new one after training on.

    bfloat16 has 8 significant bits, so the two decide differently close to the boundary between classes. Attacks that
    keep to that boundary (HopSkipJump, Boundary) lose much by it: the model does not confirm many of their hits.
    Scores lose little; differences of scores at steps below 1/256 are the noisier for it.

    Args:
        model: the deployed model, images (n, C, H, W) to logits; never changed. A random Defense keeps its ``draws``.
        precision: of the layers.
        channels_last: lay images out with channels innermost; None: in bfloat16, whose convolutions gain from it.
        compile: pass the copy through ``torch.compile``, at the price of a minute at the start.

    Returns:
        None where nothing would be cheaper: nothing was asked for, or bfloat16 alone where the device has none.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if precision == "bf16" and not has_fast_bf16(device):
        warnings.warn(
            f"precision='bf16' would not be faster on this {device.type}, which has no bfloat16 arithmetic: the "
            "search runs in the model's own precision",
            stacklevel=2,
        )
        precision = "fp32"
    channels_last = precision == "bf16" if channels_last is None else channels_last
    if precision == "fp32" and not channels_last and not compile:
        return None
    return _FastCopy(model, precision, channels_last, compile)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 faster than in float32; on a CPU, whether it has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return bool(torch.cpu._is_avx512_bf16_supported())
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


class _FastCopy(nn.Module):
    """A copy that runs in the first of several ways that its network can run in.

    Attributes:
        way: ``bf16`` or ``fp32`` (perhaps ``compiled``), ``autocast``, or ``as it is``; None before the first forward.
    """

    def __init__(self, model: nn.Module, precision: Precision, channels_last: bool, compile: bool) -> None:
        super().__init__()
        self.stochastic: bool = bool(getattr(model, "stochastic", False))
        self.reject: int | None = getattr(model, "reject", None)
        self.way: str | None = None
        self.training = False  # of this module alone: the model may be in here, as it is
        self._name, self._channels_last = type(model).__name__, channels_last
        ways: list[tuple[str, nn.Module]] = []
        copied = _copy(model)
        if copied is not None and (precision == "fp32" or _narrow(copied)):
            if channels_last:
                copied.to(memory_format=torch.channels_last)
            if compile:
                ways.append((f"{precision} compiled", cast(nn.Module, torch.compile(copied, dynamic=True))))
            ways.append((precision, copied))
        if precision == "bf16":
            ways.append(("autocast", model))
        self._ways = [*ways, ("as it is", model)]
        self.model = self._ways[0][1]

    def forward(self, x: Tensor, **draws: Any) -> Tensor:
        return self._ask(x, lambda model, images: model(images, **draws))

    def averaged(self, x: Tensor, answers: int, **draws: Any) -> Tensor:
        """As the method of a random :class:`~lit_adv.defense.Defense`."""
        return self._ask(x, lambda model, images: model.averaged(images, answers, **draws))

    def _ask(self, x: Tensor, ask: Callable[[Any, Tensor], Tensor]) -> Tensor:
        images = x.contiguous(memory_format=torch.channels_last) if self._channels_last and x.dim() == 4 else x
        while True:
            way, model = self._ways[0]
            try:
                with torch.autocast(x.device.type, torch.bfloat16, enabled=way == "autocast"):
                    answer = ask(model, images)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever a network raises on a copy of itself, the next way may do; the last raises
                if self.way is not None or len(self._ways) == 1:
                    raise
                self._ways.pop(0)
                self.model = self._ways[0][1]
                continue
            if self.way is None:
                self._settle(way)
            return answer.to(x.dtype) if answer.is_floating_point() else answer

    def _settle(self, way: str) -> None:
        self.way = way
        del self._ways[1:]
        if way == "as it is":
            warnings.warn(
                f"{self._name} runs neither as a cheaper copy nor under autocast: the search asks it as it is",
                stacklevel=2,
            )


def _copy(model: nn.Module) -> nn.Module | None:
    """A frozen copy in eval mode; None of a network that holds what cannot be copied, a session or a lock say."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except Exception:  # what cannot be copied says so by errors of its own making; the search then goes without
        return None


def _narrow(model: nn.Module) -> bool:
    """Round the weights of all layers but the last, which gives the scores; whether there were any.

    Each layer casts what comes in to the type of its weights, as autocast does, but weights are cast once.
    """
    layers = [module for module in model.modules() if type(module) in _LAYERS]
    for layer in layers[:-1] or layers:
        layer.to(torch.bfloat16)
    for layer in layers:
        layer.register_forward_pre_hook(_cast_input)
    return bool(layers)


def _cast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(layer.weight.dtype), *inputs[1:])  # type: ignore[arg-type]

"""What frozen networks say of training images, computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KeptByPlace:
    """Values by place in a data set: computed when an image is first seen, then kept in memory, on the CPU.

    Args:
        most: bytes to keep; what does not fit is computed again every time.
    """

    def __init__(self, most: int = 2**31) -> None:
        self.most = most
        self._known: dict[int, Tensor] = {}
        self._bytes = 0

    def __call__(self, places: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The values of a batch, on the places' device.

        Args:
            places: (n,) places of the batch's images in the data set.
            compute: from the rows of the batch that are missing, (k,) int64, to their values (k, ...).
        """
        wanted = places.tolist()
        missing = [row for row, place in enumerate(wanted) if place not in self._known]
        fresh: dict[int, Tensor] = {}
        if missing or not wanted:
            values = compute(torch.tensor(missing, dtype=torch.int64, device=places.device)).detach()
            if len(missing) == len(wanted):
                self._keep(wanted, values)
                return values
            computed = [wanted[row] for row in missing]  # a place that stands twice is among them twice
            fresh = dict(zip(computed, values, strict=True))
            self._keep(computed, values)
        rows = [fresh[place] if place in fresh else self._known[place] for place in wanted]
        return torch.stack([row.to(places.device) for row in rows])

    def _keep(self, places: list[int], values: Tensor) -> None:
        for place, value in zip(places, values.cpu(), strict=True):
            size = value.numel() * value.element_size()
            if place not in self._known and self._bytes + size <= self.most:
                self._known[place] = value.clone()
                self._bytes += size

"""How many images go through the model at once."""

from __future__ import annotations

import torch

_AROUND = 1e-3  # seconds that an attack's own work takes per forward, as measured with PGD and NAttack


class Chunk:
    """The number of images in one forward: given, or found from the forwards that are made anyway.

    The size doubles while that raises the images per second, so that no image is sent just to measure; out of
    memory halves it for good. The work around a forward counts too: larger ones share it among more images.
    """

    def __init__(self, size: int | None, device: torch.device) -> None:
        if size is not None and size < 1:
            raise ValueError(f"chunk must be at least 1 image per forward or None, got {size}")
        self.settled = size is not None
        self.given = size is not None
        self.fallen = False  # by running out of memory
        self.fits = 0  # most images of which one graph has stood
        self.limit = 1024 if device.type == "cpu" else 16384
        self.size = size if size is not None else (64 if device.type == "cpu" else 256)
        self._first, self._backward = self.size, False
        self._best, self._previous_rate, self._seen = 0.0, 0.0, 0

    @property
    def graph(self) -> int:
        """Most images whose graph may stand at once: where nobody has set a limit, as many as it once did."""
        return self.size if self.given else max(self.size, self.fits)

    def observe(self, images: int, seconds: float, backward: bool = False) -> None:
        """Learn from a forward; only (nearly) full ones count, and the first at each size is a warm-up.

        Those with a backward are three times dearer: from the first of them on they alone count, from the start.
        """
        if backward and not self._backward:
            self._backward, self.settled = True, self.given or self.fallen
            self.size = self.size if self.settled else self._first
            self._best, self._previous_rate, self._seen = 0.0, 0.0, 0
        if self._backward and not backward:
            return
        if self.settled or 4 * images < 3 * self.size:  # blocks of a population seldom divide the size
            return
        self._seen += 1
        if self._seen > 1:
            self._best = max(self._best, images / (seconds + _AROUND))
        plain = self._seen > 1 and self._best > 1.2 * self._previous_rate  # short attacks cannot wait for more
        if self._seen < 4 and not plain:
            return
        if self._best < 1.05 * self._previous_rate:
            if self._seen < 16:  # a busy machine makes single forwards slow
                return
            if self._best < 0.95 * self._previous_rate:  # else stay, for the rows of the pool are that many by now
                self.size //= 2
            self.settled = True
        elif 2 * self.size > self.limit or images / self._best > 0.25:
            self.settled = True
        else:
            self.size, self._previous_rate = 2 * self.size, self._best
        self._best, self._seen = 0.0, 0

    def halve(self) -> None:
        """One step down after running out of memory; raises again where one image is too much."""
        if self.size == 1:
            raise torch.OutOfMemoryError("out of memory with a single image in the forward: use a smaller model")
        self.size, self.settled, self.fallen, self.fits = self.size // 2, True, True, 0

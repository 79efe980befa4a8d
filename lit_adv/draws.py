"""Random numbers keyed by seed, image and step: what a row draws does not depend on the batch it shares."""

from __future__ import annotations

import math
from typing import Self, TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_NORMAL, _UNIFORM = 1, 2


class Draws:
    """Counter-based random numbers of a set of rows.

    Each number is a hash of a 64-bit key made from (seed, image index, step, key, number of the call) and of its
    place in the row, computed over whole tensors. The same five give the same numbers in any batch, on any device,
    in any order; all are made in float32 and only then cast, so a float64 run sees the same ones.

    A call with ``first > 0`` continues the call before it: a population may be drawn in blocks of any size. Where rows
    stand at different blocks ``first`` is a tensor (n,); such calls all belong to one stream, apart from the others.

    Args:
        seed: the run's seed, any integer.
        index: places of the images in their data set, (n,) integers.
        step: number of each row's step, (n,) integers; the start of an attack is step -1.
        key: tells purposes within one step apart.

    References:
        The 32-bit mixing is a two-round multiply-xorshift hash in the manner of Salmon et al. 2011 (counter-based
        generators, https://doi.org/10.1145/2063384.2063405); normal numbers by Box and Muller 1958.
    """

    def __init__(self, seed: int, index: Tensor, step: Tensor, key: int = 0) -> None:
        self.seed, self.index, self.step, self.key = seed, index, step, key
        self._calls = 0

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor) -> Self:
        """The draws of some of the rows, from their first call on."""
        return type(self)(self.seed, self.index[rows], self.step[rows], self.key)

    def later(self, steps: int) -> Self:
        """The draws of the same rows ``steps`` steps on."""
        return type(self)(self.seed, self.index, self.step + steps, self.key)

    def normal(self, *shape: int, first: int | Tensor = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, (n, *shape); ``shape[0]`` counts samples, from sample ``first`` on."""
        samples, inner = _samples(shape)
        half = -(-inner // 2)
        unit = _unit(self._bits(_NORMAL, samples, 2 * half, first))
        radius, angle = unit[..., :half].log().mul_(-2).sqrt_(), unit[..., half:].mul(2 * math.pi)
        torch.mul(radius, angle.cos(), out=unit[..., :half])
        torch.mul(radius, angle.sin_(), out=unit[..., half:])
        return unit[..., :inner].reshape(len(self), *shape).to(dtype)

    def uniform(
        self,
        *shape: int,
        first: int | Tensor = 0,
        low: float = 0.0,
        high: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Uniform numbers in (low, high), (n, *shape)."""
        samples, inner = _samples(shape)
        unit = _unit(self._bits(_UNIFORM, samples, inner, first)).reshape(len(self), *shape)
        return unit.to(dtype).mul_(high - low).add_(low)

    def integers(self, high: int, *shape: int, first: int | Tensor = 0) -> Tensor:
        """Uniform integers in [0, high), (n, *shape) int64; ``high`` up to 2**24."""
        return (self.uniform(*shape, first=first, dtype=torch.float64) * high).long().clamp_max(high - 1)

    def _bits(self, kind: int, samples: int, width: int, first: int | Tensor) -> Tensor:
        """Hashed words, (n, samples, width) int32."""
        if isinstance(first, int) and first == 0:
            self._calls += 1
        low, high = self._row_keys(kind, self._calls if isinstance(first, int) else -1)
        if isinstance(first, Tensor):
            low = low + _words(first.to(low.device) * width)[0]
        elif first:
            low = low + _signed((first * width) & _WORD)
        counter = torch.arange(samples * width, dtype=torch.int32, device=low.device)
        word = counter + low[:, None]
        word ^= (word >> 16).bitwise_and_(0xFFFF)
        word *= 0x21F0AAAD
        word += high[:, None]
        word ^= (word >> 15).bitwise_and_(0x1FFFF)
        word *= _signed(0xD35A2D97)
        word ^= (word >> 15).bitwise_and_(0x1FFFF)
        return word.view(len(self), samples, width)

    def _row_keys(self, kind: int, call: int) -> tuple[Tensor, Tensor]:
        """Two 32-bit words per row from everything that names the stream, by 64-bit mixing."""
        index, step = _mix64(torch.stack([self.index, self.step]))
        hashed = _mix64(index ^ _signed64(self.seed * 0x9E3779B97F4A7C15))
        hashed = _mix64(hashed ^ step)
        for part in (self.key, call, kind):
            hashed = _mix64(hashed ^ _mix64(part))
        return _words(hashed)


def _samples(shape: tuple[int, ...]) -> tuple[int, int]:
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def _unit(bits: Tensor) -> Tensor:
    """The upper 24 bits as float32 in (0, 1), both ends excluded."""
    return (bits >> 8).bitwise_and_(0xFFFFFF).float().add_(0.5).mul_(2.0**-24).clamp_max_(1 - 2.0**-24)


Word = TypeVar("Word", int, Tensor)


def _mix64(word: Word) -> Word:
    """The finaliser of SplitMix64 on int64 words, whose products wrap around; of a number, as a number."""
    word = _wrapped(word + _signed64(0x9E3779B97F4A7C15))
    word = _wrapped((word ^ ((word >> 30) & (2**34 - 1))) * _signed64(0xBF58476D1CE4E5B9))
    word = _wrapped((word ^ ((word >> 27) & (2**37 - 1))) * _signed64(0x94D049BB133111EB))
    return word ^ ((word >> 31) & (2**33 - 1))


def _wrapped(word: Word) -> Word:
    return word if isinstance(word, Tensor) else _signed64(word)


def _words(word: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper half of int64 words, as int32."""
    low, high = word.contiguous().view(torch.int32).view(-1, 2).unbind(1)
    return low, high


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _signed64(word: int) -> int:
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word

"""Random numbers keyed by seed, image and step: what a row draws does not depend on the batch it shares."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Self, TypeVar

import torch
from torch import Tensor

_NORMAL, _UNIFORM, _INTEGERS, _SIGNS, _ORDER = 1, 2, 3, 4, 5
# odd 64-bit numbers that spread small counters; those of SplitMix64's mixing; an odd 32-bit one
_INDEX, _STEP, _SAMPLE = -0x2E5BDA82A6A3D3B5, -0x61C8864680B583EB, -0x41A3D5B4CF1B2F8D
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_ODD = 0x21F0AAAD
_LEVELS = 2**16
_ONE = 0x3F800000  # the bits of 1.0


class Draws:
    """Counter-based random numbers of a set of rows.

    Each number is a hash of (seed, image index, step, key, number of the call), of its sample and of its place in the
    sample, computed over whole tensors. The same give the same numbers in any batch, on any device, in any order;
    all are made in float32 and only then cast, so a float64 run sees the same ones.

    Samples are counted: a call with ``first > 0`` continues the call before it, so a population may be drawn in blocks
    of any size. Where rows stand at different blocks ``first`` is a tensor (n,); such calls all belong to one stream,
    apart from the others.

    Normal numbers take 65,536 values: the means of as many equally likely slices of the normal distribution, scaled to
    variance 1; the largest is 4.39. Uniform numbers take 2**23, the midpoints of equal intervals. Neither needs a
    function that devices round differently, so they are the same to the last bit everywhere.

    Args:
        seed: the run's seed, any integer.
        index: places of the images in their data set, (n,) integers.
        step: number of each row's step, (n,) integers; the start of an attack is step -1.
        key: tells purposes within one step apart.

    References:
        Counter-based generators: Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. Each sample gets two
        32-bit words by the mixing of SplitMix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195);
        each place has a fixed word, combined with them by xor and multiplication (multiply-shift hashing:
        Dietzfelbinger et al. 1997, https://doi.org/10.1006/jagm.1997.0873).
    """

    def __init__(self, seed: int, index: Tensor, step: Tensor, key: int = 0) -> None:
        self.seed, self.index, self.step, self.key = seed, index.long(), step.long(), key
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
        device = self.index.device
        level = torch.empty((len(self) * samples, 2, half), dtype=torch.int32, device=device)
        upper, lower = level.unbind(1)  # each word makes two numbers
        _words(_places(half, device), self._keys(_NORMAL, samples, first), out=lower)
        torch.bitwise_right_shift(lower, 16, out=upper)
        lower ^= upper
        level &= _LEVELS - 1
        numbers = _normal_levels(device).index_select(0, level.view(-1))
        if inner % 2:
            numbers = numbers.view(-1, 2 * half)[:, :inner].reshape(-1)
        numbers = numbers.view(len(self), *shape)
        return numbers if dtype == torch.float32 else numbers.to(dtype)

    def uniform(
        self,
        *shape: int,
        first: int | Tensor = 0,
        low: float = 0.0,
        high: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Uniform numbers in (low, high), (n, *shape)."""
        bits = self._bits31(_UNIFORM, shape, first).bitwise_right_shift_(8).bitwise_or_(_ONE)
        unit = bits.view(torch.float32).sub_(1 - 2.0**-24).to(dtype)  # from 23 bits behind the point of 1.0
        return unit if (low, high) == (0, 1) else unit.mul_(high - low).add_(low)

    def integers(self, high: int, *shape: int, first: int | Tensor = 0) -> Tensor:
        """Uniform integers in [0, high), (n, *shape) int64; ``high`` up to 2**24."""
        return self._bits31(_INTEGERS, shape, first).long().mul_(high).bitwise_right_shift_(31)

    def signs(self, *shape: int, first: int | Tensor = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """-1 or 1, equally likely, (n, *shape); one bit each, so cheaper than any other number."""
        samples, inner = _samples(shape)
        word = self._bits31(_SIGNS, (samples, -(-inner // 31)), first)
        bits = word.unsqueeze(-1) << torch.arange(1, 32, dtype=torch.int32, device=word.device)
        signs = bits.bitwise_and_(-(2**31)).bitwise_or_(_ONE).view(torch.float32)
        return signs.flatten(2)[..., :inner].reshape(len(self), *shape).to(dtype)

    def permutation(self, size: int) -> Tensor:
        """A random order of ``range(size)`` for each row, (n, size) int64."""
        return self._bits31(_ORDER, (1, size), 0).view(len(self), size).argsort(dim=1, stable=True)

    def _bits31(self, kind: int, shape: tuple[int, ...], first: int | Tensor) -> Tensor:
        """Uniform integers in [0, 2**31), (n, *shape) int32."""
        samples, width = _samples(shape)
        word = _words(_places(width, self.index.device), self._keys(kind, samples, first))
        word ^= word >> 16  # the shift copies the sign bit, so this clears it
        word *= _ODD
        word ^= word >> 15
        return word.view(len(self), *shape)

    def _keys(self, kind: int, samples: int, first: int | Tensor) -> tuple[Tensor, Tensor]:
        """Two words of each sample, (n * samples, 1) int32; the second is odd.

        After a forward an operation on few numbers costs ten times its usual time, for caches are cold; hence so few.
        """
        if isinstance(first, int) and first == 0:
            self._calls += 1
        stream = _stream(self.seed, self.key, self._calls if isinstance(first, int) else -1, kind)
        row = torch.add(self.index * _INDEX, self.step, alpha=_STEP)
        if isinstance(first, Tensor):
            row.add_(first.to(row.device), alpha=_SAMPLE)
            first = 0
        keys = _mix64(row.unsqueeze(1) + _counters(samples, stream + first * _SAMPLE, row.device))
        keys |= 2**32
        add, multiply = keys.view(-1).view(torch.int32).view(len(self) * samples, 2, 1).unbind(1)
        return add, multiply


def _words(places: Tensor, keys: tuple[Tensor, Tensor], out: Tensor | None = None) -> Tensor:
    """Hashed words, (m, width) int32; their upper bits are good, lower ones are to be folded with them."""
    return torch.bitwise_xor(places, keys[0], out=out).mul_(keys[1])


def _samples(shape: tuple[int, ...]) -> tuple[int, int]:
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


# What follows is remembered: constants, made on the CPU and then the same on every device.


@lru_cache(maxsize=64)
def _places(width: int, device: torch.device) -> Tensor:
    """A word for each place in a sample, (width,) int32."""
    with torch.inference_mode(False):
        words = _mix64(torch.arange(1, width + 1) * _INDEX)
        return (words >> 32).int().to(device)


@lru_cache(maxsize=1024)
def _counters(samples: int, origin: int, device: torch.device) -> Tensor:
    """What tells samples apart before the mixing, (samples,) int64."""
    with torch.inference_mode(False):
        return (torch.arange(samples) * _SAMPLE + _signed64(origin)).to(device)


@lru_cache(maxsize=8)
def _normal_levels(device: torch.device) -> Tensor:
    """The values of normal numbers, (65536,) float32, in a mixed order: words close to one another mean nothing."""
    with torch.inference_mode(False):
        edges = torch.special.ndtri(torch.arange(_LEVELS + 1, dtype=torch.float64) / _LEVELS)
        density = (edges.square() / -2).exp()
        means = density[:-1] - density[1:]
        means = means - means.flip(0)  # symmetric to the last bit
        means /= means.square().mean().sqrt()
        order = _mix64(torch.arange(1, _LEVELS + 1) * _STEP).argsort()
        return means[order].float().to(device)


@lru_cache(maxsize=1024)
def _stream(*parts: int) -> int:
    """One number from all that the rows have in common."""
    word = 0
    for part in parts:
        word = _mix64(word ^ _mix64(_signed64(part * _SAMPLE + _STEP)))
    return word


Word = TypeVar("Word", int, Tensor)


def _mix64(word: Word) -> Word:
    """Two rounds of SplitMix64 on int64 words, whose products wrap around; tensors are overwritten.

    Its last fold is left out, so the upper half is the better one. Shifts copy the sign: 62 bits are left.
    """
    word ^= word >> 32
    word = _times(word, _FIRST)
    word ^= word >> 29
    return _times(word, _SECOND)


def _times(word: Word, factor: int) -> Word:
    return word.mul_(factor) if isinstance(word, Tensor) else _signed64(word * factor)


def _signed64(word: int) -> int:
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def fresh_draws(x: Tensor, key: int = -7) -> Draws:
    """Numbers for one call on images (n, ...), from torch's generator; equally seeded processes draw different ones."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    process = torch.distributed.get_rank() if several else 0
    seed = int(torch.randint(2**62, ()))
    rows = torch.arange(len(x), device=x.device)
    return Draws(seed, rows, torch.full_like(rows, process), key=key)

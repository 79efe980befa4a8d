"""What attacks ask that take decision boundaries for planes: the nearest one, and the shortest way to it in the box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.gradients import clean_scores, gradients_of
from lit_adv.losses import is_adversarial, margin
from lit_adv.search import Search
from lit_adv.state import State
from lit_adv.threat import ThreatModel, norm_of

_FLOOR = 1e-8  # of a normal's dual norm


@dataclass(frozen=True)
class Planes:
    """One plane a row, ``{z: <normal, z - x> + gap = 0}``: where the linearised score of a class reaches the label's.

    Attributes:
        normal: (n, C, H, W) gradient of the class's score less that of the label; 0 where none is of use.
        gap: (n,) that difference itself. distance: (n,) of the plane in the threat's norm, box or no box; inf where no
            gradient is of use.
        won: (n,) bool, whether the decision on x (of the mean scores) is one the attacker wants. margin: (n,) of the
            same scores.
    """

    normal: Tensor
    gap: Tensor
    distance: Tensor
    won: Tensor
    margin: Tensor


def rivals_at(search: Search, rows: Tensor, classes: int, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """The classes whose boundaries are looked at: the likeliest at the clean image, but for the label.

    The clean images are asked once a call, as a check. A targeted row has one rival, its target; the refusal column
    is none.

    Args:
        rows: places in the caller's batch, (n,). classes: most classes, the label among them, at least 2.
        more: queries that the first step costs.

    Returns:
        Rivals (n, k) int64, the clean image's margin (n,), and (n,) bool: nothing could be asked, or NaN came back.
    """
    scores = clean_scores(search, rows, more)
    unknown = scores.isnan().any(1)
    target = None if search.target is None else search.target[rows]
    if scores.shape[1] < 2:
        return torch.zeros_like(rows)[:, None], scores[:, 0], unknown
    y = search.y[rows]
    value = margin(scores, y, target, search.reject)
    if target is not None:
        return target[:, None], value, unknown
    scores = scores.nan_to_num(-torch.inf).scatter(1, y[:, None], -torch.inf)
    others = scores.shape[1] - 1
    if search.reject is not None:
        scores[:, search.reject] = -torch.inf
        others -= 1
    return scores.topk(min(classes - 1, others), dim=1).indices, value, unknown


def nearest_planes(search: Search, state: State, rivals: Tensor, eot: int) -> Planes:
    """The nearest of the planes that bound the label's region, linearised at the rows' images.

    Distance is ``|gap|`` over the dual norm of the normal. A detector's refusal counts as the label where it speaks
    louder. A targeted row has one plane, between its target and the strongest other class.

    Args:
        rivals: (n, k) classes. eot: draws of a random model, over which gaps and normals are averaged.
    """
    y, target, reject = state.y, state.target, search.reject

    def sides(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The attacker's classes (m, k) and the other side's (m, 1), as one draw has them."""
        theirs = rivals[rows]
        if target is not None:
            return theirs, scores.scatter(1, theirs, -torch.inf).argmax(1, keepdim=True)
        own = y[rows, None]
        if reject is not None:
            own = torch.where(scores[:, reject, None] > scores.gather(1, own), reject, own)
        return theirs, own

    def directions(scores: Tensor, rows: Tensor) -> Tensor:
        theirs, own = sides(scores, rows)
        weights = scores.new_zeros(*theirs.shape, scores.shape[1]).scatter_(2, theirs[:, :, None], 1)
        return weights.scatter_(2, own[:, :, None].expand(*theirs.shape, 1), -1)

    scores, normals = gradients_of(search, state, directions, eot)
    flat = scores.flatten(0, 1)
    theirs, own = sides(flat, torch.arange(len(state), device=flat.device).repeat_interleave(eot))
    gaps = (flat.gather(1, theirs) - flat.gather(1, own)).view(len(state), eot, -1).mean(1)
    mean = scores.mean(1)
    return Planes(
        *_nearest(search.threat, gaps.to(state.x.dtype), normals.to(state.x.dtype)),
        won=is_adversarial(mean.argmax(1), y, target, reject) & ~mean.isnan().any(1),
        margin=margin(mean, y, target, reject).to(state.x.dtype),
    )


def _nearest(threat: ThreatModel, gaps: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normal, gap and distance of each row's nearest plane, of gaps (n, k) and normals (n, k, C, H, W)."""
    size = norm_of(normals.flatten(2), "l1" if threat.norm == "linf" else "l2")
    distance = gaps.abs() / size.clamp_min(_FLOOR)
    distance = torch.where((size > 0) & size.isfinite() & distance.isfinite(), distance, torch.inf)
    least, choice = distance.min(1)
    usable, row = least.isfinite(), torch.arange(len(gaps), device=gaps.device)
    normal = torch.where(usable[:, None, None, None], normals[row, choice], 0.0)
    return normal, torch.where(usable, gaps[row, choice], 0.0), least


def step_onto(threat: ThreatModel, x: Tensor, normal: Tensor, gap: Tensor) -> Tensor:
    """The shortest step from each image to its plane that stays in the box: the exact projection's displacement.

    Minimises ``|delta|`` in the threat's norm subject to ``<normal, delta> = -gap`` and ``x + delta`` in the box.
    Every pixel moves towards the plane by ``min(tau, room)`` (linf) or ``min(tau |normal|, room)`` (l2); what they
    gain together is a concave, piecewise linear function of tau, solved by sorting its corners. Where even the
    farthest corner of the box does not reach the plane, that corner is the answer.

    Shape: x and normal (n, C, H, W), gap (n,): the plane's value at x -> (n, C, H, W).
    References: Croce & Hein 2020, https://arxiv.org/abs/1907.02044, which poses it.
    """
    low, high = threat.box
    flat, w = x.flatten(1), normal.flatten(1)
    scale = w.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    w = w / scale * -gap.sign()[:, None]  # upwards along w is now towards the plane
    wanted = (gap.abs() / scale[:, 0])[:, None]
    weight = w.abs()
    room = torch.where(w > 0, high - flat, flat - low).clamp_min(0)
    if threat.norm == "linf":
        corner, slope = room, weight
    else:
        corner, slope = room / weight.clamp_min(torch.finfo(w.dtype).tiny), weight.square()
    tau = _level(corner, slope, weight * room, wanted)
    length = torch.minimum(tau if threat.norm == "linf" else tau * weight, room)
    return torch.where((wanted > 0) & (weight > 0), length * w.sign(), 0.0).view_as(x)


def noticed(threat: ThreatModel, step: Tensor) -> Tensor:
    """Steps (n, C, H, W), stretched until rounding to the threat's levels cannot undo them: half a level somewhere."""
    if threat.levels is None:
        return step
    largest, least = step.flatten(1).abs().amax(1), 0.51 / threat.levels
    stretch = torch.where((largest > 0) & (largest < least), least / largest, 1.0)
    return step * stretch[:, None, None, None]


def _level(corner: Tensor, slope: Tensor, most: Tensor, wanted: Tensor) -> Tensor:
    """The least tau with ``sum_i min(slope_i tau, most_i) = wanted``, where ``corner = most / slope``; else inf.

    Shape: (n, d) thrice and (n, 1) -> (n, 1).
    """
    corner, order = corner.sort(1)
    slope, most = slope.gather(1, order), most.gather(1, order)
    rising = slope.flip(1).cumsum(1).flip(1)  # of the pixels not yet at their end: summed from the end, nothing cancels
    before = most.cumsum(1) - most
    gain = before + corner * rising  # at each corner, before which the pixels of lower ones are at their ends
    place = torch.searchsorted(gain.cummax(1).values, wanted)
    inside = place.clamp_max(corner.shape[1] - 1)
    tau = (wanted - before.gather(1, inside)) / rising.gather(1, inside)
    tau = tau.clamp_min(0).minimum(corner.gather(1, inside))
    return torch.where(place < corner.shape[1], tau, torch.inf)

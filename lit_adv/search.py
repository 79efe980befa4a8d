"""One call of an attack: the rows under attack, what has been asked, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.losses import is_adversarial
from lit_adv.oracle import Access, QueryOracle
from lit_adv.result import AttackResult
from lit_adv.threat import ThreatModel


class Rules(Protocol):
    """What a search must know of its attack; see :class:`lit_adv.attack.IterativeAttack`."""

    threat: ThreatModel
    access: Access
    seed: int
    steps: int
    restarts: int
    minimizes_distance: bool
    stop_at_hit: bool
    needs_whole_step: bool

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        """Images each row may ask about in its next step."""
        ...


@dataclass(kw_only=True)
class State:
    """The rows under attack at present, one entry per row in every tensor field; subclasses add fields.

    ``state[keep]`` selects rows and ``state + other`` joins them, so every field has one shape for all rows.

    Attributes:
        x: (n, C, H, W) the current candidates. x0: the clean images. y: (n,) labels. target: (n,) or None.
        rows: (n,) places in the caller's batch. t: (n,) each row's own step number.
        done: (n,) bool, the attack has no more to try. inside: (n,) bool, in the midst of a step (between blocks
            of a population): the step number stays.
    """

    x: Tensor
    x0: Tensor
    y: Tensor
    target: Tensor | None
    rows: Tensor
    t: Tensor
    done: Tensor
    inside: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, keep: Tensor) -> Self:
        return replace(self, **{name: value[keep] for name, value in self._tensors()})

    def __add__(self, other: Self) -> Self:
        if not len(self):
            return other
        theirs = dict(other._tensors())
        return replace(self, **{name: torch.cat([value, theirs[name]]) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, value) for name, value in pairs if isinstance(value, Tensor)]


class Search:
    """Asks the oracle on behalf of one call of an attack, and keeps what it finds.

    Every image asked about is a candidate: the answer that yields loss or decision also ends or improves its row,
    so no forward is spent on checking.

    Args:
        watch: False for training, where just the steps count: nothing is offered, nothing recorded.
    """

    def __init__(
        self,
        attack: Rules,
        oracle: QueryOracle,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        index: Tensor,
        finished: Callable[[Tensor, AttackResult], None] | None = None,
        watch: bool = True,
    ) -> None:
        self.attack, self.oracle, self.threat = attack, oracle, attack.threat
        self.x0, self.y, self.target, self.index = x, y, target, index
        self.finished, self.watch, self.reject = finished, watch, oracle.reject
        self.seed = attack.seed
        rows, device = len(x), x.device
        self.restart = torch.zeros(rows, dtype=torch.int64, device=device)
        self._labels_checked = False
        self._classes: int | None = None
        if not watch:
            return
        self.x_adv = x.clone()
        self.distance = torch.full((rows,), torch.inf, dtype=x.dtype, device=device)
        self.success = torch.zeros(rows, dtype=torch.bool, device=device)
        self.first_hit = torch.full_like(self.restart, -1)
        self.iterations = torch.zeros_like(self.restart)
        self.checks = torch.zeros_like(self.restart)
        self._earlier = torch.zeros_like(self.restart)  # steps of the restarts before this one
        self._trace: list[Tensor] = []

    def fresh(self, rows: Tensor) -> dict[str, Any]:
        """The fields that every state has, for rows that begin at their clean image."""
        flags = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        x0 = self.x0[rows]
        target = None if self.target is None else self.target[rows]
        return {
            "x": x0, "x0": x0, "y": self.y[rows], "target": target, "rows": rows,
            "t": torch.zeros_like(rows), "done": flags, "inside": flags,
        }  # fmt: skip

    def draws(self, state: State, key: int = 0) -> Draws:
        """Random numbers of these rows in this step; ``key`` tells purposes within a step apart."""
        return self._draws(state.rows, state.t, key)

    def starting_draws(self, rows: Tensor, key: int = 0) -> Draws:
        """Random numbers of rows about to start: step -1."""
        return self._draws(rows, torch.full_like(rows, -1), key)

    def _draws(self, rows: Tensor, step: Tensor, key: int) -> Draws:
        if self.attack.restarts > 1:
            step = step + (self.restart[rows] << 32)
        return Draws(self.seed, self.index[rows], step, key)

    def scores(
        self,
        x: Tensor,
        state: State,
        candidate: bool = True,
        check: bool = False,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Scores of images of the state's rows, offered as candidates on the way.

        Args:
            candidate: False where the paper's schedule does not look at these images, or they are no images.
            check: the images stand outside the paper's arithmetic of queries.
            asked: (n, s) bool, False for places to leave out. Where the budget does not cover all samples of a
                row, its last ones are left out too. What was left out answers NaN.

        Shape: x (n, C, H, W) or (n, s, C, H, W) -> (n, K) or (n, s, K).
        """
        x = self._rounded(x, state) if candidate else x
        return self._ask(self.oracle.scores, x, state, candidate, check, asked)

    def label(
        self,
        x: Tensor,
        state: State,
        candidate: bool = True,
        check: bool = False,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Decisions on images of the state's rows, offered as candidates; arguments as :meth:`scores`.

        Shape: x (n, C, H, W) or (n, s, C, H, W) -> (n,) or (n, s); -1 for what was left out.
        """
        x = self._rounded(x, state) if candidate else x
        return self._ask(self.oracle.label, x, state, candidate, check, asked)

    def _ask(
        self,
        ask: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        state: State,
        candidate: bool,
        check: bool,
        asked: Tensor | None,
    ) -> Tensor:
        if not self.watch:
            return self._checked(ask(x, state.rows), state)
        before = self.oracle.queries[state.rows]
        asked = self._affordable(x, state, asked)
        answer = ask(x, state.rows) if asked is None else self._ask_some(ask, x, state, asked)
        self._checked(answer, state)
        if check:
            self.checks[state.rows] += self.oracle.queries[state.rows] - before
        if candidate:
            each = 1 if x.requires_grad else self.oracle.answers
            order = torch.arange(1, (x.shape[1] if x.dim() == 5 else 1) + 1, device=x.device).expand(len(x), -1)
            spent = before[:, None] + each * (order if asked is None else asked.cumsum(1))
            self._offer(x.detach(), answer.detach(), state, spent)
        return answer

    def _rounded(self, x: Tensor, state: State) -> Tensor:
        if self.threat.levels is None or not self.watch:
            return x
        exact = self.threat.quantize(x.detach(), state.x0, self.threat.levels)
        return x + (exact - x).detach() if x.requires_grad else exact

    def _affordable(self, x: Tensor, state: State, asked: Tensor | None) -> Tensor | None:
        """Which samples to send: those asked for that the budget covers; None for all."""
        if self.oracle.budget is None or x.dim() == 4:
            return asked
        left = self.oracle.remaining(state.rows)
        if int(left.min()) >= x.shape[1]:
            return asked
        wanted = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if asked is None else asked
        covered = wanted & (wanted.cumsum(1) <= left[:, None])
        return asked if bool((covered == wanted).all()) else covered

    def _ask_some(self, ask: Callable[[Tensor, Tensor], Tensor], x: Tensor, state: State, asked: Tensor) -> Tensor:
        if not asked.any():
            if ask == self.oracle.label:
                return torch.full_like(asked, -1, dtype=torch.int64)
            return x.new_full((*asked.shape, self._classes or 1), torch.nan)
        flat = ask(x[asked], state.rows[:, None].expand_as(asked)[asked])
        blank = torch.nan if flat.is_floating_point() else -1
        answer = flat.new_full((*asked.shape, *flat.shape[1:]), blank)
        answer[asked] = flat
        return answer

    def _checked(self, answer: Tensor, state: State) -> Tensor:
        """Labels and targets must be classes of the model; looked at once, at the first answer."""
        if self._labels_checked or not answer.is_floating_point():
            return answer
        self._labels_checked = True
        self._classes = answer.shape[-1]
        classes = answer.shape[-1] - (self.reject is not None)
        for name, value in (("y", self.y), ("target", self.target)):
            if value is not None and len(value) and int(value.max()) >= classes:
                raise ValueError(
                    f"{name} holds class {int(value.max())}, but the model knows classes 0 to {classes - 1}"
                )
        return answer

    def _offer(self, x: Tensor, answer: Tensor, state: State, spent: Tensor) -> None:
        """Keep the first (or nearest) adversarial candidate of each row.

        Shape: x (n, [s,] C, H, W), answer scores (n, [s,] K) or labels (n, [s]), spent (n, s): queries up to each.
        """
        x = x if x.dim() == 5 else x.unsqueeze(1)
        samples = x.shape[1]
        scored = answer.is_floating_point()
        labels = answer.argmax(-1) if scored else answer
        hit = is_adversarial(labels, state.y, state.target, self.reject).view(len(x), samples)
        if not hit.any():
            return
        if scored:
            known = ~answer.isnan().any(-1).view(len(x), samples)
            hit = hit & known
        else:
            hit = hit & (answer.view(len(x), samples) >= 0)
        found = hit.any(1).nonzero().squeeze(1)
        if len(found):
            self._keep(x[found], hit[found], state[found], spent[found])

    def _keep(self, x: Tensor, hit: Tensor, state: State, spent: Tensor) -> None:
        flat, samples = x.flatten(0, 1), x.shape[1]
        x0 = state.x0.repeat_interleave(samples, 0)
        hit = hit & self.threat.in_box(flat).view(hit.shape)  # what is no image is no adversarial image
        distance = self.threat.distance(flat, x0).view(hit.shape).masked_fill(~hit, torch.inf)
        valid = hit & self.threat.within(flat, x0).view(hit.shape)
        if self.attack.minimizes_distance:
            place = distance.argmin(1)
        else:  # the earliest valid one; where none is, the nearest outside
            place = torch.where(valid.any(1), valid.int().argmax(1), distance.argmin(1))
        every = torch.arange(len(x), device=x.device)
        near, valid = distance[every, place], valid[every, place]
        better = self._better(near, valid, state.rows)
        kept = better.nonzero().squeeze(1)
        if not len(kept):
            return
        x, rows = x[kept, place[kept]], state.rows[kept]
        spent = spent[kept, place[kept]]
        t, near, valid, y = state.t[kept], near[kept], valid[kept], state.y[kept]
        if self.oracle.doubtful:
            before = self.oracle.queries[rows]
            label = self.oracle.confirm(x, rows)
            self.checks[rows] += self.oracle.queries[rows] - before
            target = None if state.target is None else state.target[kept]
            sure = is_adversarial(label, y, target, self.reject) & (label >= 0)
            x, rows, t, near, valid = x[sure], rows[sure], t[sure], near[sure], valid[sure]
            spent = self.oracle.queries[rows]
        self._record(x, rows, t, near, valid, spent)

    def _better(self, distance: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
        if self.attack.minimizes_distance:
            return (distance < self.distance[rows]) & (valid | ~self.success[rows])
        return (valid | (~self.success[rows] & (distance < self.distance[rows]))) & ~(
            self.success[rows] & self.attack.stop_at_hit
        )

    def _record(self, x: Tensor, rows: Tensor, t: Tensor, distance: Tensor, valid: Tensor, spent: Tensor) -> None:
        self.x_adv[rows] = x.to(self.x_adv.dtype)
        self.distance[rows] = distance.to(self.distance.dtype)
        first = rows[valid & ~self.success[rows]]
        new = valid & ~self.success[rows]
        self.first_hit[first] = spent[new]
        self.iterations[first] = self._earlier[first] + t[new]
        self.success[first] = True
        self._trace.append(torch.stack([v.double() for v in (rows, t, spent, distance)], 1))

    def won(self, state: State) -> Tensor:
        """Rows that are about to leave because they have won, (n,) bool."""
        if not self.watch or not self.attack.stop_at_hit or self.attack.minimizes_distance:
            return torch.zeros_like(state.done)
        return self.success[state.rows]

    def retire(self, state: State) -> tuple[State, Tensor]:
        """The rows that go on, and those to be started anew.

        A row ends when it has won, is done, or is out of steps or budget. One that ends without a win has its last
        candidate asked once more, charged as a check; then it may have a restart left.
        """
        over = state.done | (state.t >= self.attack.steps) | self.won(state)
        if self.oracle.budget is not None:
            over = over | self._broke(state)
        if not over.any():
            return state, state.rows[:0]
        ended = state[over.nonzero().squeeze(1)]
        self._check_last(ended)
        again = ~self.success[ended.rows] & (self.restart[ended.rows] + 1 < self.attack.restarts)
        again &= self.oracle.remaining(ended.rows) > 0
        self._close(ended[~again])
        anew = ended[again]
        self._earlier[anew.rows] += anew.t
        self.restart[anew.rows] += 1
        return state[(~over).nonzero().squeeze(1)], anew.rows

    def _broke(self, state: State) -> Tensor:
        cost = self.attack.cost(state.x.shape[1:], state) if self.attack.needs_whole_step else 1
        return self.oracle.remaining(state.rows) < cost

    def _check_last(self, ended: State) -> None:
        unsure = (self.oracle.remaining(ended.rows) > 0) & ended.done.logical_not()
        if self.attack.stop_at_hit or self.attack.minimizes_distance:
            unsure &= ~self.success[ended.rows]
        if unsure.any():
            last = ended[unsure.nonzero().squeeze(1)]
            ask = self.label if self.attack.access == Access.LABEL else self.scores
            ask(self.threat.project(last.x, last.x0), last, check=True)

    def _close(self, ended: State) -> None:
        """Write down what rows that found nothing leave behind, and tell the caller of all that ended."""
        open_rows = ~self.success[ended.rows]
        lost = ended[open_rows.nonzero().squeeze(1)]
        self.iterations[lost.rows] = self._earlier[lost.rows] + lost.t
        blank = lost[(self.distance[lost.rows] == torch.inf).nonzero().squeeze(1)]
        self.x_adv[blank.rows] = self.threat.project(blank.x, blank.x0)
        if self.finished is not None and len(ended):
            self.finished(ended.rows, self.result()[ended.rows])

    def result(self) -> AttackResult:
        """The result of all rows; of those not yet ended, as far as they have come."""
        blank = torch.zeros(0, 4, dtype=torch.float64, device=self.x0.device)
        return AttackResult(
            x_adv=self.x_adv,
            success=self.success,
            distance=self.distance,
            queries=self.oracle.queries.clone(),
            checks=self.checks,
            first_hit=self.first_hit,
            iterations=self.iterations,
            trace=torch.cat(self._trace) if self._trace else blank,
            nonfinite=int(self.oracle.nonfinite),
        )

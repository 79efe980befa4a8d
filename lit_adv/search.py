"""One call of an attack: the rows under attack, what has been asked, and what was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.losses import adversarial_samples, is_adversarial
from lit_adv.oracle import Access, QueryOracle
from lit_adv.result import AttackResult
from lit_adv.state import Rules, State


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
        self.clean: Tensor | None = None  # scores of clean images, where asked
        self.blind = torch.zeros(rows, dtype=torch.bool, device=device)
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
        self._counts: dict[str, tuple[Tensor, int]] = {}

    def fresh(self, rows: Tensor) -> dict[str, Any]:
        """The fields that every state has, for rows that begin at their clean image."""
        flags = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        x0 = self.x0[rows]
        target = None if self.target is None else self.target[rows]
        return {
            "x": x0.clone(), "x0": x0, "y": self.y[rows], "target": target, "rows": rows,
            "t": torch.zeros_like(rows), "done": flags, "inside": flags.clone(),
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
        check: bool | Tensor = False,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Scores of images of the state's rows, offered as candidates on the way.

        Args:
            candidate: False where the paper's schedule does not look at these images, or they are no images.
            check: the images (or those of a mask like ``asked``) stand outside the paper's arithmetic of queries.
            asked: (n, s) bool, False for places to leave out. Where the budget does not cover all samples of a
                row, its last ones are left out too. What was left out answers NaN.

        Shape: x (n, C, H, W) or (n, s, C, H, W), or packed: with ``asked``, its m images alone, row by row,
            (m, C, H, W) -> (n, K) or (n, s, K).
        """
        return self.ask(self.oracle.scores, x, state, candidate, check, asked)

    def label(
        self,
        x: Tensor,
        state: State,
        candidate: bool = True,
        check: bool | Tensor = False,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Decisions on images of the state's rows, offered as candidates; arguments as :meth:`scores`.

        Shape: x as for :meth:`scores` -> (n,) or (n, s); -1 for what was left out.
        """
        return self.ask(self.oracle.label, x, state, candidate, check, asked)

    def ask(
        self,
        ask: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        state: State,
        candidate: bool = True,
        check: bool | Tensor = False,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Answers of any question ``(images, rows) -> answers``; arguments as :meth:`scores`."""
        x = self._rounded(x, state, asked) if candidate else x
        if not self.watch:
            answer = ask(x, state.rows) if asked is None else self._ask_some(ask, x, state, asked, asked)
            return self._checked(answer, state)
        before = self.oracle.queries[state.rows]
        paid = self._affordable(x, state, asked)
        answer = ask(x, state.rows) if paid is None else self._ask_some(ask, x, state, asked, paid)
        self._checked(answer, state)
        each = 1 if x.requires_grad else self.oracle.answers
        if isinstance(check, Tensor):
            known = check if paid is None else check & paid
            self.checks.index_add_(0, state.rows, known.sum(1), alpha=each)
        elif check:
            self.checks[state.rows] += self.oracle.queries[state.rows] - before
        if candidate:
            alike = x.dim() == 5 and x.stride(1) == 0  # draws of one image
            rule = (state.y, state.target, self.reject, self.attack.confidence)
            hit = adversarial_samples(answer.detach(), *rule, averaged=alike and self.oracle.stochastic)
            if hit is not None:  # seldom: what follows is only done then
                order = torch.arange(1, hit.shape[1] + 1, device=x.device).expand(hit.shape)
                spent = before[:, None] + each * (order if paid is None else paid.cumsum(1))
                self._keep(x.detach(), hit, state, spent, asked)
        return answer

    def _rounded(self, x: Tensor, state: State, asked: Tensor | None) -> Tensor:
        if self.threat.levels is None or not self.watch:
            return x
        x0 = state.x0 if asked is None or x.dim() == 5 else state.x0[asked.nonzero()[:, 0]]
        exact = self.threat.quantize(x.detach(), x0, self.threat.levels)
        return x + (exact - x).detach() if x.requires_grad else exact

    def _affordable(self, x: Tensor, state: State, asked: Tensor | None) -> Tensor | None:
        """Which samples to send: those asked for that the budget covers; None for all."""
        if self.oracle.budget is None or (x.dim() == 4 and asked is None):
            return asked
        left = self.oracle.remaining(state.rows, x.requires_grad)
        samples = x.shape[1] if asked is None else asked.shape[1]
        if int(left.min()) >= samples:
            return asked
        wanted = torch.ones(len(x), samples, dtype=torch.bool, device=x.device) if asked is None else asked
        covered = wanted & (wanted.cumsum(1) <= left[:, None])
        return asked if bool((covered == wanted).all()) else covered

    def _ask_some(
        self,
        ask: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        state: State,
        asked: Tensor | None,
        paid: Tensor,
    ) -> Tensor:
        """Answers for the samples that are ``paid``, blanks elsewhere; ``x`` may hold those ``asked`` alone."""
        if not paid.any():
            if ask == self.oracle.label:
                return torch.full_like(paid, -1, dtype=torch.int64)
            return x.new_full((*paid.shape, self._classes or 1), torch.nan)
        if x.dim() == 5:
            images = x[paid]
        else:
            assert asked is not None
            images = x if paid is asked else x[paid[asked]]
        flat = ask(images, state.rows[:, None].expand_as(paid)[paid])
        blank = torch.nan if flat.is_floating_point() else -1
        answer = flat.new_full((*paid.shape, *flat.shape[1:]), blank)
        answer[paid] = flat
        return answer

    def _checked(self, answer: Tensor, state: State) -> Tensor:
        """Labels and targets must be classes of the model; looked at once, at the first answer."""
        if self._labels_checked or not answer.is_floating_point() or answer.shape[-1] < 2:  # nothing was asked yet
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

    def _keep(self, x: Tensor, hit: Tensor, state: State, spent: Tensor, asked: Tensor | None) -> None:
        """Keep the first (or nearest) adversarial candidate of each row.

        Shape: x (n, [s,] C, H, W) or packed by ``asked``, hit (n, s), spent (n, s): queries up to each.
        """
        owner, column = hit.nonzero().unbind(1)
        images = _picked(x, owner, column, asked)
        near = self.threat.distance(images, state.x0[owner])
        near = near.masked_fill(~self.threat.in_box(images), torch.inf)  # what is no image is no adversarial image
        valid = (near <= self.threat.reach(images)) & near.isfinite()
        # what an estimator asks outside the ball is a probe and no result
        wanted = near.isfinite() if self.attack.minimizes_distance else valid
        if not wanted.any():
            return
        samples = hit.shape[1]
        # the nearest; or the earliest valid one, and where none is, the nearest outside
        key = near if self._keeps_nearest else torch.where(valid, column.to(near.dtype), samples + near)
        table = near.new_full(hit.shape, torch.inf)
        table[owner, column] = key.masked_fill(~wanted, torch.inf)
        least, place = table.min(1)
        kept = least.isfinite().nonzero().squeeze(1)
        number = column.new_zeros(hit.shape)
        number[owner, column] = torch.arange(len(column), device=x.device)
        chosen = number[kept, place[kept]]
        better = self._better(near[chosen], valid[chosen], state.rows[kept])
        kept, chosen = kept[better], chosen[better]
        if not len(kept):
            return
        earliest = column.new_full(hit.shape, samples - 1)
        earliest[owner, column] = torch.where(valid, column, samples - 1)
        first = spent[kept, earliest.amin(1)[kept]]  # queries up to the first valid one, whichever is kept
        self._confirm(images[chosen], state[kept], near[chosen], valid[chosen], spent[kept, place[kept]], first)

    def _confirm(self, x: Tensor, state: State, near: Tensor, valid: Tensor, spent: Tensor, first: Tensor) -> None:
        """Write hits down, one a row; doubtful ones only if fresh answers of the deployed model agree."""
        rows, t = state.rows, state.t
        if self.oracle.doubtful:
            before = self.oracle.queries[rows]
            label = self.oracle.confirm(x, rows)
            self.checks[rows] += self.oracle.queries[rows] - before
            sure = is_adversarial(label, state.y, state.target, self.reject) & (label >= 0)
            x, rows, t, near, valid = x[sure], rows[sure], t[sure], near[sure], valid[sure]
            spent = first = self.oracle.queries[rows]
        self._record(x, rows, t, near, valid, spent, first)

    def _better(self, distance: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
        if self._keeps_nearest:
            return (distance < self.distance[rows]) & (valid | ~self.success[rows])
        return (valid | (~self.success[rows] & (distance < self.distance[rows]))) & ~(
            self.success[rows] & self.attack.stop_at_hit
        )

    def _record(
        self, x: Tensor, rows: Tensor, t: Tensor, distance: Tensor, valid: Tensor, spent: Tensor, first: Tensor
    ) -> None:
        self.x_adv[rows] = x.to(self.x_adv.dtype)
        self.distance[rows] = distance.to(self.distance.dtype)
        new = valid & ~self.success[rows]
        won = rows[new]
        self.first_hit[won] = first[new]
        self.iterations[won] = self._earlier[won] + t[new]
        self.success[won] = True
        self._trace.append(torch.stack([v.double() for v in (rows, t, spent, distance)], 1))

    @property
    def _keeps_nearest(self) -> bool:
        """Whether rows go on after a hit within the radius, for a nearer one."""
        nearest = self.attack.minimizes_distance
        return nearest and not (self.attack.stop_at_hit and math.isfinite(self.threat.radius))

    def won(self, state: State) -> Tensor:
        """Rows that are about to leave because they have won, (n,) bool."""
        if not self.watch or not self.attack.stop_at_hit or self._keeps_nearest:
            return torch.zeros_like(state.done)
        return self.success[state.rows]

    def count(self, name: str, happened: Tensor) -> None:
        """Note for the report how often something happened, of all the times it could have: a bool mask."""
        if self.watch:
            before, times = self._counts.get(name, (happened.new_zeros((), dtype=torch.int64), 0))
            self._counts[name] = before + happened.sum(), times + happened.numel()

    def look(self, rows: Tensor) -> Tensor:
        """Ask about clean images before the attack, as a check; those of ``rows`` that go on to be attacked.

        One query each, where the budget covers it and the first step. Nothing is asked where the caller knows that
        they are right at first, as an evaluation does.
        """
        if self.oracle.known_right or not self.attack.looks_first or not len(rows):
            return rows
        step = int(self.attack.least(self.x0.shape[1:])) if self.attack.needs_whole_step else 1
        paid = rows[self.oracle.remaining(rows) >= (1 + step if step > 1 else 1)]
        ask = self.label if self.attack.access == Access.LABEL else self.scores
        for part in torch.split(paid, self.oracle.chunk):
            fields = self.fresh(part)
            ask(fields["x"], State(**fields), check=True)
        over = self.success[rows] & (self.attack.stop_at_hit or self.attack.minimizes_distance)
        if over.any():
            self._close(State(**self.fresh(rows[over])))
        return rows[~over]

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
        every = bool(over.all())  # then nothing need be copied
        ended = state if every else state[over.nonzero().squeeze(1)]
        self._check_last(ended)
        if self.attack.leaving is not None:
            self.attack.leaving(ended)
        if self.attack.restarts == 1:
            self._close(ended)
            return state[(~over).nonzero().squeeze(1)], state.rows[:0]
        open_still = ~self.success[ended.rows] | (self._keeps_nearest & (self.distance[ended.rows] > 0))
        again = open_still & (self.restart[ended.rows] + 1 < self.attack.restarts)
        again &= self.oracle.remaining(ended.rows) > 0
        self._close(ended[~again])
        anew = ended[again]
        self._earlier[anew.rows] += anew.t
        self.restart[anew.rows] += 1
        return state[(~over).nonzero().squeeze(1)], anew.rows

    def _broke(self, state: State) -> Tensor:
        least = self.attack.least(state.x.shape[1:], state) if self.attack.needs_whole_step else 1
        return self.oracle.remaining(state.rows, self.attack.access == Access.GRADIENT) < least

    def _check_last(self, ended: State) -> None:
        begun = (ended.t > 0) | ended.inside  # where no step could be paid nothing is spent
        unsure = begun & (self.oracle.remaining(ended.rows) > 0) & ended.done.logical_not()
        if self.attack.stop_at_hit or self.attack.minimizes_distance:
            unsure &= ~self.success[ended.rows]
        if unsure.any():
            last = ended if bool(unsure.all()) else ended[unsure.nonzero().squeeze(1)]
            ask = self.label if self.attack.access == Access.LABEL else self.scores
            ask(self.threat.project(last.x, last.x0), last, check=True)

    def _close(self, ended: State) -> None:
        """Write down what rows that found nothing leave behind, and tell the caller of all that ended."""
        lost = (~self.success[ended.rows]).nonzero().squeeze(1)
        rows = ended.rows[lost]
        self.iterations[rows] = self._earlier[rows] + ended.t[lost]
        blank = lost[self.distance[rows] == torch.inf]
        if len(blank):
            last, x0 = self.threat.project(ended.x[blank], ended.x0[blank]), ended.x0[blank]
            levels = self.threat.levels
            self.x_adv[ended.rows[blank]] = last if levels is None else self.threat.quantize(last, x0, levels)
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
            counts={name: (int(happened), times) for name, (happened, times) in self._counts.items()},
        )


def _picked(x: Tensor, owner: Tensor, column: Tensor, asked: Tensor | None) -> Tensor:
    """Some of the images, (h, C, H, W), by row and sample, from any of the forms in which they may be asked."""
    if x.dim() == 5:
        return x[owner, column]
    if asked is None:
        return x[owner]
    return x[(asked.flatten().cumsum(0) - 1).view(asked.shape)[owner, column]]

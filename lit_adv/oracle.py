"""What an attacker may ask, how often, and how much it has asked: a counter around any model."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_adv.answers import Output, check_answer, check_finite, dtype_of, label_of
from lit_adv.chunk import Chunk
from lit_adv.defense import Defense
from lit_adv.differentiable import Differentiable, Directions, no_gradient, products
from lit_adv.draws import Draws

Surrogate = str | Callable[[Tensor], Tensor]


class Access(IntEnum):
    """What an answer tells; each includes those below it."""

    LABEL = 0
    PROBS = 1
    LOGITS = 2
    GRADIENT = 3


class AccessDenied(PermissionError):
    """The attack asked for more than it was granted."""


class QueryBudgetExceeded(RuntimeError):
    """The attack asked for images that its budget does not cover; nothing was asked or charged."""


class QueryOracle:
    """Charges before it asks the model; raises rather than overspend or tell more than was granted.

    An ``x`` that requires grad demands GRADIENT and goes through the surrogate: the model's own, unless the attacker
    brings another. Any other ``x`` runs the deployed forward without grad. One oracle serves one call of an attack.

    Args:
        model: images (n, C, H, W) in [0, 1] to logits (n, K); a :class:`~lit_adv.defense.Defense` or any module.
        rows: images in the caller's batch; the ledger has one entry for each.
        access: what is granted.
        budget: images that may be asked per row, None for no limit.
        chunk: images per forward; None finds the fastest on the way.
        surrogate: what gradients go through instead of the model's own: a function, or the name of a method or part
            of the model (``"smooth"``, a backward pass that it offers; ``"classifier"``, a transfer from within).
        answers: answers averaged per image of a random model, each charged.
        confirm: fresh deployed answers whose average must agree before a hit counts, where an answer is not the
            deployed one or not its last word (``fast``, a surrogate brought along, stochastic). None: 1, or 31
            where the model is stochastic.
        fast: a cheaper stand-in for the model (bf16, say) that answers the search.
        output: what the model returns.
        floor: smallest probability before the logarithm, where the model returns probabilities.
        index: places of the rows in their data set, for a random model's draws; default ``arange(rows)``.
        seed: of a random model's draws.
        known_right: the caller knows that the clean images are classified rightly; nobody need look first.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        access: Access = Access.GRADIENT,
        budget: int | None = None,
        chunk: int | Chunk | None = None,
        surrogate: Surrogate | None = None,
        answers: int = 1,
        confirm: int | None = None,
        fast: nn.Module | None = None,
        output: Output = "logits",
        floor: float = 1e-30,
        index: Tensor | None = None,
        seed: int = 0,
        known_right: bool = False,
    ) -> None:
        _check_arguments(model, budget, answers, confirm, floor, output)
        self.model, self.access, self.budget = model, Access(access), budget
        self.fast, self.output, self.floor, self.seed, self.known_right = fast, output, floor, seed, known_right
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = dtype_of(model)
        self.chunk_tuner = chunk if isinstance(chunk, Chunk) else Chunk(chunk, self.device)
        self.stochastic: bool = bool(getattr(model, "stochastic", False))
        self.reject: int | None = getattr(model, "reject", None)
        if self.stochastic and (output in ("probs", "labels") or not hasattr(model, "averaged")):
            raise ValueError(
                f"{type(model).__name__} says that it is stochastic: make it a lit_adv.defense.Defense whose forward "
                f"takes draws and returns logits (here: output={output!r})"
            )
        self.queries = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.index = torch.arange(rows) if index is None else index
        self._surrogate, self.random_gradient = _surrogate_of(model, surrogate)
        self.answers = answers if self.stochastic else 1  # a deterministic model would only repeat itself
        self.confirmations = (31 if confirm is None else confirm) if self.stochastic else 1
        self._lent = surrogate is not None
        self.doubtful = self.stochastic or fast is not None or self._lent
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=self.device)
        self.direct = False  # training: graphs in one piece, for the step on the weights needs more memory anyway
        self._asked = False

    def part(self, rows: Tensor) -> QueryOracle:
        """An oracle of some of the rows, which goes on with their accounts; :meth:`settle` books what it spent."""
        other = copy.copy(self)
        other.queries, other.index = self.queries[rows], self.index.to(rows.device)[rows]
        other.nonfinite = torch.zeros_like(self.nonfinite)
        return other

    def settle(self, rows: Tensor, part: QueryOracle) -> None:
        """Take over the accounts of a :meth:`part` of these rows."""
        self.queries = self.queries.index_put((rows,), part.queries)
        self.nonfinite = self.nonfinite + part.nonfinite
        self._asked = self._asked or part._asked

    def trust_only_the_model(self) -> None:
        """Leave a stand-in out."""
        if self.fast is not None:
            self.fast, self.doubtful = None, self.stochastic or self._lent

    @property
    def chunk(self) -> int:
        """Images per forward at present."""
        return self.chunk_tuner.size

    @property
    def models(self) -> list[nn.Module]:
        """All modules that answer."""
        return [self.model] if self.fast is None else [self.model, self.fast]

    def remaining(self, rows: Tensor, gradient: bool = False) -> Tensor:
        """Images that each of ``rows`` may still ask about, (n,) int64; a very large number if unlimited.

        Args:
            gradient: with their gradients, which cost one query whatever ``answers``.
        """
        if self.budget is None:
            return torch.full_like(rows, 2**62)
        return (self.budget - self.queries[rows]).div(1 if gradient else self.answers, rounding_mode="floor")

    def charge(self, rows: Tensor, images: int) -> None:
        """Book ``images`` per row; raises :class:`QueryBudgetExceeded` and books nothing if that is too much."""
        if self.budget is not None:
            after = self.queries.index_add(0, rows, torch.full_like(rows, images))
            if len(rows) and int(after.max()) > self.budget:
                row = int(rows[after[rows].argmax()])
                raise QueryBudgetExceeded(
                    f"{images} more queries were asked for image {row}, which has {int(self.queries[row])} of its "
                    f"budget of {self.budget} behind it: ask oracle.remaining(rows) first"
                )
            self.queries = after
        else:
            self.queries.index_add_(0, rows, torch.full_like(rows, images))

    def label(self, x: Tensor, rows: Tensor) -> Tensor:
        """Deployed decisions; of a random model the majority of ``answers``.

        Shape: x (n, C, H, W) or (n, s, C, H, W), rows (n,) -> (n,) or (n, s).
        """
        flat, flat_rows = _flat(x, rows)
        draws = self._draws(flat_rows, self.answers)
        self.charge(flat_rows, self.answers)
        if draws is None or self.answers == 1:
            return self._labels(flat, draws).view(x.shape[:-3])
        votes = [self._labels(flat, draws.later(number)) for number in range(self.answers)]
        return torch.stack(votes, -1).mode(-1).values.view(x.shape[:-3])

    def scores(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits, or log-probabilities where only probabilities are granted or given; float32 at least.

        Shape: x (n, C, H, W) or (n, s, C, H, W), rows (n,) -> (n, K) or (n, s, K).
        Raises:
            AccessDenied: gradients (``x`` requires grad) or scores beyond what was granted.
        """
        wanted = Access.GRADIENT if x.requires_grad else Access.PROBS
        if self.access < wanted:
            raise AccessDenied(
                f"this attack needs {wanted.name} access and was granted {self.access.name}: grant more, or choose "
                "an attack that needs less"
            )
        flat, flat_rows = _flat(x, rows)
        each = 1 if x.requires_grad else self.answers  # gradients are averaged by eot instead
        draws = self._draws(flat_rows, each)
        self.charge(flat_rows, each)
        if not x.requires_grad:
            answer = self._in_chunks(self._fast_or_deployed, flat, draws)
        elif self.direct:
            answer = self._checked(self._differentiated(flat, draws), len(flat))
            if not answer.requires_grad:
                raise no_gradient(self.model, len(flat))
        else:
            answer = Differentiable.apply(flat, self, draws)
        answer = self._as_scores(answer)
        if not self.direct and answer.detach().sum().isnan():  # also where inf meets -inf: then none is counted
            self.nonfinite += answer.detach().isnan().any(-1).sum()
        return answer.view(*x.shape[:-3], answer.shape[-1])

    def jacobian(self, x: Tensor, rows: Tensor, directions: Directions) -> tuple[Tensor, Tensor]:
        """Scores and gradients of ``k`` weighted sums of them, averaged over a row's draws; one query an image.

        Shape: x (n, s, C, H, W), rows (n,) -> (n, s, K) and (n, k, C, H, W).
        Raises:
            AccessDenied: gradients were not granted.
        """
        if self.access < Access.GRADIENT:
            raise AccessDenied(f"this attack needs GRADIENT access and was granted {self.access.name}: grant more")
        _, flat_rows = _flat(x, rows)
        draws = self._draws(flat_rows)
        self.charge(flat_rows, 1)
        answer, gradient = products(self, x, draws, directions)
        self.nonfinite += answer.isnan().any(-1).sum()
        return answer, gradient

    def confirm(self, x: Tensor, rows: Tensor) -> Tensor:
        """Labels by the average of ``confirmations`` fresh deployed answers, each charged.

        Shape: x (m, C, H, W), rows (m,) without repeats -> (m,) int64; -1 where the budget does not cover it.
        """
        labels = torch.full_like(rows, -1)
        paid = torch.ones_like(rows, dtype=torch.bool)
        if self.budget is not None:
            paid = self.queries[rows] + self.confirmations <= self.budget
        if paid.any():
            draws = self._draws(rows[paid])
            self.charge(rows[paid], self.confirmations)
            labels[paid] = self._decide(self._in_chunks(self._averaged, x[paid], draws))
        return labels

    def _averaged(self, x: Tensor, draws: Draws | None) -> Tensor:
        if self.stochastic:
            return cast(Defense, self.model).averaged(x, self.confirmations, draws=draws)
        return self._deployed(x, draws)

    def _labels(self, flat: Tensor, draws: Draws | None) -> Tensor:
        ask = self._deployed if self.fast is None else self._fast
        return self._decide(self._in_chunks(ask, flat, draws))

    def _decide(self, answer: Tensor) -> Tensor:
        labels = label_of(answer, self.output)
        self.nonfinite += (labels < 0).sum()
        return labels

    def _draws(self, flat_rows: Tensor, each: int = 1) -> Draws | None:
        """A random model's numbers for these queries, keyed by image index and number of the query."""
        if not self.stochastic:
            return None
        number = self.queries[flat_rows] + _occurrence(flat_rows) * each
        return Draws(self.seed, self.index.to(flat_rows.device)[flat_rows], number, key=-1)

    def _fast_or_deployed(self, x: Tensor, draws: Draws | None) -> Tensor:
        if self.answers > 1 and self.stochastic:
            return cast(Defense, self.fast or self.model).averaged(x, self.answers, draws=draws)
        return self._deployed(x, draws) if self.fast is None else self._fast(x, draws)

    def _fast(self, x: Tensor, draws: Draws | None) -> Tensor:
        assert self.fast is not None
        x = self._cast(x)
        return self.fast(x) if draws is None else self.fast(x, draws=draws)

    def _deployed(self, x: Tensor, draws: Draws | None) -> Tensor:
        x = self._cast(x)
        return self.model(x) if draws is None else self.model(x, draws=draws)

    def _differentiated(self, x: Tensor, draws: Draws | None) -> Tensor:
        x = self._cast(x)
        answer = self._surrogate(x) if draws is None else self._surrogate(x, draws=draws)
        reject = self.reject
        if self._lent and reject is not None and answer.dim() == 2 and answer.shape[1] == self.model.num_classes:
            never = torch.full_like(answer[:, :1], -torch.inf)  # a part that knows no refusal never refuses
            answer = torch.cat([answer[:, :reject], never, answer[:, reject:]], 1)
        return answer

    def _cast(self, x: Tensor) -> Tensor:
        """A half-precision model gets half-precision images; the attack's arithmetic stays in float32."""
        return x.to(self.dtype) if self.dtype in (torch.float16, torch.bfloat16) else x

    def _in_chunks(self, ask: Callable[[Tensor, Draws | None], Tensor], flat: Tensor, draws: Draws | None) -> Tensor:
        """Answers of the deployed model in forwards of ``chunk`` images; out of memory halves it and goes on."""
        parts: list[Tensor] = []
        done = 0
        with torch.no_grad():
            while done < len(flat):
                part = flat[done : done + self._share(len(flat) - done)]
                keyed = None if draws is None else draws[torch.arange(done, done + len(part), device=flat.device)]
                try:
                    parts.append(self._timed(ask, part, keyed))
                except torch.OutOfMemoryError:
                    self.chunk_tuner.halve()
                    continue
                done += len(part)
        if not parts:
            return self._timed(ask, flat, None if draws is None else draws)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _share(self, images: int) -> int:
        """Images of the next forward: equal shares, so that no forward is nearly empty."""
        if not self.chunk_tuner.settled:  # which learns from full ones
            return self.chunk
        return -(-images // -(-images // self.chunk))

    def _timed(self, ask: Callable[[Tensor, Draws | None], Tensor], part: Tensor, draws: Draws | None) -> Tensor:
        if self.chunk_tuner.settled:
            return self._checked(ask(part, draws), len(part))
        begun = self._now(part.device)
        answer = ask(part, draws)
        self.chunk_tuner.observe(len(part), self._now(part.device) - begun)
        return self._checked(answer, len(part))

    def _now(self, device: torch.device) -> float:
        if device.type == "cpu":
            return time.thread_time()  # of this thread: other work on the machine must not decide the size
        if not self.chunk_tuner.settled:
            _wait(device)
        return time.perf_counter()

    def _checked(self, answer: Tensor, images: int) -> Tensor:
        if not self._asked:
            check_answer(answer, images, self.output, self.model)
            if self.output != "labels" and images > 1:  # a single image may be at fault itself
                check_finite(answer, self.model)
            self._asked = images > 1
        return answer

    def _as_scores(self, answer: Tensor) -> Tensor:
        if answer.dtype in (torch.float16, torch.bfloat16):
            answer = answer.float()
        if self.output == "labels":
            raise AccessDenied("the model returns labels only: choose a label-only (decision-based) attack")
        if self.output == "probs":
            answer = answer.clamp_min(self.floor).log()
        elif self.access == Access.PROBS and self.output == "logits":
            answer = answer.log_softmax(-1)
        return answer


def _surrogate_of(model: nn.Module, surrogate: Surrogate | None) -> tuple[Callable[..., Tensor], bool]:
    """What gradients go through, and whether it draws random numbers."""
    stochastic = bool(getattr(model, "stochastic", False))
    if surrogate is None:
        return getattr(model, "surrogate", model), stochastic
    method: Any = surrogate
    if isinstance(surrogate, str):
        method = model
        for name in surrogate.split("."):
            method = getattr(method, name, None)
    if not callable(method):
        raise ValueError(
            f"surrogate names a method or a part of the model, and {type(model).__name__} has no {surrogate!r}"
        )
    if stochastic and not _takes_draws(method):
        return lambda x, draws=None: method(x), False
    return cast(Callable[..., Tensor], method), stochastic


def _takes_draws(method: Any) -> bool:
    """Whether it is as random as the model, and not a deterministic part of it."""
    parameters = inspect.signature(method.forward if isinstance(method, nn.Module) else method).parameters.values()
    return any(parameter.name == "draws" or parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def _check_arguments(
    model: Any, budget: int | None, answers: int, confirm: int | None, floor: float, output: str
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module from images to logits, not {type(model).__name__}: wrap it")
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be a number of queries >= 0 per image or None, got {budget}")
    if answers < 1 or (confirm is not None and confirm < 1):
        raise ValueError(f"answers and confirm must be at least 1, got {answers} and {confirm}")
    if not 0 < floor < 1:
        raise ValueError(f"floor must be a probability in (0, 1), got {floor}")
    if output not in ("logits", "log_probs", "probs", "labels"):
        raise ValueError(f"output must be logits, log_probs, probs or labels, got {output!r}")


def _flat(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() not in (4, 5):
        raise ValueError(f"images must be (n, C, H, W) or (n, s, C, H, W), got shape {tuple(x.shape)}")
    return (x, rows) if x.dim() == 4 else (x.flatten(0, 1), rows[:, None].expand(x.shape[:2]).reshape(-1))


def _occurrence(rows: Tensor) -> Tensor:
    """How often each entry has stood before in ``rows``, (n,) int64."""
    ordered, place = rows.sort(stable=True)
    begins = torch.searchsorted(ordered, ordered)
    return torch.empty_like(rows).scatter_(0, place, torch.arange(len(rows), device=rows.device) - begins)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

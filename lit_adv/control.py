"""The null control of a random model: what an attack that changes nothing would achieve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_adv.look import Restless
from lit_adv.losses import is_adversarial
from lit_adv.oracle import Access, QueryOracle


def null_control(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Ask about clean images again and again, as an attack that changes nothing would.

    A wrong answer is a hit; each is confirmed by the average of fresh answers as an attack's hit is, where the queries
    left cover it.

    Args:
        model: random, whether it says so or not.

    Returns:
        Queries spent at the first wrong answer and at the first confirmed one, (n,) int64, 0 where there was none.
    """
    asked = model if getattr(model, "stochastic", False) else Restless(model)
    oracle = QueryOracle(asked, len(x), Access.LABEL, queries, index=index, seed=1)
    reject: int | None = getattr(model, "reject", None)
    first, confirmed = torch.zeros_like(y), torch.zeros_like(y)
    rows = torch.arange(len(x), device=x.device)
    while len(rows):
        label = oracle.label(x[rows], rows)
        hit = rows[is_adversarial(label, y[rows], None, reject) & (label >= 0)]
        first[hit] = torch.where(first[hit] == 0, oracle.queries[hit], first[hit])
        if len(hit):
            sure = oracle.confirm(x[hit], hit)
            won = hit[is_adversarial(sure, y[hit], None, reject) & (sure >= 0)]
            confirmed[won] = oracle.queries[won]
        rows = rows[(confirmed[rows] == 0) & (oracle.remaining(rows) > 0)]
    return first, confirmed

"""Imitation: what is to be answered is one fresh draw of the defence's transformation."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Small, images
from defenses.behind_g import DELTA, defended
from torch import nn

from lit_adv.datamodules import Batch
from lit_adv.objectives import Imitation


def batch(count: int = 4) -> Batch:
    return Batch(images(count), torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_target_is_what_the_transformation_makes() -> None:
    fixed = defended(random_start=False)
    given = batch()
    expected = torch.cat([fixed.transform(image[None]) for image in given.image])
    torch.testing.assert_close(Imitation(fixed).target(given), expected)
    assert ((expected - given.image).abs().amax() - DELTA).abs() < 1e-9


def test_every_call_draws_anew() -> None:
    objective, given = Imitation(defended()), batch()
    targets = torch.stack([objective.target(given) for _ in range(3)])
    assert all(not torch.equal(targets[i], targets[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.manual_seed(5)
    first = objective.target(given)
    torch.manual_seed(5)
    assert torch.equal(objective.target(given), first)


def test_loss_is_the_squared_error_and_the_defence_stays_frozen() -> None:
    defence = defended(random_start=False).train()
    before = {name: value.clone() for name, value in defence.state_dict().items()}
    objective, given = Imitation(defence), batch()
    network = nn.Conv2d(3, 3, 1).double()
    loss, logs = objective(network, given)
    target = defence.transform(given.image)
    with torch.no_grad():
        error = (network(given.image) - target).flatten().tolist()
    assert loss.item() == pytest.approx(sum(e**2 for e in error) / len(error))
    assert logs["mse_of_zero"].tolist() == pytest.approx([float((t**2).mean()) for t in target])
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in defence.parameters())
    assert all(torch.equal(value, before[name]) for name, value in defence.state_dict().items())
    assert not defence.training
    assert not isinstance(objective, nn.Module)  # so that no checkpoint of the imitator holds the defence


def test_what_transforms_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"defense must have a method transform .*, Small has none"):
        Imitation(Small())

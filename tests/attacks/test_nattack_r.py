"""NAttack that begins where a network says, and what is told of a search as its rows leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Means, Small, decided, images
from torch import Tensor, nn

from lit_adv.archive import Archive, configuration, learnt, weights_hash
from lit_adv.attacks import PGD, NAttack
from lit_adv.attacks.nattack import NAttackState
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

BALL = ThreatModel("linf", 0.05)


def problem(count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Small(scale=4.0).eval(), images(count, 7)
    return model, x, decided(model, x)


def leavings(attack: NAttack, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, dict[int, NAttackState]]:
    """The result, and the state in which each row left."""
    left: dict[int, NAttackState] = {}

    def keep(state: NAttackState) -> None:
        for place, row in enumerate(state.rows.tolist()):
            assert row not in left
            left[row] = state[torch.tensor([place])]

    attack.leaving = keep
    return attack(QueryOracle(model, len(x), chunk=50, known_right=True), x, y), left


def rendered(x: Tensor, phi: Tensor, shrink: float, eps: float) -> Tensor:
    """Equation (1) with the clip of linf, by hand."""
    moved = (torch.tanh(torch.atanh((1 - shrink) * (2 * x - 1)) + phi) + 1) / 2
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)


@pytest.mark.parametrize("block", [4, 32])
def test_the_mean_that_leaves_with_a_success_is_the_one_that_broke_it(block: int) -> None:
    """Also where other rows of the forward go on, and the row's own population would have come next."""
    model, x, y = problem(12)
    attack = NAttack(BALL, 20, 10, 0.1, schedule="mean", check_every=1, block=block, shrink=0.1)
    result, left = leavings(attack, model, x, y)
    assert sorted(left) == list(range(12))
    assert result.success.sum() > 3
    assert len(set(result.iterations[result.success].tolist())) > 2  # they leave at different times
    for row in result.success.nonzero().squeeze(1).tolist():
        by_hand = rendered(x[row], left[row].phi[0], 0.1, 0.05)
        torch.testing.assert_close(result.x_adv[row], by_hand, rtol=0, atol=1e-12)
        assert decided(model, by_hand[None]) != y[row]


def test_rows_that_fail_leave_after_their_last_check() -> None:
    model, x, y = problem()
    attack = NAttack(ThreatModel("linf", 1e-4), 3, 10, 0.1, schedule="mean")
    result, left = leavings(attack, model, x, y)
    assert not result.success.any()
    assert sorted(left) == list(range(6))
    assert all(state.t.tolist() == [3] for state in left.values())


def test_every_start_of_a_row_is_told() -> None:
    model, x, y = problem()
    starts: list[int] = []
    attack = PGD(ThreatModel("linf", 1e-5), 2, restarts=3)
    attack.leaving = lambda state: starts.extend(state.rows.tolist())
    attack(model, x, y)
    assert sorted(starts) == sorted(3 * list(range(6)))


def test_who_listens_is_no_part_of_the_attack() -> None:
    silent, heard = NAttack(BALL, 2, 4), NAttack(BALL, 2, 4)
    heard.leaving = print
    assert configuration(silent) == configuration(heard)
    model, x, y = problem()
    plain = silent(model, x, y)
    heard.leaving = lambda state: None
    assert torch.equal(plain.x_adv, heard(model, x, y).x_adv)


def test_the_search_begins_at_the_networks_answer_times_its_factor() -> None:
    """A factor of 1/100 undoes targets times 100; what is asked first is the rendered answer."""
    model, x, y = problem()
    network = Means().eval()
    attack = NAttack(BALL, 1, 4, schedule="mean", initial=network, initial_scale=0.01, shrink=0.1)
    given: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    attack(QueryOracle(model, len(x), known_right=True), x, y)
    with torch.no_grad():
        first = rendered(x, network(x) / 100, 0.1, 0.05)
    torch.testing.assert_close(given[0], first, rtol=0, atol=1e-12)


def test_a_good_network_saves_queries() -> None:
    """The mean of a former search, given back: most images fall at the first look, for one query."""
    model, x, y = problem(12)
    attack = NAttack(BALL, 20, 10, 0.1, schedule="mean", check_every=1, shrink=0.1)
    result, left = leavings(attack, model, x, y)
    means = torch.cat([left[row].phi for row in range(12)])

    class Known(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            place = torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)
            return 100 * means[place]

    again = NAttack(BALL, 20, 10, 0.1, schedule="mean", check_every=1, shrink=0.1, initial=Known(), initial_scale=0.01)
    second = again(QueryOracle(model, 12, known_right=True), x, y)
    assert (second.first_hit[result.success] == 1).all()
    assert (second.iterations[result.success] == 0).all()


def test_two_networks_of_one_form_have_archives_of_their_own(tmp_path: Path) -> None:
    attacks = [NAttack(BALL, 2, 4, initial=Means(seed=seed)) for seed in (1, 2)]
    assert configuration(attacks[0]) == configuration(attacks[1])
    folders = {Archive(tmp_path, configuration(attack) | learnt(attack)).folder for attack in attacks}
    assert len(folders) == 2
    assert learnt(attacks[0]) == {"local": [weights_hash(Means(seed=1))]}
    assert not learnt(NAttack(BALL, 2, 4))


def test_the_network_is_left_in_its_mode() -> None:
    model, x, y = problem()
    network = nn.Sequential(Means(), nn.Dropout(0.5)).train()
    results = [NAttack(BALL, 2, 4, initial=network)(model, x, y).x_adv for _ in range(2)]
    assert torch.equal(*results)
    assert network.training
    assert network[1].training


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Means(2), "must"),
        (nn.Sequential(Means(), nn.MaxPool2d(2)), r"initial must return means of shape \(6, 3, 8, 8\).*\(6, 3, 4, 4\)"),
        (nn.Sequential(Means(), nn.Threshold(1e9, torch.nan)), "initial returned NaN or inf"),
    ],
)
def test_networks_that_answer_no_means_are_refused(network: nn.Module, said: str) -> None:
    model, x, y = problem()
    attack = NAttack(BALL, 2, 4, initial=network)
    with pytest.raises((ValueError, RuntimeError), match=said if said != "must" else "channels"):
        attack(model, x, y)

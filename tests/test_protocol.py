"""What a protocol refuses, what it grants, and what of it decides an image's record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lit_adv.archive import configuration
from lit_adv.attack import Attack
from lit_adv.attacks import PGD, HopSkipJump, NAttack
from lit_adv.oracle import Access
from lit_adv.protocol import Protocol, identity
from lit_adv.threat import ThreatModel

PROTOCOL = Protocol(name="pgd", attack=PGD(steps=3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": ""}, "name becomes part of files and metrics"),
        ({"name": "a/b"}, "name becomes part of files and metrics"),
        ({"name": ".."}, "name becomes part of files and metrics"),
        ({"target": "nearest"}, "target must be none, next, random or least_likely, got 'nearest'"),
        ({"pool": 0}, "pool and max_samples must be at least 1, got 0"),
        ({"max_samples": 0}, "pool and max_samples must be at least 1, got 512 and 0"),
        ({"draws": 0}, "draws must be at least 1 or None, got 0"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"output": "scores"}, "output must be logits, log_probs, probs or labels, got 'scores'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PROTOCOL, **arguments)


@pytest.mark.parametrize("access", ["label", "probs", "logits"])
def test_less_access_than_needed_is_refused(access: Any) -> None:
    with pytest.raises(ValueError, match=f"access '{access}' is less than PGD needs, 'gradient'"):
        Protocol(name="pgd", attack=PGD(), access=access)


def test_an_attack_gets_what_it_needs_or_what_is_given() -> None:
    assert PROTOCOL.granted == Access.GRADIENT
    assert Protocol(name="n", attack=NAttack()).granted == Access.PROBS
    assert Protocol(name="n", attack=NAttack(), access="logits").granted == Access.LOGITS
    with pytest.raises(ValueError, match="access 'label' is less than NAttack needs, 'probs'"):
        Protocol(name="n", attack=NAttack(), access="label")


@pytest.mark.parametrize("attack", [PGD(), NAttack()], ids=["pgd", "nattack"])
def test_a_model_that_tells_labels_only_is_no_place_for_scores(attack: Attack) -> None:
    wanted = attack.access.name.lower()
    with pytest.raises(ValueError, match=f"output 'labels' grants access 'label', and .* needs '{wanted}': choose"):
        Protocol(name="n", attack=attack, output="labels")
    assert Protocol(name="n", attack=HopSkipJump(), output="labels").granted == Access.LABEL


@pytest.mark.parametrize("change", [{"name": "b"}, {"max_samples": 7}, {"pool": 3}, {"chunk": 2}])
def test_identity_leaves_out_how_many_and_how_fast(change: dict[str, Any]) -> None:
    assert configuration(identity(replace(PROTOCOL, **change))) == configuration(identity(PROTOCOL))


@pytest.mark.parametrize(
    "change",
    [
        {"attack": PGD(steps=4)},
        {"attack": PGD(steps=3, seed=1)},
        {"attack": PGD(ThreatModel("l2", 1.0), steps=3)},
        {"attack": NAttack(steps=3)},
        {"access": "gradient"},
        {"budget": 10},
        {"target": "next"},
        {"draws": 5},
        {"surrogate": "forward"},
        {"answers": 2},
        {"confirm": 3},
        {"precision": "bf16"},
        {"channels_last": True},
        {"compile": True},
        {"output": "probs"},
        {"attack": HopSkipJump(), "output": "labels"},
    ],
)
def test_identity_holds_all_that_decides_a_record(change: dict[str, Any]) -> None:
    assert configuration(identity(replace(PROTOCOL, **change))) != configuration(identity(PROTOCOL))

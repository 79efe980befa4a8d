"""Tables 3 and 4 of GCD: attackers who know the detectors (white box), transferred images and black boxes beside them.

    python -m lit_adv.experiments.gcd_white_box --images 100

Attacks three networks on the first test images: NoDET, the classifier alone; DET_IS, guarded by the sensitivity
detector; GCD, guarded by both, which refuse. Each attacker of the tables goes against the classifier of one class more
("direct"), and all but DeepFool against the combined loss of equation (14) too, with three weights beta. PGD is tried
once more from the image itself: at a random point of the ball an image detector is sure of what it sees, and its
margin leads nowhere. Detectors were trained on the same attacker's grey-box images (``own``, the paper's protocol)
or on those of all eight (``pooled``, what would be deployed). Records, the report of GCD with its audit, tables and
figures lie in ``--folder``; broken off, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_adv.archive import weights_hash
from lit_adv.attack import Attack
from lit_adv.attacks import HopSkipJump, NAttack, Square, Transfer
from lit_adv.datamodules import Batch
from lit_adv.defense import Undefended
from lit_adv.defenses import GuidedComplementary
from lit_adv.defenses.guided_complementary import Column
from lit_adv.evaluation import evaluate
from lit_adv.experiments.gcd_setup import ATTACKERS, Setup, command_line
from lit_adv.experiments.gcd_white_box_alarms import on_alarms, refuses
from lit_adv.experiments.gcd_white_box_probes import probed
from lit_adv.experiments.gcd_white_box_table import (
    BLACK,
    DIRECT,
    FROM_IMAGE,
    TRANSFER,
    Result,
    curves,
    lines_page,
    robust_page,
    table_page,
)
from lit_adv.experiments.starts import OtherImages
from lit_adv.inputs import class_count
from lit_adv.losses import Combined
from lit_adv.metrics import Records
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial
from lit_adv.verify import fresh_labels

COMBINED = ("FGSM-U", "PGD-U", "PGD-T", "CW-U", "CW-T", "DDN-U", "DDN-T")
"""Attackers that follow equation (14) too; the paper has it for untargeted ones."""
CONFIDENCE = 0.01
"""Kappa of C&W's combined hinges."""
KAPPAS = (0.0, 5.0, 10.0)
OWN_EXTRAS = {"CW-U": TRANSFER, "PGD-U": "linf", "DDN-U": "l2"}
"""Whose detectors meet which of the further attackers, where every attacker has detectors of its own."""


@dataclass(frozen=True)
class Line:
    """One way to attack.

    Attributes:
        attacker: of the tables. form: how it goes about the detectors. protocol: how it is tried.
        models: networks it is tried on. column: form of the refusal's logit.
    """

    attacker: str
    form: str
    protocol: Protocol
    models: tuple[str, ...] = ("DET_IS", "GCD")
    column: Column = "additive"


@dataclass(frozen=True, eq=False)
class Target:
    """A network under attack.

    Attributes:
        detectors: own or pooled, group: whose; "" without. name: NoDET, DET_IS or GCD.
    """

    detectors: str
    group: str
    name: str
    model: nn.Module


class Found(NamedTuple):
    """What came of all attacks on one network.

    Attributes:
        results: way by way. notes: what the audit says. probes: records of the audit's own attacks.
    """

    results: list[Result]
    notes: list[str]
    probes: list[Records]


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Make what is missing, attack, write tables and figures."""
    given, setup = command_line(__doc__, arguments, Path("runs/gcd_white_box"), _flags)
    return measured(setup, given)


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=_at_least(1, int), default=100, help="test images, from the first on")
    add("--query_images", type=_at_least(1, int), default=50, help="of them for attacks by queries")
    add("--queries", type=_at_least(1, int), default=2000, help="of an image in attacks by queries")
    add("--detectors", nargs="+", choices=("own", "pooled"), default=["own", "pooled"])
    weight = _at_least(0, float)
    add("--betas", nargs="+", type=weight, default=[0.1, 1.0, 10.0], help="weights of the detector in equation (14)")
    columns = ("additive", "product", "product2")
    add("--columns", nargs="+", choices=columns, default=list(columns), help="forms of the refusal in targeted attacks")
    extras = (FROM_IMAGE, TRANSFER, BLACK)
    add("--extras", nargs="*", choices=extras, default=list(extras), help="further attacks; nothing: none")
    add("--audit", type=_at_least(0, int), default=16, help="test images that the audit of GCD looks at; 0: no audit")


def _at_least(least: int, kind: Callable[[str], float]) -> Callable[[str], float]:
    """How a number is read from the command line, which a bad one ends in one line."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {least}, got {text}")
        return value

    return number


def measured(setup: Setup, given: argparse.Namespace) -> list[Path]:
    """Attack what no earlier run has attacked, write tables and figures."""
    for name in ("images", "query_images", "queries"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    data = setup.images()
    data.prepare_data()
    data.setup()
    test = data.dataset("test")
    batch = test.__getitems__(range(min(given.images, len(test))))
    train = data.training_images(2000)
    folder = given.folder / setup.tag
    results: list[Result] = []
    notes: list[str] = []
    probes: dict[tuple[str, str, str], list[Records]] = {}
    guards: dict[str, str] = {}
    known = {name: ways(setup, given, name) for name in given.attackers}
    told = {name: lines[0].protocol for name, lines in known.items()}
    for target, lines in _targets(setup, given, known, OtherImages(train.image, train.label)):
        found = attacked(target, lines, setup.base, batch, given, folder)
        results += found.results
        notes += found.notes
        probes[target.detectors, target.group, target.name] = found.probes
        guards |= _guards(target)
        told |= {line.protocol.name: line.protocol for line in lines if line.form.startswith((TRANSFER, BLACK))}
    facts = settings(setup, given, batch, guards)
    pages = {
        "table3": table_page(results, facts, notes, setup.data),
        "lines": lines_page(results, facts, list(told.values()), setup.data),
        "robust": robust_page(results, facts, _radius(setup), probes),
    }
    files: list[Path] = []
    for name, page in pages.items():
        print(page)
        files += page.write(folder, name + _subset(given))
    files += curves(results, folder)
    print("\n".join(map(str, files)))
    return files


def _subset(given: argparse.Namespace) -> str:
    """Ends the names of pages that show a part of the detectors or attackers; those of all of them have no end."""
    parts = []
    for chosen, every in ((given.detectors, ("own", "pooled")), (given.attackers, tuple(ATTACKERS))):
        if set(chosen) != set(every):
            parts += [name.lower() for name in every if name in chosen]
    return "".join(f"_{part}" for part in parts)


def _guards(target: Target) -> dict[str, str]:
    """Hashes of the detectors of a network that has both, by whose they are."""
    model = target.model
    if not isinstance(model, GuidedComplementary) or target.name != "GCD":
        return {}
    both = [detector for detector in (model.image_detector, model.sensitivity_detector) if detector is not None]
    whose = f"{target.detectors} ({target.group})"
    return {whose: " ".join(weights_hash(detector)[:8] for detector in both)}


def _targets(
    setup: Setup, given: argparse.Namespace, known: Mapping[str, list[Line]], starts: OtherImages
) -> Iterator[tuple[Target, list[Line]]]:
    """The networks one after another, each with what it is attacked by; ``known``: the ways of each attacker."""
    extras = {name: further(setup, given, starts, name) for name in (TRANSFER, "linf", "l2")}
    black = [line for name in ("linf", "l2") for line in extras[name]]
    yield Target("", "", "NoDET", _plain(setup)), [lines[0] for lines in known.values()] + black
    for detectors in given.detectors:
        whom = {name: [name] for name in given.attackers} if detectors == "own" else {"all": list(ATTACKERS)}
        for group, learnt_from in whom.items():
            defence = setup.defence(learnt_from)
            if detectors == "own":
                lines = known[group] + extras.get(OWN_EXTRAS.get(group, ""), [])
            else:
                lines = [line for way in known.values() for line in way]
                lines += [line for more in extras.values() for line in more]
            yield Target(detectors, group, "DET_IS", defence.variant(image_detector=None)), lines
            yield Target(detectors, group, "GCD", defence), lines


def _plain(setup: Setup) -> Undefended:
    return Undefended(setup.base, class_count(setup.base, [], None)).eval()


def ways(setup: Setup, given: argparse.Namespace, attacker: str) -> list[Line]:
    """All ways of an attacker, the direct one first."""

    fixed = {"stop_at_hit": True} if ATTACKERS[attacker].family == "linf" else {}
    direct = setup.protocol(attacker, attack=fixed, max_samples=given.images)

    def line(form: str, name: str, changes: dict[str, Any], **more: Any) -> Line:
        changed = replace(direct, name=f"{attacker.lower()}{name}", attack=remade(direct.attack, **changes))
        return Line(attacker, form, changed, **more)

    found = [line(DIRECT, "", {}, models=("NoDET", "DET_IS", "GCD"))]
    combined = {beta: _combined(attacker, beta) for beta in given.betas}
    if attacker in COMBINED:
        found += [line(f"beta {beta:g}", f"_beta{beta:g}", changes) for beta, changes in combined.items()]
    if FROM_IMAGE in given.extras and attacker in ("PGD-U", "PGD-T"):
        begin = {"random_start": False}
        found.append(line("from the image", "_from_image", begin))
        found += [
            line(f"from the image, beta {beta:g}", f"_from_image_beta{beta:g}", {**begin, **changes})
            for beta, changes in combined.items()
        ]
    if ATTACKERS[attacker].target != "none":
        for column in given.columns:
            if column != "additive":
                found.append(line(column, f"_{column}", {}, column=column))
    return found


def _combined(attacker: str, beta: float) -> dict[str, Any]:
    """Changes to an attack's arguments that make it follow equation (14)."""
    return {"beta": beta, "kappa": CONFIDENCE} if attacker.startswith("CW") else {"loss": Combined(beta)}


def remade(attack: Attack, **changes: Any) -> Attack:
    """The attack with other arguments; attacks keep theirs under their names."""
    names = inspect.signature(type(attack)).parameters
    return type(attack)(**{**{name: getattr(attack, name) for name in names}, **changes})


def further(setup: Setup, given: argparse.Namespace, starts: OtherImages, kind: str) -> list[Line]:
    """Transferred images (grey box), or black boxes that see the refusal, in linf or l2."""
    if kind == TRANSFER:
        if TRANSFER not in given.extras:
            return []
        carlini = setup.protocol("CW-U").attack
        grey = [(kappa, remade(carlini, kappa=kappa)) for kappa in KAPPAS]
        made = [
            (f"kappa {kappa:g}", f"transfer_kappa{kappa:g}", Transfer(attack, [setup.base])) for kappa, attack in grey
        ]
        return [
            Line("C&W on the base", f"{TRANSFER}, {form}", Protocol(name=name, attack=attack, max_samples=given.images))
            for form, name, attack in made
        ]
    if BLACK not in given.extras:
        return []
    samples = max(2, min(50, given.queries // 4))
    ball, whole = ThreatModel("linf", _radius(setup)), ThreatModel("l2", "inf")
    attacks: dict[str, Attack] = {
        "NAttack": NAttack(ball, max(1, given.queries // samples), samples, step_size=0.02, shrink=0.1),
        "Square": Square(ball, steps=given.queries, p_init=0.8),
    }
    if kind == "l2":
        attacks = {"HopSkipJump": HopSkipJump(whole, samples=max(1, min(100, given.queries // 8)), starts=starts)}
    few = min(given.images, given.query_images)
    return [
        Line(name, BLACK, Protocol(name=name.lower(), attack=attack, budget=given.queries, max_samples=few),
             ("NoDET", "DET_IS", "GCD"))
        for name, attack in attacks.items()
    ]  # fmt: skip


def _radius(setup: Setup) -> float:
    return setup.protocol("PGD-U").attack.threat.radius


def attacked(
    target: Target, lines: Sequence[Line], base: nn.Module, batch: Batch, given: argparse.Namespace, folder: Path
) -> Found:
    """All attacks on one network, and what its audit says; records of earlier runs are read.

    Args:
        base: the network that is guarded.
    """
    right = fresh_labels(base, batch.image)[:, 0] == batch.label
    refused = refuses(target.model, batch.image)
    results, notes, probes = [], [], []
    for column in dict.fromkeys(line.column for line in lines):
        chosen = [line for line in lines if line.column == column and target.name in line.models]
        if not chosen:
            continue
        model = target.model
        if isinstance(model, GuidedComplementary) and column != "additive":
            model = model.variant(column=column)
        where = folder / (target.detectors or "none") / target.group.lower() / f"{target.name.lower()}_{column}"
        audited = target.name == "GCD" and column == "additive"
        name = " ".join(word for word in (target.name, target.detectors, target.group) if word)
        tried, report = _tried(model, chosen, batch, where, name, given.audit if audited else 0)
        if report is not None:
            notes += _verdict(report, target)
            probes += probed(where / "audit", model, batch)
        missed = right & refuses(model, batch.image)  # by this form of the column
        alarms = []
        for line in chosen:
            first = missed & (torch.arange(len(missed)) < (line.protocol.max_samples or len(missed)))
            alarms.append(on_alarms(model, line.protocol, Batch(*(part[first] for part in batch)), where / "alarms"))
        results += [
            Result(
                target.detectors, target.group, target.name, line.attacker, line.form, records, alarm,
                right, refused, line.protocol.attack.threat.norm, line.protocol.attack.threat.radius,
            )
            for line, records, alarm in zip(chosen, tried, alarms, strict=True)
        ]  # fmt: skip
    return Found(results, notes, probes)


def _tried(
    model: nn.Module, lines: Sequence[Line], batch: Batch, where: Path, name: str, audit: int
) -> tuple[list[Records], Report | None]:
    """Records of all attacks, and the report with the audit where one is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")  # a finding here
        if audit:
            protocols = [line.protocol for line in lines]
            report = evaluate(model, [batch], protocols, dirpath=where, name=name, progress=True, audit=audit)
            return [outcome.records for outcome in report.outcomes], report
        found = []
        for line in lines:
            trial = Trial(line.protocol, model, dirpath=where / "attacks", progress=True)
            trial.add(batch)
            found.append(trial.close().unique())
    return found, None


def _verdict(report: Report, target: Target) -> list[str]:
    """What the audit of GCD says."""
    name = f"{target.detectors} ({target.group})"
    told = [f"audit, {name}: {audit.summary}" for audit in report.audits]
    return told + [f"audit warns, {name}: {warning}" for warning in report.warnings()]


def settings(setup: Setup, given: argparse.Namespace, batch: Batch, guards: Mapping[str, str]) -> dict[str, object]:
    """What a reader of the figures must know; ``guards``: hashes of the detectors."""
    return {
        "data": f"{setup.data}, the first {len(batch.label)} test images "
        f"({min(len(batch.label), given.query_images)} for attacks by queries)",
        "networks": setup.size, "base": f"weights {weights_hash(setup.base)[:8]}",
        "detectors": f"{setup.train_pairs} training pairs per attacker",
        "detectors' epochs": setup.epochs or "as configured",
        "detectors' weights (image, sensitivity)": "; ".join(f"{whose} {told}" for whose, told in guards.items()),
        "betas": " ".join(f"{beta:g}" for beta in given.betas), "queries": f"{given.queries:,} per image",
        "linf": f"eps {_radius(setup):.3g}", "seed": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main()

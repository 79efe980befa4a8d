"""Every attack on f_a(g(x)) on MNIST at one radius, and the worst case per image over all of them.

    python -m lit_adv.experiments.transformation_attacks --images 100 --query_images 50 --eot 8 --draws 30

Trains what is missing into ``checkpoints/``: f_b, f_a (g with delta 0.3 and 13 steps), a sibling behind a g of 2 steps,
a network h that imitates g, and the sources of transferred images. Attacks run one after another and write down each
image, so that the same command goes on where it was broken off. The table (Markdown, CSV) and the loss along the
attacks (PNG) are written into ``--folder``; figures of the paper stand beside ours and are labelled as the paper's.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.attacks import PGD, GenAttack, HopSkipJump, NAttack, Transfer
from lit_adv.cli import keep_memory
from lit_adv.datamodules import MNIST, Batch, ImageDataModule
from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.defenses.transformation_attacks import MeanStart
from lit_adv.estimators import Autograd
from lit_adv.evaluation import evaluate
from lit_adv.experiments.page import Page
from lit_adv.experiments.trained import CHECKPOINTS, trained
from lit_adv.experiments.transformation import MASKING
from lit_adv.experiments.transformation_measures import SMOOTH, measures
from lit_adv.fingerprint import digest
from lit_adv.metrics import Records
from lit_adv.metrics.summary import wilson
from lit_adv.models import Composed
from lit_adv.outcome import Outcome
from lit_adv.protocol import Protocol
from lit_adv.tables import interval, percent
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial
from lit_adv.verify import fresh_labels

DEFENCE = "f_a(g)"
FOOLED = ("images fooled the local models", "images fooled the classifier inside")
HEADS = (
    "model", "attack", "eps", "images", "accuracy over draws", "majority right", "95 % interval", "every draw right",
    "source fooled", "mean linf", "mean queries", "paper (CIFAR-10, eps 0.031)",
)  # fmt: skip
COUNTED = (
    "All images count, those wrong when clean as wrong. 'accuracy over draws': the mean and the standard deviation of "
    "the accuracy over fresh draws of g; 'majority right': more than half of an image's draws; 'every draw right': an "
    "image is broken if any of its draws is wrong, as some are without any attack. No attack counts as better than "
    "none. Where images leave as soon as most draws are wrong, the draws that are still right raise the accuracy over "
    "draws: compare by 'majority right'."
)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        protocol: how the attack is tried. model: name of the network it is tried on.
        paper: the paper's figure. counts: whether it goes into the worst case.
    """

    protocol: Protocol
    model: str = DEFENCE
    paper: str = ""
    counts: bool = True


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, attack, print and write the table and the figure."""
    given = parsed(arguments)
    keep_memory()
    torch.set_num_threads(given.threads)
    networks = {name: network.to(given.device) for name, network in built(given).items()}
    data = MNIST() if given.data is None else MNIST(given.data)
    data.prepare_data()
    data.setup()
    data.setup("test")
    page = measured(networks, images_of(data, given), data.training_images(given.images), given)
    print(page)
    print("\n".join(str(path) for path in page.write(given.folder, "table")))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the networks")
    add("--data", type=Path, default=None, help="folder of MNIST")
    add("--folder", type=Path, default=Path("runs/transformation_attacks"), help="records, table and figure")
    add("--images", type=int, default=100, help="test images for attacks by gradients, from the first on")
    add("--query_images", type=int, default=50, help="test images for attacks by queries")
    add("--queries", type=int, default=1000, help="of an image")
    add("--eot", type=int, default=8, help="draws of g over which a gradient is averaged (the paper: 500)")
    add("--draws", type=int, default=30, help="of g, by which images are judged")
    add("--confirm", type=int, default=31, help="draws that confirm a hit of an attack by gradients")
    add("--query_confirm", type=int, default=11, help="draws, each a query, that confirm a hit of an attack by queries")
    add("--eps", type=float, default=0.1, help="radius, linf")
    add("--steps", type=int, default=20, help="of attacks by gradients, each of 2.5 eps / steps")
    add("--all_steps", action="store_true", help="images that are broken go on to the last step and keep the last hit")
    add("--only", nargs="+", default=None, metavar="NAME", help="attacks whose name holds one of these")
    add("--large_eps", type=float, nargs="*", default=[0.3, 0.5], help="radii at which BPDA-I is to break everything")
    add("--large_images", type=int, default=50, help="test images at those radii")
    add("--curve_images", type=int, default=20, help="test images of the loss curves")
    add("--curve_steps", type=int, default=40, help="steps of the loss curves")
    add("--audit", type=int, default=16, help="test images that the audit probes; 0: none")
    add("--train", action="append", default=[], help="a further flag of every training, e.g. --train=--epochs=1")
    add("--device", default="cpu", help="where networks and images are")
    add("--threads", type=int, default=1, help="threads of the processor")
    given = parser.parse_args(arguments)
    for name in ("images", "query_images", "queries", "eot", "steps", "confirm", "query_confirm", "curve_steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.draws < 2:
        parser.error(f"--draws must be at least 2, for a mean and a majority, got {given.draws}")
    return given


def built(given: argparse.Namespace) -> dict[str, nn.Module]:
    """The networks, trained if they are missing."""
    folder, model = given.checkpoints, "--model.init_args.model.init_args"

    def make(name: str, config: str, *flags: str) -> Path:
        return trained(name, config, *flags, *given.train, folder=folder)

    f_b = make("mnist_reference", "mnist_reference")
    behind = [] if folder == CHECKPOINTS else [f"{model}.reference.init_args.path={f_b}"]  # else as configured
    f_a = make("mnist_transformation", "mnist_transformation", *behind)
    of = "--model.init_args.objective.init_args.defense.init_args.path"
    imitated = [] if folder == CHECKPOINTS else [f"{of}={f_a}"]
    paths = {
        "f_a": f_a,
        "f_a_n2": make("mnist_transformation_n2", "mnist_transformation", *behind, f"{model}.steps=2"),
        "h": make("mnist_reparameterisation", "mnist_reparameterisation", *imitated),
        "model_a": make("model_a", "mnist_standard"),
        "model_b": make("model_b", "mnist_standard_b"),
        "model_a_narrow": make("model_a_narrow", "mnist_madry_narrow"),
    }
    networks = {name: Checkpoint(path) for name, path in paths.items()}
    own, other = (cast(AdversarialTransformation, networks[name]).reference.state_dict() for name in ("f_a", "f_a_n2"))
    if not torch.equal(digest(own, ()), digest(other, ())):
        raise ValueError(f"{paths['f_a_n2']} was trained behind another f_b than {paths['f_a']}: move it away")
    return networks


def images_of(data: ImageDataModule, given: argparse.Namespace) -> Batch:
    """As many test images as any attack looks at, from the first on."""
    most = max(given.images, given.query_images, given.large_images, given.curve_images)
    batches: list[Batch] = []
    for batch in data.test_dataloader():
        batches.append(Batch(*batch))
        if sum(len(part.label) for part in batches) >= most:
            break
    return Batch(*(torch.cat(column)[:most] for column in zip(*batches, strict=True)))


def lines(networks: Mapping[str, nn.Module], given: argparse.Namespace) -> list[Line]:
    """The attacks, cheap ones first."""
    inside = cast(AdversarialTransformation, networks["f_a"]).classifier
    ball = ThreatModel("linf", given.eps)

    def pgd(eot: int | None = 1, threat: ThreatModel = ball) -> PGD:
        return PGD(threat, given.steps, estimator=Autograd(eot), stop_at_hit=not given.all_steps)

    def tried(name: str, attack: Attack, surrogate: str | None = None, images: int = given.images) -> Protocol:
        return Protocol(
            name=name, attack=attack, surrogate=surrogate, max_samples=images, draws=given.draws, confirm=given.confirm
        )

    def moved(name: str, source: nn.Module, eot: int | None = None, surrogate: str | None = None) -> Protocol:
        return tried(name, Transfer(pgd(eot), [source], surrogate=surrogate))

    paper = "80.2 (worst of the BPDA family)"
    reparameterised = Composed(networks["h"], inside).eval()
    found = [
        Line(tried("pgd", pgd()), "model_a", "0.0 (none, PGD)"),
        Line(tried("pgd", pgd()), "model_a_narrow", "42.7 (Madry, PGD)"),
        Line(moved("transfer_from_model_a", networks["model_a"]), paper="78.1 (Table 2), 73.4 (Table 3): transfer"),
        Line(moved("transfer_from_model_b", networks["model_b"])),
        Line(moved("transfer_from_model_a_narrow", networks["model_a_narrow"])),
        Line(moved("reparameterisation", reparameterised), paper="falls by less than 1 point"),
        Line(tried("mean_start", MeanStart(pgd(), given.draws)), counts=False),
        Line(tried("white_box_transfer", pgd(), "classifier"), paper="similar to BPDA-I"),
        Line(tried("bpda_identity", pgd(given.eot)), paper=paper),
        Line(moved("small_n_transfer", networks["f_a_n2"], given.eot, "softsign"), paper="ineffective"),
        Line(tried("unrolled", pgd(given.eot), "unrolled"), paper="finds virtually nothing"),
        *(
            Line(tried(f"bpda_{name}", pgd(given.eot), name), paper="" if "scaled" in name else paper)
            for name in SMOOTH
        ),
    ]
    found += [Line(protocol, paper=figure) for protocol, figure in asking(ball, given)]
    for eps in given.large_eps:
        attack = pgd(given.eot, ThreatModel("linf", eps))
        found.append(Line(tried(f"bpda_identity_eps{eps:g}", attack, images=given.large_images), counts=False))
    return found


def asking(ball: ThreatModel, given: argparse.Namespace) -> list[tuple[Protocol, str]]:
    """Attacks that read labels or scores, and the paper's figures."""
    samples = max(2, min(50, given.queries // 4))
    attacks: list[tuple[Attack, str]] = [
        (HopSkipJump(ball, samples=min(100, max(1, given.queries // 4))), "82.0 (HSJ, in L2)"),
        (GenAttack(ball, steps=given.queries, mutation_rate=0.3, alpha=0.5), "81.9 (GA, 91 queries a radius)"),
        (NAttack(ball, max(1, given.queries // samples), samples, step_size=0.02, shrink=0.1), ""),
    ]
    names = ("hop_skip_jump", "gen_attack", "nattack")
    return [
        (
            Protocol(
                name=name, attack=attack, budget=given.queries, max_samples=given.query_images, draws=given.draws,
                confirm=given.query_confirm,
            ),
            paper,
        )
        for name, (attack, paper) in zip(names, attacks, strict=True)
    ]  # fmt: skip


def measured(networks: Mapping[str, nn.Module], batch: Batch, train: Batch, given: argparse.Namespace) -> Page:
    """Run what is missing and make the page.

    Args:
        networks: by the names of :func:`built`. batch: test images. train: training images.
    """
    batch, train = (Batch(*(part.to(given.device) for part in each)) for each in (batch, train))
    models = {DEFENCE: networks["f_a"], **{name: networks[name] for name in ("model_a", "model_a_narrow")}}
    only = given.only or [""]
    wanted = [line for line in lines(networks, given) if any(part in line.protocol.name for part in only)]
    if not wanted:
        raise ValueError(f"--only {' '.join(only)}: no attack has such a name; leave it out for all of them")
    without = {name: unattacked(model, batch, given) for name, model in models.items()}
    rows = [clean_row(name, wrong[: given.images]) for name, wrong in without.items()]
    found: list[tuple[Line, Outcome]] = []
    for line in wanted:
        found.append((line, attacked(models[line.model], line, batch, given)))
        rows.append(cells(*found[-1], without[line.model]))
        print(" | ".join(rows[-1]), flush=True)
    valid = [outcome.records for line, outcome in found if line.counts and line.model == DEFENCE]
    few = min(given.images, given.query_images)
    spans = sorted({few, given.images})
    if valid:
        places = batch.index.cpu()
        rows += [worst(valid, without[DEFENCE], places[:n], given.eps, n > given.query_images) for n in spans]
    notes = [
        MASKING,
        COUNTED,
        *measures(networks["h"], cast(AdversarialTransformation, networks["f_a"]), batch, train, given),
    ]
    if given.audit:
        notes += audited(models[DEFENCE], [line.protocol for line, _ in found if line.model == DEFENCE], batch, given)
    return Page("Attacks on f_a(g(x)), MNIST", settings(networks["f_a"], given), HEADS, rows, notes)


def attacked(model: nn.Module, line: Line, batch: Batch, given: argparse.Namespace) -> Outcome:
    """One attack; images that an earlier run has finished are read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*with eot=1 follows the gradient of one draw")  # of f_a alone
        warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")  # a finding here
        trial = Trial(line.protocol, model, dirpath=given.folder / line.model / "attacks", progress=True)
        trial.add(batch)
        return trial.outcome(trial.close())


def wrong_shares(records: Records, clean: Tensor) -> Tensor:
    """Of each image the share of wrong draws, at least that without an attack, which an attacker need not make."""
    found = torch.where(records.clean_correct, records.verified_mean, 1.0)
    return torch.maximum(found, clean[: len(found)].to(found.dtype))


def cells(line: Line, outcome: Outcome, clean: Tensor) -> list[str]:
    """A line of the table; ``clean``: shares of wrong draws without attack of the same images and more, (n,)."""
    records, fooled = outcome.records, [outcome.counts[name] for name in FOOLED if name in outcome.counts]
    tried = records[records.clean_correct]
    name = outcome.name if line.counts or outcome.eps < float("inf") else f"{outcome.name} (invalid by construction)"
    return [
        line.model, name, "box" if outcome.eps == float("inf") else f"{outcome.eps:g}",
        *shares(wrong_shares(records, clean)),
        f"{percent(fooled[0][0] / fooled[0][1])} %" if fooled and fooled[0][1] else "",
        f"{tried.linf.mean():.3f}" if len(tried) else "", f"{tried.queries.double().mean():,.0f}" if len(tried) else "",
        line.paper,
    ]  # fmt: skip


def shares(wrong: Tensor) -> list[str]:
    """Images, accuracy over draws, majority with its interval, every draw; from each image's share of wrong draws.

    Draws of different images are independent, so the variance of the accuracy over draws is that of the shares.
    """
    count = len(wrong)
    mean, spread = 1 - wrong.mean().item(), (wrong * (1 - wrong)).sum().sqrt().item() / max(1, count)
    right = int((wrong < 0.5).sum())
    return [
        f"{count}", f"{percent(mean)} ± {100 * spread:.1f} %", f"{percent(right / count)} %",
        interval(wilson(right, count)), f"{percent((wrong == 0).double().mean().item())} %",
    ]  # fmt: skip


def unattacked(model: nn.Module, batch: Batch, given: argparse.Namespace) -> Tensor:
    """Of each clean image the share of wrong draws, (n,) float64."""
    labels = fresh_labels(model, batch.image, given.draws, batch.index)
    return (labels != batch.label[:, None]).double().mean(1).cpu()


def clean_row(name: str, wrong: Tensor) -> list[str]:
    """The line of the clean images."""
    paper = {DEFENCE: "82.9", "model_a": "92.9 (none)", "model_a_narrow": "81.7 (Madry)"}[name]
    return [name, "none (clean)", "0", *shares(wrong), "", "0.000", "0", paper]


def worst(parts: Sequence[Records], clean: Tensor, index: Tensor, eps: float, partly: bool) -> list[str]:
    """The line of the worst case: of each image, the highest share of wrong draws over all attacks that saw it.

    Args:
        clean: shares without attack, of the images ``index``.
    """
    wrong = clean[: len(index)].double()
    for records in parts:
        found = torch.where(records.clean_correct, records.verified_mean, 1.0)
        share = dict(zip(records.index.tolist(), found.tolist(), strict=True))
        wrong = torch.maximum(wrong, torch.tensor([share.get(place, 0.0) for place in index.tolist()]).double())
    name = f"worst case per image over {len(parts)} attacks" + (", those by queries on some images" if partly else "")
    return [DEFENCE, name, f"{eps:g}", *shares(wrong), "", "", "", "73.4 (worst of all)"]


def audited(model: nn.Module, protocols: Sequence[Protocol], batch: Batch, given: argparse.Namespace) -> list[str]:
    """What the audit says of all attacks together; their records are read."""
    bounded = [protocol for protocol in protocols if protocol.attack.threat.radius < float("inf")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(with eot=1 follows|the gradient was exactly 0)")
        report = evaluate(
            model,
            [batch],
            bounded,
            dirpath=given.folder / DEFENCE,
            name=DEFENCE,
            audit=min(given.audit, len(batch.label)),
        )
    return [f"audit warns: {warning}" for warning in report.warnings()] + [audit.summary for audit in report.audits]


def settings(defence: nn.Module, given: argparse.Namespace) -> dict[str, object]:
    """What a reader of the figures must know."""
    g = cast(AdversarialTransformation, defence)
    weights = {
        name: sum(p.numel() for p in network.parameters())
        for name, network in (("f_a", g.classifier), ("f_b", g.reference))
    }
    return {
        "networks": f"f_a {type(g.classifier).__name__} of {weights['f_a']:,} weights (the size of Model A), f_b of "
        f"{weights['f_b']:,} (half the paper's width)",
        "g": f"{g.mode}, {g.norm}, Delta {g.delta:g}, epsilon {g.delta / 6 if g.step_size is None else g.step_size:g}, "
        f"N {g.steps}, random start {g.random_start}, box {g.box}",
        "attacker": f"linf {given.eps:g}, {given.steps} steps of {2.5 * given.eps / given.steps:g}, random start, "
        f"S {given.eot} (the paper: 500), {given.queries:,} queries",
        "images": f"the first {given.images} of the test set, {given.query_images} for attacks by queries, "
        f"{given.large_images} at other radii",
        "draws by which an image is judged": given.draws,
        "broken images": "go on to the last step" if given.all_steps else "leave at once",
        "draws that confirm a hit": f"{given.confirm}, by queries {given.query_confirm} (charged)",
        "attacks by queries": "HopSkipJump at linf; GenAttack untargeted, mutation rate 0.3, alpha 0.5; NAttack step "
        "0.02, shrink 0.1",
        "sibling": "N 2, BPDA softsign",
        "training": "as configured (epochs: f_b 1, f_a and sibling 2, h 1; the paper: 80)"
        + (f", but {' '.join(given.train)}" if given.train else ""),
        "seed": 0,
    }


if __name__ == "__main__":
    main()

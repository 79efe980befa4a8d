"""A trial looks at each image once, attacks what is right at first, and goes on where a broken run stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_adv.attacks import PGD, NAttack
from lit_adv.datamodules import Batch
from lit_adv.metrics import Records
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol
from lit_adv.report import Outcome
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial

COUNT = 30
WRONG = [3, 11, 12, 29]
X = images(COUNT)
EXACT = ("index", "label", "target", "clean_correct", "claimed", "verified", "verified_any", "rounded", "queries",
         "checks", "first_hit", "iterations")  # fmt: skip


def labels() -> Tensor:
    """The model's own decisions but for four images that it gets wrong."""
    y = decided(Small(), X)
    y[WRONG] = (y[WRONG] + 1) % 4
    return y


Y = labels()


def nattack(**arguments: Any) -> Protocol:
    """A black-box attack that breaks about half of the images."""
    attack = NAttack(ThreatModel(eps=0.015), steps=4, samples=10, step_size=0.1, sigma=0.5, shrink=0.1)
    return Protocol(**({"name": "nattack", "attack": attack, "pool": 6} | arguments))


def pgd(**arguments: Any) -> Protocol:
    return Protocol(**({"name": "pgd", "attack": PGD(ThreatModel(eps=0.008), steps=4)} | arguments))


def batches(size: int, index: Tensor | None = None) -> list[Batch]:
    index = torch.arange(COUNT) if index is None else index
    return [Batch(X[part], Y[part], part) for part in index.split(size)]


def run(trial: Trial, size: int = 5, index: Tensor | None = None) -> Records:
    for batch in batches(size, index):
        trial.add(batch)
    return trial.close().unique()


def model() -> Counting:
    return Counting(Small(), X).eval()


def assert_same(one: Records, other: Records, exact: tuple[str, ...] = EXACT) -> None:
    ours, theirs = one.columns(), other.columns()
    for name in ours:
        if name in exact:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)


def stored(folder: Path) -> dict[int, Tensor]:
    """The adversarial images on disk, the newest of each place."""
    found: dict[int, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
        shard = load_file(path)
        found |= dict(zip(shard["index"].tolist(), shard["x_adv"], strict=True))
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]


class Killed(Exception):
    """Stands for a process that is killed."""


def killed_after(forwards: int, folder: Path, protocol: Protocol) -> None:
    """A run that is stopped in the midst of its forwards."""
    broken, left = model(), iter(range(forwards))

    def count(*_: object) -> None:
        if next(left, None) is None:
            raise Killed

    broken.register_forward_pre_hook(count)
    with pytest.raises(Killed):
        run(Trial(protocol, broken, "images", dirpath=folder))


@pytest.mark.parametrize("forwards", [9, 16, 30])
@pytest.mark.parametrize("protocol", [nattack(), pgd(pool=4)], ids=["nattack", "pgd"])
def test_a_broken_run_goes_on_where_it_stopped(tmp_path: Path, protocol: Protocol, forwards: int) -> None:
    whole = run(Trial(protocol, model(), "images", dirpath=tmp_path / "whole"))
    killed_after(forwards, tmp_path / "broken", protocol)
    done = [row["index"] for row in lines(tmp_path / "broken")]
    assert 0 < len(done) < COUNT

    watched = model()
    again = run(Trial(protocol, watched, "images", dirpath=tmp_path / "broken"))
    rest = sorted(set(range(COUNT)) - set(done))
    assert not watched.seen[done].any()
    assert (watched.seen[rest] > 0).all()
    assert_same(again, whole)
    one, other = stored(tmp_path / "broken"), stored(tmp_path / "whole")
    assert one.keys() == other.keys() == set(range(COUNT)) - set(WRONG)
    for index in one:
        torch.testing.assert_close(one[index], other[index], rtol=0, atol=1e-9)


def test_a_broken_run_goes_on_with_two_processes_and_then_with_one(tmp_path: Path) -> None:
    whole = run(Trial(nattack(), model(), "images"))
    killed_after(16, tmp_path, nattack())
    done = [row["index"] for row in lines(tmp_path)]
    watched = [model(), model()]
    parts = [
        run(Trial(nattack(), watched[rank], "images", dirpath=tmp_path, rank=rank, world=2), 4, place)
        for rank, place in enumerate((torch.arange(0, COUNT, 2), torch.arange(1, COUNT, 2)))
    ]
    assert_same(Records.cat(parts).unique(), whole)
    assert not (watched[0].seen + watched[1].seen)[done].any()
    alone = model()
    assert_same(run(Trial(nattack(), alone, "images", dirpath=tmp_path)), whole)
    assert not alone.seen.any()


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    first = Trial(pgd(), model(), "images", dirpath=tmp_path)
    whole = run(first)
    watched = model()
    second = Trial(pgd(), watched, "images", dirpath=tmp_path)
    assert_same(run(second), whole)
    assert not watched.seen.any()
    one, other = first.outcome(whole), second.outcome(whole)
    assert one.notes == other.notes
    assert one.examples is not None
    assert other.examples is not None
    assert torch.equal(one.examples.x_adv, other.examples.x_adv)
    assert torch.equal(one.examples.index, other.examples.index)


def test_a_finished_run_tells_the_same_notes(tmp_path: Path) -> None:
    """Accuracy at chance is remarked in the report of every run, also where nothing was left to do."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_tensor([2.0, 1.0, 0.0, 0.0]).expand(len(x), 4)

    def notes() -> tuple[str, ...]:
        trial = Trial(nattack(budget=10), Constant().eval(), "images", dirpath=tmp_path)
        place = torch.arange(200)
        trial.add(Batch(X[:1].repeat(200, 1, 1, 1), place % 4, place))
        return trial.outcome(trial.close()).notes

    first = notes()
    assert any("that of guessing" in note for note in first)
    assert notes() == first


def test_resume_twice_after_a_line_cut_in_half(tmp_path: Path) -> None:
    whole = run(Trial(nattack(), model(), "images", dirpath=tmp_path))
    (path,) = tmp_path.rglob("*.jsonl")
    text = path.read_text()
    path.write_text(text[: text.rindex("\n", 0, -1) + 40])  # the last line, cut after 40 characters
    (lost,) = set(range(COUNT)) - {row["index"] for row in map(json.loads, path.read_text().splitlines()[:-1])}

    watched = model()
    assert_same(run(Trial(nattack(), watched, "images", dirpath=tmp_path)), whole)
    # besides the lost image the model was shown nothing
    assert watched.seen.nonzero().flatten().tolist() == [lost]
    watched = model()
    assert_same(run(Trial(nattack(), watched, "images", dirpath=tmp_path)), whole)
    assert not watched.seen.any()
    assert stored(tmp_path).keys() == set(range(COUNT)) - set(WRONG)


def test_more_images_or_another_pool_go_on_with_the_same_records(tmp_path: Path) -> None:
    few = run(Trial(nattack(max_samples=10), model(), "images", dirpath=tmp_path))
    assert few.index.tolist() == list(range(10))
    watched = model()
    more = run(Trial(nattack(pool=100, chunk=3), watched, "images", dirpath=tmp_path))
    assert not watched.seen[:10].any()
    assert_same(more, run(Trial(nattack(), model(), "images")))


def changed_weights() -> Counting:
    other = model()
    with torch.no_grad():
        other.model.second[0, 0] += 1e-9  # type: ignore[index,union-attr,operator]
    return other


@pytest.mark.parametrize(
    ("protocol", "other", "data"),
    [
        (pgd(), changed_weights(), "images"),
        (pgd(attack=PGD(ThreatModel(eps=0.008), steps=5)), model(), "images"),
        (pgd(attack=PGD(ThreatModel(eps=0.008), steps=4, seed=1)), model(), "images"),
        (pgd(budget=50), model(), "images"),
        (pgd(), model(), "other images"),
    ],
    ids=["weights", "attack", "seed", "budget", "data"],
)
def test_what_differs_starts_anew(tmp_path: Path, protocol: Protocol, other: Counting, data: str) -> None:
    run(Trial(pgd(), model(), "images", dirpath=tmp_path))
    other.seen.zero_()
    run(Trial(protocol, other, data, dirpath=tmp_path))
    assert (other.seen > 0).all()


def test_other_pixels_under_the_same_place_start_anew(tmp_path: Path) -> None:
    run(Trial(pgd(), model(), "images", dirpath=tmp_path))
    trial = Trial(pgd(), model(), "images", dirpath=tmp_path)
    moved = X.clone()
    moved[4] = X[4].flip(-1)
    trial.add(Batch(moved[:8], decided(Small(), moved)[:8], torch.arange(8)))
    records = trial.close().unique()
    fresh = Trial(pgd(), model(), "images")
    fresh.add(Batch(moved[:8], decided(Small(), moved)[:8], torch.arange(8)))
    assert_same(records, fresh.close().unique())


def finished(protocol: Protocol, folder: Path) -> tuple[Records, Outcome]:
    trial = Trial(protocol, model(), "images", dirpath=folder)
    records = run(trial)
    return records, trial.outcome(records)


@pytest.mark.parametrize("bytes_per_file", [0, 3000, 12000])
def test_full_disk_costs_no_result(tmp_path: Path, bytes_per_file: int) -> None:
    resource = pytest.importorskip("resource")
    whole = run(Trial(nattack(), model(), "images"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        with pytest.warns(UserWarning, match="results are kept in memory") as caught:
            records, outcome = finished(nattack(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(caught) == 1
    assert_same(records, whole)
    assert outcome.examples is not None
    # what did reach the disk is sound
    assert_same(run(Trial(nattack(), model(), "images", dirpath=tmp_path)), whole)


@pytest.mark.parametrize("total", [COUNT, COUNT - 1])
@pytest.mark.parametrize("limit", [None, 1, 7, 8, 29])
def test_max_samples_are_the_first_on_one_process_and_on_two(total: int, limit: int | None) -> None:
    """Two processes share the images as a distributed sampler does, which repeats one to even the shares."""
    protocol = pgd(max_samples=limit)
    one = run(Trial(protocol, model()), 4, torch.arange(total))
    padded = torch.arange(total + total % 2) % total
    parts = [run(Trial(protocol, model(), rank=rank, world=2), 4, padded[rank::2]) for rank in (0, 1)]
    both = Records.cat(parts).unique()
    assert one.index.tolist() == list(range(min(total, limit or total)))
    assert_same(both, one)


def test_images_wrong_at_first_never_reach_the_attack() -> None:
    class Watched(PGD):
        given: list[int]

        def __call__(
            self, oracle: Any, x: Any, y: Any, target: Any = None, index: Any = None, finished: Any = None
        ) -> Any:
            assert isinstance(oracle, QueryOracle)
            self.given += index.tolist()
            return super().__call__(oracle, x, y, target, index, finished)

    attack = Watched(ThreatModel(eps=0.008), steps=4)
    attack.given = []
    watched = model()
    records = run(Trial(pgd(attack=attack, pool=7), watched))
    assert sorted(attack.given) == sorted(set(range(COUNT)) - set(WRONG))
    assert watched.seen[WRONG].tolist() == [2, 1, 1, 1]  # the clean check, and the first look at the first batch
    wrong = records[torch.tensor(WRONG)]
    assert not wrong.clean_correct.any()
    assert not wrong.verified.any()
    assert wrong.queries.tolist() == wrong.distance.tolist() == [0] * len(WRONG)
    assert int(records.clean_correct.sum()) == COUNT - len(WRONG)


def test_queries_on_record_are_what_the_model_was_asked() -> None:
    watched = model()
    records = run(Trial(nattack(), watched))
    # besides: one clean check and two verifications (as returned, and in 8 bits) of each attacked image
    beside = torch.where(records.clean_correct, 3, 1)
    beside[:5] += 1  # the first look at the first batch
    assert (records.queries + beside).tolist() == watched.seen.tolist()


@pytest.mark.parametrize("pool", [1, 4, 512])
@pytest.mark.parametrize("protocol", [nattack(), pgd()], ids=["nattack", "pgd"])
def test_pool_and_batches_decide_nothing(protocol: Protocol, pool: int) -> None:
    reference = run(Trial(protocol, model()))
    other = Trial(Protocol(**{**vars(protocol), "pool": pool, "chunk": 5}), model())
    assert_same(run(other, 11, torch.randperm(COUNT)), reference)


@pytest.mark.parametrize("attack", [nattack(), pgd()], ids=["nattack", "pgd"])
def test_a_random_model_is_judged_over_thirty_draws(attack: Protocol) -> None:
    def noisy() -> Noisy:
        return Noisy(Small(), 4, noise=0.02).eval()

    trial = Trial(attack, noisy())
    records = run(trial)
    assert trial.draws == trial.outcome(records).draws == 30
    attacked = records[records.clean_correct]
    share = attacked.verified_mean * 30
    assert torch.equal(share, share.round())
    assert ((attacked.verified_mean > 0) & (attacked.verified_mean < 1)).any()  # the noise does matter
    assert torch.equal(attacked.verified, attacked.claimed & (attacked.verified_mean > 0.5))
    assert torch.equal(attacked.verified_any, attacked.verified_mean > 0)

    torch.manual_seed(99)  # its numbers come from the seed and the images alone
    assert_same(run(Trial(Protocol(**{**vars(attack), "pool": 3, "chunk": 2}), noisy()), 4), records)


def test_share_of_the_draws_is_that_of_independent_noise() -> None:
    noisy = Noisy(Small(), 4, noise=0.02).eval()
    trial = Trial(pgd(), noisy)
    records = run(trial)
    examples = trial.examples(COUNT)
    assert examples is not None
    kept = examples.index
    with torch.no_grad():
        answers = torch.stack([noisy(examples.x_adv).argmax(1) for _ in range(300)], 1)
    expected = (answers != examples.label[:, None]).double().mean(1)
    # 30 draws: the standard error is at most 0.09
    assert (records.verified_mean[kept] - expected).abs().max() < 4 * 0.092
    assert abs(float((records.verified_mean[kept] - expected).mean())) < 0.05


def test_draws_may_be_given() -> None:
    trial = Trial(pgd(draws=5), Noisy(Small(), 4, noise=0.05).eval())
    records = run(trial)
    share = records.verified_mean * 5
    assert torch.equal(share, share.round())
    assert trial.draws == 5


def test_target_next() -> None:
    records = run(Trial(pgd(target="next"), model()))
    attacked = records[records.clean_correct]
    assert torch.equal(attacked.target, (attacked.label + 1) % 4)


def test_target_least_likely_is_that_of_the_clean_image() -> None:
    records = run(Trial(pgd(target="least_likely"), model()))
    with torch.no_grad():
        scores = Small()(X)
    expected = [min((c for c in range(4) if c != Y[i]), key=lambda c, i=i: float(scores[i, c])) for i in range(COUNT)]
    attacked = records.clean_correct
    assert records.target[attacked].tolist() == torch.tensor(expected)[attacked].tolist()


def test_target_random_is_keyed_by_seed_and_image() -> None:
    def targets(seed: int, pool: int, size: int) -> Tensor:
        protocol = pgd(target="random", pool=pool, attack=PGD(ThreatModel(eps=0.008), steps=1, seed=seed))
        return run(Trial(protocol, model()), size).target

    one = targets(0, 4, 3)
    attacked = torch.ones(COUNT, dtype=torch.bool)
    attacked[WRONG] = False
    assert ((one >= 0) & (one < 4) & (one != Y))[attacked].all()
    assert len((one - Y)[attacked].remainder(4).unique()) == 3
    assert torch.equal(one, targets(0, 50, 30))
    assert not torch.equal(one, targets(1, 4, 3))


def test_targeted_success_is_the_target() -> None:
    trial = Trial(pgd(target="least_likely", attack=PGD(ThreatModel(eps=0.1), steps=20)), model())
    records = run(trial)
    assert records.verified.any()
    examples = trial.examples(COUNT)
    assert examples is not None
    assert torch.equal(decided(Small(), examples.x_adv), records.target[examples.index])


def test_least_likely_of_a_random_model_is_reproducible() -> None:
    def targets(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(Trial(pgd(target="least_likely"), Noisy(Small(), 4, noise=0.5).eval())).target

    assert torch.equal(targets(1), targets(2))


def test_targets_without_classes_are_refused() -> None:
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return decided(Small(), x)

    for target in ("next", "least_likely"):
        trial = Trial(nattack(target=target, output="labels"), Labels())
        with pytest.raises(ValueError, match="target"):
            run(trial)


def test_a_budget_below_a_step_warns_once() -> None:
    with pytest.warns(UserWarning, match="nattack: a budget of 7 .* 10 queries") as caught:
        records = run(Trial(nattack(budget=7), model()))
    assert len(caught) == 1
    assert int(records.queries.max()) <= 7


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(ValueError, match="answers 4 classes and the data set has 10: choose the data"):
        run(Trial(pgd(), model(), num_classes=10))


class Turncoat(nn.Module):
    """Answers attackers who want gradients otherwise than everyone else, and notes who wants them."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.inner, self.label = Small(), label
        self.with_gradients, self.without = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.with_gradients += len(x)
            return self.inner(x)
        self.without += len(x)
        return nn.functional.one_hot(torch.full((len(x),), self.label), 4) * 9.0


def test_only_the_attack_asks_with_gradients() -> None:
    """Clean check and verification need no graph; a model may answer the two otherwise, and the latter counts."""
    label = int(Y[0])
    chosen = (label == Y).nonzero().squeeze(1)[:3]
    turncoat = Turncoat(label).eval()
    trial = Trial(pgd(attack=PGD(ThreatModel(eps=0.3), steps=10)), turncoat)
    trial.add(Batch(X[chosen], Y[chosen], chosen))
    records = trial.close()
    assert records.claimed.all()
    assert not records.verified.any()
    assert turncoat.with_gradients == int(records.queries.sum())
    assert turncoat.without == 4 * len(chosen)  # first look, clean check, as returned, in 8 bits
    assert any("3 claimed successes did not survive" in note for note in trial.outcome(records).notes)

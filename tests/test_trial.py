"""A trial looks at each image once, attacks what is right at first, and judges by the bare model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Noisy, Small, decided
from contracts.trials import COUNT, WRONG, X, Y, assert_same, batches, model, nattack, pgd, run, transfer
from torch import Tensor, nn

from lit_adv.attacks import PGD, Cascade, DifferenceOfMeans, HopSkipJump, NAttack
from lit_adv.datamodules import Batch
from lit_adv.metrics import Records
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial


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
    beside[:5] += 1  # the first look at the first batch,
    beside[:3] += 1  # and again at half of it
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
        trial = Trial(nattack(target=target, output="labels", attack=HopSkipJump()), Labels())
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
    assert turncoat.without == 4 * len(chosen) + 2  # first look (some twice), clean check, as returned, in 8 bits
    assert any("3 claimed successes did not survive" in note for note in trial.outcome(records).notes)


class Secret(nn.Module):
    """Random, and does not say so."""

    def __init__(self, noise: float = 0.02) -> None:
        super().__init__()
        self.inner, self.noise = Small(), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.noise * torch.randn_like(x))


class Social(nn.Module):
    """Normalises by the batch it is given, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(0.5 + x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("secret", [Secret(), Social()], ids=["random", "batch"])
def test_a_model_that_does_not_repeat_its_answers_is_judged_over_thirty_draws(secret: nn.Module) -> None:
    torch.manual_seed(0)
    trial = Trial(nattack(), secret.eval())
    with pytest.warns(UserWarning, match="nattack: .*answers the same images differently.*stochastic = True") as caught:
        records = run(trial, 10)
    assert len(caught) == 1
    outcome = trial.outcome(records)
    assert outcome.draws == trial.draws == 30
    share = records.verified_mean * 30
    torch.testing.assert_close(share, share.round())
    assert any("does not say that it is random: images were judged by 30 decisions" in note for note in outcome.notes)


def test_draws_given_count_for_such_a_model_too() -> None:
    trial = Trial(pgd(draws=3), Secret().eval())
    with pytest.warns(UserWarning, match="judged by 3 decisions"):
        run(trial)
    assert trial.draws == 3


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_randomness(kind: torch.dtype) -> None:
    """Warnings are errors here."""
    kept = X.to(torch.float32 if kind == torch.bfloat16 else kind)
    trial = Trial(nattack(), Small().to(kind).eval())
    for part in torch.arange(COUNT).split(9):
        trial.add(Batch(kept[part], Y[part], part))
    assert not trial.outcome(trial.close()).stochastic


def test_a_model_that_tells_labels_at_random_is_noticed() -> None:
    class Labels(Secret):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    torch.manual_seed(0)
    attack = HopSkipJump(ThreatModel("linf", 0.05), steps=1)
    trial = Trial(Protocol(name="hsj", attack=attack, output="labels", budget=50), Labels(0.3).eval())
    with pytest.warns(UserWarning, match="differently"):
        run(trial, 30)
    assert trial.draws == 30


def test_counts_are_gathered_over_pools() -> None:
    whole, pools = Trial(transfer(), model()), Trial(transfer(pool=4), model())
    one, other = whole.outcome(run(whole)), pools.outcome(run(pools))
    attacked = COUNT - len(WRONG)
    assert one.counts == other.counts
    (name,) = one.counts
    happened, times = one.counts[name]
    assert times == attacked
    assert 0 < happened < attacked
    assert f"{name}: {happened} of {attacked} ({100 * happened / attacked:.1f} %)" in one.notes


def test_a_stand_in_answers_the_search_and_the_model_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rough(nn.Module):
        """Three decimals of the scores."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return (self.inner(x) * 1000).round() / 1000

    made: list[tuple[Rough, tuple[Any, ...]]] = []

    def fast_copy(inner: nn.Module, *settings: Any) -> Rough:
        made.append((Rough(Small()).eval(), settings))
        return made[-1][0]

    monkeypatch.setattr("lit_adv.trial.fast_copy", fast_copy)
    trial = Trial(nattack(pool=4, precision="bf16", channels_last=True, compile=True), model())
    records = run(trial)
    ((stand_in, settings),) = made  # once in a trial of many pools
    assert settings == ("bf16", True, True)
    assert records.verified.any()
    assert torch.equal(records.claimed, records.verified)
    assert stand_in.seen == int((records.queries - records.claimed.long()).sum())  # the model confirms each hit
    assert (records.checks >= records.claimed.long()).all()


@pytest.mark.parametrize(
    ("protocol", "reason"),
    [
        (pgd(precision="bf16"), "PGD needs gradients"),
        (Protocol(name="hsj", attack=HopSkipJump(steps=1), budget=40, compile=True), "HopSkipJump walks along"),
    ],
    ids=["gradients", "labels"],
)
def test_who_goes_without_a_stand_in_is_told(protocol: Protocol, reason: str) -> None:
    plain = Protocol(**{**vars(protocol), "precision": "fp32", "compile": False})
    with pytest.warns(UserWarning, match=f"{protocol.name}: precision, .* read scores; {reason}") as caught:
        records = run(Trial(protocol, Small().eval()))
    assert len(caught) == 1
    assert_same(records, run(Trial(plain, Small().eval())))


def test_a_random_model_has_a_stand_in_with_its_own_numbers() -> None:
    protocol = nattack(precision="bf16", draws=5, confirm=3)
    model = Noisy(Small().float(), 4, noise=0.02).eval()
    first, second = (Trial(protocol, model) for _ in range(2))
    for trial, size in ((first, 5), (second, 13)):
        for batch in batches(size):
            trial.add(Batch(batch.image.float(), batch.label, batch.index))
    one, other = first.close().unique(), second.close().unique()
    assert torch.equal(one.queries, other.queries)
    assert one.verified.any()
    assert first._fast is not None


def test_labels_where_scores_were_promised_are_named() -> None:
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return decided(Small(), x)

    with pytest.raises(ValueError, match="returns one label per image and no logits: say output='labels'"):
        run(Trial(nattack(), Labels()))


def test_an_attack_that_must_learn_is_taught_once_and_known_by_it(tmp_path: Path) -> None:
    lessons = []

    def training() -> Batch:
        lessons.append(1)
        return Batch(X, Y, torch.arange(COUNT))

    def means() -> Protocol:
        return Protocol(name="means", attack=DifferenceOfMeans(ThreatModel(eps=0.1)))

    taught = means()
    one = run(Trial(taught, model(), dirpath=tmp_path, training=training))
    assert (tmp_path / "means" / "fitted.safetensors").is_file()
    run(Trial(taught, model(), dirpath=tmp_path, training=training))
    assert len(lessons) == 1
    other = means()
    other.attack.fit(X[:20], Y[:20])
    watched = model()
    two = run(Trial(other, watched, dirpath=tmp_path))
    assert watched.seen.all()
    assert not torch.equal(one.l2, two.l2)


def test_a_cascade_tells_what_its_parts_found() -> None:
    attack = Cascade(ThreatModel(eps=0.008), {"pgd": PGD(steps=2), "nattack": NAttack(steps=2, samples=10)})
    trial = Trial(Protocol(name="cascade", attack=attack, pool=7), model())
    outcome = trial.outcome(run(trial))
    first, second = outcome.stages
    assert (first.name, first.access, first.seen) == ("pgd", "gradient", COUNT - len(WRONG))
    assert (second.name, second.access, second.seen) == ("nattack", "probs", first.seen - first.broken)
    assert 0 < first.broken + second.broken == int(outcome.records.verified.sum())

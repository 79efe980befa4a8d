"""A broken run goes on where it stopped, and a disk that fails costs no result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from contracts.nets import Counting, Small, decided
from contracts.trials import COUNT, WRONG, X, assert_same, lines, model, nattack, pgd, run, stored, transfer
from torch import Tensor, nn

from lit_adv.attacks import PGD, Cascade, NAttack, Transfer
from lit_adv.datamodules import Batch
from lit_adv.metrics import Records
from lit_adv.protocol import Protocol
from lit_adv.report import Outcome
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial


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


def test_counts_are_those_of_all_runs_and_processes(tmp_path: Path) -> None:
    alone = Trial(transfer(), model(), "images")
    whole = alone.outcome(run(alone))
    parts = []
    for rank, place in enumerate((torch.arange(0, COUNT, 2), torch.arange(1, COUNT, 2))):
        trial = Trial(transfer(pool=5), model(), "images", dirpath=tmp_path, rank=rank, world=2)
        parts.append(run(trial, 4, place))
    records = Records.cat(parts).unique()
    assert trial.outcome(records).counts == whole.counts
    again = Trial(transfer(), model(), "images", dirpath=tmp_path)
    assert again.outcome(run(again)).counts == whole.counts
    for path in tmp_path.rglob("counts.*"):
        path.write_text("{")  # a damaged file costs the remark alone
    assert Trial(transfer(), model(), "images", dirpath=tmp_path).outcome(records).counts == {}


def test_other_local_models_begin_anew(tmp_path: Path) -> None:
    """Their weights decide the result, though they are no argument that can be written down."""
    run(Trial(transfer(), model(), "images", dirpath=tmp_path))
    attack = Transfer(PGD(ThreatModel(eps=0.008), steps=4), [Small(seed=4)])
    watched = model()
    run(Trial(transfer(attack=attack), watched, "images", dirpath=tmp_path))
    assert watched.seen.all()
    watched = model()
    run(Trial(transfer(), watched, "images", dirpath=tmp_path))
    assert not watched.seen.any()


def test_a_resumed_run_knows_that_the_model_does_not_repeat_itself(tmp_path: Path) -> None:
    class Secret(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 0.02 * torch.randn_like(x))

    first = Trial(pgd(), Secret().eval(), "images", dirpath=tmp_path)
    with pytest.warns(UserWarning, match="answers the same images differently"):
        records = run(first)
    second = Trial(pgd(), Secret().eval(), "images", dirpath=tmp_path)
    assert_same(run(second), records)
    assert second.outcome(records).draws == 30
    assert second.outcome(records).notes == first.outcome(records).notes


def test_a_cascade_broken_off_counts_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_adv.trial._FLUSH_ROWS", 1)
    parts = {"pgd": PGD(steps=3), "nattack": NAttack(steps=2, samples=10)}
    protocol = Protocol(name="cascade", attack=Cascade(ThreatModel(eps=0.008), parts), chunk=5)
    trial = Trial(protocol, model(), "images")
    whole = trial.outcome(run(trial))
    killed_after(14, tmp_path, protocol)
    assert 0 < len(lines(tmp_path)) < COUNT
    resumed = Trial(protocol, model(), "images", dirpath=tmp_path)
    outcome = resumed.outcome(run(resumed))
    assert outcome.stages == whole.stages
    assert outcome.stages[0].seen == COUNT - len(WRONG)

"""What is on disk survives a broken run, and a disk that fails costs nothing but the resumption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Noisy, Small, images
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lit_adv.archive import Archive, configuration, weights_hash
from lit_adv.attack import Attack
from lit_adv.attacks import PGD, NAttack
from lit_adv.estimators import Autograd
from lit_adv.losses import margin
from lit_adv.threat import ThreatModel


@contextmanager
def small_disk(bytes_per_file: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: the operating system's own error."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rows(*index: int) -> list[dict[str, Any]]:
    return [{"index": i, "label": i % 3, "distance": 0.1 * i, "trace": [[0.0, 2.0, 0.1]]} for i in index]


def tensors(*index: int) -> dict[str, Tensor]:
    x0 = torch.stack([torch.full((1, 2, 2), float(i)) for i in index])
    return {"index": torch.tensor(index), "label": torch.tensor(index) % 3, "x0": x0, "x_adv": x0 + 0.5}


def lines(archive: Archive, rank: int = 0) -> Path:
    return archive.folder / f"rank{rank}.jsonl"


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {"a": 1})
    archive.append(rows(4, 2), tensors(4, 2))
    archive.append(rows(7), {})
    again = Archive(tmp_path, {"a": 1})
    assert again.load() == {row["index"]: row for row in rows(4, 2, 7)}
    found = again.images([2, 4, 7])
    assert sorted(found) == [2, 4]
    assert torch.equal(found[4]["x_adv"], torch.full((1, 2, 2), 4.5))
    assert int(found[2]["label"]) == 2
    assert list(again.images([2])) == [2]


def test_another_identity_is_another_run(tmp_path: Path) -> None:
    Archive(tmp_path, {"weights": "a"}).append(rows(1), {})
    assert Archive(tmp_path, {"weights": "b"}).load() == {}
    assert list(Archive(tmp_path, {"weights": "a"}).load()) == [1]


def test_identity_stands_beside_the_records(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {"weights": "a", "data": "digits"})
    assert json.loads((archive.folder / "identity.rank0.json").read_text()) == {"weights": "a", "data": "digits"}


def test_ranks_write_apart_and_read_together(tmp_path: Path) -> None:
    for rank in (0, 1):
        Archive(tmp_path, {}, rank).append(rows(rank, rank + 2), tensors(rank, rank + 2))
    other = Archive(tmp_path, {}, 5)
    assert sorted(other.load()) == [0, 1, 2, 3]
    assert sorted(other.images(range(9))) == [0, 1, 2, 3]


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_line_cut_short_is_passed_over(tmp_path: Path, left: int) -> None:
    archive = Archive(tmp_path, {})
    archive.append(rows(1, 2, 3), {})
    text = lines(archive).read_text()
    begin = text.rindex("\n", 0, -1) + 1
    lines(archive).write_text(text[: begin + left])
    assert sorted(archive.load()) == [1, 2]


def test_lines_after_a_cut_one_are_read(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {})
    archive.append(rows(1, 2, 3), {})
    lines(archive).write_text(lines(archive).read_text()[:-30])
    again = Archive(tmp_path, {})
    again.append(rows(3), {})
    again.append(rows(4), {})
    assert sorted(Archive(tmp_path, {}).load()) == [1, 2, 3, 4]


def test_a_newer_record_stands_for_the_older(tmp_path: Path) -> None:
    """Other images under the same places: the last ones count, lines and images alike."""
    archive = Archive(tmp_path, {})
    archive.append(rows(1, 2), tensors(1, 2))
    newer = tensors(2)
    newer["x_adv"] = newer["x_adv"] + 3
    archive.append([{**rows(2)[0], "label": 9}], newer)
    assert [archive.load()[i]["label"] for i in (1, 2)] == [1, 9]
    found = archive.images([1, 2])
    assert [float(found[i]["x_adv"].mean()) for i in (1, 2)] == [1.5, 5.5]


def test_half_written_shards_are_not_seen(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {})
    archive.append(rows(1), tensors(1))
    (archive.folder / "rank0.5.part").write_bytes(b"half of a shard")
    assert sorted(archive.images([1, 5])) == [1]


def test_a_full_disk_at_a_shard_warns_once(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {})
    archive.append(rows(0), tensors(0))
    large = {"index": torch.tensor([1]), "x0": torch.zeros(1, 3, 40, 40), "x_adv": torch.zeros(1, 3, 40, 40)}
    with small_disk(4096):
        with pytest.warns(UserWarning, match="cannot write to .* it cannot be resumed; free the disk") as caught:
            archive.append(rows(1), large)
        archive.append(rows(2), tensors(2))
    assert len(caught) == 1
    assert list(archive.load()) == [0]
    assert sorted(archive.images([0, 1, 2])) == [0]


def test_a_full_disk_at_the_lines_warns_once(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {})
    archive.append(rows(0), {})
    with small_disk(2048):
        with pytest.warns(UserWarning, match="cannot be resumed") as caught:
            archive.append(rows(*range(1, 100)), {})
        archive.append(rows(100), {})
    assert len(caught) == 1
    assert 0 in archive.load()
    assert 100 not in archive.load()


def test_a_folder_that_cannot_be_made_warns_once(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(UserWarning, match="choose another dirpath"):
        archive = Archive(tmp_path / "taken", {})
    archive.append(rows(1), tensors(1))  # says no more
    assert archive.load() == {}
    assert archive.images([1]) == {}


def test_errors_that_are_no_disk_faults_are_raised(tmp_path: Path) -> None:
    archive = Archive(tmp_path, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        archive.append([{"index": 1, "label": object()}], {})


def test_hash_is_that_of_the_weights() -> None:
    assert weights_hash(Small(seed=1)) == weights_hash(Small(seed=1))
    changed = Small(seed=1)
    with torch.no_grad():
        changed.second[3, 15] += 1e-12
    assert weights_hash(changed) != weights_hash(Small(seed=1))
    assert weights_hash(Small(seed=1).float()) != weights_hash(Small(seed=1))


def test_hash_does_not_depend_on_mode_or_gradients() -> None:
    model = Small(seed=1)
    model(images(2)).sum().backward()
    assert weights_hash(model.eval()) == weights_hash(Small(seed=1))


def test_hash_knows_buffers_of_every_kind() -> None:
    class Buffered(nn.Module):
        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.register_buffer("value", value)

    values = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(True), torch.zeros(0), torch.ones(3).bfloat16()]
    assert len({weights_hash(Buffered(value)) for value in values}) == len(values)
    transposed = torch.arange(6.0).view(2, 3).T
    assert weights_hash(Buffered(transposed)) == weights_hash(Buffered(transposed.contiguous()))


def test_hash_knows_the_class() -> None:
    class Other(Small):
        pass

    assert weights_hash(Other()) != weights_hash(Small())


def test_hash_knows_settings_beside_weights() -> None:
    """A defence of another strength is another model, though its weights are the same."""
    assert weights_hash(Noisy(Small(), 4, noise=0.1)) != weights_hash(Noisy(Small(), 4, noise=0.9))
    assert weights_hash(nn.Sequential(Small(scale=1.0))) != weights_hash(nn.Sequential(Small(scale=2.0)))


@pytest.mark.parametrize(
    "attack",
    [
        PGD(ThreatModel("l2", "inf"), steps=3, step_size=0.1, decay=0.5, restarts=2, seed=4),
        PGD(ThreatModel(eps="4/255", levels=255), steps=5, loss=margin, estimator=Autograd(eot=2), random_start=False),
        NAttack(ThreatModel("l2", 0.5), steps=3, samples=10, space="pixel", schedule="mean", block=4, antithetic=True),
    ],
    ids=["unbounded", "grid", "nattack"],
)
def test_configuration_builds_an_equal_attack(attack: Attack) -> None:
    plain = json.loads(json.dumps(configuration(attack)))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Attack, "attack")
    built = parser.instantiate(parser.parse_object({"attack": plain})).attack
    assert type(built) is type(attack)
    assert built.threat == attack.threat
    assert built.access == attack.access
    assert configuration(built) == plain
    model = Small()
    x = images(3)
    one, other = (a(model.eval(), x, torch.tensor([0, 1, 2])) for a in (attack, built))
    assert torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(one.queries, other.queries)


def test_configuration_names_every_argument() -> None:
    plain = configuration(PGD(ThreatModel(eps=0.1), steps=7))
    assert plain["class_path"] == "lit_adv.attacks.pgd.PGD"
    assert plain["init_args"]["steps"] == 7
    assert plain["init_args"]["threat"]["init_args"]["eps"] == 0.1
    assert plain["init_args"]["loss"] == "lit_adv.losses.cross_entropy"


def test_configuration_is_plain_data() -> None:
    found = configuration({"path": Path("a/b"), "inf": float("inf"), "pair": (1, None), 3: True})
    assert json.loads(json.dumps(found)) == {"path": "a/b", "inf": "inf", "pair": [1, None], "3": True}


def test_configuration_tells_functions_apart() -> None:
    """A function with arguments bound is known by the function and by the arguments."""
    found = [partial(margin, reject=1), partial(margin, reject=2), partial(torch.add, alpha=1)]
    texts = {json.dumps(configuration(function), sort_keys=True, default=str) for function in found}
    assert len(texts) == len(found)

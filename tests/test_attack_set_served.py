"""What an attack set's folder serves: the same for any number of processes, and nothing of other data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attacked_digits import files, make, read

from lit_adv.datamodules import Digits


def test_three_processes_in_any_order_serve_what_one_does(tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    for wanted in (6, 15, 4):  # grows, and does not shrink
        make(one, 80, wanted=wanted)
        for rank in (1, 2, 0):
            make(three, 80, wanted=wanted, rank=rank, world=3)
        served, expected = read(three), read(one)
        assert expected["success"].sum() >= wanted
        assert all(torch.equal(served[name], value) for name, value in expected.items())
    assert len(files(three)) > len(files(one))
    assert json.loads((three / "wanted.json").read_text()) == {"wanted": 15}
    for folder in (one, three):
        make(folder, 80)  # all of them
    assert all(torch.equal(read(three)[name], value) for name, value in read(one).items())
    assert not (three / "wanted.json").exists()
    make(one, 80, wanted=3)
    assert int(read(one)["success"].sum()) > 20  # all were asked for once


def test_folders_of_an_earlier_version_go_on(tmp_path: Path) -> None:
    """Their note does not know the data by all labels, and nothing stands there of what was wanted."""
    place, whole = tmp_path / "a", tmp_path / "whole"
    make(whole)
    make(place, 8)
    path = place / "attack_set.json"
    note = json.loads(path.read_text())
    del note["data"]["images"]
    path.write_text(json.dumps(note))
    make(place, wanted=1)
    make(place)
    assert files(place) == files(whole)
    assert not (place / "wanted.json").exists()
    with pytest.raises(ValueError, match="another data"):
        make(place, data=Digits(max_train=50))


def test_other_labels_or_a_longer_set_are_noticed(tmp_path: Path) -> None:
    class Changed(Digits):
        """The same name and first image, and all other labels another."""

        def dataset(self, split: Any) -> Any:
            found = copy.copy(super().dataset(split))
            found.labels = torch.cat([found.labels[:1], (found.labels[1:] + 1) % 10])
            return found

    make(tmp_path)
    with pytest.raises(ValueError, match=r"made with another data \(see"):
        make(tmp_path, data=Changed(max_train=100))

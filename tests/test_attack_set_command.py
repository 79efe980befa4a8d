"""The command line that makes adversarial images: a file of an attack stands for the attack in it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lit_adv.attack_set import arguments, main


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse renames what older versions of it need
def test_the_command_line_takes_a_file_of_an_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fgsm.yaml"
    attack = "{class_path: lit_adv.attacks.PGD, init_args: {threat: {norm: linf, eps: 0.2}}}"
    inside = f"{{name: fgsm, budget: 7, target: next, attack: {attack}}}"
    config.write_text(f"class_path: lit_adv.callbacks.AttackEvaluation\ninit_args: {inside}\n")
    words = (
        f"x --attack={config} --attack.threat.eps 0.3 --model lit_adv.models.DigitsNet --data Digits --target random "
        f"--images 60 --folder {tmp_path / 'set'}"
    )
    monkeypatch.setattr(sys, "argv", shlex.split(words))
    torch.manual_seed(1)
    main()
    made = capsys.readouterr().out
    assert " successes of " in made
    note = json.loads((tmp_path / "set" / "attack_set.json").read_text())
    assert note["attack"]["init_args"]["threat"]["init_args"]["eps"] == 0.3
    assert (note["budget"], note["target"]) == (7, "random")
    monkeypatch.setattr(sys, "argv", ["x", "--attack", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit, match=r"none\.yaml"):
        main()


def test_a_file_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("{class_path: A, init_args: {surrogate: smooth, attack: {class_path: B}}}")
    with pytest.raises(ValueError, match=r"x.yaml says surrogate, which an attack set does not take"):
        arguments(["--attack", str(config)])
    config.write_text("{name: [")
    with pytest.raises(ValueError, match=r"x.yaml is no YAML \(.*\): mend it"):
        arguments(["--attack", str(config)])
    config.write_text("{name: a}")
    with pytest.raises(ValueError, match=r"x.yaml holds no attack: give a file of configs/attack"):
        arguments(["--attack", str(config)])
    config.write_text("{class_path: lit_adv.attacks.PGD}")
    assert arguments(["--attack", str(config), "--images", "3"]) == ["--attack", str(config), "--images", "3"]
    assert arguments(["--attack", "PGD"]) == ["--attack", "PGD"]

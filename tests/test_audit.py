"""The audit's checks on made-up records and answers, each against figures worked out by hand."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_adv import checks
from lit_adv.audit import CHECKS, Audited, Finding, complete, judged, skipped
from lit_adv.metrics import Records
from lit_adv.outcome import RESTLESS, Outcome, Stage
from lit_adv.report import Report

N = 20


def records(
    broken: range | list[int],
    wrong: tuple[int, ...] = (),
    n: int = N,
    target: int = -1,
    lost: tuple[int, ...] = (),
    queries: int = 50,
) -> Records:
    """Records of n images: these broken, those wrong at first; ``lost`` claimed and not verified."""
    index = torch.arange(n)
    hit = torch.isin(index, torch.tensor(list(broken), dtype=torch.int64))
    claimed = hit | torch.isin(index, torch.tensor(lost, dtype=torch.int64))
    right = ~torch.isin(index, torch.tensor(wrong, dtype=torch.int64))
    return Records(
        index=index, label=index % 10, target=torch.full((n,), target), clean_correct=right, claimed=claimed,
        verified=hit, verified_any=hit, verified_mean=hit.double(), rounded=hit,
        distance=torch.where(hit, 0.1, math.inf), l2=right.double(), linf=right.double(), queries=queries * right,
        checks=right.long(), first_hit=torch.where(hit, 5, -1), iterations=right.long(),
    )  # fmt: skip


def outcome(name: str, rows: Records, access: str = "gradient", **others: Any) -> Outcome:
    values: dict[str, Any] = {"norm": "linf", "eps": 8 / 255, "budget": None, "draws": 1, "config": {}}
    return Outcome(name=name, records=rows, access=access, **{**values, **others})


def test_every_check_tells_what_a_warning_means_and_what_to_run_next() -> None:
    assert len(CHECKS) == 13
    for name, check in CHECKS.items():
        warning = str(judged(name, True, "said", 3, {}, 0.25))
        assert f"{check.title}: said (n 3, McNemar's p 0.250). " in warning
        assert f"Next: {check.next}" in warning
        assert check.means[1:] in warning
        assert str(judged(name, False, "said", 3, {})) == f"{check.title}: said (n 3)"
    with pytest.raises(ValueError, match=r"check must be one of black_box, .*, got 'luck'"):
        Finding("luck", "PASS", "")


def test_all_checks_are_reported_once_in_order_the_gravest_finding_first() -> None:
    given = [skipped("slope", "no"), judged("noise", False, "fine", 3, {}), judged("slope", True, "bad", 2, {})]
    given += [judged("noise", False, "again", 3, {}), skipped("noise", "no")]
    found = complete(given)
    assert [finding.check for finding in found] == list(CHECKS)
    by_name = {finding.check: finding for finding in found}
    assert (by_name["slope"].status, by_name["slope"].said) == ("WARN", "bad")
    assert (by_name["noise"].status, by_name["noise"].said) == ("PASS", "fine")
    assert by_name["gain"].status == "SKIP"
    assert "not probed" in by_name["gain"].said
    audit = Audited("net", "linf", 0.3, found)
    assert audit.counts == "1 PASS, 1 WARN, 11 SKIP"
    assert audit.summary == "audit: 1 PASS, 1 WARN, 11 SKIP (net, L∞ 0.3)"
    assert audit.warnings == [f"net, L∞ 0.3: {by_name['slope']}"]
    assert len(audit.lines) == 3  # one PASS, all that was not probed, the numbers


def black_box(*group: Outcome) -> Finding:
    return checks.black_box(list(group))


def test_black_box_attack_that_breaks_more_than_the_best_white_one() -> None:
    weak, strong = outcome("fgsm", records(range(1))), outcome("pgd", records(range(5)))
    found = black_box(weak, strong, outcome("square", records(range(4, 10)), "logits"))
    assert found.status == "WARN"
    assert found.figures == {"black_left": 14 / 20, "white_left": 15 / 20, "unique": 5 / 20}
    assert "square leaves 70.0 %, pgd 75.0 % of the same 20 images; black-box attacks alone broke 5 of 20" in found.said
    assert found.n == 20
    assert found.p == pytest.approx(2 * sum(math.comb(9, k) for k in range(5)) / 2**9)  # 4 against 5


def test_images_that_only_black_box_attacks_break_are_a_warning_though_each_breaks_less() -> None:
    white = outcome("pgd", records(range(10)))
    few = [outcome("nes", records([10, 11]), "probs"), outcome("square", records([0, 12]), "logits")]
    found = black_box(white, *few)
    assert found.status == "WARN"
    assert found.figures["unique"] == 3 / 20
    assert black_box(white, outcome("nes", records(range(10)), "probs")).status == "PASS"
    # one of 200 is less than 1 %
    many = black_box(outcome("pgd", records(range(150), n=200)), outcome("nes", records([199], n=200), "probs"))
    assert (many.status, many.figures["unique"]) == ("PASS", 1 / 200)


def test_what_cannot_be_compared_is_skipped() -> None:
    white, black = outcome("pgd", records(range(1))), outcome("nes", records(range(9)), "probs")
    assert "no black-box attack" in black_box(white).said
    assert "no white-box attack" in black_box(black).said
    assert black_box(outcome("pgd", records(range(1), target=3)), black).status == "SKIP"  # targets are harder
    assert black_box(white, outcome("nes", records([], n=0), "probs")).status == "SKIP"
    assert black_box(outcome("pgd", records(range(1), target=3)), outcome("n", records([2], target=3), "probs")).status


def test_a_black_box_stage_of_a_cascade_after_white_box_ones() -> None:
    def cascade(broken: int) -> Finding:
        stages = (Stage("apgd", "gradient", 500, 300), Stage("square", "logits", 200, broken))
        return black_box(outcome("standard", records(range(3)), stages=stages))

    assert (cascade(2).status, cascade(3).status) == ("PASS", "WARN")
    assert cascade(3).figures == {"late": 3 / 200}
    assert "square broke 3 of 200 images that apgd had left" in cascade(3).said
    first = (Stage("square", "logits", 200, 50), Stage("apgd", "gradient", 150, 100))
    assert black_box(outcome("standard", records(range(3)), stages=first)).status == "SKIP"


def test_robust_accuracy_above_clean_accuracy() -> None:
    sound = [outcome("pgd", records(range(4), (18, 19))), outcome("nes", records([], (18, 19)), "probs")]
    found = checks.above_clean(sound)
    assert (found.status, found.n, found.figures) == ("PASS", 20, {"clean": 0.9, "robust": 0.9})
    odd = [outcome("pgd", records(range(4), (16, 17, 18, 19))), outcome("nes", records([], (18, 19)), "probs")]
    found = checks.above_clean(odd)
    assert (found.status, found.figures) == ("WARN", {"clean": 0.8, "robust": 0.9})
    assert checks.above_clean([outcome("pgd", records([], n=0))]).status == "SKIP"


def test_claims_that_fail_verification() -> None:
    fine, lost = outcome("pgd", records(range(9))), outcome("n", records(range(9), lost=(12,)), "probs")
    assert (checks.unverified([fine]).status, checks.unverified([fine]).n) == ("PASS", 9)
    found = checks.unverified([fine, lost])
    assert (found.status, found.n, found.figures) == ("WARN", 19, {"pgd": 0.0, "n": 0.1})
    assert "n 1 of 10" in found.said
    # a random model may lose one of 20, and not two
    once = outcome("pgd", records(range(19), lost=(19,)), draws=30, stochastic=True)
    twice = outcome("pgd", records(range(18), lost=(18, 19)), draws=30, stochastic=True)
    assert (checks.unverified([once]).status, checks.unverified([twice]).status) == ("PASS", "WARN")
    assert checks.unverified([outcome("pgd", records([]))]).status == "SKIP"


def test_records_alone_tell_four_checks() -> None:
    found = {f.check: f.status for f in checks.of_records([outcome("pgd", records(range(2)))])}
    assert found == {"black_box": "SKIP", "above_clean": "PASS", "unverified": "PASS", "null": "SKIP"}
    restless = outcome("pgd", records(range(2)), counts={RESTLESS: (1, 1)})
    found = {f.check: f.status for f in checks.of_records([restless])}
    assert found == {"black_box": "SKIP", "above_clean": "PASS", "unverified": "PASS", "repeats": "WARN"}


def test_one_step_against_many() -> None:
    found = checks.single_step(records(range(4)), records(range(3, 6)), 50)
    assert (found.status, found.n, found.figures) == ("WARN", 20, {"one": 0.2, "many": 0.15})
    assert found.p == pytest.approx(2 * sum(math.comb(5, k) for k in range(3)) / 2**5)  # 3 against 2: 1
    assert checks.single_step(records(range(4)), records(range(4)), 50).status == "PASS"
    assert checks.single_step(records([]), records([]), 50).status == "SKIP"


def test_success_that_falls_as_the_radius_grows() -> None:
    grows = [(0.1, records(range(2))), (0.2, records(range(5))), (0.4, records(range(9)))]
    found = checks.growth(grows)
    assert (found.status, found.figures) == ("PASS", {"0.1": 0.1, "0.2": 0.25, "0.4": 0.45})
    found = checks.growth([*grows[:2], (0.4, records(range(4, 8)))])
    assert found.status == "WARN"
    assert found.p == pytest.approx(2 * sum(math.comb(7, k) for k in range(4)) / 2**7)  # 4 against 3
    assert checks.growth([(0.1, records([])), (0.2, records([]))]).status == "SKIP"


def test_eps_one_half_must_break_everything() -> None:
    assert checks.everything(records(range(98), n=100), 50).status == "PASS"
    found = checks.everything(records(range(97), (98, 99), n=100), 50)
    assert (found.status, found.figures["broken"], found.n) == ("PASS", 97 / 98, 98)
    assert checks.everything(records(range(97), n=100), 50).status == "WARN"


def test_white_box_attacks_without_a_radius_must_break_everything() -> None:
    def found(*attacks: Outcome) -> list[Finding]:
        return [f for f in checks.of_records(attacks) if f.check == "everything"]

    assert not found(outcome("pgd", records(range(2))))
    assert not found(outcome("boundary", records(range(2)), "label", eps=math.inf))
    every, few = records(range(20)), records(range(19))
    (whole,) = found(outcome("ddn", every, eps=math.inf))
    assert (whole.status, whole.n, whole.figures) == ("PASS", 20, {"ddn": 1.0})
    (partly,) = found(outcome("ddn", every, eps=math.inf), outcome("cw", few, eps=math.inf))
    assert (partly.status, partly.figures) == ("WARN", {"ddn": 1.0, "cw": 0.95})


def test_gradients_that_lead_nowhere() -> None:
    size = torch.ones(40)
    size[0], size[1] = 0.0, math.nan
    found = checks.blind({"margin": size, "cross-entropy": torch.ones(40)})
    assert (found.status, found.figures) == ("PASS", {"margin": 0.05, "cross-entropy": 0.0})
    size[2] = math.inf
    found = checks.blind({"cross-entropy": torch.ones(40), "margin": size})
    assert (found.status, found.figures["margin"], found.n) == ("WARN", 3 / 40, 40)
    assert "margin: exactly 0 for 1, not finite for 2" in found.said


def gain(short: int, long: int, again: int, reported: int | None, seen: int = 100) -> Finding:
    first, more, anew = (records(range(count), n=100) for count in (short, long, again))
    told = None if reported is None else (torch.arange(seen), torch.arange(seen) < reported)
    return checks.gain(first, more, anew, (10, 50), 5, told)


def test_what_more_steps_and_restarts_gain() -> None:
    assert gain(50, 52, 52, None).status == "PASS"
    found = gain(50, 53, 51, None)
    assert (found.status, found.n) == ("WARN", 100)
    assert found.figures == pytest.approx({"steps": 0.03, "restarts": 0.01, "missed": None})
    assert found.p == pytest.approx(0.25)  # 3 against 0
    assert gain(50, 50, 53, None).status == "WARN"


def test_a_report_that_breaks_all_the_same_has_nothing_to_gain() -> None:
    assert gain(50, 60, 55, 60).status == "PASS"
    found = gain(50, 60, 55, 59)
    assert (found.status, found.figures["missed"]) == ("WARN", 0.01)
    assert gain(50, 60, 55, 55, seen=55).status == "WARN"  # of five more broken images nothing is known
    found = gain(50, 50, 50, 47)  # the report is weaker than ten steps
    assert (found.status, found.figures["missed"]) == ("WARN", 0.03)
    assert gain(50, 50, 50, 48).status == "PASS"


def test_answers_that_differ_when_asked_again() -> None:
    first = torch.tensor([[10.0, 0.0], [0.0, -20.0]])
    other = first.clone()
    other[0, 1] = 0.02
    assert checks.repeats(first, first).status == "PASS"
    assert checks.repeats(first, other).status == "PASS"  # exactly 1e-3 of 20, up to rounding below
    other[0, 1] = 12.0
    found = checks.repeats(first, other)
    assert (found.status, found.figures) == ("WARN", {"difference": 0.6, "labels": 0.5})
    labels = torch.tensor([1, 2, 3, 4])
    assert checks.repeats(labels, labels).status == "PASS"
    found = checks.repeats(labels, torch.tensor([1, 2, 3, 5]))
    assert (found.status, found.figures) == ("WARN", {"labels": 0.25})
    nan = torch.tensor([[math.nan, 1.0]])
    assert checks.relative(nan, nan) == 0
    assert checks.relative(nan, torch.ones(1, 2)) == math.inf


def test_a_surrogate_of_other_value() -> None:
    deployed = torch.tensor([[4.0, -1.0], [2.0, 3.0]])
    assert checks.surrogate(deployed + 1e-3, deployed).status == "PASS"
    found = checks.surrogate(deployed * 1.5, deployed)
    assert (found.status, found.figures) == ("WARN", {"difference": 0.5})


def test_noise_that_beats_a_gradient() -> None:
    one, many = records(range(6)), records(range(9))
    assert checks.noise(records(range(6)), one, many, 10).status == "PASS"
    found = checks.noise(records(range(5, 12)), one, many, 10)
    assert (found.status, found.figures) == ("WARN", {"noise": 0.35, "one": 0.3, "many": 0.45})
    assert found.p == pytest.approx(2 * sum(math.comb(11, k) for k in range(6)) / 2**11)  # 6 against 5
    assert checks.noise(records(range(8)), records(range(9)), records(range(7)), 10).status == "WARN"
    assert checks.noise(records([]), records([]), records([]), 10).status == "SKIP"


def test_the_null_control_stands_beside_each_attack() -> None:
    first, confirmed = torch.tensor([3, 0, 50, 200]), torch.tensor([34, 0, 0, 0])
    cheap, dear = (
        outcome(name, records(range(4), (18, 19), queries=queries), draws=30, stochastic=True)
        for name, queries in (("cheap", 10), ("dear", 100_000))
    )
    found = checks.null(first, confirmed, [cheap, dear], 1000)
    share = 4 / 18
    assert found.figures == {
        "cheap: success": share, "cheap: null": 0.25, "cheap: null, confirmed": 0.0,
        "dear: success": share, "dear: null": 0.75, "dear: null, confirmed": 0.25,
    }  # fmt: skip
    assert (found.status, found.n) == ("WARN", 4)
    assert "cheap 22.2 %, nothing at all 25.0 % at first hit and 0.0 % confirmed in 10 queries" in found.said
    assert "in 1,000 queries" in found.said
    never = torch.zeros(50, dtype=torch.int64)
    assert checks.null(never, never, [cheap], 1000).status == "PASS"
    never[0] = 7  # one of 50 is just 2 %
    assert checks.null(never, never, [cheap], 1000).status == "PASS"


@pytest.mark.parametrize(
    ("quotients", "status"),
    [
        ({0.1: [1.0, 1.0, 1.0], 0.5: [0.9, 1.1, 1.0]}, "PASS"),
        ({0.1: [0.0, 0.0, 0.0], 0.5: [0.3, 0.2, 0.5]}, "PASS"),  # a staircase
        ({0.1: [1e12, 1e12, 1e12], 0.5: [1e12, 9e11, 1e12]}, "WARN"),  # a gradient scaled down
        ({0.1: [1e-6, 1e-6, 1.0], 0.5: [1e-6, 1e-6, 1.0]}, "WARN"),
        ({0.1: [-1.0, -1.0, 1.0], 0.5: [-1.0, -1.0, -1.0]}, "WARN"),  # of the wrong sign
        ({0.1: [math.inf, 1.0, math.inf], 0.5: [math.inf, math.inf, 1.0]}, "WARN"),
        ({0.1: [math.inf, 10.0, 0.0], 0.5: [11.0, 11.0, 11.0]}, "PASS"),
    ],
)
def test_values_follow_the_gradient_over_some_step(quotients: dict[float, list[float]], status: str) -> None:
    found = checks.slope({length: Tensor(values) for length, values in quotients.items()})
    assert found.status == status
    assert found.n == 3


def test_the_median_of_an_even_number_is_that_between_the_two() -> None:
    found = checks.slope({0.1: Tensor([1.0, 2.0, 4.0, 8.0])})
    assert found.figures == {"0.1": 3.0}


def test_a_report_joins_probes_and_records() -> None:
    probe = judged("slope", True, "too steep", 7, {"0.1": math.inf})
    probed = [Audited(None, "linf", 8 / 255, (probe,)), Audited("other", "linf", 8 / 255, (skipped("slope", "no"),))]
    black = outcome("nes", records(range(9)), "probs")
    report = Report([outcome("pgd", records(range(2))), black], "net", "digits", probed=probed)
    (audit,) = report.audits
    status = {finding.check: finding.status for finding in audit.findings}
    assert (status["slope"], status["black_box"], status["unverified"], status["gain"]) == (
        "WARN",
        "WARN",
        "PASS",
        "SKIP",
    )
    assert len(report.warnings()) == 2
    (told,) = report.as_dict()["audit"]
    assert [finding["check"] for finding in told["findings"]] == list(CHECKS)
    assert told["findings"][-1]["figures"] == {"0.1": None}  # strict JSON knows no infinity
    assert "WARNING: net, L∞ 8/255: values follow the gradient: too steep (n 7). " in str(report)
    assert "audit: 2 PASS, 2 WARN, 9 SKIP (net, L∞ 8/255)" in report.markdown()


def test_the_terminal_gets_warnings_and_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    Report([outcome("pgd", records(range(2), lost=(7,)))], "net", "digits").show()
    told = capsys.readouterr().out
    assert "WARNING: net, L∞ 8/255: claims that hold" in told
    assert "audit: 1 PASS, 1 WARN, 11 SKIP (net, L∞ 8/255)" in told
    assert "PASS net" not in told


def test_the_page_says_each_finding_in_words(tmp_path: Any) -> None:
    text = Report([outcome("pgd", records(range(2), lost=(7,)))], "net", "digits").write(tmp_path)["html"].read_text()
    assert "Can this be believed?" in text
    for check in CHECKS.values():
        assert f'<th scope="row">{html.escape(check.title).replace("&#x27;", "&#39;")}</th>' in text
    assert text.count('<span class="status">WARN</span>') == 1
    assert text.count('<span class="status">SKIP</span>') == 11


def test_of_many_paired_tests_only_telling_ones_are_printed() -> None:
    attacks = [outcome(f"a{number}", records(range(number % 2 * 12))) for number in range(6)]
    report = Report(attacks, "net", "digits")
    assert len(report.comparisons()) == len(report.as_dict()["comparisons"]) == 15
    lines = [line for line in report.markdown().splitlines() if "McNemar's p" in line and "against" in line]
    assert len(lines) == 9  # three strong ones against three weak ones
    assert lines[0] == "* a0 against a1: McNemar's p < 0.001 (n 20)"
    assert "6 further paired tests have p >= 0.05: report.json" in report.markdown()
    few = Report(attacks[:3], "net", "digits")
    assert "a0 against a2: McNemar's p 1.000 (n 20)" in str(few)
    assert "further paired tests" not in str(few)


def test_without_a_radius_the_nearer_attack_is_the_stronger() -> None:
    rows = records(range(20))
    far = replace(rows, distance=torch.full((20,), 2.0, dtype=torch.float64))
    found = black_box(outcome("ddn", far, eps=math.inf), outcome("hsj", rows, "label", eps=math.inf))
    assert (found.status, found.figures["unique"], found.n) == ("WARN", 1.0, 20)
    assert found.said.endswith("(within 0.1, the median distance of the nearest)")
    assert black_box(outcome("ddn", rows, eps=math.inf), outcome("hsj", far, "label", eps=math.inf)).status == "PASS"


def test_targeted_attacks_without_a_radius_need_not_break_everything() -> None:
    attack = outcome("ddn", records(range(2), target=3), eps=math.inf)
    assert not [f for f in checks.of_records([attack]) if f.check == "everything"]

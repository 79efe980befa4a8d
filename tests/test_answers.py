"""What counts as an answer of a classifier, and the mode it is asked in."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Linear, Small, images
from torch import Tensor, nn

from lit_adv.answers import check_answer, evaluating


def test_modes_of_all_submodules_are_restored_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    with evaluating(model) as was_training:
        assert was_training
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_a_model_in_eval_mode_is_told_as_such() -> None:
    with evaluating(Small().eval()) as was_training:
        assert not was_training


@pytest.mark.parametrize("answer", [None, (torch.zeros(2, 3),), {"logits": torch.zeros(2, 3)}])
def test_what_is_no_tensor_is_refused(answer: object) -> None:
    with pytest.raises(TypeError, match="Small must return a tensor of logits"):
        check_answer(answer, 2, "logits", Small())


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 1), (2, 4, 1), (4,)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Small must return logits \(2, K >= 2\)"):
        check_answer(torch.zeros(shape), 2, "logits", Small())


def test_probabilities_are_recognised() -> None:
    logits = Linear()(images(20))
    with pytest.raises(ValueError, match="returns probabilities"):
        check_answer(logits.softmax(1), 20, "logits", Linear())
    check_answer(logits.softmax(1), 20, "probs", Linear())
    check_answer(logits, 20, "logits", Linear())
    check_answer(logits.log_softmax(1), 20, "logits", Linear())
    check_answer(logits.log_softmax(1), 20, "log_probs", Linear())


def test_a_log_softmax_over_sure_probabilities_is_recognised() -> None:
    logits = 30 * Linear(10)(images(20))
    with pytest.raises(ValueError, match="normalises its answers twice"):
        check_answer(logits.softmax(1).log_softmax(1), 20, "logits", Linear())


@pytest.mark.parametrize("scores", [[0.4, 0.0], [0.2, -0.1, -0.1], [0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
def test_unsure_log_softmax_is_accepted(scores: list[float]) -> None:
    check_answer(torch.tensor([scores, scores[::-1]]).log_softmax(1), 2, "logits", Linear())


def test_labels_must_be_labels() -> None:
    check_answer(torch.tensor([1, 2]), 2, "labels", Linear())
    check_answer(torch.tensor([[1], [2]]), 2, "labels", Linear())
    for wrong in (torch.zeros(2, 3), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="label"):
            check_answer(wrong, 2, "labels", Linear())


@pytest.mark.parametrize("output", ["logits", "probs", "log_probs", "labels"])
def test_no_images_are_no_error(output: str) -> None:
    answer: Tensor = torch.zeros(0, dtype=torch.int64) if output == "labels" else torch.zeros(0, 3)
    check_answer(answer, 0, output, Linear())  # type: ignore[arg-type]

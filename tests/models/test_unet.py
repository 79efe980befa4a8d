"""The encoder-decoder: sizes, bounds, and that an untrained one is no constant."""

import pytest
import torch

from lit_adv.models import UNet


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (8, 8), (28, 28), (32, 32)])
def test_answers_have_the_images_size(size: tuple[int, int]) -> None:
    model = UNet(3, 2, widths=(4, 6, 8))
    assert model(torch.rand(2, 3, *size)).shape == (2, 2, *size)
    assert model(torch.rand(0, 3, *size)).shape == (0, 2, *size)


def test_answers_have_the_size_asked_for() -> None:
    model = UNet(3, widths=(4, 6, 8), out_size=32)
    for side in (20, 32, 64):
        assert model(torch.rand(1, 3, side, side + 3)).shape == (1, 3, 32, 32)
    x = torch.rand(2, 3, 32, 32)
    plain = UNet(3, widths=(4, 6, 8))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))


def test_levels_halve_the_size() -> None:
    model = UNet(1, widths=(4, 6, 8))
    seen: list[tuple[int, ...]] = []
    for stage in model.down:
        stage.register_forward_hook(lambda module, given, answer: seen.append(tuple(answer.shape)))
    model(torch.rand(2, 1, 28, 28))
    assert seen == [(2, 4, 28, 28), (2, 6, 14, 14), (2, 8, 7, 7)]


@pytest.mark.parametrize("normalize", [True, False])
def test_an_untrained_one_is_no_constant_and_all_weights_get_gradient(normalize: bool) -> None:
    model = UNet(1, normalize=normalize).double()
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    answer = model(x)
    assert answer.flatten(1).std(1).min() > 1e-3
    assert answer.std(0).mean() > 1e-3
    assert answer.min() < 0 < answer.max() or answer.abs().max() < 1
    (answer**2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if normalize and name.endswith("0.bias"):
            continue  # of a convolution before a normalisation by groups, which may take all of it away
        assert (parameter.grad.abs() > 0).any(), name


def test_the_answer_is_not_bounded() -> None:
    model = UNet(1, widths=(4, 6))
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        for parameter in model.last.parameters():
            parameter.mul_(1000)
        torch.testing.assert_close(model(x), 1000 * before)


def test_rows_do_not_see_one_another_in_training_either() -> None:
    model = UNet(1, widths=(8, 16, 32)).double().train()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.eval()(x), alone, rtol=1e-10, atol=1e-12)


def test_a_grey_image_gives_finite_answers_and_gradients() -> None:
    model = UNet(1, widths=(4, 6))
    for value in (0.0, 0.5, 1.0):
        model.zero_grad()
        answer = model(torch.full((2, 1, 4, 4), value))
        answer.sum().backward()
        assert answer.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_a_blur() -> None:
    model = UNet(1, widths=(8, 16))
    x = torch.rand(64, 1, 8, 8)
    wanted = 3 * (torch.nn.functional.avg_pool2d(x, 3, 1, 1) - 0.4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * wanted.var()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"in_channels": 0}, "in_channels must hold positive whole numbers only, got 0"),
        ({"widths": (4, 0)}, "widths must hold positive whole numbers only"),
        ({"out_size": 3}, "out_size must be at least 4, got 3"),
    ],
)
def test_bad_sizes_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UNet(**given)  # type: ignore[arg-type]


def test_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides of at least 4 pixels, got \(1, 1, 3, 8\)"):
        UNet()(torch.rand(1, 1, 3, 8))
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, H, W\), got \(1, 3, 8, 8\)"):
        UNet()(torch.rand(1, 3, 8, 8))

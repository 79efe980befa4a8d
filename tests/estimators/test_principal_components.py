"""Principal components against scikit-learn's, and their number against the rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contracts.nets import images
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from lit_adv.estimators import PrincipalComponents
from lit_adv.estimators.finite_difference import principal_components

SHAPE = (3, 8, 8)
SIZE = 192


@pytest.mark.parametrize(("count", "most"), [(400, SIZE), (50, 40)])
def test_components_are_those_of_the_textbook(count: int, most: int) -> None:
    x = images(count, 6) * torch.linspace(0.2, 1.0, SIZE, dtype=torch.float64).view(SHAPE)
    mean, components, variance = principal_components(x, most)
    theirs = PCA(most, svd_solver="full").fit(x.flatten(1).numpy())
    torch.testing.assert_close(mean.double().flatten(), torch.from_numpy(theirs.mean_), rtol=1e-6, atol=1e-6)
    scale = (count - 1) / count
    torch.testing.assert_close(variance, torch.from_numpy(theirs.explained_variance_) * scale)
    overlap = (components.flatten(1) * torch.from_numpy(theirs.components_)).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones(most, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (components.flatten(1).amax(1) >= -components.flatten(1).amin(1)).all()


@pytest.mark.parametrize(("count", "rank"), [(10, 9), (1, 0)])
def test_more_components_than_the_rank_are_refused(count: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"at most the rank of the training images, {rank}, got 10"):
        PrincipalComponents(10).fit(images(count))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="at least 3 components"):
        PrincipalComponents(3, path)
    save_file({"components": torch.zeros(2, *SHAPE)}, path)
    with pytest.raises(ValueError, match=r"at least 3 components \(k, C, H, W\), got a tensor \(2, 3, 8, 8\)"):
        PrincipalComponents(3, path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match="path must be a safetensors file"):
        PrincipalComponents(3, path)

"""LID: of how many dimensions the clean images around an image seem to be, as the classifier's layers see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_adv.detector import Images
from lit_adv.features import features, features_of_many
from lit_adv.layerwise import Layerwise

NEIGHBOURS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
LARGEST = 1000.0
"""The dimension of an image all of whose neighbours are equally far, for which the estimate has no bound."""
_ITSELF = 1e-5  # of the farthest distance: an image among its own neighbours, computed in another batch


class LocalIntrinsicDimension(Layerwise):
    """Each layer's score is the local intrinsic dimension, estimated from the distances to the nearest clean images.

    The published code compares an image with the minibatch it comes in. Here the clean images to compare with are a
    fixed set of training images, so that a score does not depend on the batch; none of them is the clean image of a
    pair. Features are the spatial means of a layer's maps, the paper's are the maps themselves.

    Differentiable in the image.

    Args:
        classifier: the network it protects.
        neighbours: numbers of neighbours that are tried, at least 2; those that leave no image over are passed by.
        references: number of clean training images to compare with.
        layers, noisy: see :class:`~lit_adv.layerwise.Layerwise`. seed: of the noisy images.

    Raises:
        ValueError: an argument out of its range; asked before it was fitted; when fitted, see ``fit``, or fewer
            training images beside the pairs' than the fewest neighbours need.
    References:
        Ma et al. 2018, "Characterizing Adversarial Subspaces Using Local Intrinsic Dimensionality",
        https://arxiv.org/abs/1801.02613, equation (4) and algorithm 1.
    """

    def __init__(
        self,
        classifier: nn.Module,
        neighbours: Sequence[int] = NEIGHBOURS,
        references: int = 100,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        noisy: bool = True,
    ) -> None:
        if not neighbours or not all(isinstance(k, int) and k >= 2 for k in neighbours):
            raise ValueError(f"neighbours must hold whole numbers from 2, one at least, got {list(neighbours)}")
        if references <= min(neighbours):
            raise ValueError(
                f"references must be more than the fewest neighbours, {min(neighbours)}, got {references}: compare "
                "with more images"
            )
        super().__init__(classifier, neighbours, layers, seed, noisy)
        self.neighbours, self.references = tuple(neighbours), references
        for number in range(len(self.layers)):
            self.register_buffer(f"reference_{number}", torch.empty(0, 0, dtype=torch.float64))

    def learn(self, training: Images, clean: Tensor) -> None:
        """Features of the first training images that are in no pair."""
        paired = {_bytes(one) for one in clean}
        free = [place for place, one in enumerate(training.image.to(clean.dtype)) if _bytes(one) not in paired]
        chosen = free[: self.references]
        if len(chosen) <= min(self.neighbours):
            raise ValueError(
                f"training must hold more than {min(self.neighbours)} images that are in no pair, got {len(chosen)}: "
                "give more training images"
            )
        self.settings = tuple(k for k in self.neighbours if k < len(chosen))
        image = training.image[torch.tensor(chosen, device=training.image.device)]
        for number, h in enumerate(features_of_many(self.network, self.layers, image)):
            setattr(self, f"reference_{number}", h)

    def layer_scores(self, x: Tensor, settings: Sequence[float]) -> Tensor:
        layers = []
        for number, h in enumerate(features(self.network, self.layers, x)):
            reference = getattr(self, f"reference_{number}")
            # not by matrix products, which lose the small distances
            away = torch.cdist(h.to(reference.dtype), reference, compute_mode="donot_use_mm_for_euclid_dist")
            layers.append(intrinsic_dimension(away, [int(k) for k in settings]))
        return torch.stack(layers, 2)


def intrinsic_dimension(distances: Tensor, neighbours: Sequence[int]) -> Tensor:
    """Maximum-likelihood estimates of the local intrinsic dimension from distances (n, m), (n, len(neighbours)).

    ``-1 / mean of log(r_i / r_k)`` over the k nearest. Points at no distance are the image itself, or cannot be told
    from it: they are left out, and k counts the others, as far as there are as many. At most :data:`LARGEST`; 0 where
    no other point is left.

    Raises:
        ValueError: fewer points than neighbours.
    References:
        Ma et al. 2018, https://arxiv.org/abs/1801.02613, equation (4).
    """
    if distances.shape[1] < max(neighbours):
        raise ValueError(f"distances to {distances.shape[1]} points are too few for {max(neighbours)} neighbours")
    r = distances.sort(1).values
    itself = (r <= _ITSELF * r[:, -1:]).sum(1, keepdim=True)
    place = torch.arange(r.shape[1], device=r.device) + itself  # of the neighbours in order, the image itself left out
    there = place < r.shape[1]
    log = r.gather(1, place.clamp_max(r.shape[1] - 1)).clamp_min(1e-300).log()
    found = []
    for k in neighbours:
        count = there[:, :k].sum(1)
        farthest = log.gather(1, (count - 1).clamp_min(0)[:, None])
        total = ((farthest - log[:, :k]) * there[:, :k]).sum(1)
        dimension = count / total.clamp_min(1e-300)
        found.append(torch.where(count > 0, dimension.clamp_max(LARGEST), 0.0))
    return torch.stack(found, 1)


def _bytes(image: Tensor) -> bytes:
    return image.detach().cpu().contiguous().numpy().tobytes()

"""Networks and images of the benchmarks: a small convolutional network, trained at first use, and Model A."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.datamodules import MNIST
from lit_adv.tasks import Checkpoint

EPOCHS, BATCH = 2, 128


class MnistSmall(nn.Module):
    """Two strided convolutions and two linear layers: 0.5 M multiply-adds for an image of 28 x 28 grey pixels.

    Small enough that what an attack does beside its forwards shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        logits: Tensor = self.layers(x)
        return logits


def mnist_small(cache: Path | None = None) -> nn.Module:
    """The small network, trained on MNIST for two epochs; kept in the user's cache folder."""
    path = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lit_adv" / "mnist_small.pt"
    net = MnistSmall()
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = MnistSmall()
            _train(net)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    return net.eval().requires_grad_(False)


def model_a(checkpoint: Path) -> nn.Module:
    """Model A, 45 M multiply-adds, from a checkpoint that training wrote."""
    return Checkpoint(checkpoint)


def right_images(net: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The first MNIST test images that the network classifies rightly, and their labels.

    Raises:
        ValueError: there are not so many.
    """
    batch = _images("test", 4 * count + 64)
    with torch.no_grad():
        right = torch.cat([net(part) for part in torch.split(batch[0], 64)]).argmax(1) == batch[1]
    if int(right.sum()) < count:
        raise ValueError(f"only {int(right.sum())} of {len(right)} test images are classified rightly, not {count}")
    return batch[0][right][:count].contiguous(), batch[1][right][:count]


def _images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    data = MNIST(val_split=0, batch_size=10_000, shuffle=False, max_test=count)
    data.prepare_data()
    data.setup("fit" if split == "train" else "test")
    batches = list(data.train_dataloader() if split == "train" else data.test_dataloader())
    return torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])


def _train(net: nn.Module) -> None:
    x, y = _images("train")
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(x)), BATCH):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

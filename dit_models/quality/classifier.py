"""The digit classifier behind the quality figures of the ``digits`` data set."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dit_models.data.digits import NUM_DIGITS, DigitDataset
from dit_models.quality.trained import load_or_train

DIGIT_IMAGE_SIZE = 16


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier is trained; part of the name of its cache file.

    Attributes:
        epochs: passes over the training half.
        batch_size: digits a step.
        learning_rate: peak of a one-cycle schedule of AdamW.
        noise_std: standard deviation of the noise added to training images in [-1, 1].
        max_shift: training images are moved by up to this many pixels along each axis.
        version: raise it when the network, the data or the training code changes.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 4e-3
    noise_std: float = 0.2
    max_shift: int = 1
    version: int = 1


class DigitClassifier(nn.Module):
    """Convolutional classifier of 16x16 digits with 64 features before its last layer."""

    feature_size = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, self.feature_size),
            nn.GELU(),
        )
        self.head = nn.Linear(self.feature_size, NUM_DIGITS)

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 16, 16) in [-1, 1] to (n, 64)."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 16, 16) in [-1, 1] to logits (n, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def digit_classifier(
    cache_dir: str | Path | None = None,
    seed: int = 0,
    settings: ClassifierSettings | None = None,
) -> tuple[DigitClassifier, float]:
    """The classifier, trained on the training half of the digits, on the CPU in eval mode.

    The same seed and settings give the same weights on one machine. No global random state is
    changed.

    Args:
        cache_dir: folder where it is kept; None trains it every time (a few seconds).
        seed: of initialisation, order and augmentation.
        settings: None is the default of ``ClassifierSettings``.

    Returns:
        The classifier and its accuracy on the held-out half, which it never saw.
    """
    settings = settings or ClassifierSettings()
    network, accuracies = load_or_train(
        DigitClassifier,
        lambda network: _train(network, settings),
        name="digit-classifier",
        settings=settings,
        seed=seed,
        cache_dir=cache_dir,
    )
    return network, accuracies["heldout"]


def shifted(images: Tensor, max_shift: int) -> Tensor:
    """Each image of (n, C, s, s) moved by up to ``max_shift`` pixels, its edge repeated."""
    count, _, _, size = images.shape
    padded = functional.pad(images, [max_shift] * 4, mode="replicate")
    offsets = torch.randint(2 * max_shift + 1, (2, count, 1))
    rows, columns = offsets + torch.arange(size)
    indices = torch.arange(count)[:, None, None]
    return padded.movedim(1, -1)[indices, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _train(network: DigitClassifier, settings: ClassifierSettings) -> dict[str, float]:
    """Train in place on the training half; accuracy on the held-out half."""
    data = DigitDataset("train", DIGIT_IMAGE_SIZE)
    steps_per_epoch = -(-len(data) // settings.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps_per_epoch
    )
    network.train()
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(data)).split(settings.batch_size):
            images = shifted(data.images[chosen], settings.max_shift)
            images = images + settings.noise_std * torch.randn_like(images)
            loss = functional.cross_entropy(network(images), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    heldout = DigitDataset("heldout", DIGIT_IMAGE_SIZE)
    with torch.no_grad():
        right = network(heldout.images).argmax(1) == heldout.labels
    return {"heldout": float(right.double().mean())}

"""What a training step draws at random, and what of it is whose."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_models.conditioned import ConditionedModel
from dit_models.config import TrainConfig
from dit_models.data import Batch, ImageDataset, LatentDataset
from dit_models.data.base import pad_rows
from dit_models.diffusion import DDPM, RectifiedFlow
from dit_models.masking import draw_kept_tokens
from dit_models.parallel.world import World
from dit_models.text import NULL_CAPTION, PretrainedText, TextFeatures


@dataclass(frozen=True)
class Draws:
    """A batch with all its randomness drawn, so that micro-batches are slices of it."""

    images: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor | None
    captions: list[str] | None
    text: TextFeatures | None = None  # instead of captions, where the data hold it encoded
    kept_tokens: Tensor | None = None  # (B, K) int64 of masked training

    def split(self, parts: int) -> list["Draws"]:
        """``parts`` micro-batches of equal size."""
        size = len(self.images) // parts
        return [self._part(slice(start, start + size)) for start in range(0, size * parts, size)]

    def _part(self, where: slice) -> "Draws":
        return Draws(
            self.images[where],
            self.noise[where],
            self.timesteps[where],
            None if self.labels is None else self.labels[where],
            None if self.captions is None else self.captions[where],
            None if self.text is None else self.text.part(where),
            None if self.kept_tokens is None else self.kept_tokens[where],
        )


class Randomness:
    """Draws noise, timesteps, dropped conditions and hidden tokens, in the order of the steps.

    Args:
        generator: on the CPU, so that a run draws the same numbers on every device.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ConditionedModel,
        objective: RectifiedFlow | DDPM,
        dataset: ImageDataset,
        world: World,
        generator: torch.Generator,
    ) -> None:
        self.generator = generator
        self._config = config
        self._model = model
        self._objective = objective
        self._dataset = dataset
        self._world = world

    def draw(self, batch: Batch) -> Draws:
        """Noise, timesteps and dropped conditions of this process's part of the batch.

        They are drawn for the whole batch, so that they do not depend on how it is divided.
        """
        images, count = batch.images.to(self._world.device), self._config.batch_size
        part = self._world.part_of(count)
        timesteps = self._objective.sample_timesteps(count, self.generator, self._world.device)[
            part
        ]
        shape = (count, *images.shape[1:])
        noise = torch.randn(shape, generator=self.generator)[part].to(self._world.device)
        dropped = torch.rand(count, generator=self.generator)[part] < self._config.condition_dropout
        labels = captions = text = None
        if self._model.backbone.config.num_classes:
            assert batch.labels is not None
            null_class = self._model.backbone.config.num_classes
            labels = torch.where(dropped, null_class, batch.labels).to(self._world.device)
        elif batch.text is not None and isinstance(self._model.text_encoder, PretrainedText):
            text = self._stored_text(batch, dropped)
        else:
            assert batch.captions is not None
            captions = [
                NULL_CAPTION if drop else caption
                for drop, caption in zip(dropped.tolist(), batch.captions, strict=True)
            ]
        return Draws(images, noise, timesteps, labels, captions, text)

    def _stored_text(self, batch: Batch, dropped: Tensor) -> TextFeatures:
        """Text features of the data, with those of the null caption where it is dropped."""
        assert isinstance(self._dataset, LatentDataset)
        assert self._dataset.null_text is not None
        assert batch.text is not None
        assert batch.text_mask is not None
        assert batch.captions is not None
        empty = torch.tensor([caption == NULL_CAPTION for caption in batch.captions])
        null, null_mask = pad_rows([self._dataset.null_text], batch.text.shape[1])
        features = torch.where(dropped[:, None, None], null, batch.text)
        mask = torch.where(dropped[:, None], null_mask, batch.text_mask)
        return TextFeatures(features, mask, dropped | empty).to(self._world.device)

    def masked(self, draws: Draws, step: int) -> Draws:
        """The draws with the tokens that this step keeps, where it hides any."""
        masking = self._config.masking
        if not masking.ratio or step >= masking.unmask_from * self._config.steps:
            return draws
        seq_len = self._model.backbone.config.seq_len
        count = self._config.batch_size
        kept = draw_kept_tokens(count, seq_len, masking.ratio, self.generator)
        return replace(draws, kept_tokens=kept[self._world.part_of(count)].to(self._world.device))

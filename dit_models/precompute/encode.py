"""One shard of samples through the VAE and the text encoder."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_models.data import ImageDataset, Sample
from dit_models.precompute.settings import Settings
from dit_models.text import DTYPES, NULL_CAPTION, FrozenEncoder
from dit_models.vae import VAE

# The two kinds of random stream of a sample: what its source draws, and the noise of its latent.
_SOURCE_STREAM, _NOISE_STREAM = 0, 1


class Encoder:
    """What a process needs to make shards.

    Args:
        settings: of the run.
        dataset: the source.
        vae, text: ``None`` stores pixels, or captions alone.
        device: where both run.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        vae: VAE | None,
        text: FrozenEncoder | None,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.vae = vae
        self.text = text
        self.device = device
        self.dtype = DTYPES[settings.dtype]

    def shard(
        self, indices: range, progress: Callable[[int], None]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Samples ``indices`` as the tensors of a shard.

        Args:
            indices: of the source.
            progress: called with the number of samples of each batch that is done.

        Returns:
            tensors by name (each with a row a sample, or ragged with offsets), and what was left
            out and why.

        Raises:
            ValueError: a sample that cannot be read (unless these are skipped), or a value that
                is not finite in the dtype that it is stored in.
        """
        images: dict[str, list[Tensor]] = {}
        samples: list[Sample] = []
        texts: list[Tensor] = []
        skipped: list[str] = []
        for start in range(indices.start, indices.stop, self.settings.batch_size):
            part = range(start, min(start + self.settings.batch_size, indices.stop))
            kept = self._read(part, skipped)
            if kept:
                batch = torch.stack([sample.image for _, sample in kept])
                for name, values in self._images([index for index, _ in kept], batch).items():
                    images.setdefault(name, []).append(self._checked(name, values, part))
                if self.text is not None:
                    captions = [sample.caption for _, sample in kept]
                    rows = self.text.encode(captions, self.device)
                    texts += [self._checked("text", row.cpu(), part) for row in rows]
                # The pixels are done with; a shard of them would not fit beside its latents.
                samples += [sample._replace(image=torch.empty(0)) for _, sample in kept]
            progress(len(part))
        tensors = {name: torch.cat(parts) for name, parts in images.items()}
        return tensors | self._conditions(samples, texts), skipped

    def null_text(self) -> Tensor:
        """Features (n, dim) of the null caption."""
        assert self.text is not None
        return self.text.encode([NULL_CAPTION], self.device)[0].cpu()

    def _read(self, part: range, skipped: list[str]) -> list[tuple[int, Sample]]:
        kept = []
        for index in part:
            rng = np.random.default_rng([self.settings.seed, _SOURCE_STREAM, index])
            try:
                kept.append((index, self.dataset.sample(index, rng)))
            except ValueError as error:
                if not self.settings.skip_broken:
                    raise ValueError(f"{error} (--skip-broken leaves such samples out)") from error
                skipped.append(f"{index}: {error}")
        return kept

    def _images(self, indices: list[int], batch: Tensor) -> dict[str, Tensor]:
        """Stored tensors of a batch of images, and of its mirror image where that is asked for."""
        out = self._encoded("images", indices, batch)
        if self.settings.flip:
            # The latent of a mirrored image is not the mirrored latent.
            out |= self._encoded("flipped", indices, batch.flip(-1))
        return out

    def _encoded(self, name: str, indices: list[int], batch: Tensor) -> dict[str, Tensor]:
        if self.vae is None:
            return {name: batch}
        mean, std = (values.cpu() for values in self.vae.encode(batch.to(self.device)))
        if self.settings.latents == "moments":
            return {name: mean, f"{name}_std": std}
        if self.settings.latents == "mean":
            return {name: mean}
        noise = [
            np.random.default_rng(
                [self.settings.seed, _NOISE_STREAM, index, name == "flipped"]
            ).standard_normal(mean.shape[1:], dtype=np.float32)
            for index in indices
        ]
        return {name: mean + std * torch.from_numpy(np.stack(noise))}

    def _checked(self, name: str, values: Tensor, part: range) -> Tensor:
        """The values as they are stored, refused where they do not survive it."""
        if name != "text":
            values = values.to(self.dtype)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{name} of samples {part.start} to {part.stop - 1} is not finite as "
                f"{str(values.dtype)[6:]}; store bf16 or fp32 (--dtype, --text-dtype, --vae-dtype)."
            )
        return values

    def _conditions(self, samples: list[Sample], texts: list[Tensor]) -> dict[str, Tensor]:
        info, out = self.dataset.info, {}
        if info.num_classes:
            out["labels"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        if info.has_captions:
            rows = [
                torch.tensor(list(sample.caption.encode()), dtype=torch.uint8) for sample in samples
            ]
            out |= _ragged("captions", rows)
        if self.text is not None and texts:
            out |= _ragged("text", texts)
        return out


def _ragged(name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths behind each other, and where each begins."""
    lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
    values = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.uint8)
    return {name: values, f"{name}_offsets": lengths.cumsum(0)}

"""The training loop: one object that knows a run's state and can stop and go on exactly."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_models.assemble import (
    autocast_for,
    build_conditioned_model,
    build_objective,
    pick_device,
    with_defaults,
)
from dit_models.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_training_state,
    load_weights,
    remove_unfinished,
    save_checkpoint,
    verify_checkpoint,
)
from dit_models.config import TrainConfig
from dit_models.config_io import differing_fields, fields_of
from dit_models.data import (
    Batch,
    BatchLoader,
    CaptionFolderDataset,
    ImageDataset,
    LatentDataset,
    build_dataset,
)
from dit_models.data.base import pad_rows
from dit_models.drawing import Artist
from dit_models.ema import EMA
from dit_models.masking import (
    check_masking,
    draw_kept_tokens,
    kept_pixels,
    reconstruction_loss,
)
from dit_models.optimization import build_optimizer, learning_rate, set_learning_rate
from dit_models.rng import get_rng_state, set_rng_state
from dit_models.router_losses import (
    check_accumulation,
    layer_head_losses,
    own_coefficients,
    router_losses,
    routing_telemetry,
)
from dit_models.routing.layers import set_progress, update_routers
from dit_models.run_folder import checkpoint_folder
from dit_models.text import NULL_CAPTION, ByteTextEncoder, PretrainedText, TextFeatures
from dit_models.vae import decoder_of, why_no_vae


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


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


class Trainer:
    """A run in memory.

    Args:
        config: a validated configuration.
        run_dir: the run's folder; checkpoints go to ``run_dir/checkpoints``.

    Attributes:
        step: optimizer steps done.
        train_seconds: time spent in steps, over all sessions of the run; kept by ``Stopwatch``.
        wall_seconds: time since the run began, over all sessions.
    """

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self.config = config = with_defaults(config)
        self.run_dir = run_dir
        self.device = pick_device(config.device)
        self.dataset = build_dataset(
            config.data.name,
            split=config.data.split,
            image_size=config.data.image_size,
            flip=config.data.flip,
        )
        self.info = self.dataset.info
        self.loader = BatchLoader(
            self.dataset, config.batch_size, config.seed, config.data.num_workers
        )
        torch.manual_seed(config.seed)
        self.model = build_conditioned_model(config, self.info, self.device)
        if isinstance(self.model.text_encoder, ByteTextEncoder):
            _check_caption_lengths(self.dataset, self.model.text_encoder.max_length)
        check_masking(config.masking, self.model.backbone.config)
        check_accumulation(config.accumulate, self.model.backbone.config)
        self._own_losses = own_coefficients(config.router_loss, self.model.backbone.config)
        self.model.backbone.gradient_checkpointing = config.gradient_checkpointing
        self.objective = build_objective(config.objective)
        self.optimizer = build_optimizer(self.model.parameters(), config.optimizer)
        self.ema = EMA(self.model, config.ema_decay)
        # On the CPU, so that a run draws the same numbers on every device and can change device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.train_seconds = 0.0
        self._earlier_wall_seconds = 0.0
        self._started = time.perf_counter()
        if config.compile:
            self.model.backbone.compile()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    @property
    def wall_seconds(self) -> float:
        """Time since the run began, over all sessions."""
        return self._earlier_wall_seconds + time.perf_counter() - self._started

    def artist(self) -> Artist:
        """The averaged model, ready to draw from."""
        return Artist(
            self.ema.model,
            self.objective,
            self.config.sampling,
            (self.info.channels, self.info.image_size, self.info.image_size),
            self.device,
            partial(autocast_for, self.config.precision, self.device),
            decoder_of(self.info.vae, self.config.data.vae, self.device),
        )

    @cached_property
    def why_no_samples(self) -> str | None:
        """Why this run cannot draw images here, although it can train; ``None`` when it can."""
        if reason := why_no_vae(self.info.vae, self.config.data.vae):
            return reason
        encoder = self.model.text_encoder
        return encoder.frozen.why_missing() if isinstance(encoder, PretrainedText) else None

    def train_step(self, with_routing: bool = True) -> dict[str, float | Tensor]:
        """Do one optimizer step.

        Args:
            with_routing: also return the routing statistics of every MoE layer.

        Returns:
            Values for the log; tensors are still on the device, so that a step does not wait.
        """
        self.model.train()
        progress = self.step / self.config.steps
        set_progress(self.model.backbone, progress)
        draws = self._masked(self._draw(next(self.loader)))
        micro_batches = draws.split(self.config.accumulate)
        counts = self._count_tokens_per_expert(micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        observed = []
        for micro_batch in micro_batches:
            losses, seen = self._losses(micro_batch, counts, with_routing)
            observed.append(seen)
            (losses["loss"] / len(micro_batches)).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        set_learning_rate(self.optimizer, rate)
        limit = self.config.optimizer.clip_norm or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        update_routers(self.model.backbone, observed)
        self.step += 1
        self.ema.update(self.model, self.step)
        set_progress(self.ema.model.backbone, progress)
        return {**totals, "grad_norm": grad_norm.detach(), "lr": rate}

    def _draw(self, batch: Batch) -> Draws:
        """Noise, timesteps and dropped conditions for the whole batch."""
        images, count = batch.images.to(self.device), len(batch.images)
        timesteps = self.objective.sample_timesteps(count, self.generator, self.device)
        noise = torch.randn(images.shape, generator=self.generator).to(self.device)
        dropped = torch.rand(count, generator=self.generator) < self.config.condition_dropout
        labels = captions = text = None
        if self.model.backbone.config.num_classes:
            assert batch.labels is not None
            null_class = self.model.backbone.config.num_classes
            labels = torch.where(dropped, null_class, batch.labels).to(self.device)
        elif batch.text is not None and isinstance(self.model.text_encoder, PretrainedText):
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
        assert isinstance(self.dataset, LatentDataset)
        assert self.dataset.null_text is not None
        assert batch.text is not None
        assert batch.text_mask is not None
        assert batch.captions is not None
        empty = torch.tensor([caption == NULL_CAPTION for caption in batch.captions])
        null, null_mask = pad_rows([self.dataset.null_text], batch.text.shape[1])
        features = torch.where(dropped[:, None, None], null, batch.text)
        mask = torch.where(dropped[:, None], null_mask, batch.text_mask)
        return TextFeatures(features, mask, dropped | empty).to(self.device)

    def _masked(self, draws: Draws) -> Draws:
        """The draws with the tokens that this step keeps, where it hides any."""
        masking = self.config.masking
        if not masking.ratio or self.step >= masking.unmask_from * self.config.steps:
            return draws
        seq_len = self.model.backbone.config.seq_len
        kept = draw_kept_tokens(len(draws.images), seq_len, masking.ratio, self.generator)
        return replace(draws, kept_tokens=kept.to(self.device))

    def _losses(
        self, draws: Draws, counts: list[Tensor] | None, with_routing: bool
    ) -> tuple[dict[str, Tensor], tuple[Mapping[str, Tensor], ...]]:
        """Mean losses of a micro-batch (``loss`` is minimised), and what its routers observed."""
        with autocast_for(self.config.precision, self.device):
            condition = self.model.condition(draws.labels, draws.captions, draws.text)
            kept = None
            if draws.kept_tokens is not None:
                condition["kept_tokens"] = draws.kept_tokens
                patch_size = self.model.backbone.config.patch_size
                kept = kept_pixels(draws.kept_tokens, draws.images, patch_size)
            result = self.objective.loss_at(
                partial(self.model, **condition), draws.images, draws.noise, draws.timesteps, kept
            )
        diffusion = result.loss.mean()
        losses = {"loss": diffusion, "diffusion_loss": diffusion}
        masking = self.config.masking
        if kept is not None and masking.reconstruction:
            target = draws.images
            if masking.reconstruction_target == "noisy":
                target = self.objective.add_noise(draws.images, draws.noise, draws.timesteps)
            hidden = reconstruction_loss(result.output.sample, target, kept).mean()
            losses["reconstruction_loss"] = hidden
            losses["loss"] = losses["loss"] + masking.reconstruction * hidden
        head_losses = layer_head_losses(
            result.output,
            self.objective.target(draws.images, draws.noise),
            self.model.backbone.config.patch_size,
            draws.kept_tokens,
        )
        router, terms = router_losses(
            result.output, self.config.router_loss, counts, self._own_losses, head_losses
        )
        losses |= router
        for term in terms:
            losses["loss"] = losses["loss"] + term
        plans = result.output.plans
        if with_routing and plans:
            losses |= routing_telemetry(plans)
        return losses, result.output.observed

    def _count_tokens_per_expert(self, micro_batches: list[Draws]) -> list[Tensor] | None:
        """Rows of each expert and layer over the whole batch, for the exact balance loss.

        Its frequencies are those of the whole batch, which a micro-batch cannot know; counting
        them takes a forward pass without gradient.
        """
        weights = self.config.router_loss
        if not weights.balance or weights.balance_pool != "batch" or len(micro_batches) == 1:
            return None
        counts: list[Tensor] = []
        with torch.no_grad(), autocast_for(self.config.precision, self.device):
            for draws in micro_batches:
                condition = self.model.condition(draws.labels, draws.captions, draws.text)
                if draws.kept_tokens is not None:
                    condition["kept_tokens"] = draws.kept_tokens
                noisy = self.objective.add_noise(draws.images, draws.noise, draws.timesteps)
                plans = self.model(noisy, draws.timesteps.float(), **condition).plans
                parts = [plan.tokens_per_expert for plan in plans]
                counts = [a + b for a, b in zip(counts, parts, strict=True)] if counts else parts
        return counts or None

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        state = {
            "config": {name: value for name, value, _ in fields_of(self.config)},
            "optimizer": self.optimizer.state_dict(),
            "rng": get_rng_state(self.generator),
            "loader": self.loader.state_dict(),
            "step": self.step,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
        }
        return save_checkpoint(
            checkpoint_folder(self.run_dir),
            self.step,
            self.model,
            self.ema.model,
            state,
            self.config.keep_checkpoints,
        )

    def resume(self) -> bool:
        """Continue from the newest checkpoint; ``False`` when there is none.

        Raises:
            CheckpointError: when the checkpoint is damaged or was made with other settings.
        """
        folder = checkpoint_folder(self.run_dir)
        remove_unfinished(folder)
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            return False
        newest = checkpoints[-1]
        verify_checkpoint(newest)
        state = load_training_state(newest)
        self._check_same_settings(newest, state["config"])
        load_weights(newest, "model", self.model)
        load_weights(newest, "ema", self.ema.model)
        self.optimizer.load_state_dict(state["optimizer"])
        try:
            self.loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise CheckpointError(f"{newest}: {error}") from error
        set_rng_state(state["rng"], self.generator)
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        self._earlier_wall_seconds = state["wall_seconds"]
        return True

    def _check_same_settings(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        if different := differing_fields(saved, self.config):
            raise CheckpointError(
                f"{checkpoint} was made with other settings ({'; '.join(different)}). Start a new "
                f"run with name=ANOTHER, or use the settings of {self.run_dir}/config.yaml."
            )


def _check_caption_lengths(dataset: ImageDataset, max_length: int) -> None:
    """Find a caption that is too long now, not hours later when it is drawn."""
    if isinstance(dataset, LatentDataset):
        longest = dataset.longest_caption
    elif isinstance(dataset, CaptionFolderDataset):
        longest = max(dataset.captions, key=lambda caption: len(caption.encode()))
    else:
        return
    if len(longest.encode()) + 2 > max_length:
        raise ValueError(
            f"the caption {longest[:40]!r}... has {len(longest.encode())} bytes; text.max_length="
            f"{max_length} leaves {max_length - 2}. Set text.max_length, or shorten the caption."
        )


class Stopwatch:
    """Adds the time of training steps, and of nothing else, to ``trainer.train_seconds``.

    A GPU works on after a step returns, so each reading waits for it first.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Count the time since the last ``lap`` or ``skip`` as training."""
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)
        self._trainer.train_seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def skip(self) -> None:
        """Leave out the time since the last ``lap``: it was spent on something else."""
        self._since = time.perf_counter()

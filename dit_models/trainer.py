"""The training loop: one object that knows a run's state and can stop and go on exactly."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_models.assemble import (
    autocast_for,
    build_conditioned_model,
    build_objective,
    model_config_for,
    pick_device,
    product_dtype,
    with_defaults,
)
from dit_models.checkpoints import (
    CheckpointError,
)
from dit_models.conditioned import ConditionedModel
from dit_models.config import TrainConfig
from dit_models.data import (
    BatchLoader,
    CaptionFolderDataset,
    ImageDataset,
    LatentDataset,
    build_dataset,
)
from dit_models.drawing import Artist
from dit_models.draws import Draws, Randomness
from dit_models.ema import EMA
from dit_models.masking import (
    check_masking,
    kept_pixels,
    reconstruction_loss,
)
from dit_models.model_config import ModelConfig
from dit_models.optimization import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from dit_models.parallel.watchdog import Watchdog
from dit_models.parallel.world import World
from dit_models.router_losses import (
    check_accumulation,
    layer_head_losses,
    own_coefficients,
    router_losses,
    routing_telemetry,
)
from dit_models.routing.layers import average_observed, set_progress, update_routers
from dit_models.run_checkpoints import RunCheckpoints
from dit_models.text import ByteTextEncoder, PretrainedText
from dit_models.vae import decoder_of, why_no_vae

if TYPE_CHECKING:  # they load torch.distributed, which one process does not need
    from dit_models.parallel.ema import ShardedEMA


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


class Trainer:
    """A run in memory.

    Args:
        config: a validated configuration.
        run_dir: the run's folder; checkpoints go to ``run_dir/checkpoints``.
        world: the processes that train together (``join_world``); ``None`` for this one alone.

    Attributes:
        step: optimizer steps done.
        watchdog: what watches this process's progress, if anything does.
        train_seconds: time spent in steps, over all sessions of the run; kept by ``Stopwatch``.
        wall_seconds: time since the run began, over all sessions.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, world: World | None = None) -> None:
        self.config = config = with_defaults(config)
        self.run_dir = run_dir
        self.world = world = world or World(pick_device(config.device))
        self.device = world.device
        check_batch(config, world.size)
        self.dataset = build_dataset(
            config.data.name,
            split=config.data.split,
            image_size=config.data.image_size,
            flip=config.data.flip,
        )
        self.info = self.dataset.info
        self.loader = BatchLoader(
            self.dataset,
            config.batch_size,
            config.seed,
            config.data.num_workers,
            part=world.part_of(config.batch_size),
        )
        torch.manual_seed(config.seed)
        self.model = self._build_model()
        if isinstance(self.model.text_encoder, ByteTextEncoder):
            _check_caption_lengths(self.dataset, self.model.text_encoder.max_length)
        check_masking(config.masking, self.model.backbone.config)
        check_accumulation(config.accumulate, self.model.backbone.config)
        self._own_losses = own_coefficients(config.router_loss, self.model.backbone.config)
        self.objective = build_objective(config.objective)
        self.optimizer = build_optimizer(parameter_groups(self.model), config.optimizer)
        self.ema = self._average()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.randomness = Randomness(
            config, self.model, self.objective, self.dataset, world, self.generator
        )
        self.watchdog: Watchdog | None = None
        self.checkpoints = RunCheckpoints(
            config, run_dir, world, self.model, self.ema, self.optimizer, self.generator
        )
        self.step = 0
        self.train_seconds = 0.0
        self._earlier_wall_seconds = 0.0
        self._started = time.perf_counter()
        if config.compile and world.size == 1:
            self.model.backbone.compile()

    def _build_model(self) -> ConditionedModel:
        """The model, with the same weights for any number of processes."""
        config, world = self.config, self.world
        if world.size == 1:
            model = build_conditioned_model(config, self.info, self.device)
            model.backbone.gradient_checkpointing = config.gradient_checkpointing
            return model
        from dit_models.parallel.shard import Sharding

        check_divided_model(config, model_config_for(config, self.info))
        sharding = Sharding(
            world,
            product_dtype(config.precision, self.device),
            reshard_after_forward=config.parallel.reshard_after_forward,
            checkpointing=config.gradient_checkpointing,
            compile=config.compile,
        )
        model = build_conditioned_model(config, self.info, self.device, sharding.shard_block)
        sharding.shard_rest(model)
        if config.parallel.pool == "global" and model.backbone.config.pools_images:
            from moe_kernels.distributed import share_pools

            share_pools(model, world.group, equal_tokens=True)
        return model

    def _average(self) -> "EMA[ConditionedModel] | ShardedEMA":
        if self.world.size == 1:
            return EMA(self.model, self.config.ema_decay)
        from dit_models.parallel.ema import ShardedEMA

        return ShardedEMA(self.model, self.config.ema_decay)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    @property
    def wall_seconds(self) -> float:
        """Time since the run began, over all sessions."""
        return self._earlier_wall_seconds + time.perf_counter() - self._started

    @contextmanager
    def drawing(self) -> Iterator[Artist]:
        """The averaged model, ready to draw from; nothing is trained in the meantime.

        With several processes all of them draw the same images together.
        """
        with self._unhurried(), self.ema.drawing_model() as model:
            yield self._artist(model)

    def _unhurried(self) -> AbstractContextManager[None]:
        """What may take longer than a step does; the watchdog waits."""
        return nullcontext() if self.watchdog is None else self.watchdog.paused()

    def artist(self) -> Artist:
        """The averaged model, ready to draw from, where one process trains."""
        assert isinstance(self.ema, EMA)
        return self._artist(self.ema.model)

    def _artist(self, model: ConditionedModel) -> Artist:
        return Artist(
            model,
            self.objective,
            self.config.sampling,
            (self.info.channels, self.info.image_size, self.info.image_size),
            self.device,
            partial(autocast_for, self.config.precision, self.device),
            decoder_of(self.info.vae, self.config.data.vae, self.device),
        )

    @cached_property
    def why_no_samples(self) -> str | None:
        """Why this run cannot draw images here, although it can train; ``None`` when it can.

        Several processes draw together or not at all: all of them ask, for the first time together.
        """
        reason = why_no_vae(self.info.vae, self.config.data.vae)
        encoder = self.model.text_encoder
        if reason is None and isinstance(encoder, PretrainedText):
            reason = encoder.frozen.why_missing()
        if self.world.largest(reason is not None) and reason is None:
            return "another process lacks what it takes to draw."
        return reason

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
        self.report("data")
        draws = self.randomness.draw(next(self.loader))
        draws = self.randomness.masked(draws, self.step)
        micro_batches = draws.split(self.config.accumulate)
        counts = self._count_tokens_per_expert(micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        observed = []
        for micro_batch in micro_batches:
            losses, seen = self._losses(micro_batch, counts, with_routing)
            observed.append(seen)
            self.report("backward")
            (losses["loss"] / len(micro_batches) / self.world.size).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
        self.report("optimizer step")
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        set_learning_rate(self.optimizer, rate)
        grad_norm = self._clip_gradient(self.config.optimizer.clip_norm or float("inf"))
        self.optimizer.step()
        update_routers(self.model.backbone, self._observed_by_all(observed))
        self.step += 1
        self.ema.update(self.model, self.step)
        if isinstance(self.ema, EMA):
            set_progress(self.ema.model.backbone, progress)
        return {**self._mean_losses(totals), "grad_norm": grad_norm.detach(), "lr": rate}

    def report(self, where: str) -> None:
        """Tell the watchdog, where there is one, what this process is about to do."""
        if self.watchdog is not None:
            self.watchdog.report(f"step {self.step + 1}: {where}")

    def _clip_gradient(self, limit: float) -> Tensor:
        if self.world.size == 1:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        from dit_models.parallel.gradients import clip_grad_norm_

        return clip_grad_norm_(self.model.parameters(), limit, self.world)

    def _observed_by_all(
        self, observed: list[tuple[Mapping[str, Tensor], ...]]
    ) -> Sequence[Sequence[Mapping[str, Tensor]]]:
        group = self.world.group
        return observed if group is None else [average_observed(observed, group)]

    def _mean_losses(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over all processes; statistics of the routing are those of all of them already."""
        scalars = [name for name in totals if name.endswith("loss")]
        means = self.world.mean_(torch.stack([totals[name].float() for name in scalars]))
        return totals | dict(zip(scalars, means.unbind(), strict=True))

    def _losses(
        self, draws: Draws, counts: list[Tensor] | None, with_routing: bool
    ) -> tuple[dict[str, Tensor], tuple[Mapping[str, Tensor], ...]]:
        """Mean losses of a micro-batch (``loss`` is minimised), and what its routers observed."""
        self.report("forward")
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
            result.output,
            self.config.router_loss,
            counts,
            self._own_losses,
            head_losses,
            process_group=self.world.group,
        )
        losses |= router
        for term in terms:
            losses["loss"] = losses["loss"] + term
        plans = result.output.plans
        if with_routing and plans:
            losses |= routing_telemetry(plans, process_group=self.world.group)
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
        if counts and self.world.size > 1:
            counts = list(self.world.sum_(torch.stack(counts)))
        return counts or None

    def save(self) -> Path:
        """Write a checkpoint of this step; with several processes in the background.

        Returns:
            The checkpoint's directory, which appears when it is complete.

        Raises:
            OSError: one process only, when it could not be written. Where processes write in the
                background, ``failed_saves`` says so later.
        """
        self.report("saving")
        progress = {
            "loader": self.loader.state_dict(),
            "step": self.step,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
        }
        with self._unhurried():  # where the save before is still under way
            return self.checkpoints.save(self.step, progress)

    def failed_saves(self) -> list[str]:
        """What went wrong with saves in the background since the last call."""
        return self.checkpoints.failures()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice when one of several processes stands still, and end with its name.

        With ``parallel.debug`` also when one exchanges other things than the others.
        """
        if self.world.size == 1:
            yield
            return
        from moe_kernels.distributed import debug_collectives

        debug = debug_collectives() if self.config.parallel.debug else nullcontext()
        limits = (self.world.rank, self.world.size, self.config.parallel.timeout)
        with debug, Watchdog(self.run_dir, *limits) as self.watchdog:
            yield
        self.watchdog = None

    def finish_saving(self) -> None:
        """Wait for the save that is under way in the background, if one is."""
        self.report("waiting for the save")
        with self._unhurried():
            self.checkpoints.wait()

    def resume(self) -> bool:
        """Continue from the newest checkpoint; ``False`` when there is none.

        It may come from another number of processes, or another division among them.

        Raises:
            CheckpointError: when the checkpoint is damaged or was made with other settings.
        """
        newest = self.checkpoints.newest()
        if newest is None:
            return False
        state = self.checkpoints.load(newest)
        try:
            self.loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise CheckpointError(f"{newest}: {error}") from error
        self.step = state["step"]
        self.train_seconds = state["train_seconds"]
        self._earlier_wall_seconds = state["wall_seconds"]
        return True


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raise ``ValueError`` unless each process gets micro-batches of the same size."""
    if config.batch_size % (processes * config.accumulate):
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into accumulate={config.accumulate} "
            f"micro-batches for each of {processes} processes; choose a multiple of "
            f"{processes * config.accumulate}."
        )


def check_divided_model(config: TrainConfig, model: ModelConfig) -> None:
    """Raise ``ValueError`` for what several processes cannot divide, or with other losses."""
    if config.parallel.expert > 1 and not model.moe_blocks:
        raise ValueError(
            f"parallel.expert={config.parallel.expert} and {config.model}, which has no experts; "
            "leave parallel.expert out."
        )
    losses = config.router_loss
    if losses.balance and losses.balance_pool == "sequence" and model.pools_images:
        raise ValueError(
            'router_loss.balance_pool="sequence" on several processes with a routing in which '
            "images of a batch compete: the sequence would be the whole batch, of which each "
            'process sees a part. Use "batch".'
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

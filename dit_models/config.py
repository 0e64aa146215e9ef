"""Everything a run is made of, as dataclasses: each field carries its own help text."""

import math
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with help."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class DataConfig:
    """Where the images come from."""

    name: str = option(
        "digits", "digits, digit-scenes, or the path of an image folder or of precomputed latents"
    )
    split: str = option("train", "split to train on: train, heldout or all; or a sub-folder")
    image_size: int | None = option(None, "side in pixels; needed for folders of images")
    flip: bool = option(False, "random horizontal flips")
    num_workers: int = option(0, "processes that load batches ahead; 0 loads them in place")
    vae: str = option("", "latents: where the VAE is now, instead of the path they were made with")


@dataclass
class TextConfig:
    """How captions become features; nothing here matters to a class-conditional model."""

    encoder: str = option(
        "auto",
        "bytes (trained with the model), or the folder or Hugging Face name of a frozen "
        "transformers encoder (T5, CLIP, Gemma, ...); auto: that of precomputed text, else bytes",
    )
    revision: str = option("main", "branch, tag or commit of an encoder given by name")
    max_length: int | None = option(
        None, "longest text: bytes with two end marks (null: 128), or tokens (null: 77)"
    )
    depth: int = option(2, "bytes: layers of the encoder")
    layer: int | None = option(
        None, "pretrained: hidden state that is read; -1 (null) the last, -2 the one before"
    )
    dtype: str = option(
        "auto", "pretrained: fp32, bf16 or fp16 of the encoder and its cache; auto: fp32"
    )
    projection: str = option(
        "none", "pretrained: none (text_dim is the encoder's width) or linear (to the model's)"
    )
    null: str = option(
        "empty", "pretrained: the null caption is the encoded empty string, zeros, or learned"
    )
    cache: str = option(
        "auto",
        "pretrained: folder of encoded captions; none; auto: text in MOE_KERNELS_CACHE",
    )


@dataclass
class ObjectiveConfig:
    """What the model learns to predict."""

    kind: str = option("flow", "flow (rectified flow) or ddpm (noise prediction)")
    timesteps: str = option("logit_normal", "flow: logit_normal or uniform timesteps")
    logit_mean: float = option(0.0, "flow: mean of the logit-normal timesteps")
    logit_std: float = option(1.0, "flow: standard deviation of the logit-normal timesteps")
    num_timesteps: int = option(1000, "ddpm: steps of the linear schedule from 1e-4 to 2e-2")
    learned_sigma: bool = option(True, "ddpm: learn the variance (doubles the output channels)")


@dataclass
class OptimizerConfig:
    """How the weights move."""

    kind: str = option("adamw", "adamw or rmsprop (with momentum, as EC-DiT)")
    lr: float = option(1e-4, "peak learning rate")
    beta1: float = option(0.9, "adamw: decay of the first moment")
    beta2: float = option(0.999, "adamw: decay of the second moment")
    momentum: float = option(0.9, "rmsprop: momentum")
    alpha: float = option(0.99, "rmsprop: decay of the squared gradients")
    eps: float = option(1e-8, "added to the denominator")
    weight_decay: float = option(0.0, "decoupled for adamw, added to the gradient for rmsprop")
    warmup_steps: int = option(0, "steps of linear warm-up")
    schedule: str = option("constant", "constant, or cosine to zero at the last step")
    clip_norm: float = option(0.0, "largest global gradient norm; 0 does not clip")


@dataclass
class RouterLossConfig:
    """Coefficients of the router losses, summed over the MoE layers."""

    balance: float = option(0.0, "load-balance loss (DiT-MoE: 0.005 in the paper, 0.01 in code)")
    balance_pool: str = option(
        "batch",
        "batch (exact for any accumulate: counts the whole batch in a forward pass of its own when "
        "accumulate > 1), micro_batch (pools what one backward sees), or sequence",
    )
    z: float = option(0.0, "router z-loss")
    similarity: float = option(0.0, "router similarity loss (Expert Race)")
    own: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "losses that only some routings have: router_loss.own.layer_head=0.01; what is "
            "left out has its routing's default (python -m dit_models.routing)"
        },
    )


@dataclass
class MaskingConfig:
    """Training on a part of each image's patches (MaskDiT); drawing always sees all of them."""

    ratio: float = option(0.0, "share of patches hidden from the model (EC-DiT: 0.5); 0 hides none")
    unmask_from: float = option(1.0, "share of the run after which nothing is hidden any more")
    reconstruction: float = option(
        0.0, "coefficient of the hidden patches' loss (MaskDiT: 0.1; needs a mask_decoder_depth)"
    )
    reconstruction_target: str = option("noisy", "what they are compared with: noisy or clean")


@dataclass
class SamplingConfig:
    """How images are drawn during and after training."""

    sampler: str = option("auto", "euler or heun (flow), ddim or ddpm (ddpm); auto: heun or ddim")
    num_steps: int = option(10, "steps from noise to image")
    guidance_scale: float = option(1.25, "classifier-free guidance; 1 is none")
    guidance_start: float = option(0.0, "lowest noise level (0 to 1) where guidance acts")
    guidance_end: float = option(1.0, "highest noise level where guidance acts")
    guidance_channels: int | None = option(None, "guide only the first channels (DiT's DDPM: 3)")
    clip_range: float | None = option(None, "clamp the predicted image to +- this at every step")
    grid_images: int = option(40, "images of the sample grid")


@dataclass
class EvaluationConfig:
    """The quality figure of the embedded data sets."""

    enabled: bool = option(True, "evaluate after training (embedded data sets only)")
    num_samples: int = option(500, "generated images for each guidance scale")
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.0, 1.1, 1.25, 1.5],
        metadata={"help": "the sweep; the best is named"},
    )
    batch_size: int = option(32, "images drawn at a time: changes their speed, not the images")


@dataclass
class ParallelConfig:
    """How the processes that torchrun started share one training; nothing here matters to one."""

    data: int = option(0, "processes that share each batch; 0: all that torchrun started")
    expert: int = option(1, "processes that share the experts of a layer; divides data")
    replicate: int = option(1, "whole copies of the divided model (HSDP); divides data / expert")
    pool: str = option(
        "global",
        "where images of a batch compete for experts: global (all processes' images, as in one "
        "process) or local (each process's own: results depend on the number of processes)",
    )
    reshard_after_forward: bool = option(
        True, "free gathered weights after a block's forward and gather them again in backward"
    )
    timeout: float = option(
        600.0,
        "seconds without progress after which a hanging process is named and all end; 0: never",
    )
    debug: bool = option(False, "check sizes, types and order of the exchanges between experts")


@dataclass
class TrainConfig:
    """One run."""

    name: str = option("", "name of the run; its folder is runs/NAME; a recipe sets its own name")
    run_dir: str = option("", "folder of the run, instead of runs/NAME")
    model: str = option("EC-DiT-tiny", "a preset of python -m dit_models.models")
    model_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of ModelConfig to change: model_options.capacity_factor=1.0"},
    )
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    router_loss: RouterLossConfig = field(default_factory=RouterLossConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = option(1000, "optimizer steps")
    stop_at: int = option(0, "save and stop at this step, to go on later; 0 runs to the end")
    batch_size: int = option(64, "images a step")
    accumulate: int = option(1, "micro-batches a step; the step equals that of the whole batch")
    condition_dropout: float = option(0.1, "share of labels or captions replaced by the null one")
    ema_decay: float = option(0.9999, "decay of the averaged weights that sampling uses")
    seed: int = option(0, "of weights, data order, noise and samples")
    device: str = option("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "auto (bf16 where a GPU has it), fp32 or bf16 (autocast)")
    gradient_checkpointing: bool = option(False, "recompute blocks in backward; routing is saved")
    compile: bool = option(False, "torch.compile the backbone")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    sample_every: int = option(250, "steps between sample grids; 0: only after training")
    save_every: int = option(250, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(2, "newest checkpoints to keep")

    def validate(self) -> "TrainConfig":
        """Return self when every value makes sense.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        _choose("objective.kind", self.objective.kind, ("flow", "ddpm"))
        _choose("objective.timesteps", self.objective.timesteps, ("logit_normal", "uniform"))
        _choose("optimizer.kind", self.optimizer.kind, ("adamw", "rmsprop"))
        _choose("optimizer.schedule", self.optimizer.schedule, ("constant", "cosine"))
        pools = ("batch", "micro_batch", "sequence")
        _choose("router_loss.balance_pool", self.router_loss.balance_pool, pools)
        samplers = {"flow": ("auto", "euler", "heun"), "ddpm": ("auto", "ddim", "ddpm")}
        _choose("sampling.sampler", self.sampling.sampler, samplers[self.objective.kind])
        _choose("precision", self.precision, ("auto", "fp32", "bf16"))
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every",
                     "keep_checkpoints"):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        for name in ("stop_at", "sample_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("optimizer.warmup_steps", self.optimizer.warmup_steps, 0)
        _between("condition_dropout", self.condition_dropout, 0, 1)
        _between("ema_decay", self.ema_decay, 0, 1)
        _between("optimizer.lr", self.optimizer.lr, 0, math.inf)
        self._check_sampling()
        self._check_masking()
        self._check_text()
        _choose("parallel.pool", self.parallel.pool, ("global", "local"))
        _at_least("parallel.data", self.parallel.data, 0)
        _at_least("parallel.expert", self.parallel.expert, 1)
        _at_least("parallel.replicate", self.parallel.replicate, 1)
        _between("parallel.timeout", self.parallel.timeout, 0, 1e6)
        if not self.data.name:
            raise ValueError('data.name is empty; expected "digits", "digit-scenes" or a folder.')
        if self.objective.logit_std <= 0:
            raise ValueError(f"objective.logit_std={self.objective.logit_std}; expected above 0.")
        for name in ("balance", "z", "similarity"):
            _between(f"router_loss.{name}", getattr(self.router_loss, name), 0, math.inf)
        for name, coefficient in self.router_loss.own.items():
            _between(f"router_loss.own.{name}", coefficient, 0, math.inf)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}; "
                "expected micro-batches of equal size."
            )
        if self.accumulate > 1 and self.router_loss.similarity:
            raise ValueError(
                f"router_loss.similarity={self.router_loss.similarity} with "
                f"accumulate={self.accumulate}: its weights are counted over the whole batch, so "
                "accumulation would not equal the large batch. Set accumulate=1."
            )
        if self.accumulate > 1 and self.model_options.get("group", "image") != "image":
            raise ValueError(
                f"model_options.group={self.model_options['group']!r} with "
                f"accumulate={self.accumulate}: images of different micro-batches would not share "
                'a pool, so accumulation would not equal the large batch. Use group "image".'
            )
        return self

    def _check_text(self) -> None:
        text = self.text
        _choose("text.dtype", text.dtype, ("auto", "fp32", "bf16", "fp16"))
        _choose("text.projection", text.projection, ("none", "linear"))
        _choose("text.null", text.null, ("empty", "zeros", "learned"))
        _at_least("text.depth", text.depth, 1)
        _at_least("text.max_length", 2 if text.max_length is None else text.max_length, 2)
        if text.layer is not None and text.layer > -1:
            raise ValueError(
                f"text.layer={text.layer}; expected -1 (the last), -2 and so on, or null."
            )
        for name in ("encoder", "cache", "revision"):
            if not getattr(text, name):
                raise ValueError(f"text.{name} is empty; leave it out for its default.")

    def _check_masking(self) -> None:
        masking = self.masking
        _choose("masking.reconstruction_target", masking.reconstruction_target, ("noisy", "clean"))
        _between("masking.reconstruction", masking.reconstruction, 0, math.inf)
        if not 0 <= masking.ratio < 1:
            raise ValueError(f"masking.ratio={masking.ratio}; expected at least 0 and below 1.")
        if not 0 < masking.unmask_from <= 1:
            raise ValueError(
                f"masking.unmask_from={masking.unmask_from}; expected above 0 and at most 1."
            )
        if not masking.ratio and masking != MaskingConfig():
            raise ValueError(
                f"masking.ratio=0 hides nothing and {masking} has no effect; set masking.ratio."
            )
        if not masking.reconstruction and masking.reconstruction_target != "noisy":
            raise ValueError(
                f"masking.reconstruction_target={masking.reconstruction_target!r} has no effect "
                "with masking.reconstruction=0."
            )

    def _check_sampling(self) -> None:
        sampling, evaluation = self.sampling, self.evaluation
        _at_least("sampling.grid_images", sampling.grid_images, 1)
        _at_least("evaluation.num_samples", evaluation.num_samples, 2)
        _at_least("evaluation.batch_size", evaluation.batch_size, 1)
        # One ancestral step would end with noise added.
        _at_least("sampling.num_steps", sampling.num_steps, 2 if sampling.sampler == "ddpm" else 1)
        if self.objective.kind == "ddpm":
            limit = self.objective.num_timesteps
            _between("sampling.num_steps", sampling.num_steps, 1, limit)
        _between("sampling.guidance_start", sampling.guidance_start, 0, 1)
        _between("sampling.guidance_end", sampling.guidance_end, sampling.guidance_start, 1)
        if sampling.clip_range is not None and sampling.clip_range <= 0:
            raise ValueError(
                f"sampling.clip_range={sampling.clip_range}; expected above 0 or null."
            )
        if evaluation.enabled and not evaluation.guidance_scales:
            raise ValueError("evaluation.guidance_scales is empty; expected at least one number.")


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value}; expected at least {least}.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value}; expected a number from {low} to {high}.")

"""What both pipelines share: noise, guidance, the loop over a scheduler's steps, and decoding."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_models.diffusion import guided
from dit_models.extras import require
from dit_models.pipelines.components import CaptionEncoder, DiTTransformer
from dit_models.pipelines.schedulers import (
    check_fits,
    model_timestep,
    prediction_for,
    scheduler_for,
    set_timesteps,
)
from dit_models.pretrained import is_pretrained, load_pretrained, read_pretrained
from dit_models.vae import VAE, why_no_vae

_diffusers: Any = require("diffusers", extra="train")
_image_processor: Any = require("diffusers.image_processor", extra="train")
_torch_utils: Any = require("diffusers.utils.torch_utils", extra="train")
_pipeline_utils: Any = require("diffusers.pipelines.pipeline_utils", extra="train")

Labels = int | str | Sequence[int | str] | Tensor
Generators = torch.Generator | list[torch.Generator] | None
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What the sampling of a model knows; arguments of a call change it.
_DEFAULTS = ("num_steps", "guidance_scale", "guidance_start", "guidance_end", "guidance_channels")


class MoEPipeline(_diffusers.DiffusionPipeline):
    """Images from class labels or captions.

    Args:
        transformer: the model.
        scheduler: any of diffusers that fits the objective.
        vae: an ``AutoencoderKL`` for a model of latents; None for a model of pixels.
        text_encoder: for a model that reads captions.
        objective: "flow" or "ddpm".
        sampling: defaults of a call: num_steps, guidance_scale, guidance_start, guidance_end,
            guidance_channels.
        id2label: names of the classes; keys may be strings, as JSON has them.

    Raises:
        ValueError: components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: DiTTransformer,
        scheduler: Any,
        vae: Any = None,
        text_encoder: CaptionEncoder | None = None,
        objective: str = "flow",
        sampling: dict[str, Any] | None = None,
        id2label: dict[Any, str] | None = None,
    ) -> None:
        super().__init__()
        self._check_model(transformer)
        check_fits(scheduler, objective)
        if bool(transformer.shape.text_dim) != (text_encoder is not None):
            raise ValueError(
                f"the transformer has text_dim {transformer.shape.text_dim} (0 means no captions), "
                f"text_encoder is {type(text_encoder).__name__}; give both or neither."
            )
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder
        )
        sampling = dict(sampling or {})
        if unknown := sorted(set(sampling) - set(_DEFAULTS)):
            raise ValueError(f"sampling has {unknown}; expected some of {', '.join(_DEFAULTS)}.")
        labels = {str(key): name for key, name in (id2label or {}).items()}
        self.register_to_config(objective=objective, sampling=sampling, id2label=labels)
        self.image_processor = _image_processor.VaeImageProcessor(vae_scale_factor=self.downscale)

    @classmethod
    def _check_model(cls, transformer: DiTTransformer) -> None:
        """Raise ValueError for a model that this pipeline is not for."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load what ``save_pretrained`` wrote, or an exported or converted model.

        Args:
            pretrained_model_name_or_path: a pipeline's folder (or its name on the hub), or the
                folder of a model that ``dit_models.export`` or ``dit_models.convert`` made.
            options: those of ``DiffusionPipeline.from_pretrained``; for the folder of a model
                ``vae`` (an ``AutoencoderKL``, or its folder), ``scheduler``, and ``dtype`` or
                ``torch_dtype``, as diffusers calls it by turns.

        Raises:
            ValueError: an option that the folder of a model does not take, or its VAE is not where
                it was, or another one.
        """
        folder = Path(pretrained_model_name_or_path)
        if not is_pretrained(folder):
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        known = ("vae", "scheduler", "dtype", "torch_dtype")
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"{', '.join(unknown)}: the folder of a model takes {', '.join(known)}."
            )
        dtype = options.pop("torch_dtype", None)
        return cls._of_model_folder(folder, **{"dtype": dtype, **options})

    @classmethod
    def _of_model_folder(
        cls,
        folder: Path,
        dtype: torch.dtype | None,
        vae: Any = None,
        scheduler: Any = None,
    ) -> Any:
        described = read_pretrained(folder)
        train, info = described.train, described.info
        model = load_pretrained(folder, dtype=dtype)
        if vae is None and info.vae is not None:
            vae = train.data.vae or info.vae["path"]
            if reason := why_no_vae(info.vae, vae):
                raise ValueError(f"{reason} For a pipeline: from_pretrained(..., vae=FOLDER).")
        if isinstance(vae, str | Path):
            vae = VAE(str(vae)).model.to(dtype)
        encoder = model.text_encoder
        sampling = asdict(train.sampling)
        return cls(
            DiTTransformer.of(model.backbone),
            scheduler or scheduler_for(train.objective, train.sampling),
            vae,
            None if encoder is None else CaptionEncoder.of(encoder, train, info),
            train.objective.kind,
            {name: sampling[name] for name in _DEFAULTS},
            described.id2label,
        )

    @property
    def downscale(self) -> int:
        """Pixels of an image for one latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1

    def _draw(
        self,
        condition: dict[str, Tensor],
        null_condition: dict[str, Tensor] | None,
        *,
        num_inference_steps: int | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None,
        guidance_channels: int | None,
        height: int | None,
        width: int | None,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
    ) -> Any:
        self._check_output(output_type)
        defaults = self.config.sampling
        batch_size = next(iter(condition.values())).shape[0]
        device = self._execution_device
        channels = self.transformer.shape.in_channels
        shape = (batch_size, channels, *self._latent_sides(height, width))
        latents = self._noise(shape, generator, latents, device)
        steps = num_inference_steps or defaults.get("num_steps", 50)
        set_timesteps(self.scheduler, steps, device)
        interval = guidance_interval or (
            defaults.get("guidance_start", 0.0),
            defaults.get("guidance_end", 1.0),
        )
        if guidance_channels is None:
            guidance_channels = defaults.get("guidance_channels")
        flow = self.config.objective == "flow"
        denoise = guided(
            self.transformer,
            condition,
            null_condition,
            guidance_scale,
            interval,
            guidance_channels,
            max_timestep=1.0 if flow else float(self.scheduler.config.num_train_timesteps),
        )
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as bar:
            # One copy to the host before the loop, none in it.
            for index, value in enumerate(timesteps.tolist()):
                timestep = timesteps[index]
                scaled = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    scaled = self.scheduler.scale_model_input(latents, timestep)
                sample = denoise(scaled, model_timestep(self.scheduler, value)).sample
                prediction = prediction_for(self.scheduler, sample, channels)
                latents = self.scheduler.step(
                    prediction, timestep, latents, return_dict=False, **extra
                )[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        assert latents is not None
        images = self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return _pipeline_utils.ImagePipelineOutput(images=images)

    def _check_output(self, output_type: str) -> None:
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(
                f"output_type={output_type!r}; expected one of {', '.join(_OUTPUT_TYPES)}."
            )
        channels = self.transformer.shape.in_channels
        if self.vae is None and channels not in (1, 3) and output_type != "latent":
            raise ValueError(
                f"this model draws latents of {channels} channels and the pipeline has no VAE; "
                'load it with vae=FOLDER, or ask for output_type="latent".'
            )

    def _latent_sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        shape, downscale = self.transformer.shape, self.downscale
        sides = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = shape.image_size * downscale if pixels is None else pixels
            unit = downscale * shape.patch_size
            if pixels < unit or pixels % unit:
                raise ValueError(f"{name}={pixels}; expected a positive multiple of {unit}.")
            sides.append(pixels // downscale)
        return sides[0], sides[1]

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators for {shape[0]} images; give one, or one for each."
            )
        if latents is None:
            latents = _torch_utils.randn_tensor(
                shape, generator=generator, device=device, dtype=torch.float32
            )
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}.")
        # Steps are small differences: they are added up in fp32 whatever the model computes in.
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if self.vae is None:
            return self.image_processor.postprocess(latents, output_type)
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        decoded = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(decoded.float(), output_type)

    def _guidance_scale(self, guidance_scale: float | None) -> float:
        if guidance_scale is not None:
            return guidance_scale
        return float(self.config.sampling.get("guidance_scale", 1.0))

    def _label_conditions(
        self, class_labels: Labels, count: int, guidance_scale: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The condition of every image, and that of the other branch where guidance acts."""
        num_classes = self.transformer.shape.num_classes
        indices = [index for index in self.label_ids(class_labels) for _ in range(count)]
        labels = torch.tensor(indices, device=self._execution_device)
        null = {"labels": torch.full_like(labels, num_classes)} if guidance_scale != 1 else None
        return {"labels": labels}, null

    def label_ids(self, class_labels: Labels) -> list[int]:
        """Class indices of names (as ``id2label`` has them) or indices.

        Raises:
            ValueError: an unknown name, or an index out of range.
        """
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, int | str):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("class_labels is empty; give at least one.")
        num_classes = self.transformer.shape.num_classes
        by_name = {name: int(key) for key, name in self.config.id2label.items()}
        indices = []
        for label in class_labels:
            index = by_name.get(label, -1) if isinstance(label, str) else label
            if not 0 <= index < num_classes:
                names = f", or one of {', '.join(list(by_name)[:10])}, ..." if by_name else ""
                raise ValueError(f"class label {label!r}; expected 0 to {num_classes - 1}{names}.")
            indices.append(index)
        return indices

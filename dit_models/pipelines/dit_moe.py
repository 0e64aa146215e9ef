"""DiT-MoE (and dense DiT) as a pipeline: class labels in, images out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_models.pipelines.base import Generators, Labels, MoEPipeline
from dit_models.pipelines.components import DiTTransformer


class DiTMoEPipeline(MoEPipeline):
    """Class-conditional images from a DiT-MoE or a dense DiT.

    ``DiTMoEPipeline.from_pretrained(FOLDER)(class_labels=[3, 7]).images``.
    """

    @classmethod
    def _check_model(cls, transformer: DiTTransformer) -> None:
        shape = transformer.shape
        if shape.text_dim or shape.family == "ec_dit":
            raise ValueError(
                f"a model of family {shape.family!r} with text_dim {shape.text_dim}; "
                "DiTMoEPipeline is for class-conditional DiT-MoE and DiT: use ECDiTPipeline."
            )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Any:
        """Draw images.

        Args:
            class_labels: a class or several, by index or by name (``id2label``).
            num_inference_steps: steps from noise to image; None = the model's default.
            guidance_scale: classifier-free guidance, 1 is none; None = the model's default.
            guidance_interval: noise levels in [0, 1] where guidance acts; None = the default.
            guidance_channels: guide the first channels only (published DDPM samples: 3 of 4).
            num_images_per_label: images of each label, one after another.
            height, width: in pixels; None = the size of the training.
            generator: one, or one for each image: then an image does not depend on its batch.
            latents: (B, C, h, w) the noise to start from, instead of ``generator``'s.
            output_type: "pil", "np" (B, H, W, C) and "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": x})``
                after each step; a returned {"latents": x} takes their place.

        Returns:
            ``ImagePipelineOutput`` with ``images``.

        Raises:
            ValueError: a label, size, number of generators or output type that does not fit.
        """
        scale = self._guidance_scale(guidance_scale)
        condition, null = self._label_conditions(class_labels, num_images_per_label, scale)
        return self._draw(
            condition,
            null,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
        )

"""EC-DiT as a pipeline: captions or class labels in, images out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_models.pipelines.base import Generators, Labels, MoEPipeline
from dit_models.pipelines.components import DiTTransformer
from dit_models.text import NULL_CAPTION


class ECDiTPipeline(MoEPipeline):
    """Images from an EC-DiT, or from its dense twin that reads captions.

    ``ECDiTPipeline.from_pretrained(FOLDER)(prompt="a red three").images``, or with
    ``class_labels=`` where the model has classes.
    """

    @classmethod
    def _check_model(cls, transformer: DiTTransformer) -> None:
        shape = transformer.shape
        if shape.family != "ec_dit" and not shape.text_dim:
            raise ValueError(
                f"a class-conditional model of family {shape.family!r}; ECDiTPipeline is for "
                "EC-DiT and models that read captions: use DiTMoEPipeline."
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        num_images_per_prompt: int = 1,
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
            prompt: a caption or several, for a model that reads captions.
            class_labels: classes by index or name, for a model with classes.
            num_images_per_prompt: images of each prompt or label, one after another.
            num_inference_steps, guidance_scale, guidance_interval, guidance_channels, height,
                width, generator, latents, output_type, return_dict, callback_on_step_end: see
                ``DiTMoEPipeline``.

        Returns:
            ``ImagePipelineOutput`` with ``images``.

        Raises:
            ValueError: a prompt where labels are read or the reverse, or an argument that does not
                fit.
        """
        scale = self._guidance_scale(guidance_scale)
        if self.transformer.shape.text_dim:
            if prompt is None or class_labels is not None:
                raise ValueError("this model reads captions: give prompt, and no class_labels.")
            condition, null = self._prompt_conditions(prompt, num_images_per_prompt, scale)
        else:
            if prompt is not None or class_labels is None:
                raise ValueError("this model has classes: give class_labels, and no prompt.")
            condition, null = self._label_conditions(class_labels, num_images_per_prompt, scale)
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

    def _prompt_conditions(
        self, prompt: str | list[str], count: int, guidance_scale: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = [caption for caption in prompts for _ in range(count)]
        text, mask = self.text_encoder(captions)
        condition = {"text": text, "text_mask": mask}
        if guidance_scale == 1:
            return condition, None
        text, mask = self.text_encoder([NULL_CAPTION] * len(captions))
        return condition, {"text": text, "text_mask": mask}

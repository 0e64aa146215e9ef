"""Dense models to upcycle: a block as timm and DiT write it, and tiny models of real libraries."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """The MLP of timm and DiT, with its usual submodules."""

    def __init__(
        self,
        hidden_size: int = 16,
        intermediate_size: int = 24,
        act: nn.Module | None = None,
        bias: tuple[bool, bool] = (True, True),
        drop: float = 0.0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias[0])
        self.act = nn.GELU(approximate="tanh") if act is None else act
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm is None else norm
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias[1])
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))


class Blocks(nn.Module):
    """Residual blocks of a LayerNorm and an MLP."""

    def __init__(self, *mlps: nn.Module, hidden_size: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(self.norm(x))
        return x


def diffusers_model(name: str, **sizes: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**sizes)


def make_dit(activation: str = "gelu-approximate") -> nn.Module:
    return diffusers_model(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        activation_fn=activation,
    )


def make_pixart() -> nn.Module:
    return diffusers_model(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        interpolation_scale=1,
        use_additional_conditions=False,
    )


def make_sd3() -> nn.Module:
    return diffusers_model(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )


def make_flux() -> nn.Module:
    return diffusers_model(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )


def make_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def make_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }
    vision = {"image_size": 8, "patch_size": 4, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def run_diffusers(inputs: dict[str, Tensor | dict], model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    cast = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return model(**cast).sample


def run_tokens(inputs: dict[str, Tensor], model: nn.Module) -> Tensor:
    return model(**inputs).logits


def run_clip(inputs: dict[str, Tensor], model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    out = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    return torch.cat([out.text_embeds, out.image_embeds])


def real_model(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], int]:
    """A tiny model with weights that use every path, how to run it, and its number of MLPs."""
    latents = torch.randn(2, 4, 8, 8)
    steps = torch.tensor([3, 500])
    caption, pooled = torch.randn(2, 6, 24), torch.randn(2, 20)
    text = {"encoder_hidden_states": caption, "pooled_projections": pooled}
    tokens = torch.randint(3, 40, (2, 12))
    make, run, blocks = {
        "dit": (
            make_dit,
            partial(
                run_diffusers,
                {
                    "hidden_states": latents,
                    "timestep": steps,
                    "class_labels": torch.tensor([1, 7]),
                },
            ),
            2,
        ),
        "dit-geglu": (
            partial(make_dit, "geglu"),
            partial(
                run_diffusers,
                {
                    "hidden_states": latents,
                    "timestep": steps,
                    "class_labels": torch.tensor([1, 7]),
                },
            ),
            2,
        ),
        "pixart": (
            make_pixart,
            partial(
                run_diffusers,
                {
                    "hidden_states": latents,
                    "timestep": steps,
                    "encoder_hidden_states": caption,
                    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
                },
            ),
            2,
        ),
        # The last block of SD3 has no text MLP.
        "sd3": (
            make_sd3,
            partial(run_diffusers, {"hidden_states": latents, "timestep": steps, **text}),
            3,
        ),
        "flux": (
            make_flux,
            partial(
                run_diffusers,
                {
                    "hidden_states": torch.randn(2, 16, 4),
                    "timestep": torch.tensor([0.1, 0.6]),
                    "img_ids": torch.randn(16, 3),
                    "txt_ids": torch.zeros(6, 3),
                    **text,
                },
            ),
            4,
        ),
        "llama": (make_llama, partial(run_tokens, {"input_ids": tokens}), 2),
        "clip": (
            make_clip,
            partial(run_clip, {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 8, 8)}),
            4,
        ),
    }[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, run, blocks


REAL_MODELS = ("dit", "dit-geglu", "pixart", "sd3", "flux", "llama", "clip")

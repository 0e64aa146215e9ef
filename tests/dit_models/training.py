"""A run small enough for tests, shared by the training tests."""

from pathlib import Path

from dit_models.config import TrainConfig
from dit_models.config_io import build_config

TINY = (
    "model_options.depth=2",
    "model_options.hidden_size=32",
    "model_options.num_heads=2",
    "model_options.num_experts=4",
    "batch_size=8",
    "steps=6",
    "optimizer.warmup_steps=0",
    "optimizer.lr=3e-3",
    "log_every=1",
    "sample_every=0",
    "save_every=3",
    "sampling.num_steps=2",
    "sampling.grid_images=10",
    "evaluation.num_samples=20",
    "evaluation.guidance_scales=[1.0,2.0]",
)


def tiny_config(run_dir: Path, *overrides: str, recipe: str = "digits") -> TrainConfig:
    return build_config(recipe, overrides=[*TINY, f"run_dir={run_dir}", *overrides])

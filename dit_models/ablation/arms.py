"""What is compared: a dense model, token choice, and expert choice at four capacity factors.

In every arm of a level a token costs the same on average, and every mixture of experts holds the
same number of expert weights.
"""

from dataclasses import dataclass
from typing import Any

from dit_models.assemble import byte_length
from dit_models.config import TrainConfig
from dit_models.config_io import build_config
from dit_models.count import count_macs
from dit_models.model_config import ModelConfig
from dit_models.models import get_config

RECIPE = "digit-scenes"
CAPACITY_FACTORS = (0.5, 1.0, 2.0, 4.0)
HEAD_DIM = 32
# A dense FFN of 4 D costs 8 D^2 a token; k experts of width 4 D / k cost the same.
_FFN_RATIO = 4.0
# Expert weights of a MoE layer, in units of the dense FFN's.
_EXPERT_SHARE = 8
_BALANCE_LOSS = 0.01
# Fields of the trainer that the ablation decides, beside those of an arm's model.
_DECIDED = ("name", "run_dir", "steps", "seed", "model", "model_options.hidden_size",
            "router_loss.balance", "sample_every")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to route.

    Attributes:
        name: unique, used in folder names.
        label: for tables and plots.
        model_options: ``TrainConfig.model_options`` over the model of ``RECIPE``.
        balance: coefficient of the load-balance loss.
    """

    name: str
    label: str
    model_options: dict[str, Any]
    balance: float = 0.0


def arms(match: str = "total") -> list[Arm]:
    """The arms, at equal activated compute.

    A token meets k experts on average: ``top_k``, or the capacity factor. Experts are 4 D / k wide.

    Args:
        match: "total" also holds the number of expert weights fixed (E = 8 k experts, so k is how
            finely the same weights are cut, and an expert always takes S / 8 tokens of an image);
            "experts" has E = 8 everywhere (so a small k has more weights in wider experts).

    Raises:
        ValueError: another ``match``.
    """
    if match not in ("total", "experts"):
        raise ValueError(f"match={match!r}; expected total or experts.")

    def experts(used: float) -> dict[str, Any]:
        count = _EXPERT_SHARE * used if match == "total" else _EXPERT_SHARE
        return {"num_experts": int(count), "expert_ratio": _FFN_RATIO / used, "moe_every": 2}

    dense = Arm(
        "dense",
        "dense",
        {"family": "dit", "num_experts": 0, "capacity_factor": 0.0, "moe_every": 1},
    )
    token = Arm(
        "token-choice",
        "token choice, top 2",
        {"family": "dit_moe", "top_k": 2, "capacity_factor": 0.0, **experts(2)},
        _BALANCE_LOSS,
    )
    chosen = [
        Arm(
            f"expert-choice-{f:g}",
            f"expert choice, f_c {f:g}",
            {"capacity_factor": f, **experts(f)},
        )
        for f in CAPACITY_FACTORS
    ]
    return [dense, token, *chosen]


def run_config(
    arm: Arm, width: int, seed: int, *, steps: int, run_dir: str, overrides: list[str] | None = None
) -> TrainConfig:
    """The training of one arm at hidden size ``width``; ``overrides`` are words of the trainer.

    Raises:
        ValueError: ``width`` is not a multiple of 32, or an override that is wrong or would have
            no effect.
    """
    if width % HEAD_DIM:
        raise ValueError(f"width {width}; expected a multiple of {HEAD_DIM} (the head size).")
    decided = {*_DECIDED, *(f"model_options.{name}" for name in arm.model_options)}
    for word in overrides or []:
        name = word.partition("=")[0]
        if name in decided or name.startswith("evaluation."):
            raise ValueError(
                f"{word!r}: {name} is decided by the ablation; its own options: "
                "python -m dit_models.ablation --help."
            )
    config = build_config(RECIPE, overrides=overrides or [])
    config.name, config.run_dir = f"{arm.name}-{width}-{seed}", run_dir
    config.steps, config.seed = steps, seed
    config.router_loss.balance = arm.balance
    config.evaluation.enabled = False  # judged by evaluate_run, all arms alike
    config.sample_every = 0
    config.model_options = {
        "hidden_size": width,
        "num_heads": width // HEAD_DIM,
        "num_kv_heads": None,
        **config.model_options,
        **arm.model_options,
    }
    return config.validate()


def activated_macs(config: TrainConfig) -> int:
    """Multiply-accumulates of a forward pass for one image, attention products included.

    The text encoder, the same in every arm, is not in it.
    """
    preset = get_config(config.model).to_dict()
    model = ModelConfig.from_dict(preset | config.model_options)
    size = model.image_size
    return count_macs(model, size, size, text_len=byte_length(config), attention=True)

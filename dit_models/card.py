"""The model card of an exported or converted model: ``README.md`` for people and for the Hub."""

from collections.abc import Mapping
from pathlib import Path

from dit_models.count import count_model
from dit_models.models import build_model
from dit_models.pretrained import Pretrained

_FAMILIES = {
    "dit": "DiT (dense)",
    "dit_moe": "DiT-MoE (token choice)",
    "ec_dit": "EC-DiT (expert choice)",
}


def model_card(folder: Path, described: Pretrained, origin: Mapping[str, str]) -> str:
    """The card's text.

    Args:
        folder: where the model will be.
        described: its configuration.
        origin: what the weights come from, a row each.
    """
    model, train = described.model, described.train
    count = count_model(build_model(model, device="meta"))
    facts = {
        "family": _FAMILIES[model.family],
        "size": f"{described.preset or 'of its own'}: {model.depth} blocks of width "
        f"{model.hidden_size}, {model.num_heads} heads",
        "parameters": f"{count.total / 1e6:.2f} M, {count.activated / 1e6:.2f} M activated",
        "objective": train.objective.kind,
        "draws": f"{model.in_channels} x {model.image_size} x {model.image_size}",
        "condition": f"{model.num_classes} classes" if model.num_classes else "captions",
        **({"training steps": str(described.step)} if described.step else {}),
        **origin,
    }
    if model.num_experts:
        choice = (
            f"top {model.top_k}" if model.top_k else f"capacity factor {model.capacity_factor:g}"
        )
        facts["experts"] = f"{model.num_experts} in {len(model.moe_blocks)} blocks, {choice}"
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    pipeline = "ECDiTPipeline" if model.family == "ec_dit" else "DiTMoEPipeline"
    condition = "class_labels=[1, 2]" if model.num_classes else 'prompt=["..."]'
    return f"""---
library_name: dit-moe-kernels
tags: [diffusion, mixture-of-experts, {model.family.replace("_", "-")}]
---

# {folder.name}

| | |
|---|---|
{rows}

```
python -m dit_models.sample {folder.name}
```

```python
from dit_models.pipelines import {pipeline}

images = {pipeline}.from_pretrained("{folder.name}")({condition}).images
```

The weights alone: `build_model(ModelConfig.from_dict(config["model"])).load_state_dict(...)` with
`model.safetensors` and the `model` entry of `config.json`.
The licence of the weights is that of where they come from.
"""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")

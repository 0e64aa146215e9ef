"""Swap the kernels into diffusers' HiDream-I1 transformer: report, difference, speed.

Small and with random weights, so that it runs anywhere in seconds; with the released weights the
one line in the middle is the same: ``mk.apply(pipeline)``.
"""

import copy
import time

import torch
from diffusers import HiDreamImageTransformer2DModel

import moe_kernels as mk

torch.manual_seed(0)
model = HiDreamImageTransformer2DModel(
    patch_size=2,
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=64,
    num_attention_heads=8,
    caption_channels=[64, 64],
    text_emb_dim=64,
    axes_dims_rope=(32, 16, 16),
    llama_layers=[0, 1, 2],
)
original = copy.deepcopy(model)

report = mk.apply(model, verify=True)  # this is the line
print(report)

inputs = {
    "hidden_states": torch.randn(1, 16, 32, 32),
    "timesteps": torch.tensor([500]),
    "encoder_hidden_states_t5": torch.randn(1, 8, 64),
    "encoder_hidden_states_llama3": torch.randn(3, 1, 8, 64),
    "pooled_embeds": torch.randn(1, 64),
    "return_dict": False,
}


def seconds(transformer: torch.nn.Module, mode: str) -> float:
    """One forward, or one forward and backward, of the whole transformer."""
    transformer.train(mode == "training")
    start = time.perf_counter()
    with torch.set_grad_enabled(mode == "training"):
        (out,) = transformer(**inputs)
    if mode == "training":
        out.square().mean().backward()
    return time.perf_counter() - start


model.eval(), original.eval()
with torch.no_grad():
    before, after = original(**inputs)[0], model(**inputs)[0]
print(f"\nlargest difference {(after - before).abs().max():.1e} of {before.abs().max():.2f}")

for mode in ("inference", "training"):
    seconds(original, mode), seconds(model, mode)  # warm up
    pairs = [(seconds(original, mode), seconds(model, mode)) for _ in range(7)]
    ratio = torch.tensor([a / b for a, b in pairs]).median()
    best = [1e3 * min(times) for times in zip(*pairs, strict=True)]
    print(f"{mode}: {best[0]:.0f} ms before, {best[1]:.0f} ms after, {ratio:.2f}x in the median")

mk.revert(model)
with torch.no_grad():
    same = torch.equal(original.eval()(**inputs)[0], model.eval()(**inputs)[0])
print(f"after revert: {'the same bits as before' if same else 'not the same bits'}")

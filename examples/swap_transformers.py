"""Swap the kernels into transformers' Mixtral and GPT-OSS: report, difference, speed.

Small and with random weights; ``mk.apply(AutoModelForCausalLM.from_pretrained(...))`` is the same.
"""

import copy
import time

import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import moe_kernels as mk

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """One training step without the optimiser."""
    start = time.perf_counter()
    model(tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start


def compare(original: torch.nn.Module) -> None:
    """Swap a copy and compare it with the original."""
    model = copy.deepcopy(original)
    print(mk.apply(model, verify=True))  # this is the line
    tokens = torch.randint(SIZES["vocab_size"], (2, 128))
    with torch.no_grad():
        before, after = original(tokens).logits, model(tokens).logits
    print(f"largest difference {(after - before).abs().max():.1e} of {before.abs().max():.2f}")
    seconds(original, tokens), seconds(model, tokens)  # warm up
    pairs = [(seconds(original, tokens), seconds(model, tokens)) for _ in range(9)]
    ratio = torch.tensor([a / b for a, b in pairs]).median()
    best = [1e3 * min(times) for times in zip(*pairs, strict=True)]
    print(f"training step: {best[0]:.1f} ms before, {best[1]:.1f} after, {ratio:.2f}x\n")


torch.manual_seed(0)
compare(MixtralForCausalLM(MixtralConfig(**SIZES)))
compare(GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=64)))

# The other way in: by name, as one of transformers' own implementations.
mk.register_with_transformers()
model = MixtralForCausalLM(MixtralConfig(**SIZES))
model.set_experts_implementation("moe_kernels")
print("set_experts_implementation:", model.config._experts_implementation)

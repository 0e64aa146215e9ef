"""Stand-ins in plain PyTorch for libraries that need a GPU, with the signatures of their releases.

They are as strict about layout, order and dtype as the kernels are, so that an adapter that passes
something else fails or computes something else.
"""

import enum
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules where imports find them; ``a__b`` is the module ``a.b``."""
    for key, contents in modules.items():
        name = key.replace("__", ".")
        module = ModuleType(name)
        module.__path__ = []  # so that it may have submodules
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def scattermoe() -> dict[str, dict[str, Any]]:
    """scattermoe 0.3.0: matrices are (E, in, out), gates of the dtype of the rows."""

    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, ...]:
        ranked, order = expert_idxs.flatten().sort()
        return ranked, order, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        assert sorted_scattered_idxs.shape[0] == inputs.shape[0] * k
        assert expert_biases is None
        assert int(expert_offsets[-1]) == len(sorted_expert_idxs)
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        y = torch.einsum("ri,rio->ro", rows, expert_weights[sorted_expert_idxs])
        if not grouped_out:
            y = torch.zeros_like(y).index_copy(0, sorted_scattered_idxs, y)
        if gates is None:
            return y
        return (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)

    contents = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    return {"scattermoe": {}, "scattermoe__parallel_experts": contents}


class ActivationType(enum.Enum):
    """Of sonic-moe."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"


def sonicmoe() -> dict[str, dict[str, Any]]:
    """sonic-moe 0.1.2.post1: (2F, D, E) and (D, F, E) views of the matrices, flat int32 rows."""

    def moe_general_routing_inputs(
        x: Tensor,
        router_scores: Tensor,
        token_indices: Tensor,
        expert_indices: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        E: int,
        stream_id: int,
        activation_type: ActivationType,
        is_inference_mode_enabled: bool = False,
        concat_layout: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert b1 is None
        assert b2 is None
        assert isinstance(stream_id, int)
        assert activation_type is ActivationType.SWIGLU
        assert is_inference_mode_enabled == (not torch.is_grad_enabled())
        assert router_scores.shape == token_indices.shape == expert_indices.shape
        assert router_scores.dim() == 1
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert bool((token_indices.diff() >= 0).all())
        for w in (w1, w2):
            assert w.shape[2] == E
            assert w.permute(2, 0, 1).is_contiguous()
        tokens, experts = token_indices.long(), expert_indices.long()
        hidden = torch.einsum("ri,hir->rh", x[tokens], w1[..., experts])
        if concat_layout:
            gate, up = hidden.chunk(2, dim=-1)
        else:
            gate, up = hidden[:, ::2], hidden[:, 1::2]
        y = torch.einsum("rf,dfr->rd", F.silu(gate) * up, w2[..., experts])
        weighted = (router_scores.float().unsqueeze(1) * y.float()).to(x.dtype)
        return torch.zeros_like(x).index_add(0, tokens, weighted), experts.bincount(minlength=E)

    return {
        "sonicmoe": {"moe_general_routing_inputs": moe_general_routing_inputs},
        "sonicmoe__enums": {"ActivationType": ActivationType},
    }


def transformer_engine() -> dict[str, dict[str, Any]]:
    """transformer_engine 2.20.2: the router's functions, permute and unpermute by a routing map."""
    return {
        "transformer_engine": {},
        "transformer_engine__pytorch": {},
        "transformer_engine__pytorch__router": _router_functions(),
        "transformer_engine__pytorch__permutation": _permutation_functions(),
    }


def _router_functions() -> dict[str, Callable[..., Any]]:
    def fused_topk_with_score_function(
        logits: Tensor,
        topk: int,
        use_pre_softmax: bool,
        num_groups: int | None,
        group_topk: int | None,
        scaling_factor: float | None,
        score_function: str,
        expert_bias: Tensor | None,
        routing_map_format: str = "bytemap",
        topk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert score_function == "softmax"
        assert num_groups is group_topk is scaling_factor is expert_bias is None
        if use_pre_softmax:
            scores, indices = logits.softmax(-1).topk(topk)
        else:
            scores, indices = logits.topk(topk)
            scores = scores.softmax(-1)
        probs = torch.zeros_like(logits).scatter(1, indices, scores)
        if topk_indices is None:
            return probs, torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
        return probs, topk_indices.copy_(indices)

    def fused_compute_score_for_moe_aux_loss(
        logits: Tensor, topk: int, score_function: str, routing_map_format: str = "bytemap"
    ) -> tuple[Tensor, Tensor]:
        assert score_function == "softmax"
        routing_map = torch.zeros_like(logits, dtype=torch.bool)
        return routing_map.scatter(1, logits.topk(topk).indices, True), logits.float().softmax(-1)

    def fused_moe_aux_loss(
        probs: Tensor,
        tokens_per_expert: Tensor,
        total_num_tokens: int,
        num_experts: int,
        topk: int,
        coeff: float,
    ) -> Tensor:
        factor = num_experts * coeff / (topk * total_num_tokens * total_num_tokens)
        return (probs.sum(0) * tokens_per_expert).sum() * factor

    return {
        "fused_topk_with_score_function": fused_topk_with_score_function,
        "fused_compute_score_for_moe_aux_loss": fused_compute_score_for_moe_aux_loss,
        "fused_moe_aux_loss": fused_moe_aux_loss,
    }


def _permutation_functions() -> dict[str, Callable[..., Any]]:
    def moe_permute(
        inp: Tensor,
        routing_map: Tensor,
        num_out_tokens: int,
        max_token_num: int = -1,
        map_type: str = "mask",
    ) -> tuple[Tensor, Tensor]:
        assert map_type == "mask"
        assert routing_map.dtype == torch.int32
        expert, token = routing_map.T.nonzero(as_tuple=True)
        assert len(token) == num_out_tokens > 0
        return inp[token], torch.stack([token, expert], dim=1)

    def moe_unpermute(
        inp: Tensor,
        row_id_map: Tensor,
        merging_probs: Tensor | None = None,
        restore_shape: torch.Size | None = None,
        map_type: str = "mask",
    ) -> Tensor:
        assert map_type == "mask"
        assert merging_probs is not None
        assert isinstance(restore_shape, torch.Size)
        token, expert = row_id_map.unbind(1)
        weighted = (inp.float() * merging_probs[token, expert].unsqueeze(1)).to(inp.dtype)
        return inp.new_zeros(restore_shape).index_add(0, token, weighted)

    return {"moe_permute": moe_permute, "moe_unpermute": moe_unpermute}

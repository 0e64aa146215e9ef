"""Weights of a megablocks ``dMoE`` as those of ``moe_kernels.MoE``, and back, to the bit.

| megablocks (0.5 and newer) | | here | |
|---|---|---|---|
| ``router.layer.weight`` | (E, D) | ``router.weight`` | (E, D) |
| ``experts.mlp.w1`` | (E·F, D) | ``experts.up_proj`` | (E, F, D) |
| with ``experts.mlp.v1`` (GLU) | (E·F, D) | ``experts.gate_up_proj``: w1, then v1 | (E, 2F, D) |
| ``experts.mlp.w2`` | (E·F, D) | ``experts.down_proj`` | (E, D, F) |
| ``experts.bias`` | (D,) | ``MegaBlocksState.output_bias`` | (D,) |
| ``shared_expert.{gate,up,down}_proj`` | | ``shared_expert.{gate_up,up,down}_proj`` | |

megablocks itself is never imported, and needs no GPU for this.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROUTER = "router.layer.weight"
_EXPERTS = "experts.mlp"
_OUTPUT_BIAS = "experts.bias"
_SHARED = "shared_expert"


class MegaBlocksState(NamedTuple):
    """What ``from_megablocks`` returns.

    Attributes:
        layer: state dict of a ``moe_kernels.MoE``; without ``"experts."`` its expert entries are
            the state dict of a ``GroupedExperts``.
        output_bias: (D,) that megablocks adds to every token once, which a ``MoE`` has no place
            for: add it to the layer's output; ``None`` for a layer built with ``bias=False``.
        activation: the layer's ``activation``, read from a module; ``None`` for a state dict,
            which does not tell.
    """

    layer: dict[str, Tensor]
    output_bias: Tensor | None
    activation: str | None


def from_megablocks(source: Mapping[str, Tensor] | nn.Module) -> MegaBlocksState:
    """Turn the weights of a megablocks ``dMoE`` into those of a ``moe_kernels.MoE``.

    ``out = MoE(x) + output_bias`` is then what the dMoE computes, if the layer is built with
    ``router=TokenChoiceRouter(D, E, args.moe_top_k, normalize="per_token" if
    args.moe_normalize_expert_weights == 1 else "none")``, ``activation="swiglu"`` for a GLU with
    SiLU and ``"gelu_tanh"`` for an MLP with megablocks' default, and
    ``shared_intermediate_size=args.shared_expert_hidden_size`` if there is a shared expert
    (``bias=True`` if that has biases: the experts' own are then zeros).

    Args:
        source: a dMoE, or its ``state_dict()``: every key must be known, so take the prefix of a
            whole model off first. A shard of expert parallelism must be gathered first.

    Returns:
        A ``MegaBlocksState`` of new tensors in the dtype and on the device of the source.

    Raises:
        ValueError: a key that is missing or unknown, a size that does not fit, or a module whose
            arguments ask for what a ``MoE`` does not compute.

    Source: megablocks 0.10 (github.com/databricks/megablocks), ``megablocks/layers``.
    """
    activation = None
    if isinstance(source, nn.Module):
        activation = _check_module(source)
        source = source.state_dict()
    given = {name: tensor.detach() for name, tensor in source.items()}
    router = _take(given, _ROUTER, 2, "(num_experts, hidden_size)")
    num_experts, hidden_size = router.shape
    w1 = _take(given, f"{_EXPERTS}.w1", 2, "(num_experts * intermediate_size, hidden_size)")
    rows = w1.shape[0]
    if rows % num_experts or not rows or w1.shape[1] != hidden_size:
        raise ValueError(
            f"{_EXPERTS}.w1 has shape {tuple(w1.shape)}; expected a multiple of {num_experts} rows "
            f"of {hidden_size}, as {_ROUTER} has shape {tuple(router.shape)}. Gather the shards of "
            "expert parallelism first."
        )

    def by_expert(matrix: Tensor) -> Tensor:  # (E·F, D) -> (E, F, D)
        return matrix.unflatten(0, (num_experts, -1))

    layer = {"router.weight": router.clone()}
    gated = f"{_EXPERTS}.v1" in given
    if gated:
        v1 = _take_like(given, f"{_EXPERTS}.v1", w1)
        layer["experts.gate_up_proj"] = torch.cat([by_expert(w1), by_expert(v1)], dim=1)
    else:
        layer["experts.up_proj"] = by_expert(w1).clone()
    w2 = _take_like(given, f"{_EXPERTS}.w2", w1)
    layer["experts.down_proj"] = (
        by_expert(w2).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    )
    shared = _shared_from(given, hidden_size, gated)
    if f"{_SHARED}.down_proj.bias" in shared:
        # A MoE has one switch for the biases of the shared and of the routed experts.
        in_proj = "gate_up_proj" if gated else "up_proj"
        layer[f"experts.{in_proj}_bias"] = w1.new_zeros(layer[f"experts.{in_proj}"].shape[:2])
        layer["experts.down_proj_bias"] = w1.new_zeros(num_experts, hidden_size)
    output_bias = None
    if _OUTPUT_BIAS in given:
        output_bias = _take(given, _OUTPUT_BIAS, 1, "(hidden_size,)").clone()
        _check_size(_OUTPUT_BIAS, output_bias, (hidden_size,))
    _refuse_rest(given, "a dMoE")
    return MegaBlocksState(layer | shared, output_bias, activation)


def to_megablocks(
    layer: Mapping[str, Tensor] | nn.Module, output_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Turn the weights of a ``moe_kernels.MoE`` into the state dict of a megablocks ``dMoE``.

    Args:
        layer: a ``MoE`` with a ``TokenChoiceRouter``, or its ``state_dict()``.
        output_bias: (D,) for ``experts.bias``; ``None`` for a dMoE built with ``bias=False``.

    Returns:
        New tensors; ``from_megablocks`` gives the same bits back.

    Raises:
        ValueError: a key that is missing or unknown, a size that does not fit, or biases of single
            experts that are not zero, which a dMoE does not have.

    Source: megablocks 0.10 (github.com/databricks/megablocks), ``megablocks/layers``.
    """
    state = layer.state_dict() if isinstance(layer, nn.Module) else layer
    given = {name: tensor.detach() for name, tensor in state.items()}
    router = _take(given, "router.weight", 2, "(num_experts, hidden_size)")
    num_experts, hidden_size = router.shape
    down = _take(given, "experts.down_proj", 3, "(num_experts, hidden_size, intermediate_size)")
    intermediate_size = down.shape[2]
    _check_size("experts.down_proj", down, (num_experts, hidden_size, intermediate_size))
    gated = "experts.gate_up_proj" in given
    in_proj = "gate_up_proj" if gated else "up_proj"
    w_in = _take(given, f"experts.{in_proj}", 3, "(num_experts, rows, hidden_size)")
    rows_in = 2 * intermediate_size if gated else intermediate_size
    _check_size(f"experts.{in_proj}", w_in, (num_experts, rows_in, hidden_size))
    for name in (f"experts.{in_proj}_bias", "experts.down_proj_bias"):
        if name in given and given.pop(name).count_nonzero():
            raise ValueError(
                f"{name} is not zero; the experts of a dMoE have no biases of their own. Set it to "
                "zero, or keep the layer here."
            )
    halves = w_in.chunk(2, dim=1) if gated else (w_in,)
    out = {_ROUTER: router.clone()}
    for name, half in zip(("w1", "v1"), halves, strict=False):  # no v1 without a gate
        out[f"{_EXPERTS}.{name}"] = half.flatten(0, 1).clone()
    out[f"{_EXPERTS}.w2"] = down.transpose(1, 2).flatten(0, 1).clone()
    if output_bias is not None:
        _check_size("output_bias", output_bias, (hidden_size,))
        out[_OUTPUT_BIAS] = output_bias.detach().clone()
    out |= _shared_to(given, hidden_size, gated)
    _refuse_rest(given, "a MoE that a dMoE can compute")
    return out


def _shared_from(given: dict[str, Tensor], hidden_size: int, gated: bool) -> dict[str, Tensor]:
    """Take the shared expert out of a dMoE's entries; empty if there is none."""
    if f"{_SHARED}.up_proj.weight" not in given:
        return {}
    up = _take(given, f"{_SHARED}.up_proj.weight", 2, "(shared_intermediate_size, hidden_size)")
    _check_size(f"{_SHARED}.up_proj.weight", up, (up.shape[0], hidden_size))
    down = _take(given, f"{_SHARED}.down_proj.weight", 2, "(hidden_size, shared_intermediate_size)")
    _check_size(f"{_SHARED}.down_proj.weight", down, (hidden_size, up.shape[0]))
    parts = {"weight": (up, down)}
    if f"{_SHARED}.up_proj.bias" in given:
        up_bias = given.pop(f"{_SHARED}.up_proj.bias")
        _check_size(f"{_SHARED}.up_proj.bias", up_bias, (up.shape[0],))
        down_bias = _take(given, f"{_SHARED}.down_proj.bias", 1, "(hidden_size,)")
        _check_size(f"{_SHARED}.down_proj.bias", down_bias, (hidden_size,))
        parts["bias"] = (up_bias, down_bias)
    out = {}
    for kind, (up_part, down_part) in parts.items():
        if gated:
            gate_part = _take_like(given, f"{_SHARED}.gate_proj.{kind}", up_part)
            out[f"{_SHARED}.gate_up_proj.{kind}"] = torch.cat([gate_part, up_part])
        else:
            out[f"{_SHARED}.up_proj.{kind}"] = up_part.clone()
        out[f"{_SHARED}.down_proj.{kind}"] = down_part.clone()
    return out


def _shared_to(given: dict[str, Tensor], hidden_size: int, gated: bool) -> dict[str, Tensor]:
    """Take the shared expert out of a MoE's entries; empty if there is none."""
    in_proj = f"{_SHARED}.gate_up_proj" if gated else f"{_SHARED}.up_proj"
    if f"{in_proj}.weight" not in given:
        return {}
    w_in = _take(given, f"{in_proj}.weight", 2, "(rows, hidden_size)")
    rows = w_in.shape[0]
    down = _take(given, f"{_SHARED}.down_proj.weight", 2, "(hidden_size, shared_intermediate_size)")
    _check_size(f"{_SHARED}.down_proj.weight", down, (hidden_size, rows // 2 if gated else rows))
    _check_size(f"{in_proj}.weight", w_in, (down.shape[1] * (2 if gated else 1), hidden_size))
    parts = {"weight": (w_in, down)}
    if f"{in_proj}.bias" in given:
        in_bias = given.pop(f"{in_proj}.bias")
        _check_size(f"{in_proj}.bias", in_bias, (rows,))
        down_bias = _take(given, f"{_SHARED}.down_proj.bias", 1, "(hidden_size,)")
        _check_size(f"{_SHARED}.down_proj.bias", down_bias, (hidden_size,))
        parts["bias"] = (in_bias, down_bias)
    out = {}
    for kind, (in_part, down_part) in parts.items():
        names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        for name, half in zip(names, in_part.chunk(len(names)), strict=True):
            out[f"{_SHARED}.{name}.{kind}"] = half.clone()
        out[f"{_SHARED}.down_proj.{kind}"] = down_part.clone()
    return out


def _take(given: dict[str, Tensor], name: str, rank: int, shape_words: str) -> Tensor:
    if name not in given:
        known = ", ".join(sorted(given)) or "none"
        raise ValueError(
            f"{name} is missing among the keys {known}; pass the state dict of the MoE layer "
            "alone, its keys without the prefix that they have in a whole model."
        )
    tensor = given.pop(name)
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape_words}.")
    return tensor


def _take_like(given: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    tensor = _take(given, name, like.dim(), f"{tuple(like.shape)}")
    _check_size(name, tensor, tuple(like.shape))
    return tensor


def _check_size(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}.")


def _refuse_rest(given: dict[str, Tensor], words: str) -> None:
    if given:
        raise ValueError(
            f"{', '.join(sorted(given))}: not among the weights of {words}; "
            "nothing is converted, so that nothing is lost. Leave these keys out if you mean to."
        )


def _check_module(module: nn.Module) -> str:
    """Refuse a dMoE that a MoE cannot compute, and return the activation that it needs."""
    args: Any = getattr(getattr(module, "experts", None), "args", None)
    if args is None:
        raise ValueError(
            f"source is a {type(module).__name__} without experts.args; expected a megablocks dMoE "
            "or its state dict."
        )
    refused = {
        "moe_expert_model_parallelism": "gather the weights of all ranks into a state dict",
        "shared_expert_weighted_sum": "a MoE adds its shared expert with weight 1",
    }
    for name, words in refused.items():
        if getattr(args, name, False):
            raise ValueError(f"{name} is {getattr(args, name)!r}; expected False: {words}.")
    norm = getattr(args, "moe_normalize_expert_weights", None)
    if norm not in (None, 0, 1):
        raise ValueError(
            f"moe_normalize_expert_weights is {norm!r}; expected None or 1, which a "
            'TokenChoiceRouter calls normalize "none" and "per_token".'
        )
    gated = getattr(args, "mlp_type", "mlp") == "glu"
    for name, activation in _GATES.items() if gated else _ACTIVATIONS.items():
        if _same_function(args.activation_fn, activation):
            return name
    raise ValueError(
        f"activation_fn is {args.activation_fn!r} in an {'GLU' if gated else 'MLP'}; expected "
        f"{'SiLU' if gated else 'GELU (tanh or exact)'}, which a MoE computes."
    )


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu}


def _same_function(given: Callable[[Tensor], Tensor], known: Callable[[Tensor], Tensor]) -> bool:
    """Compared by value, since megablocks takes any callable; the two GELUs differ by 5e-4."""
    points = torch.linspace(-6, 6, 121, dtype=torch.float64)
    return torch.allclose(given(points), known(points), rtol=0, atol=1e-9)

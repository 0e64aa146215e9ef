"""The expert classes of public diffusion transformers, and what each asks of the kernels."""

from typing import Any

from torch import nn

from moe_kernels.integrations.adapter import why_bypassing_is_wrong
from moe_kernels.integrations.expert_list import ExpertList


class SwiGLUExperts(ExpertList):
    """``MoeMLP`` of DiT-MoE: ``down_proj(silu(gate_proj x) · up_proj x)``."""

    def changed(self, experts: Any) -> str | None:
        reason = super().changed(experts)
        if reason is not None:
            return reason
        for i, expert in enumerate(experts):
            act = getattr(expert, "act_fn", None)
            if type(act) is not nn.SiLU:
                return f"the act_fn of experts.{i} is a {type(act).__name__}, not SiLU"
            reason = why_bypassing_is_wrong(act, f"experts.{i}.act_fn")
            if reason is not None:
                return reason
            slices, width = getattr(expert, "pretraining_tp", 1), expert.gate_proj.out_features
            if slices > 1 and width % slices:
                # The original drops the channels that its slices do not cover.
                return f"pretraining_tp {slices} does not divide the {width} channels of an expert"
        return None

    def activation(self, experts: Any) -> str:
        """The kernels' name of what these experts compute."""
        return "swiglu"


class MlpExperts(ExpertList):
    """``Mlp`` of vision transformers: ``fc2(gelu(fc1 x))``."""

    def changed(self, experts: Any) -> str | None:
        reason = super().changed(experts)
        if reason is not None:
            return reason
        first = getattr(experts[0], "act", None)
        for i, expert in enumerate(experts):
            act = getattr(expert, "act", None)
            if type(act) is not nn.GELU or act.approximate != getattr(first, "approximate", None):
                return f"the act of experts.{i} is {act}, not the GELU of the others"
            reason = why_bypassing_is_wrong(act, f"experts.{i}.act")
            if reason is not None:
                return reason
            if type(getattr(expert, "norm", None)) not in (nn.Identity, type(None)):
                return f"experts.{i} has a norm between its layers"
            for name in ("drop", "drop1", "drop2"):
                if getattr(getattr(expert, name, None), "p", 0) > 0:
                    return f"experts.{i}.{name} is an active dropout"
        return None

    def activation(self, experts: Any) -> str:
        """The kernels' name of what these experts compute."""
        return "gelu_tanh" if experts[0].act.approximate == "tanh" else "gelu"


_SWIGLU = SwiGLUExperts(("gate_proj", "up_proj"), "down_proj")
_MLP = MlpExperts(("fc1",), "fc2", bias=True)
_MLP_WITHOUT_BIAS = MlpExperts(("fc1",), "fc2")


def expert_kind(experts: Any) -> SwiGLUExperts | MlpExperts:
    """Which of the classes these experts are, by their attributes."""
    first = experts[0]
    if not hasattr(first, "fc1"):
        return _SWIGLU
    return _MLP_WITHOUT_BIAS if getattr(first.fc1, "bias", None) is None else _MLP


def why_not_experts(experts: Any) -> str | None:
    """Why these experts cannot be served."""
    if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
        return f"experts is a {type(experts).__name__}, not a list of modules"
    if not hasattr(experts[0], "fc1") and not hasattr(experts[0], "gate_proj"):
        return f"experts.0 is a {type(experts[0]).__name__} without fc1 or gate_proj"
    return expert_kind(experts).why_not(experts)

"""Experts that are a list of small MLPs of ``nn.Linear`` s: their weights in the kernels' order."""

from typing import Any

from torch import nn

from moe_kernels.integrations.adapter import why_bypassing_is_wrong
from moe_kernels.integrations.packing import pack


class ExpertList:
    """How a family names the matrices of an expert.

    Args:
        names_in: of the first product; for SwiGLU gate and then up.
        name_out: of the second product.
        bias: whether all of them have biases.
        class_name: of an expert; ``None`` where the family has experts of several classes.
    """

    def __init__(
        self,
        names_in: tuple[str, ...],
        name_out: str,
        bias: bool = False,
        class_name: str | None = None,
    ) -> None:
        self.names_in, self.name_out, self.bias = names_in, name_out, bias
        self.class_name = class_name
        self.names = (*names_in, name_out)

    def why_not(self, experts: Any) -> str | None:
        """Why these experts cannot be served."""
        if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
            return f"experts is a {type(experts).__name__}, not a list of modules"
        shapes = None
        for i, expert in enumerate(experts):
            if type(expert) is not type(experts[0]):
                return f"experts.{i} is a {type(expert).__name__}, unlike experts.0"
            found = []
            for name in self.names:
                linear = getattr(expert, name, None)
                if type(linear) is not nn.Linear:
                    return f"experts.{i}.{name} is a {type(linear).__name__}, not an nn.Linear"
                if (linear.bias is not None) != self.bias:
                    return f"experts.{i}.{name} has {'no' if self.bias else 'a'} bias"
                found.append((linear.weight.shape, linear.weight.dtype, linear.weight.device))
            shapes = shapes or found
            if found != shapes:
                return f"experts.{i} differs from experts.0 in shapes, dtype or device"
        return self.changed(experts)

    def changed(self, experts: Any) -> str | None:
        """Why the experts have to be called instead of read."""
        for i, expert in enumerate(experts):
            reason = why_bypassing_is_wrong(expert, f"experts.{i}", self.class_name)
            if reason is not None:
                return reason
            for name in self.names:
                linear = getattr(expert, name, None)
                if type(linear) is not nn.Linear:
                    return f"experts.{i}.{name} is a {type(linear).__name__} now"
                if (linear.bias is not None) != self.bias:
                    return f"experts.{i}.{name} has {'no' if self.bias else 'a'} bias now"
                reason = why_bypassing_is_wrong(linear, f"experts.{i}.{name}")
                if reason is not None:
                    return reason
        return None

    def pack(self, experts: Any) -> str | None:
        """Make each of the lists below adjacent in memory."""
        reason = self.changed(experts)
        if reason is not None:
            return reason
        reasons = [pack(self.weights_in(experts)), pack(self.weights_out(experts))]
        if self.bias:
            reasons += [pack(self.biases_in(experts)), pack(self.biases_out(experts))]
        return next((reason for reason in reasons if reason is not None), None)

    def weights_in(self, experts: Any) -> list[Any]:
        """First matrices: of expert 0 (gate, up), of expert 1, ..."""
        return [getattr(expert, name).weight for expert in experts for name in self.names_in]

    def weights_out(self, experts: Any) -> list[Any]:
        """Second matrices."""
        return [getattr(expert, self.name_out).weight for expert in experts]

    def biases_in(self, experts: Any) -> list[Any]:
        """Biases of the first matrices."""
        return [getattr(expert, name).bias for expert in experts for name in self.names_in]

    def biases_out(self, experts: Any) -> list[Any]:
        """Biases of the second matrices."""
        return [getattr(expert, self.name_out).bias for expert in experts]

    def operands(self, experts: Any) -> dict[str, Any]:
        """The weights as arguments of ``expert_mlp``."""
        return {
            "w_in": self.weights_in(experts),
            "w_out": self.weights_out(experts),
            "bias_in": self.biases_in(experts) if self.bias else None,
            "bias_out": self.biases_out(experts) if self.bias else None,
        }

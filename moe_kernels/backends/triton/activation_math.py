"""Activations and their derivatives in fp32, for the epilogues of the products."""

import triton
import triton.language as tl

# Values of the ACTIVATION constant of kernels.
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "swiglu": 2}
GELU_TANH = tl.constexpr(ACTIVATIONS["gelu_tanh"])
GELU = tl.constexpr(ACTIVATIONS["gelu"])
SWIGLU = tl.constexpr(ACTIVATIONS["swiglu"])

_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
_THREE_CUBIC = tl.constexpr(0.134145)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(h, ACTIVATION: tl.constexpr):
    """GELU; the tanh form is h * sigmoid(2u), since (1 + tanh(u)) / 2 = sigmoid(2u)."""
    if ACTIVATION == GELU_TANH:
        return h * tl.sigmoid((h + h * h * h * _CUBIC) * _TWO_SQRT_2_OVER_PI)
    return h * 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))


@triton.jit
def gelu_with_slope(h, ACTIVATION: tl.constexpr):
    """GELU and its derivative."""
    if ACTIVATION == GELU_TANH:
        s = tl.sigmoid((h + h * h * h * _CUBIC) * _TWO_SQRT_2_OVER_PI)
        du = (h * h * _THREE_CUBIC + 1.0) * _TWO_SQRT_2_OVER_PI
        return h * s, s + h * s * (1.0 - s) * du
    normal = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
    return h * normal, normal + h * _INV_SQRT_2PI * tl.exp(-0.5 * h * h)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_with_slopes(gate, up):
    """SwiGLU, and its derivatives by the gate and by the up half."""
    s = tl.sigmoid(gate)
    silu = gate * s
    return silu * up, up * (s + silu * (1.0 - s)), silu

"""Tile sizes shipped with the package: data only, by architecture, product and rows an expert.

No entry has been measured yet (see the README on GPU figures): they follow from what fits. Each
compiles without spills on its architecture, and its shared memory leaves room for the blocks that
it is meant to have on a multiprocessor; ``python -m benchmarks.triton_check`` proves both.
``moe_kernels.warmup(..., tune=True)`` measures alternatives on the GPU at hand.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How a grouped product is cut.

    Attributes:
        block_m, block_n, block_k: tile of the result, and step along the summed dimension.
        num_warps, num_stages: compile options.
        group_m: row tiles that pass all column tiles together, to share them in L2.
        persistent: as many programs as run at once, each computing several tiles; with tensor
            descriptors where tensors allow them.
        blocks: programs meant to run on a processor at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    persistent: bool = False
    blocks: int = 1


# Mean rows an expert up to which a bucket applies; the last one has no end.
BUCKETS = {"few": 32, "some": 256, "many": None}

# Products: up_fwd (gather, activation), up_fwd_gated (SwiGLU: two accumulators), rows_gemm (w as in
# nn.Linear), rows_gemm_nn (the other way), down_bwd (activation backward), weight_bwd (along rows).
PRODUCTS = ("up_fwd", "up_fwd_gated", "rows_gemm", "rows_gemm_nn", "down_bwd", "weight_bwd")

# Architectures that share a table: compute capabilities 8.6, 8.9 and 12.x have 99 KiB of shared
# memory a block, 8.0 has 163, 9.0 and 10.x have 227.
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "sm_120",
    "sm_87": "sm_80",
    "sm_89": "sm_120",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_120",
    "sm_121": "sm_120",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
    "interpreter": "interpreter",
}


def _by_bucket(few: Config, some: Config, many: Config) -> dict[str, Config]:
    return {"few": few, "some": some, "many": many}


_FEW_80 = Config(16, 128, 64, 4, 3)
_SOME_80 = Config(64, 128, 64, 4, 3)
_MANY_80 = Config(128, 128, 64, 8, 3)
_SM_80 = {
    "up_fwd": _by_bucket(_FEW_80, _SOME_80, _MANY_80),
    "up_fwd_gated": _by_bucket(
        Config(16, 64, 64, 4, 3), Config(64, 64, 64, 4, 3), Config(128, 64, 64, 8, 3)
    ),
    "rows_gemm": _by_bucket(_FEW_80, _SOME_80, _MANY_80),
    "rows_gemm_nn": _by_bucket(_FEW_80, _SOME_80, _MANY_80),
    "down_bwd": _by_bucket(_FEW_80, _SOME_80, _MANY_80),
    "weight_bwd": _by_bucket(Config(128, 128, 32, 8, 3), _MANY_80, _MANY_80),
}

_FEW_90 = Config(64, 128, 64, 4, 3, persistent=True, blocks=2)
_SOME_90 = Config(64, 128, 64, 4, 4, persistent=True, blocks=2)
_MANY_90 = Config(128, 256, 64, 8, 3, persistent=True)
_HALF_90 = Config(128, 128, 64, 8, 3, persistent=True)
_SM_90 = {
    "up_fwd": _by_bucket(_FEW_90, _SOME_90, _MANY_90),
    "up_fwd_gated": _by_bucket(
        Config(64, 64, 64, 4, 3, persistent=True, blocks=3),
        Config(64, 64, 64, 4, 4, persistent=True, blocks=2),
        _HALF_90,
    ),
    "rows_gemm": _by_bucket(_FEW_90, _SOME_90, _MANY_90),
    "rows_gemm_nn": _by_bucket(_FEW_90, _SOME_90, _MANY_90),
    "down_bwd": _by_bucket(_FEW_90, _SOME_90, _HALF_90),
    "weight_bwd": _by_bucket(
        Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3)
    ),
}

_FEW_100 = Config(64, 128, 64, 4, 4, persistent=True, blocks=2)
_SOME_100 = Config(128, 128, 64, 8, 4, persistent=True)
_MANY_100 = Config(128, 256, 64, 8, 3, persistent=True)
_SM_100 = {
    "up_fwd": _by_bucket(_FEW_100, _SOME_100, _SOME_100),
    "up_fwd_gated": _by_bucket(
        Config(64, 64, 64, 4, 4, persistent=True, blocks=2),
        Config(128, 64, 64, 8, 4, persistent=True),
        Config(128, 128, 64, 8, 3, persistent=True),
    ),
    "rows_gemm": _by_bucket(_FEW_100, _SOME_100, _MANY_100),
    "rows_gemm_nn": _by_bucket(_FEW_100, _SOME_100, _MANY_100),
    "down_bwd": _by_bucket(_FEW_100, _SOME_100, _SOME_100),
    "weight_bwd": _by_bucket(
        Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4)
    ),
}

_FEW_120 = Config(16, 128, 64, 4, 3, persistent=True, blocks=2)
_SOME_120 = Config(64, 128, 64, 4, 3, persistent=True, blocks=2)
_MANY_120 = Config(128, 128, 32, 8, 4, persistent=True)
_SM_120 = {
    "up_fwd": _by_bucket(_FEW_120, _SOME_120, _MANY_120),
    "up_fwd_gated": _by_bucket(
        Config(16, 64, 64, 4, 3, persistent=True, blocks=2),
        Config(64, 64, 64, 4, 3, persistent=True, blocks=2),
        Config(128, 64, 32, 8, 4, persistent=True),
    ),
    "rows_gemm": _by_bucket(_FEW_120, _SOME_120, _MANY_120),
    "rows_gemm_nn": _by_bucket(_FEW_120, _SOME_120, _MANY_120),
    "down_bwd": _by_bucket(_FEW_120, _SOME_120, _MANY_120),
    "weight_bwd": _by_bucket(
        Config(128, 128, 32, 8, 3), Config(128, 128, 32, 8, 4), Config(128, 128, 32, 8, 4)
    ),
}

_FEW_942 = Config(16, 128, 64, 4, 2)
_SOME_942 = Config(64, 128, 64, 4, 2)
_MANY_942 = Config(128, 128, 64, 8, 2)
_GFX_942 = {
    "up_fwd": _by_bucket(_FEW_942, _SOME_942, _MANY_942),
    "up_fwd_gated": _by_bucket(
        Config(16, 64, 64, 4, 2), Config(64, 64, 64, 4, 2), Config(128, 64, 64, 8, 2)
    ),
    "rows_gemm": _by_bucket(_FEW_942, _SOME_942, _MANY_942),
    "rows_gemm_nn": _by_bucket(_FEW_942, _SOME_942, _MANY_942),
    "down_bwd": _by_bucket(_FEW_942, _SOME_942, _MANY_942),
    "weight_bwd": _by_bucket(
        Config(128, 128, 32, 8, 2), Config(128, 128, 64, 8, 2), Config(128, 128, 64, 8, 2)
    ),
}

# Small, because the interpreter's tests are: several tiles, and ends that do not fill one.
_TEST = Config(16, 32, 16, 4, 1, group_m=2)
_INTERPRETER = {product: _by_bucket(_TEST, _TEST, _TEST) for product in PRODUCTS}

SIXTEEN_BIT = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _GFX_942,
    "interpreter": _INTERPRETER,
}

# fp32 products run without tensor cores unless PyTorch allows TF32; one size for both.
_FEW_32 = Config(16, 64, 32, 4, 2)
_MANY_32 = Config(64, 64, 32, 4, 2)
_NARROW_32 = Config(64, 32, 32, 4, 2)
FP32 = {
    family: (
        _INTERPRETER
        if family == "interpreter"
        else {
            **{product: _by_bucket(_FEW_32, _MANY_32, _MANY_32) for product in PRODUCTS},
            "up_fwd_gated": _by_bucket(_FEW_32, _NARROW_32, _NARROW_32),
            "down_bwd": _by_bucket(_FEW_32, _NARROW_32, _NARROW_32),
        }
    )
    for family in SIXTEEN_BIT
}

# What ``warmup(..., tune=True)`` tries besides the shipped config. Those that do not fit a GPU's
# shared memory are passed over.
CANDIDATES = (
    Config(64, 64, 64, 4, 4),
    Config(64, 128, 32, 4, 4),
    Config(64, 256, 64, 8, 3),
    Config(128, 64, 64, 4, 4),
    Config(128, 128, 32, 4, 4),
    Config(128, 128, 64, 4, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 3),
)

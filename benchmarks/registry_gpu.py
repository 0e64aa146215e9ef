"""The GPU entries, as data: the figures wanted on an H100 in bf16, the most telling ones first.

A run that has little time does the first of them.
"""

from collections.abc import Iterator

from benchmarks.entry import BY_BACKEND, Entry, FigureGoal, Goal, Shape
from benchmarks.registry_presets import GPU_PRESET_ENTRIES
from benchmarks.registry_scaling import GPU_SCALING_ENTRIES

ROUTE_MODES = ("forward", "backward", "both")
LAYER_MODES = ("forward", "both")
# Expert MLPs of other libraries. Not transformers_batched_mm: it copies the matrices of every row,
# hundreds of gigabytes at these shapes.
LIBRARIES = (
    *("transformers_eager", "transformers_grouped_mm", "megablocks_grouped", "megablocks_sparse"),
    *("liger", "moe_ops", "scattermoe", "sonicmoe"),
)

# Every layer, whoever runs it, has to keep the host free.
NO_SYNC = FigureGoal("host_syncs", at_most=0)
# What makes expert choice by the CUDA kernels worth choosing.
CUDA_FASTER = FigureGoal("forward.cuda_speedup", at_least=1.5)


def _expert_choice(
    seq_len: int, batch_size: int = 32, all_experts: tuple[int, ...] = (8, 16, 64)
) -> Iterator[Entry]:
    for experts in all_experts:
        most = _expert_choice_microseconds(batch_size, seq_len, experts)
        wanted = () if most is None else (FigureGoal("forward.graph_us", at_most=most),)
        yield Entry(
            f"gpu_expert_choice/B{batch_size}-S{seq_len}-E{experts}",
            "expert_choice",
            {"B": batch_size, "S": seq_len, "E": experts},
            {"B": 2, "S": 37, "E": experts},
            ROUTE_MODES,
            ("minimal", "eager", "tuned", *BY_BACKEND, "ours"),
            (
                Goal("forward", "eager", at_least=10.0),
                Goal("forward", "minimal", at_least=8.0),
            ),
            figures=(*wanted, CUDA_FASTER, NO_SYNC),
        )


def _expert_choice_microseconds(batch_size: int, seq_len: int, experts: int) -> float | None:
    """Most that the forward is to take; ``None`` where nothing is wanted."""
    # Up to 1024 tokens an image the time is that of a launch and its latencies.
    if seq_len <= 1024:
        return 8.0
    # Wanted only where reading the logits leaves time for the rest: an H100 reads 3.35 MB in a
    # microsecond. For 32 images of 8 experts (16.8 MB) that is 5 us, of 16 experts 10, of 64 40.
    if seq_len == 16384 and batch_size * experts <= 32 * 8:
        return 15.0
    return None


def _whole_batch() -> Entry:
    """One pool of a million tokens.

    Wanted: at most twice the time of reading the logits three times, which are 96 numbers a token.
    A copy moves the 24 that count as traffic (16 logits, the outputs of two rows) in a quarter.
    """
    return Entry(
        "gpu_expert_choice/B1-S1048576-E16",
        "expert_choice",
        {"B": 1, "S": 2**20, "E": 16},
        {"B": 1, "S": 74, "E": 16},
        ROUTE_MODES,
        ("minimal", "eager", "tuned", *BY_BACKEND, "ours"),
        figures=(FigureGoal("forward.copy_share", at_least=0.25), CUDA_FASTER, NO_SYNC),
    )


def _token_choice() -> Iterator[Entry]:
    # TransformerEngine's fused router is no goal: its published times are not known to us for these
    # shapes on an H100, and its result is a (T, E) map, without the rows sorted by expert.
    for tokens in (8192, 32768):
        for experts in (8, 64):
            yield Entry(
                f"gpu_token_choice/T{tokens}-E{experts}-K2",
                "token_choice",
                {"T": tokens, "E": experts, "K": 2},
                {"T": 33, "E": experts, "K": 2},
                ROUTE_MODES,
                ("eager", "tuned", "transformer_engine", *BY_BACKEND, "ours"),
                (Goal("forward", "eager", at_least=5.0),) if tokens == 32768 else (),
                figures=(NO_SYNC,),
            )


def _ec_layer(batch_size: int, seq_len: int, hidden_size: int, experts: int) -> Entry:
    one_hot = (Goal("both", "one_hot", at_least=2.0),) if seq_len >= 1024 else ()
    return Entry(
        f"gpu_ec_layer/B{batch_size}-S{seq_len}-D{hidden_size}-E{experts}",
        "ec_layer",
        {"B": batch_size, "S": seq_len, "D": hidden_size, "E": experts},
        {"B": 2, "S": 24, "D": 16, "E": 8},
        LAYER_MODES,
        ("one_hot", "good_eager", "compiled", "dense_limit", "ours"),
        (Goal("both", "compiled", at_least=1.25), *one_hot),
        dtype="bfloat16",
        memory=("one_hot", "good_eager", "compiled", "dense_limit", "ours"),
        figures=(FigureGoal("saved_share.good_eager", at_most=0.6), NO_SYNC),
    )


def _dit_moe_xl(batch_size: int) -> Entry:
    """F is 4608 = 4D and there is no shared expert, which other libraries leave to PyTorch."""
    return Entry(
        f"gpu_dit_moe_layer/T{batch_size * 256}-D1152-E8-K2",
        "dit_moe_layer",
        {"B": batch_size, "S": 256, "D": 1152, "E": 8, "shared": 0},
        {"B": 2, "S": 24, "D": 16, "E": 8, "shared": 0},
        LAYER_MODES,
        (
            *("published", "good_eager", "compiled"),
            *("grouped_mm", "grouped_permute", "grouped_compiled"),
            *LIBRARIES,
            *("dense_limit", "ours"),
        ),
        dtype="bfloat16",
        memory=("good_eager", "grouped_permute", "grouped_compiled", "dense_limit", "ours"),
        figures=(
            FigureGoal("both.best", at_least=1.0),
            FigureGoal("both.tflops", at_least=400.0),
            FigureGoal("both.dense_share", at_most=1.15),
            FigureGoal("saved_share.good_eager", at_most=0.6),
            NO_SYNC,
        ),
    )


def _rows(tokens: int) -> Iterator[Entry]:
    """Gather and combine, whose only limit is memory."""
    shape, tiny = {"D": 1152, "E": 8, "K": 2}, {"D": 20, "E": 8, "K": 2}
    wanted = tuple(
        FigureGoal(f"{mode}.copy_share", at_least=0.7) for mode in ("forward", "backward")
    )
    combined = (FigureGoal("forward.copy_share", at_least=0.8), wanted[1])
    yield Entry(
        f"gpu_dispatch/T{tokens}-D1152",
        "dispatch",
        {"T": tokens, **shape},
        {"T": 33, **tiny},
        ("forward", "backward"),
        ("index_select", "transformer_engine", *BY_BACKEND, "ours"),
        dtype="bfloat16",
        figures=wanted,
    )
    for router in ("token_choice", "expert_choice"):
        middle = ("gather_sum",) if router == "token_choice" else ()
        yield Entry(
            f"gpu_combine/{router}-T{tokens}-D1152",
            "combine",
            {"router": router, "T": tokens, **shape},
            {"router": router, "T": 32, **tiny},
            ("forward", "backward"),
            ("index_add", *middle, "transformer_engine", *BY_BACKEND, "ours"),
            dtype="bfloat16",
            figures=combined,
        )


def _skew(skew: str) -> Iterator[Entry]:
    """Unequal use of the experts, beside the equal one of the entries without the word."""
    shape: Shape = {"T": 32768, "E": 64, "K": 2, "skew": skew}
    yield Entry(
        f"gpu_token_choice_skew/{skew}-T32768-E64-K2",
        "token_choice",
        shape,
        {**shape, "T": 33},
        ROUTE_MODES,
        ("eager", "tuned", "transformer_engine", "ours"),
        figures=(NO_SYNC,),
    )
    shape = {"B": 32, "S": 256, "D": 1152, "E": 8, "shared": 0, "skew": skew}
    yield Entry(
        f"gpu_dit_moe_skew/{skew}-T8192-D1152-E8-K2",
        "dit_moe_layer",
        shape,
        {**shape, "B": 2, "S": 24, "D": 16},
        LAYER_MODES,
        ("good_eager", "grouped_mm", "grouped_permute", *LIBRARIES, "dense_limit", "ours"),
        dtype="bfloat16",
        figures=(NO_SYNC,),
    )


GPU_ENTRIES: tuple[Entry, ...] = (
    _ec_layer(32, 256, 1152, 8),
    _dit_moe_xl(32),
    *_expert_choice(256),
    *_expert_choice(1024),
    *_rows(32768),
    *_token_choice(),
    *_expert_choice(16384),
    *_expert_choice(16384, batch_size=4, all_experts=(16, 64)),
    _whole_batch(),
    _ec_layer(16, 1024, 1152, 16),
    _ec_layer(4, 4096, 2048, 32),
    _dit_moe_xl(128),
    *_expert_choice(512),
    *_expert_choice(4096),
    *_rows(8192),
    *_skew("zipf"),
    *_skew("collapsed"),
    *GPU_PRESET_ENTRIES,
    *GPU_SCALING_ENTRIES,
)

"""The entries, as data; ``suites.py`` says which of them make up a suite."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.entry import MODES, Entry, Goal, Shape
from benchmarks.registry_gpu import GPU_ENTRIES
from benchmarks.registry_presets import PRESET_ENTRIES
from benchmarks.registry_scaling import SCALING_ENTRIES
from benchmarks.stages.skew import SKEWS

ROUTE_MODES = ("forward", "backward")


def _token_choice() -> Iterator[Entry]:
    for tokens, experts, top_k, forward in (
        (256, 8, 2, 8.0),
        (2048, 8, 2, 10.0),
        (16384, 8, 2, 12.0),
        (2048, 64, 6, None),
    ):
        goals = (Goal("forward", "eager", at_least=forward),) if forward else ()
        yield Entry(
            f"token_choice/T{tokens}-E{experts}-K{top_k}",
            "token_choice",
            {"T": tokens, "E": experts, "K": top_k},
            {"T": 33, "E": experts, "K": top_k},
            ROUTE_MODES,
            ("eager", "tuned", "compiled", "reference", "ours"),
            (*goals, Goal("backward", "eager", at_least=5.0)),
        )


def _expert_choice() -> Iterator[Entry]:
    for experts, forward in ((8, 10.0), (16, 6.0), (64, 6.0)):
        for batch_size, seq_len in ((8, 256), (32, 256), (4, 1024)):
            yield Entry(
                f"expert_choice/B{batch_size}-S{seq_len}-E{experts}",
                "expert_choice",
                {"B": batch_size, "S": seq_len, "E": experts},
                {"B": 2, "S": 37, "E": experts},
                ROUTE_MODES,
                ("minimal", "eager", "tuned", "compiled", "reference", "ours"),
                (
                    Goal("forward", "eager", at_least=forward),
                    Goal("backward", "eager", at_least=3.0),
                ),
            )


def _dispatch() -> Iterator[Entry]:
    for tokens, hidden_size in ((2048, 384), (2048, 1152), (8192, 384), (8192, 1152)):
        yield Entry(
            f"dispatch/T{tokens}-D{hidden_size}",
            "dispatch",
            {"T": tokens, "D": hidden_size, "E": 8, "K": 2},
            {"T": 33, "D": 20, "E": 8, "K": 2},
            ROUTE_MODES,
            ("index_select", "reference", "ours"),
        )


def _combine() -> Iterator[Entry]:
    sizes = ((2048, 384), (2048, 1152), (8192, 384), (8192, 1152))
    routers = [("token_choice", *size) for size in sizes]
    routers += [("expert_choice", 2048, 384), ("expert_choice", 8192, 1152)]
    for router, tokens, hidden_size in routers:
        # In expert choice tokens have different numbers of rows, which gather_sum cannot do.
        middle = ("gather_sum",) if router == "token_choice" else ()
        yield Entry(
            f"combine/{router}-T{tokens}-D{hidden_size}",
            "combine",
            {"router": router, "T": tokens, "D": hidden_size, "E": 8, "K": 2},
            {"router": router, "T": 32, "D": 20, "E": 8, "K": 2},
            ROUTE_MODES,
            ("index_add", *middle, "embedding_bag", "reference", "ours"),
            tuple(Goal(mode, "index_add", at_least=2.8) for mode in ROUTE_MODES),
        )


def _dit_moe_layer() -> Iterator[Entry]:
    tiny = {"B": 2, "S": 24, "D": 16, "E": 8}
    plain = ("published", "good_eager", "compiled", "grouped_mm")
    libraries = ("transformers_eager", "transformers_grouped_mm")
    for hidden_size, batch_size, seq_len, published, dense in (
        (384, 8, 256, 1.45, 1.03),
        (768, 4, 256, 1.4, 1.05),
        (384, 1, 128, 2.3, 1.45),
        (128, 2, 256, 2.9, 0.95),
    ):
        large = batch_size * seq_len >= 1024
        goals = (
            Goal("both", "published", at_least=published),
            Goal("both", "dense_limit", at_most=dense),
            Goal("memory", "published", at_most=0.5),
        )
        entry = Entry(
            f"dit_moe_layer/D{hidden_size}-T{batch_size * seq_len}",
            "dit_moe_layer",
            {"B": batch_size, "S": seq_len, "D": hidden_size, "E": 8},
            tiny,
            MODES,
            (*plain, *libraries, "reference", "dense_limit", "ours"),
            goals if large else goals[:2],
            memory=("published", "good_eager", "dense_limit", "ours") if large else (),
        )
        yield entry
        if (hidden_size, batch_size) == (384, 8):
            yield _in_bfloat16(entry)


def _ec_layer() -> Iterator[Entry]:
    providers = ("one_hot", "good_eager", "compiled", "reference", "dense_limit", "ours")
    for hidden_size, batch_size, seq_len, one_hot in (
        (768, 4, 256, 1.25),
        (384, 8, 256, 1.6),
        (384, 1, 128, 1.6),
        (128, 8, 256, 2.5),
    ):
        large = batch_size * seq_len * hidden_size >= 2**19
        entry = Entry(
            f"ec_layer/D{hidden_size}-T{batch_size * seq_len}",
            "ec_layer",
            {"B": batch_size, "S": seq_len, "D": hidden_size, "E": 8},
            {"B": 2, "S": 24, "D": 16, "E": 8},
            MODES,
            providers,
            (
                Goal("both", "one_hot", at_least=one_hot),
                Goal("both", "compiled", at_least=1.0),
            ),
            memory=("one_hot", "good_eager", "dense_limit", "ours") if large else (),
        )
        yield entry
        if (hidden_size, batch_size) == (384, 8):
            yield _in_bfloat16(entry)


def _in_bfloat16(entry: Entry) -> Entry:
    """The goals are for fp32."""
    return replace(entry, name=f"{entry.name}-bf16", dtype="bfloat16", goals=(), memory=())


def _skew() -> Iterator[Entry]:
    """Token choice with experts that are used unequally; uniform is what random routers do."""
    for skew in SKEWS:
        for experts, top_k in ((8, 2), (64, 6)):
            shape: Shape = {"T": 8192, "E": experts, "K": top_k, "skew": skew}
            yield Entry(
                f"token_choice_skew/{skew}-T8192-E{experts}-K{top_k}",
                "token_choice",
                shape,
                {**shape, "T": 33},
                ROUTE_MODES,
                ("eager", "tuned", "ours"),
            )
        shape = {"B": 4, "S": 256, "D": 384, "E": 8, "skew": skew}
        yield Entry(
            f"dit_moe_skew/{skew}-D384-T1024",
            "dit_moe_layer",
            shape,
            {**shape, "B": 2, "S": 24, "D": 16},
            ("forward", "both"),
            ("published", "good_eager", "grouped_mm", "dense_limit", "ours"),
        )


def _overhead() -> Iterator[Entry]:
    """Each public op on 16 tokens, where the time is the call."""
    sizes = {"T": 16, "D": 16, "E": 8, "K": 2}
    image = {"B": 1, "S": 16, "D": 16, "E": 8}
    stages: tuple[tuple[str, Shape, str], ...] = (
        ("token_choice", {"T": 16, "E": 8, "K": 2}, "eager"),
        ("expert_choice", {"B": 1, "S": 16, "E": 8}, "eager"),
        ("dispatch", sizes, "index_select"),
        ("combine", {"router": "token_choice", **sizes}, "index_add"),
        ("dit_moe_layer", image, "good_eager"),
        ("ec_layer", image, "good_eager"),
    )
    for stage, shape, plain in stages:
        # It copies the matrices of every row, which only so small a shape allows.
        copied = ("transformers_batched_mm",) if stage == "dit_moe_layer" else ()
        providers = (plain, *copied, "reference", "ours")
        yield Entry(f"overhead/{stage}", stage, shape, shape, MODES, providers)
    losses = ("load_balance_loss", "router_z_loss", "router_similarity_loss")
    for op in ("grouped_gemm", "expert_mlp", *losses):
        shape = {"op": op, **sizes}
        modes = ("forward",) if op in losses else MODES
        # Routing has computed the first two, off the clock: code that does it here is no peer.
        peers = () if op in losses[:2] else ("eager", "reference")
        yield Entry(f"overhead/{op}", "single_op", shape, shape, modes, (*peers, "ours"))


ENTRIES: tuple[Entry, ...] = (
    *_token_choice(),
    *_expert_choice(),
    *_dispatch(),
    *_combine(),
    *_dit_moe_layer(),
    *_ec_layer(),
    *_skew(),
    *PRESET_ENTRIES,
    *_overhead(),
    *SCALING_ENTRIES,
)


def find_entry(name: str) -> Entry:
    """The entry of this name.

    Raises:
        ValueError: when there is none.
    """
    for entry in (*ENTRIES, *GPU_ENTRIES):
        if entry.name == name:
            return entry
    raise ValueError(f"entry is {name!r}; python -m benchmarks.run --list prints the names.")

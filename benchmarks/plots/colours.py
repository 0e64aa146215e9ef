"""One colour and one marker for each provider, the same in every picture.

The hues are those of Okabe and Ito and of Tol's muted set, which people with the usual forms of
colour blindness tell apart; where there are more providers than hues, the marker differs.
"""

import zlib
from typing import NamedTuple


class Style(NamedTuple):
    """How a provider looks."""

    colour: str
    marker: str


OURS = "ours"
STYLES: dict[str, Style] = {
    OURS: Style("#D55E00", "o"),
    "ours:cuda": Style("#D55E00", "^"),
    "ours:triton": Style("#D55E00", "s"),
    "ours_compiled": Style("#D55E00", "D"),
    "reference": Style("#8C8C8C", "x"),
    "dense_limit": Style("#000000", "_"),
    "published": Style("#0072B2", "s"),
    "one_hot": Style("#332288", "P"),
    "minimal": Style("#332288", "v"),
    "eager": Style("#0072B2", "v"),
    "index_select": Style("#0072B2", "<"),
    "index_add": Style("#0072B2", ">"),
    "good_eager": Style("#009E73", "^"),
    "tuned": Style("#009E73", "<"),
    "gather_sum": Style("#009E73", ">"),
    "embedding_bag": Style("#56B4E9", "D"),
    "compiled": Style("#CC79A7", "D"),
    "grouped_mm": Style("#E69F00", "v"),
    "grouped_permute": Style("#999933", "<"),
    "grouped_compiled": Style("#882255", "D"),
    "dense": Style("#000000", "_"),
    "megablocks_grouped": Style("#117733", "P"),
    "megablocks_sparse": Style("#117733", "X"),
    "transformers_eager": Style("#56B4E9", "p"),
    "transformers_batched_mm": Style("#56B4E9", "s"),
    "transformers_grouped_mm": Style("#56B4E9", "h"),
    "liger": Style("#AA4499", "P"),
    "moe_ops": Style("#AA4499", "X"),
    "scattermoe": Style("#332288", "X"),
    "sonicmoe": Style("#44AA99", "P"),
    "transformer_engine": Style("#44AA99", "X"),
}
# For providers without a style of their own.
_OTHERS = tuple(
    Style(colour, marker)
    for marker in "*hp"
    for colour in ("#56B4E9", "#117733", "#AA4499", "#44AA99", "#999933", "#882255", "#332288")
)


def style_of(provider: str) -> Style:
    """The provider's own style; one that follows from its name where it has none."""
    return STYLES.get(provider) or _OTHERS[zlib.crc32(provider.encode()) % len(_OTHERS)]


def colour_of(provider: str) -> str:
    """Only the colour, for bars."""
    return style_of(provider).colour

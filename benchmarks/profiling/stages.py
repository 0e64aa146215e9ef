"""The stages of a layer that time is assigned to.

An operator does not know what it is used for: ``mul`` is one in the activation and in the weighted
sum. What a name does not decide is called after what it does (``elementwise``), and what no table
knows is ``other``.
"""

ROUTER = "router"  # its product, and the affinities
SELECT = "select"  # top-k, sorting and counting; ours: all of routing in one operator
MOVE = "move rows"
PRODUCTS = "products"  # of the experts and of a shared expert
ELEMENTWISE = "elementwise"  # activations, scaling, sums, casts, copies
COMBINE = "combine"
FUSED = "expert MLP (fused)"  # ours on a CPU: rows, products, activation and combine in one
LOSSES = "losses"
COMPILED = "compiled code"
OTHER = "other"
BETWEEN = "between operators"  # Python, and starting operators
# As they run in a layer.
STAGES = (
    ROUTER,
    SELECT,
    MOVE,
    PRODUCTS,
    ELEMENTWISE,
    COMBINE,
    FUSED,
    LOSSES,
    COMPILED,
    OTHER,
    BETWEEN,
)
BACKWARD = ", backward"  # behind the name of a stage


def in_order() -> list[str]:
    """Every name of a stage, each before that of its backward."""
    return [name for stage in STAGES for name in (stage, stage + BACKWARD)]

"""``Recipe``: the options of ``upcycle`` that say how a block is made."""

from dataclasses import dataclass

from moe_kernels.checks import check_choice, check_positive_int


@dataclass(kw_only=True)
class Recipe:
    """The arguments of ``upcycle`` that say how a block is made.

    They are checked, and ``None`` becomes the default of the chosen routing and mode, when a recipe
    is created.
    """

    num_experts: int
    routing: str
    mode: str
    keep_function: bool
    capacity_factor: float | None
    top_k: int | None
    shards: int | None
    normalize: str | None
    group: str | int
    drop_ratio: float
    router_std: float

    def __post_init__(self) -> None:
        check_positive_int("num_experts", self.num_experts)
        check_choice("routing", self.routing, ("expert_choice", "token_choice"))
        check_choice("mode", self.mode, ("copy", "split", "drop"))
        if self.normalize is None:
            self.normalize = "per_token" if self.keeps_by_weights else "none"
        check_choice("normalize", self.normalize, ("none", "per_token"))
        if not self.router_std > 0:
            raise ValueError(f"router_std is {self.router_std}; expected a positive number.")
        if self.mode == "drop" and not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"drop_ratio is {self.drop_ratio}; expected 0 to 1.")
        self._check_shards()
        if self.routing == "expert_choice":
            self._check_expert_choice()
        else:
            self._check_token_choice()

    def _check_shards(self) -> None:
        if self.mode != "split" and self.shards is not None:
            raise ValueError(f'shards is {self.shards} in mode {self.mode!r}; only "split" has it.')
        if self.shards is None:
            self.shards = 2 if self.mode == "split" else 1
        check_positive_int("shards", self.shards)
        if self.num_experts % self.num_shards:
            raise ValueError(
                f"num_experts is {self.num_experts}; expected a multiple of shards = {self.shards}."
            )

    def _check_expert_choice(self) -> None:
        if self.top_k is not None:
            raise ValueError(
                f"top_k is {self.top_k} with expert choice, where experts choose tokens; set "
                "capacity_factor, the average number of experts per token."
            )
        if self.capacity_factor is None:
            self.capacity_factor = min(2.0, float(self.num_experts))
        if not 0 < self.capacity_factor <= self.num_experts:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}; expected more than 0 and at most "
                f"num_experts = {self.num_experts}."
            )

    def _check_token_choice(self) -> None:
        if self.group != "image":
            raise ValueError(
                f"group is {self.group!r} with token choice, where tokens choose; only expert "
                "choice has pools."
            )
        if self.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor} with token choice, which drops no "
                "token; set top_k."
            )
        if self.top_k is None:
            self.top_k = self.num_shards if self.mode == "split" else min(2, self.num_experts)
        check_positive_int("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; expected at most {self.num_experts} experts.")
        if self.keeps_by_weights and self.normalize == "none":
            raise ValueError(
                'normalize is "none" with keep_function=True; raw weights do not sum to 1, so '
                'leave it at "per_token" or set keep_function=False.'
            )
        if self.keeps_by_weights and self.top_k % self.num_shards:
            raise ValueError(
                f"top_k is {self.top_k} with keep_function=True; a token needs all {self.shards} "
                "shards of the dense MLP, so expected a multiple of shards."
            )

    @property
    def words(self) -> str:
        """The recipe in a line."""
        if self.routing == "token_choice":
            routing = f"token choice, top {self.top_k} of {self.num_experts}"
        else:
            routing = f"expert choice, capacity factor {self.capacity_factor:g}, "
            routing += f"{self.num_experts} experts"
        mode = self.mode
        if mode == "split":
            mode = f"{self.shards} shards of each MLP"
        elif mode == "drop":
            mode = f"{self.drop_ratio:.0%} of the channels drawn anew"
        kept = "plain weights"
        if self.keep_function:
            kept = "function kept by the " + (
                "routing weights" if self.keeps_by_weights else "dense MLP as shared expert"
            )
        return f"{routing}; {mode}; {kept}"

    @property
    def num_shards(self) -> int:
        """Experts that together hold the channels of one dense MLP."""
        return self.shards or 1

    @property
    def keeps_by_weights(self) -> bool:
        """The experts of every token add up to the dense MLP."""
        return self.keep_function and self.routing == "token_choice" and self.mode != "drop"

    @property
    def keeps_by_shared_expert(self) -> bool:
        """The dense MLP stays, and the routed experts start at zero."""
        return self.keep_function and not self.keeps_by_weights

    @property
    def experts_per_token(self) -> float:
        """On average."""
        per_token = self.capacity_factor if self.top_k is None else self.top_k
        assert per_token is not None
        return float(per_token)

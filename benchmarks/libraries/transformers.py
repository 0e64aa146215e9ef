"""The experts backends of Hugging Face transformers: ``eager``, ``batched_mm``, ``grouped_mm``.

Read from transformers 5.23, ``integrations/moe.py``. An experts module there has the stacked
matrices in this project's layout and chooses its forward by ``config._experts_implementation``.
"""

from collections.abc import Callable

from torch import Tensor

from benchmarks.libraries.library import ExpertMLP, Experts, Library


def maker(implementation: str) -> Callable[[], ExpertMLP]:
    """Mixtral's experts, whose activation is SwiGLU, with one of the backends."""

    def make() -> ExpertMLP:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(hidden_size=1, intermediate_size=1, num_local_experts=1)
        config._experts_implementation = implementation
        module = MixtralExperts(config)
        # Plain attributes from here on, which take the benchmark's own tensors.
        del module.gate_up_proj, module.down_proj

        def experts(
            x: Tensor, weights: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor
        ) -> Tensor:
            module.num_experts = w_in.shape[0]
            module.gate_up_proj, module.down_proj = w_in, w_out
            # The eager loop makes a one-hot of the indices, which wants int64.
            out: Tensor = module(x, chosen.long() if implementation == "eager" else chosen, weights)
            return out

        return experts

    return make


LIBRARY = Library(
    "transformers",
    "transformers",
    "transformers",
    load=maker("eager"),
    install=('pip install "transformers>=5"',),
    experts={
        "transformers_eager": Experts(maker("eager"), "transformers, experts backend eager"),
        "transformers_batched_mm": Experts(
            maker("batched_mm"), "transformers, batched_mm: the matrices of each row, copied"
        ),
        "transformers_grouped_mm": Experts(
            maker("grouped_mm"), "transformers, experts backend grouped_mm"
        ),
    },
    devices=("cpu", "cuda"),
    extra="bench",
)

"""What the planner is asked: the run and the machines, checked."""

from dataclasses import dataclass

from dit_models.count import DEFAULT_TEXT_LEN
from dit_models.model_config import ModelConfig
from dit_models.router_losses import check_accumulation

PRECISIONS = ("bf16", "fp32")
OPTIMIZERS = ("adamw", "rmsprop")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Run:
    """A training run as far as its memory and its traffic depend on it.

    Attributes:
        model: shape of the model.
        images_per_gpu: images that one GPU sees in one forward and backward.
        accumulate: of these to an optimizer step.
        precision: "bf16" (weights, gradients and optimizer in fp32, products in bf16) or "fp32".
        optimizer: "adamw" or "rmsprop" (with momentum): two fp32 numbers a parameter either way.
        ema: keep averaged weights.
        reshard_after_forward: free a block's gathered weights between forward and backward.
        imbalance: rows that the fullest owner of experts gets, over the mean: 1 with expert choice,
            what the logged ``expert_load`` says with token choice. Only memory counts it.
        text_len: text tokens L a caption, for a text model.
        device: whose temporaries to count: "cuda" (Triton kernels, flash attention), or "cpu" (with
            ``MOE_KERNELS_PRODUCTS=torch``), where the model of the memory is measured.
    """

    model: ModelConfig
    images_per_gpu: int = 32
    accumulate: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    ema: bool = True
    reshard_after_forward: bool = True
    imbalance: float = 1.0
    text_len: int = DEFAULT_TEXT_LEN
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("images_per_gpu", "accumulate", "text_len"):
            _check_at_least_one(name, getattr(self, name))
        if not 1 <= self.imbalance < float("inf"):
            raise ValueError(f"imbalance={self.imbalance}; expected a finite number of at least 1.")
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("device", self.device, DEVICES)
        check_accumulation(self.accumulate, self.model)

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that a matrix product reads."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Cluster:
    """The machines. Rates are assumptions of whoever asks, not measurements.

    Attributes:
        gpus: GPUs in all.
        gpu_memory: of one GPU, in GB of 10^9 bytes.
        reserve: share of it that a plan must leave free, for the CUDA context, NCCL, the
            allocator's fragmentation and what the model does not count.
        gpus_per_node: GPUs that one fast link joins.
        nvlink_gb_s: GB/s of a GPU in one direction inside a node.
        network_gb_s: GB/s of a GPU in one direction between nodes.
        tflops: peak of a GPU in the precision of the run, in 10^12 flops a second.
        utilization: share of the peak that training reaches.
    """

    gpus: int
    gpu_memory: float
    reserve: float = 0.1
    gpus_per_node: int = 8
    nvlink_gb_s: float = 450.0
    network_gb_s: float = 50.0
    tflops: float = 989.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            _check_at_least_one(name, getattr(self, name))
        for name in ("gpu_memory", "nvlink_gb_s", "network_gb_s", "tflops", "utilization"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}; expected a finite number above 0.")
        if self.utilization > 1:
            raise ValueError(f"utilization={self.utilization}; expected at most 1.")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve={self.reserve}; expected at least 0 and below 1.")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus={self.gpus} is not a multiple of gpus_per_node={self.gpus_per_node}; "
                "plan with whole nodes, or set gpus_per_node to what each node gives."
            )

    @property
    def usable_bytes(self) -> float:
        """Memory that a plan may fill."""
        return self.gpu_memory * 1e9 * (1 - self.reserve)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}; expected at least 1.")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}.")

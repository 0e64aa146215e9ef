"""Names of operators, autograd nodes and GPU kernels, and the stage of each; tables only."""

from benchmarks.profiling.stages import (
    COMBINE,
    COMPILED,
    ELEMENTWISE,
    FUSED,
    LOSSES,
    MOVE,
    PRODUCTS,
    ROUTER,
    SELECT,
)
from moe_kernels.backends import BACKENDS

# Ops of torch.ops.moe_kernels. Each is opaque: what runs inside belongs to it.
OURS = {
    "affinity": ROUTER,
    "token_choice": SELECT,
    "expert_choice": SELECT,
    "route_bwd": SELECT,
    "global_search": SELECT,
    "rank_sum": SELECT,
    "dispatch": MOVE,
    "sum_rows": MOVE,  # alone it is dispatch's backward
    "grouped_gemm": PRODUCTS,
    "grouped_gemm_bwd": PRODUCTS,
    "ragged_gemm": PRODUCTS,
    "ragged_gemm_bwd": PRODUCTS,
    "activation": ELEMENTWISE,
    "activation_bwd": ELEMENTWISE,
    "expert_mlp": FUSED,
    "expert_mlp_bwd": FUSED,
    "expert_mlp_parts": FUSED,
    "expert_mlp_parts_bwd": FUSED,
    "combine": COMBINE,
    "gather": COMBINE,  # alone it is combine's backward
    "similarity": LOSSES,
    "similarity_bwd": LOSSES,
}
# Dispatched "moe_kernels::combine", an autograd.Function "combine_cpu", its "combine_cpuBackward".
OURS_PATTERN = (
    r"(?P<library>moe_kernels::)?(?P<op>[a-z_]+?)"
    rf"(?P<backend>_({'|'.join(BACKENDS)}))?(Backward)?"
)

# What the autograd engine writes before the name of a node.
NODE = "autograd::engine::evaluate_function: "

# A node is the backward of an operator, whatever it calls: that of index_select is an index_add.
NODES = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Logsumexp", "Sigmoid"), ROUTER),
    **dict.fromkeys(("Topk", "Sort", "Cumsum"), SELECT),
    **dict.fromkeys(("IndexSelect", "Index", "Gather", "RepeatInterleave", "Embedding"), MOVE),
    **dict.fromkeys(("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "GroupedMm", "Mv"), PRODUCTS),
    **dict.fromkeys(
        ("IndexAdd", "IndexPut", "ScatterAdd", "Scatter", "EmbeddingBag", "IndexCopy"), COMBINE
    ),
    **dict.fromkeys(
        ("Silu", "Gelu", "Mul", "Add", "Sub", "Div", "Neg", "Exp", "Sum", "Mean", "Pow", "Glu"),
        ELEMENTWISE,
    ),
    **dict.fromkeys(("Cat", "Stack", "ToCopy", "Clone", "Copy", "CopySlices"), ELEMENTWISE),
    **dict.fromkeys(("Split", "SplitWithSizes", "Unbind", "Slice", "Select", "Chunk"), ELEMENTWISE),
}

# ATen's operators without "aten::" and without the underscore of the in-place form.
OPERATORS = {
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "sigmoid"), ROUTER
    ),
    **dict.fromkeys(
        ("topk", "sort", "argsort", "bincount", "cumsum", "searchsorted", "one_hot", "nonzero"),
        SELECT,
    ),
    **dict.fromkeys(
        (
            "histc",
            "unique",
            "_unique2",
            "unique_consecutive",
            "eq",
            "lt",
            "ge",
            "arange",
            "scatter",
        ),
        SELECT,
    ),
    **dict.fromkeys(("floor_divide", "item", "_local_scalar_dense", "is_nonzero", "diff"), SELECT),
    **dict.fromkeys(
        ("index_select", "index", "gather", "repeat_interleave", "embedding", "take_along_dim"),
        MOVE,
    ),
    **dict.fromkeys(
        ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "matmul", "linear", "einsum", "addmv"),
        PRODUCTS,
    ),
    **dict.fromkeys(
        ("_grouped_mm", "grouped_mm", "_scaled_grouped_mm", "_addmm_activation"), PRODUCTS
    ),
    **dict.fromkeys(("mkldnn_linear", "_mkl_linear", "mkldnn::_linear_pointwise"), PRODUCTS),
    **dict.fromkeys(
        ("index_add", "index_put", "_index_put_impl", "scatter_add", "embedding_bag"), COMBINE
    ),
    **dict.fromkeys(("_embedding_bag", "scatter_reduce", "index_copy"), COMBINE),
    **dict.fromkeys(
        ("silu", "gelu", "glu", "silu_backward", "gelu_backward", "glu_backward", "relu"),
        ELEMENTWISE,
    ),
    **dict.fromkeys(
        ("mul", "add", "sub", "div", "neg", "exp", "pow", "square", "log", "sqrt", "reciprocal"),
        ELEMENTWISE,
    ),
    **dict.fromkeys(("sum", "mean", "amax", "max", "clamp", "clamp_min", "where"), ELEMENTWISE),
    **dict.fromkeys(
        ("copy", "_to_copy", "to", "clone", "contiguous", "cat", "stack", "fill", "zero", "zeros"),
        ELEMENTWISE,
    ),
    **dict.fromkeys(("zeros_like", "new_zeros", "ones", "ones_like", "full"), ELEMENTWISE),
    **dict.fromkeys(("slice_backward", "select_backward", "unbind_backward"), ELEMENTWISE),
}

# What torch.compile shows of itself; products that it leaves to a library are operators inside.
COMPILED_PREFIXES = (
    "Torch-Compiled Region",
    "CompiledFunction",
    "CompiledFxGraph",
    "## Call CompiledFxGraph",
    "TorchDynamo",
    "AOTDispatcher",
    "Pregraph bytecode",
    "cpp_fused",
    "inductor::",
)

# Kernels on a GPU; the first pattern that is found in the name counts.
KERNELS = (
    (r"_affinity_fwd_kernel|_expert_choice_affinity_kernel|\bAffinityFwd<", ROUTER),
    (r"_(token|expert)_choice_\w+_kernel|\b(TokenChoice|ExpertChoice(Short|Long))<", SELECT),
    (r"_radix_\w+_kernel|_group_scan_kernel|_route_bwd_kernel|\bRouteBwd<", SELECT),
    (r"_pairs_fwd_kernel|_similarity_(fwd|bwd)_kernel", LOSSES),
    (r"_(up_fwd|rows_gemm|down_bwd|weight_bwd)_kernel", PRODUCTS),
    (r"_activation_(fwd|bwd)_kernel|_bias_bwd_kernel", ELEMENTWISE),
    (r"_sum_rows_kernel|_gate_gradient_kernel|\b(Sum|Scale)Rows<", COMBINE),
    (r"_gather_kernel|\bCopyRows<", MOVE),
    (r"softmax|SoftMax", ROUTER),
    (r"(?i)radix_?sort|bitonic|sbtopk|mbtopk|gatherTopK|topk|DeviceScan|DeviceHistogram", SELECT),
    (r"(?i)DeviceSelect|DeviceReduceByKey|DeviceMergeSort|searchsorted|bincount", SELECT),
    # triton_tem: a template of torch.compile, which is a product.
    (r"(?i)gemm|gemv|cutlass|\bnvjet|wgmma|xmma|grouped_mm|\btriton_(tem|mm)_", PRODUCTS),
    (r"\btriton_(poi|red|per|for)_", COMPILED),
    (r"(?i)indexFunc|index_?add|index_put|scatter_add|embedding_?bag|indexing_backward", COMBINE),
    (r"(?i)index_?select|gather|index_elementwise|index_kernel|vectorized_gather", MOVE),
    (r"(?i)elementwise|reduce_kernel|CatArray|Memcpy|Memset|copy_kernel|FillFunctor", ELEMENTWISE),
)
# Kernels of ours whose name says that they are a backward.
BACKWARD_KERNELS = r"_bwd_kernel|Bwd<|_gate_gradient_kernel|\bScaleRows<"

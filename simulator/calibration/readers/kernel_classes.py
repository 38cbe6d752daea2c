"""What a kernel does, by its name; and by what launched it, where the name alone does not say.

The first pattern that is found decides, so that a fused kernel counts as its dearer part. Names are those of PyTorch,
NCCL, DeepEP, cuBLAS, CUTLASS, FlashAttention, cuDNN, Transformer Engine, Apex, Triton, ROCm, XLA, and of DeepSeek-AI's
published profile. What no pattern finds is `other`, and counts as not classed.
"""

from __future__ import annotations

import re
from functools import lru_cache

OTHER = "other"

# Kernels that move data between devices, or wait for other devices to do so.
COMMUNICATION = (
    "dispatch", "combine", "exchange_notify", "all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast",
    "send_receive", "collective",
)  # fmt: skip

_NAMES: tuple[tuple[str, str], ...] = (
    # DeepEP and its kin. A notify exchanges counts and is a barrier: its time is mostly waiting for the others.
    ("exchange_notify",
     r"(?:\b|_)ep::(?:internode|intranode|internode_ll)::(?:cached_)?(?:notify|barrier)\w*|hybrid_ep.*preproc"),
    ("dispatch", r"(?:\b|_)ep::(?:internode|intranode|internode_ll)::dispatch\b|hybrid_ep::dispatch|\bEpDispatch"),
    ("combine", r"(?:\b|_)ep::(?:internode|intranode|internode_ll)::combine\b|hybrid_ep::combine|\bEpCombine"),
    ("permute", r"get_dispatch_layout"),
    ("all_reduce", r"nccl\w*_AllReduce|^all-reduce|cross_device_reduce|multimem_all_reduce"),
    ("all_gather", r"nccl\w*_AllGather|^all-gather|multimem_all_gather"),
    ("reduce_scatter", r"nccl\w*_ReduceScatter|^reduce-scatter"),
    ("all_to_all", r"nccl\w*_(?:AllToAll|AlltoAll)|^(?:ragged-)?all-to-all"),
    ("broadcast", r"nccl\w*_Broadcast|^collective-broadcast"),
    ("send_receive", r"nccl\w*_SendRecv|^collective-permute|^send\b|^recv\b"),
    # NCCL's generic kernel, where only what launched it knows which collective it is, and its rarer ones.
    ("collective", r"nccl(?:Dev)?Kernel|^nccl"),
    # Attention before products: its kernels are made of CUTLASS's too.
    ("attention_backward",
     r"FlashAttnBwd|flash_bwd|flash.*backward|fmha\w*(?:bwd|backward)|sdpa\w*bprop|attn_bwd|_bwd_(?:kernel_)?d(?:q|k|kv)\b"),
    ("attention_forward",
     r"flash::compute_attn|FlashAttnFwd|flash_fwd|fmha\w*(?:fwd|forward|cutlassF)|sdpa\w*(?:fprop|flash)|_attn_fwd|"
     r"flash.*forward|FlashAttn|^custom-call.*attention"),
    # A transpose of scales is in the same namespace as the products that read it.
    ("layout", r"grouped_gemm::cuda::utils::"),
    # The weight gradients of dense products and of experts' are one kernel; what launched it tells them apart.
    ("weight_gradient_gemm", r"fp8_dptp128c_acc"),
    ("grouped_gemm",
     r"\bm_grouped_|\bk_grouped_|GroupProblemShape|GemmGrouped|GroupedGemm|(?<!::)\bgrouped_(?:gemm|mm)(?!::)|"
     r"\bgmm\b|ragged[_-]dot|megablox|fused_moe_kernel|m_grouped_fp8|GroupedConfig"),
    ("dense_gemm",
     r"fp8_ptp128c|gemm|nvjet|cijk_|Cijk_|\bcublas|xmma_|cutlass.*Gemm|\bmatmul|^dot\b|^(?:convolution|conv)\b|"
     r"splitKreduce"),
    # Fused with a cast, an activation is still what the kernel is for.
    ("activation", r"swiglu|silu|gelu|geglu|\bact_and_mul|relu"),
    ("optimizer", r"multi_tensor_apply|multi_tensor_(?:adam|l2norm|scale)|[Aa]dam|[Aa]dafactor|lamb_stage|fused_sgd"),
    ("norm", r"layer_?norm|LayerNorm|rms_?norm|RMSNorm|ln_(?:fwd|bwd)|batch_norm"),
    ("router", r"topk|TopK|unique_group_indices|aux_(?:fi|loss)|moe_aux_loss|gating|noaux_tc"),
    ("rotary", r"rotary|(?:\b|_)rope|RoPE"),
    ("loss", r"cross_entropy|nll_loss|log_?softmax|LogSoftMax"),
    ("embedding", r"embedding|index_select|indexSelect"),
    ("permute",
     r"(?:un)?permute|expand_to_fused|reduce_fused|get_fused_mapping|clean_and_count_expert|moe_(?:align|sort)|"
     r"count_cumsum|\bpadded_(?:gather|scatter)|scatter_moe|gather_moe|sort_chunks"),
    ("cast", r"cast_to_fp8|cast_and_transpose|cast_back|cast_transpose|quantize|Quantize|to_fp8|amax|mxfp8|nvfp4"),
    ("memory_copy", r"^Memcpy|^Memset|^copy-(?:start|done)|^MemcpyD2D"),
    ("layout", r"direct_copy_kernel|_copy_tensor|transpose|CatArrayBatchedCopy|contiguous|^copy\b|split_with_sizes"),
    ("softmax", r"softmax|SoftMax"),
    ("elementwise", r"elementwise_kernel|reduce_kernel|scatter_gather|index_(?:put|add)|distribution_|FillFunctor|"
     r"triton_(?:poi|red|per|for)_|cub::|thrust::|tensor_kernel_scan|index_elementwise|fill_tensormaps|RadixSort|bitonicSort|"
     # XLA names what is in a fusion on GPUs only: a plain fusion may be a product.
     r"^(?:loop|input|wrapped)_\w+|^(?:add|multiply|reduce|broadcast|select|convert)\b"),
)  # fmt: skip
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _NAMES)

# Kernels that any op may use: the op that launched them says what for. Innermost op first.
_GENERIC = ("elementwise", "layout", "memory_copy", "softmax", "dense_gemm", "collective", "send_receive", OTHER)
_OPS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("all_to_all", re.compile(r"^nccl:all_?to_?all|^c10d::all_?to_?all")),
    ("all_reduce", re.compile(r"^nccl:all_?reduce|^c10d::all_?reduce")),
    ("all_gather", re.compile(r"^nccl:_?all_?gather|^c10d::_?all_?gather")),
    ("reduce_scatter", re.compile(r"^nccl:_?reduce_?scatter|^c10d::_?reduce_?scatter")),
    ("optimizer", re.compile(r"^Optimizer\.|_fused_adam|_foreach_|clip_grad|^Optimizer#")),
    (
        "attention_backward",
        re.compile(r"^aten::\w*(?:scaled_dot_product|flash_attention)\w*backward$|^_?FlashAttn\w*FuncBackward$"),
    ),
    ("attention_forward", re.compile(r"^aten::_?scaled_dot_product")),
    ("loss", re.compile(r"cross_entropy|nll_loss|log_softmax", re.IGNORECASE)),
    ("embedding", re.compile(r"^aten::embedding|EmbeddingBackward")),
    ("norm", re.compile(r"layer_?norm$|rms_?norm$|LayerNormBackward|RMSNormBackward", re.IGNORECASE)),
    ("activation", re.compile(r"^aten::(?:silu|gelu)|SiluBackward|GeluBackward|swiglu", re.IGNORECASE)),
    ("router", re.compile(r"^aten::topk$")),
    ("grouped_gemm", re.compile(r"^aten::_grouped_mm|GroupedGemm|GroupedLinear")),
)
_COPIES = re.compile(r"^aten::(?:copy_|clone|contiguous|_to_copy|to|fill_|zero_)$")

_BACKWARD_OP = re.compile(r"^autograd::engine::evaluate_function|Backward\d*$|_backward$")
_BACKWARD_REGION = re.compile(r"\((?:B|W)\)$|backward|bwd", re.IGNORECASE)
_FORWARD_REGION = re.compile(r"\(F\)$|forward|fwd", re.IGNORECASE)
_BACKWARD_NAME = re.compile(r"bwd|[Bb]ackward|Bwd|wgrad|dgrad|fp8_dptp128c_acc")


@lru_cache(maxsize=65536)
def by_name(name: str) -> str:
    """The class of a kernel by its name alone."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), OTHER)


@lru_cache(maxsize=65536)
def kernel_class(name: str, ops: tuple[str, ...] = (), region: str = "") -> str:
    """The class of a kernel; `ops` are the ops round its launch, outermost first, `region` the annotation round it."""
    found = by_name(name)
    if found == "weight_gradient_gemm" and region.lower().startswith("attn"):
        # Attention has no experts.
        return "dense_gemm"
    if found in _GENERIC and not (found == "layout" and "grouped_gemm" in name):
        for op in reversed(ops):
            if _COPIES.search(op):
                continue
            by_op = next((c for c, pattern in _OPS if pattern.search(op)), None)
            if by_op is not None and _fits(found, by_op):
                return by_op
    return found


def _fits(by_name: str, by_op: str) -> bool:
    """Whether an op may say what a kernel of such a name is: a product stays one, a collective too."""
    if by_name == "dense_gemm":
        return by_op == "grouped_gemm"
    return (by_name in COMMUNICATION) == (by_op in COMMUNICATION) or by_name == OTHER


@lru_cache(maxsize=65536)
def phase_of(name: str, ops: tuple[str, ...] = (), region: str = "") -> str:
    """forward or backward, or nothing where the trace does not say; what a backward pass makes again is backward."""
    if any(_BACKWARD_OP.search(op) for op in ops) or _BACKWARD_REGION.search(region):
        return "backward"
    if _FORWARD_REGION.search(region):
        return "forward"
    return "backward" if _BACKWARD_NAME.search(name) else ""


# A gradient takes the way of its value back: what returns results in the forward pass is a dispatch in the backward.
_SCOPES = {
    ("dispatch", "forward"): "moe.dispatch_all_to_all",
    ("combine", "backward"): "moe.dispatch_all_to_all_backward",
    ("combine", "forward"): "moe.combine_all_to_all",
    ("dispatch", "backward"): "moe.combine_all_to_all",
    ("attention_forward", "forward"): "attention.core",
    ("attention_backward", "backward"): "attention.core",
}


def scope_of(name: str, phase: str, stack: str) -> str:
    """The scope (`simulator/job/scopes.py`) that a class and pass are all of in `stack`, or nothing where none is."""
    scope = _SCOPES.get((name, phase))
    return f"{stack}.{scope}" if scope else ""

"""The one list of scope names: what the simulator calls its ops, and the trainer its `jax.named_scope`s.

A scope is `<stack>.<sublayer>.<op>`, or `<end>.<op>` outside the layers. A trace event and a simulated op meet by it.
"""

from __future__ import annotations

STACKS = ("encoder", "decoder", "mtp")

_ATTENTION = ("norm", "core", "output", "casts", "residual", "tensor_reduce")
_SELF = ("qkv", "q_down", "q_up", "kv_down", "kv_up", "kv_exchange")

SUBLAYERS: dict[str, tuple[str, ...]] = {
    "attention": (*_ATTENTION, *_SELF),
    "cross_attention": (*_ATTENTION, "q", "kv", "kv_exchange"),
    "lstm": ("input", "recurrent", "cell", "projection"),
    "ffn": ("norm", "up", "hidden", "activation", "down", "casts", "residual", "tensor_reduce"),
    "moe": (
        "norm", "router", "dispatch", "dispatch_all_to_all", "dispatch_all_to_all_backward", "expert_tensor_gather",
        "experts.up", "experts.hidden", "experts.activation", "experts.down", "combine_all_to_all", "combine",
        "shared.up", "shared.activation", "shared.down", "shared.tensor_reduce", "casts", "residual",
    ),
}  # fmt: skip

ENDS = (
    "embedding.lookup", "embedding.exchange", "embedding.tensor_reduce", "logits.norm", "logits.product", "logits.loss",
    "logits.tensor_reduce", "mtp.projection", "layers.saved", "optimizer.update", "step.sums",
)  # fmt: skip

# Collectives on weights and gradients, whole stages at once; the piece that is gathered stands before the name.
STATES = (
    "parameters.all_gather", "experts.parameters.all_gather", "experts.all_gather", "gradients.all_reduce",
    "gradients.reduce_scatter", "experts.gradients.all_reduce", "experts.gradients.reduce_scatter",
)  # fmt: skip


def all_scopes() -> frozenset[str]:
    """Every scope name there is."""
    layers = {f"{s}.{sub}.{op}" for s in STACKS for sub, ops in SUBLAYERS.items() for op in ops}
    pieces = {f"{p}.{name}" for p in (*STACKS, "logits") for name in STATES}
    return frozenset(layers | pieces | set(ENDS) | set(STATES))

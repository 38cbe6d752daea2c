"""Ops of dense feed-forward networks and of mixtures of experts.

Letters: T tokens, N tokens of a routing group, D hidden, F ffn hidden, E experts, K choices, C slots of an expert,
R rows that the experts of a device work on.
"""

from __future__ import annotations

from typing import Any

from simulator.job.job import Job
from simulator.job.model import Ffn, Moe
from simulator.job.rules import group_tokens
from simulator.numbers import Number, some, where
from simulator.workload.attention import tensor_collectives
from simulator.workload.blocks import balanced_rows, padding
from simulator.workload.habits import Habits
from simulator.workload.ops import Comm, LayerWork, Op, add_casts, product, stream
from simulator.workload.parameters import router_matrices
from simulator.workload.routing import Slots, capacity_slots


def ffn_ops(
    prefix: str,
    ffn: Ffn,
    habits: Habits,
    *,
    rows: Number,
    hidden: int,
    split: Number,
    groups: Number = 1,
    model_rows: Number | None = None,
    names: tuple[str, str] = ("ffn", "ffn_activation"),
    hot: bool = False,
    dead: bool = False,
) -> list[Op]:
    """Up (and gate), activation and down of `groups` networks with `rows` rows each, the hidden size split.

    The hidden size is split over `split` devices. `model_rows` are the rows that count as model FLOPs where `rows`
    has padding.
    """
    width = habits.activation_bytes
    kw: dict[str, Any] = {
        "width": width,
        "weight_width": habits.weight_bytes,
        "dtype": habits.matmul_dtype,
        "gradient_traffic": habits.weight_gradient_traffic,
        "groups": groups,
        "hot": hot,
    }
    f = ffn.hidden / split
    share = 1.0 if model_rows is None else model_rows / rows
    gate = 2 if ffn.gated else 1
    ops = []

    def add(name: str, depth: Number, columns: Number, saved: Number, last: bool = False) -> None:
        op = product(f"{prefix}.{name}", names[0], rows, depth, columns, saved=saved, dead=dead and last, **kw)
        op.model_flops = op.flops * share
        ops.append(op)

    inner = rows * groups * f
    add("up", hidden, f * gate, inner * gate * habits.saved_result_bytes)
    for _ in range(ffn.depth - 1):
        add("hidden", f, f, inner * width)
    passes = gate + 1
    ops.append(
        stream(
            f"{prefix}.activation",
            names[1],
            passes * inner * width,
            2 * passes * inner * width,
            saved=inner * habits.saved_input_bytes,
            hot=hot,
        )
    )
    add("down", f, hidden, 0.0, last=True)
    return ops


def ffn_work(
    work: LayerWork,
    prefix: str,
    ffn: Ffn,
    habits: Habits,
    *,
    tokens: Number,
    stream_tokens: Number,
    hidden: int,
    tensor: Number,
    last: bool = True,
) -> None:
    """Append a dense feed-forward sublayer: norm, network, residual sum, tensor collectives.

    `last`: nothing follows in the layer, so that a backward pass that remakes the layer does without the network's
    result.
    """
    start = len(work.ops)
    residual = stream_tokens * hidden * habits.activation_bytes
    work.ops.append(
        stream(
            f"{prefix}.norm",
            "norms",
            2 * residual,
            4 * residual,
            saved=stream_tokens * hidden * habits.saved_input_bytes,
        )
    )
    work.ops.extend(
        ffn_ops(prefix, ffn, habits, rows=tokens, hidden=hidden, split=tensor, dead=last and not habits.recompute_dead)
    )
    if habits.quantises:
        add_casts(work.ops, start, f"{prefix}.casts")
    work.ops.append(stream(f"{prefix}.residual", "layer_input", 3 * residual, 2 * residual))
    tensor_collectives(work, prefix, tokens * hidden * habits.activation_bytes)


def make_again_in_backward(experts: list[Op]) -> None:
    """Change the ops of experts to those of blocks: their backward pass makes all but the last product again.

    Nothing is kept for it, whatever the remat policy says.
    """
    for op in experts:
        op.saved_bytes, op.dead_on_recompute = 0.0, True
    for op in experts[:-1]:
        op.backward_bytes = op.backward_bytes + op.bytes
        op.backward += 1.0 if op.kind == "matmul" else 0.0


def slots_of(job: Job, moe: Moe, sequence: int, microbatch_tokens: Number) -> Slots | None:
    """Capacity of `moe` for the job, in columns where the microbatch's tokens are one; None when dropless."""
    capacity = job.training.capacity
    if capacity == "dropless":
        return None
    if isinstance(microbatch_tokens, int):
        return capacity_slots(capacity, moe, group_tokens(capacity, sequence, microbatch_tokens))
    import numpy as np

    sizes, at = np.unique(microbatch_tokens, return_inverse=True)
    each = [capacity_slots(capacity, moe, group_tokens(capacity, sequence, int(n))) for n in sizes]
    return Slots(*(np.array([getattr(s, name) for s in each])[at] for name in Slots.__slots__))


def moe_work(
    work: LayerWork,
    prefix: str,
    moe: Moe,
    job: Job,
    habits: Habits,
    *,
    layout: str,
    slots: Slots | None,
    tokens: Number,
    stream_tokens: Number,
    routed_tokens: Number,
    assignments_here: Number,
    experts_here: Number,
    hidden: int,
    tensor: Number,
    expert_tensor: Number,
    router_copies: Number,
    split_tokens: Number = 1,
) -> None:
    """Append a mixture-of-experts sublayer.

    `routed_tokens` are the tokens this device routes and dispatches (its share where tensor ranks split them);
    `assignments_here` the assignments that reach the experts of this device without padding or drops, over all its
    expert-tensor peers; `experts_here` its experts; `router_copies` the tensor ranks that score the same tokens,
    `split_tokens` those that split them. Dropped tokens count as model FLOPs: the job asked for them.
    """
    width, d = habits.activation_bytes, hidden
    k, e = moe.top_k, moe.experts
    residual = stream_tokens * d * width
    ops = work.ops
    start = len(ops)
    ops.append(
        stream(
            f"{prefix}.norm", "norms", 2 * residual, 4 * residual, saved=stream_tokens * d * habits.saved_input_bytes
        )
    )
    scored = routed_tokens
    scored_outputs = moe.gate_outputs * router_matrices(moe)
    ops.append(
        product(
            f"{prefix}.router", "router", scored, d, scored_outputs, width=4, weight_width=4,
            dtype=habits.attention_dtype,
            saved=2 * 4 * routed_tokens * scored_outputs, model_flops=2.0 * scored * d * scored_outputs / router_copies,
        )
    )  # fmt: skip
    # Padding: slots that exist over assignments that were made; in blocks, room for the worst case.
    fill = slots.per_expert * e / (slots.group * k) if slots is not None else 1.0
    blocks = habits.own and layout == "blocks"
    if blocks:
        fill = padding(moe, experts_here)
    rows = assignments_here * fill
    sent = routed_tokens * k * fill
    row_bytes = d * width
    if layout == "one_hot":
        assert slots is not None
        # [N, E C] x [N, D] per group, twice: 2 E C D FLOPs a token each; only combine has a gradient for its weights.
        slots_all = slots.per_expert * e
        mask = routed_tokens * slots_all * width
        kw: dict[str, Any] = {
            "width": width,
            "weight_width": width,
            "dtype": habits.attention_dtype,
        }
        moves: dict[str, Op] = {}
        # Gates in the mask give it a gradient: a second product in the backward pass of combine.
        for name, backward in (("dispatch", 1.0), ("combine", 2.0 if habits.gate_after_down else 1.0)):
            op = product(
                f"{prefix}.{name}", "dispatch", slots_all if name == "dispatch" else slots.group,
                slots.group if name == "dispatch" else slots_all, d, groups=routed_tokens / slots.group, **kw,
            )  # fmt: skip
            op.model_flops, op.backward, op.dead_on_recompute = 0.0, backward, name == "combine" and habits.xla
            op.saved_bytes = mask + (sent * d * habits.saved_input_bytes if name == "dispatch" else 0.0)
            op.bytes = mask + (routed_tokens * d + sent * d) * width
            op.backward_bytes = 2 * op.bytes
            moves[name] = op
        ops.append(moves["dispatch"])
        combine = moves["combine"]
        work.dispatch_buffer_bytes = work.dispatch_buffer_bytes + 2 * mask + 2 * sent * row_bytes
    else:
        # Gather to rows or slots, and weighted sum back: read and write every row once.
        moved = (routed_tokens + sent) * row_bytes
        # In blocks: what the loop writes is cleared before, and brought into the order of arrival after it.
        ordered = 3 * rows * row_bytes if blocks else 0.0
        ops.append(
            stream(
                f"{prefix}.dispatch",
                "dispatch",
                moved + ordered,
                moved + sent * row_bytes + ordered,
                saved=rows * d * habits.saved_input_bytes,
            )
        )
        combine = stream(f"{prefix}.combine", "dispatch", moved, 2 * moved)
        work.dispatch_buffer_bytes = work.dispatch_buffer_bytes + 2 * sent * row_bytes
    transport = job.training.dispatch.transport
    # Buffers for the worst case are equally long for all ranks.
    hot = slots is None and not blocks
    payload = sent * row_bytes
    # FP8 recipes dispatch in 8 bits and combine in 16 (DeepSeek-V3, arXiv:2412.19437 section 3.2.2).
    dispatch_payload = (
        payload / 2 if job.training.precision == "fp8-blockwise" and transport in ("deepep", "hybridep") else payload
    )
    # Our trainer's gates travel beside their tokens, in a call of their own.
    arrays = [(dispatch_payload, payload), *([(sent * width, sent * width)] if habits.own else [])]
    for out, back in arrays:
        work.comms.append(Comm(f"{prefix}.dispatch_all_to_all", "all_to_all", "expert", out, 1, 0, 1, hot, transport))
        work.comms.append(
            Comm(
                f"{prefix}.dispatch_all_to_all_backward", "all_to_all", "expert", back, 0, 1, 0, hot, transport,
                (False, False),
            )
        )  # fmt: skip
    if blocks:
        # Which expert each row is for, as int32.
        name = f"{prefix}.dispatch_all_to_all"
        work.comms.append(Comm(name, "all_to_all", "expert", 4 * sent, 1, 0, 1, hot, transport))
    if habits.own:
        whole = routed_tokens * row_bytes
        work.comms.append(Comm(f"{prefix}.expert_tensor_gather", "sum", "expert_tensor", whole, 1, 1))
        if some(split_tokens > 1) and not job.plan.sequence_parallel:
            joined = where(split_tokens > 1, tokens * row_bytes, 0.0)
            work.comms.append(Comm(f"{prefix}.combine", "all_gather", "tensor", joined, 1, 1))
    else:
        gathered = rows * row_bytes
        work.comms.append(Comm(f"{prefix}.expert_tensor_gather", "tensor", "expert_tensor", gathered, 1, 1, 1, hot))
    each = assignments_here / experts_here
    experts = ffn_ops(
        f"{prefix}.experts", moe.expert, habits,
        rows=balanced_rows(job.training.routing, each) if blocks else rows / experts_here,
        hidden=d, split=expert_tensor, groups=experts_here,
        model_rows=each, names=("experts", "expert_activation"), hot=slots is None,
        dead=habits.own,
    )  # fmt: skip
    if blocks:
        make_again_in_backward(experts)
    if habits.gate_after_down:
        # The gate multiplies the experts' results, whose gradient needs them.
        experts[-1].saved_bytes = rows * row_bytes
    ops.extend(experts)
    work.comms.append(
        Comm(f"{prefix}.combine_all_to_all", "all_to_all", "expert", payload, 1, 1, 0, hot, transport, (False, True))
    )
    ops.append(combine)
    if moe.shared_hidden:
        shared = moe.expert.model_copy(update={"hidden": moe.shared_hidden})
        ops.extend(
            ffn_ops(
                f"{prefix}.shared", shared, habits, rows=tokens, hidden=d, split=tensor,
                names=("shared_expert", "shared_expert"),
                dead=not habits.recompute_dead,
            )
        )  # fmt: skip
        tensor_collectives(work, f"{prefix}.shared", tokens * d * width)
    if habits.quantises:
        add_casts(ops, start, f"{prefix}.casts")
    ops.append(stream(f"{prefix}.residual", "layer_input", 3 * residual, 2 * residual))

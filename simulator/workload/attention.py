"""Ops of attention (MHA, GQA, MLA, windows, chunks, cross-attention) and of an LSTM layer.

Letters: T tokens of a device, S sequence, D hidden, H heads of a device. FLOPs of the scores are 2 T H (d_qk + d_v) K
with K the keys a query meets: S, or S/2 when causal, less under a window (Kaplan et al. 2020 count S; PaLM's and
Megatron's MFU count the causal half, arXiv:2204.02311 appendix B).
"""

from __future__ import annotations

from typing import Any

from simulator.job.model import Attention, Lstm
from simulator.numbers import Number, maximum, where
from simulator.workload.habits import Habits
from simulator.workload.ops import Comm, LayerWork, Op, add_casts, product, stream


def mean_keys(a: Attention, keys: int, causal: bool, document: int | None) -> float:
    """Keys that a query meets on average: the count behind model FLOPs.

    Causal attention over S counts S/2 (not (S+1)/2: the convention of published figures). A window of w counts
    w - w^2/(2S): the first w queries see fewer. Chunks of c count c/2, packed documents of mean length l count l/2.
    """
    span = float(min(keys, document) if document else keys)
    if not causal:
        return span
    if a.chunk and a.chunk < span:
        return a.chunk / 2
    if a.window and a.window < span:
        return a.window - a.window**2 / (2 * span)
    return span / 2


def executed_keys(a: Attention, keys: int, causal: bool, habits: Habits) -> float:
    """Keys that the kernel works on: all of them when dense, else whole blocks on and below the diagonal.

    Of n x n blocks (n+1)/2n run (splash attention's executed share, and FlashAttention's); a window adds one block.
    """
    if is_dense(habits, keys) or not causal:
        return float(keys)
    block = min(habits.attention_block, keys)
    whole = keys / 2 + block / 2
    if habits.attention == "blocks":
        # A block of queries meets the keys from its first query's reach to its own end.
        reach = min([n for n in (a.window, a.chunk) if n] or [keys])
        rows = [(first, min(keys, first + block)) for first in range(0, keys, block)]
        return sum((end - max(0, first - reach + 1)) * (end - first) for first, end in rows) / keys
    if a.chunk and a.chunk < keys:
        return min(whole, a.chunk / 2 + block / 2)
    if a.window and a.window < keys:
        return min(whole, a.window + block)
    return whole


def is_dense(habits: Habits, queries: Number) -> Number:
    """Whether all scores of a sequence are there at once; a column of them where `queries` is one."""
    return habits.attention == "dense" or (habits.attention == "blocks" and queries <= habits.attention_block)


def core_attention(
    scope: str,
    a: Attention,
    habits: Habits,
    *,
    sequences: Number,
    queries: Number,
    keys: int,
    heads: Number,
    kv_heads: Number,
    causal: bool,
    document: int | None,
) -> Op:
    """Scores, softmax and values of `sequences` x `queries` tokens against `keys` keys on `heads` heads of a device."""
    d_qk = a.mla.nope_dim + a.mla.rope_dim if a.mla else a.head_dim
    d_v = a.mla.value_dim if a.mla else a.head_dim
    kv = heads if a.mla else kv_heads
    tokens = sequences * queries
    per_key = 2.0 * tokens * heads * (d_qk + d_v)
    width = habits.activation_bytes
    io = (tokens * heads * (d_qk + d_v) + sequences * keys * kv * (d_qk + d_v)) * width
    saved = tokens * heads * d_v * habits.saved_result_bytes + 4 * tokens * heads
    scores = tokens * heads * executed_keys(a, keys, causal, habits) * width
    # S x S logits and probabilities: written and read once each way; the probabilities stay for the backward pass.
    dense = is_dense(habits, queries)
    backward = where(dense, 2.0, habits.attention_backward)
    saved = saved + where(dense, scores, 0.0)
    extra = 4 * scores if habits.attention == "blocks" else where(dense, 4 * scores, 0.0)
    return Op(
        scope,
        "core_attention",
        "attention",
        per_key * executed_keys(a, keys, causal, habits),
        per_key * mean_keys(a, keys, causal, document),
        io + extra,
        rows=queries,
        columns=keys,
        depth=d_qk,
        groups=sequences * heads,
        dtype=habits.attention_dtype,
        backward=backward,
        backward_bytes=3 * io + 2 * extra,
        saved_bytes=saved,
    )


def attention_work(
    work: LayerWork,
    prefix: str,
    a: Attention,
    habits: Habits,
    *,
    hidden: int,
    sequences: Number,
    length: int,
    keys: int,
    causal: bool,
    cross: bool,
    tensor: Number,
    context: Number,
    stream_tokens: Number,
    document: int | None,
) -> None:
    """Append one attention sublayer to `work`: norm, projections, core, output; tensor and context collectives.

    `stream_tokens` are the tokens of the residual stream a device holds (T, or T/tensor under sequence parallelism).
    """
    width, saved_width = habits.activation_bytes, habits.saved_input_bytes
    tokens = sequences * length / context
    kv_tokens = sequences * keys / context
    heads = a.heads / tensor
    kv_heads = maximum(a.kv / tensor, 1)
    kw: dict[str, Any] = {
        "width": width,
        "weight_width": habits.weight_bytes,
        "dtype": habits.matmul_dtype,
        "gradient_traffic": habits.weight_gradient_traffic,
    }
    residual = stream_tokens * hidden * width
    start = len(work.ops)
    work.ops.append(
        stream(f"{prefix}.norm", "norms", 2 * residual, 4 * residual, saved=stream_tokens * hidden * saved_width)
    )
    if a.mla is not None:
        m = a.mla
        q_out, kv_up = heads * (m.nope_dim + m.rope_dim), heads * (m.nope_dim + m.value_dim)
        kv_low = m.kv_lora_rank + m.rope_dim
        if m.q_lora_rank:
            low = tokens * m.q_lora_rank * width
            # The down projections are not split over tensor ranks: each repeats them, and one of them counts.
            once = 2.0 * tokens * hidden * m.q_lora_rank / tensor
            work.ops.append(
                product(f"{prefix}.q_down", "qkv", tokens, hidden, m.q_lora_rank, saved=2 * low, model_flops=once, **kw)
            )
            work.ops.append(
                product(
                    f"{prefix}.q_up", "mla_up_proj", tokens, m.q_lora_rank, q_out, saved=tokens * q_out * width, **kw
                )
            )
        else:
            work.ops.append(
                product(f"{prefix}.q_up", "mla_up_proj", tokens, hidden, q_out, saved=tokens * q_out * width, **kw)
            )
        once = 2.0 * tokens * hidden * kv_low / tensor
        work.ops.append(
            product(
                f"{prefix}.kv_down",
                "qkv",
                tokens,
                hidden,
                kv_low,
                saved=2 * tokens * kv_low * width,
                model_flops=once,
                **kw,
            )
        )
        # Keys are stored per head with the shared rotary part copied in.
        k_and_v = tokens * heads * (m.nope_dim + m.rope_dim + m.value_dim) * width
        work.ops.append(product(f"{prefix}.kv_up", "mla_up_proj", tokens, m.kv_lora_rank, kv_up, saved=k_and_v, **kw))
        out_in = heads * m.value_dim
        kv_bytes = kv_tokens * (q_out + out_in) * width
    else:
        q_out, kv_out = heads * a.head_dim, kv_heads * a.head_dim * (1 if a.shared_kv else 2)
        if cross:
            work.ops.append(product(f"{prefix}.q", "qkv", tokens, hidden, q_out, saved=tokens * q_out * width, **kw))
            work.ops.append(
                product(f"{prefix}.kv", "qkv", kv_tokens, hidden, kv_out, saved=kv_tokens * kv_out * width, **kw)
            )
        else:
            out = q_out + kv_out
            work.ops.append(product(f"{prefix}.qkv", "qkv", tokens, hidden, out, saved=tokens * out * width, **kw))
        out_in = q_out
        kv_bytes = kv_tokens * kv_heads * a.head_dim * 2 * width
    work.ops.append(
        core_attention(
            f"{prefix}.core", a, habits, sequences=sequences, queries=length / context, keys=keys, heads=heads,
            kv_heads=kv_heads, causal=causal, document=document,
        )
    )  # fmt: skip
    # The branch is added to the stream: the sum is the next sublayer's input and is kept as such.
    work.ops.append(product(f"{prefix}.output", "attention_output", tokens, out_in, hidden, saved=residual, **kw))
    if habits.quantises:
        add_casts(work.ops, start, f"{prefix}.casts")
    work.ops.append(stream(f"{prefix}.residual", "attention_output", 3 * residual, 2 * residual))
    tensor_collectives(work, prefix, tokens * hidden * width)
    work.comms.append(Comm(f"{prefix}.kv_exchange", "context_exchange", "context", kv_bytes, 1, 2, 1))


def tensor_collectives(work: LayerWork, prefix: str, bytes_: Number) -> None:
    """The pair of tensor-parallel collectives of a sublayer (Megatron-LM, arXiv:1909.08053 and 2205.05198).

    One all-reduce forward and one backward, or all-gather and reduce-scatter each way with sequence parallelism: the
    same bytes on the wire. A recomputed forward repeats its share.
    """
    work.comms.append(Comm(f"{prefix}.tensor_reduce", "tensor", "tensor", bytes_, 1, 1, 1))


def lstm_work(
    work: LayerWork, prefix: str, lstm: Lstm, habits: Habits, *, hidden: int, tokens: Number, sequences: Number
) -> None:
    """Append an LSTM layer: input products for all tokens at once, recurrent products step by step, cell, projection.

    The recurrent product has only `sequences` rows each step; its weights are read again at every step.
    """
    width = habits.activation_bytes
    kw: dict[str, Any] = {
        "width": width,
        "weight_width": habits.weight_bytes,
        "dtype": habits.matmul_dtype,
        "gradient_traffic": habits.weight_gradient_traffic,
    }
    state = lstm.projection or lstm.cells
    gates = 4 * lstm.cells
    steps = tokens / sequences
    work.ops.append(
        product(f"{prefix}.input", "qkv", tokens, hidden, gates, saved=tokens * (hidden + gates) * width, **kw)
    )
    recurrent = product(
        f"{prefix}.recurrent", "core_attention", sequences, state, gates, saved=tokens * state * width, **kw
    )
    recurrent.flops = recurrent.flops * steps
    recurrent.model_flops = recurrent.model_flops * steps
    recurrent.bytes = recurrent.bytes * steps
    recurrent.backward_bytes = recurrent.backward_bytes * steps
    work.ops.append(recurrent)
    cell = tokens * lstm.cells * width
    work.ops.append(stream(f"{prefix}.cell", "ffn_activation", 7 * cell, 10 * cell, saved=2 * cell))
    if lstm.projection:
        work.ops.append(
            product(f"{prefix}.projection", "attention_output", tokens, lstm.cells, state, saved=cell, **kw)
        )

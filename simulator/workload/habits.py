"""What a software stack does with a job: attention kernels, number formats, what recomputation repeats.

Sources are beside each number. Where a stack's habit is not published it is an assumption, and docs/model.md lists it.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.job.job import Job, Overlap

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
XLA_STACKS = ("moecast", "t5x", "mesh-tensorflow", "maxtext")

# Peak and curve of the large products, by precision. int8 (AQT) and fp8 keep attention in bf16.
MATMUL_DTYPE = {
    "fp32": "fp32",
    "bf16": "bf16",
    "selective-bf16": "bf16",
    "fp8-tensorwise": "fp8",
    "fp8-blockwise": "fp8_block",
    "mxfp8": "fp8",
    "nvfp4": "fp4",
    "int8": "int8",
}


@dataclass(frozen=True, slots=True)
class Habits:
    """Number formats in bytes per element, and the choices that change FLOPs.

    `attention`: dense keeps S x S scores in memory; flash and splash work in blocks of `attention_block` tokens, and so
    do blocks, whose scores pass through memory one block at a time; sequences of one block are dense.
    `attention_backward` is its FLOPs over the forward's. `quantises`: 8-bit recipes,
    whose inputs and gradients are cast by kernels of their own. `recompute_dead`: whether recomputation repeats results
    that the backward pass does not need (torch checkpoints do, XLA removes them). `gate_after_down`: gates multiply the
    experts' results, not their last product's input. `own`: our trainer's program (trainer/), in which gates travel
    with their tokens, FSDP exchanges what was looked up and not the input table, ranks that slice an expert add up at
    home, and tensor ranks that split tokens gather them again. `each_array`: every array of weights is gathered, and
    its gradient scattered, by a call of its own; all-reduces are merged, and go one array after the other (XLA:CPU).
    """

    xla: bool
    attention: str
    attention_block: int
    attention_backward: float
    recompute_dead: bool
    gate_after_down: bool
    own: bool
    each_array: bool
    matmul_dtype: str
    attention_dtype: str
    activation_bytes: int
    saved_input_bytes: int
    saved_result_bytes: float
    weight_bytes: int
    weight_gradient_traffic: float
    quantises: bool
    gather_bytes: int
    new_weight_bytes: float
    parameter_bytes: float
    master_bytes: float
    gradient_bytes: float
    reduction_bytes: float
    first_moment_bytes: float
    second_moment_bytes: float
    factored_second_moment: bool


def overlap_of(job: Job, chip_kind: str) -> Overlap:
    """What communicates beside compute: on a CPU nothing, since the cores that compute also carry the messages."""
    if chip_kind == "cpu":
        return Overlap(all_to_all=False, gradients=False, parameters=False)
    return job.software.overlap


def habits_of(job: Job, chip_kind: str, *, accumulates: bool = False) -> Habits:
    """The habits of the job's stack; `generic` behaves like MaxText on a TPU or CPU, and like Megatron-LM on a GPU.

    - Attention: T5X and Mesh-TensorFlow (2020 to 2022) form the S x S scores. Splash attention runs separate kernels
      for dq (3 products) and dk, dv (4): 3.5 forwards (seen in XLA's FLOP counts, tests/test_memory.py).
      FlashAttention-2 (arXiv:2307.08691) shares one recomputation: 5 products, 2.5 forwards.
    - Formats: XLA stacks keep fp32 weights and moments and cast to bf16 for use; MaxText's gradient stacks are fp32 and
      are reduced in bf16 (measured from its compiled programs). Megatron-LM keeps bf16 weights, an fp32 master copy,
      fp32 gradients and moments (its mixed-precision optimizer).
    """
    stack, precision = job.software.stack, job.training.precision
    xla = stack in XLA_STACKS or (stack == "generic" and chip_kind != "gpu")
    own = stack == "moecast"
    if own and job.model.family != "lstm":
        # Scores of 512 queries at a time, made again in the backward pass; shorter sequences whole (core_attention).
        attention, block, backward = "blocks", 512, 2.5
    elif job.software.attention == "unfused" or stack in ("t5x", "mesh-tensorflow") or job.model.family == "lstm":
        attention, block, backward = "dense", 1, 2.0
    elif chip_kind == "tpu":
        attention, block, backward = "splash", 512, 3.5
    elif chip_kind == "cpu":
        attention, block, backward = "dense", 1, 2.0
    else:
        attention, block, backward = "flash", 128, 2.5
    eight_bit = precision in ("fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4", "int8")
    activation = 4 if precision == "fp32" else 2
    given = job.training.dtypes

    def width(name: str | None, default: float) -> float:
        return BYTES[name] if name else default

    optimizer = job.training.optimizer
    if xla or precision == "fp32" or stack == "torchtitan":
        parameter, master = width(given.parameters, 4), width(given.master, 0)
    else:
        parameter, master = width(given.parameters, 2), width(given.master, 4)
    first = 0 if optimizer in ("adafactor", "sgd") else width(given.first_moment, 4)
    second = 0 if optimizer == "sgd" else width(given.second_moment, 4)
    if own:
        # FSDP's reduce-scatter is the gradient of a gather in the compute format; everything else is summed in fp32.
        reduction = activation if job.plan.shard == "parameters" else 4
    else:
        reduction = 2 if stack == "maxtext" or (xla and precision != "fp32") else 4
    return Habits(
        xla=xla,
        attention=attention,
        attention_block=block,
        attention_backward=backward,
        recompute_dead=not xla,
        gate_after_down=stack not in ("megatron", "moecast"),
        own=own,
        each_array=own and chip_kind == "cpu",
        matmul_dtype=MATMUL_DTYPE[precision],
        attention_dtype="fp32" if precision == "fp32" else "bf16",
        activation_bytes=activation,
        saved_input_bytes=1 if eight_bit and not xla else activation,
        saved_result_bytes=width(given.saved_activations, activation),
        weight_bytes=1 if eight_bit else activation,
        # A weight gradient is written once, or added to the sum of earlier microbatches: read and written in fp32.
        weight_gradient_traffic=8 if accumulates else 4,
        quantises=eight_bit,
        gather_bytes=activation,
        new_weight_bytes=parameter if own else activation,
        parameter_bytes=parameter,
        master_bytes=master,
        gradient_bytes=width(given.gradients, 4),
        reduction_bytes=width(given.gradient_reduction, reduction),
        first_moment_bytes=first,
        second_moment_bytes=second,
        factored_second_moment=optimizer == "adafactor",
    )

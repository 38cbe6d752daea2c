"""The job: model, cluster, plan, batch, training and software, as one strict schema (docs/job.md).

The schema only says what each field may hold. Rules between fields, and between the job and its cluster, are in
`simulator.job.rules`; reading files and overrides is in `simulator.job.load`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from simulator.job.learning import Learning, Run
from simulator.job.model import Count, CountOrZero, Model, Section

# Limits far beyond sense keep every product of such numbers finite.
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Exponent = Annotated[float, Field(gt=0, le=20, allow_inf_nan=False)]
Concentration = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
Dtype = Literal["fp32", "bf16", "fp16", "fp8"]
Axis = Literal["tensor", "context", "data", "pipeline"]
Precision = Literal["fp32", "bf16", "selective-bf16", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4", "int8"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe"]
Stack = Literal["generic", "moecast", "t5x", "mesh-tensorflow", "maxtext", "megatron", "torchtitan"]

# Forward results of a layer that a remat mapping may name.
RematName = Literal[
    "norms", "qkv", "mla_up_proj", "core_attention", "attention_output", "ffn", "ffn_activation", "router", "dispatch",
    "experts", "expert_activation", "shared_expert", "layer_input",
]  # fmt: skip

# The same things by the names of Megatron's `--recompute-modules` and MaxText's remat settings.
REMAT_ALIASES: dict[str, tuple[str, ...]] = {
    "core_attn": ("core_attention",),
    "layernorm": ("norms",),
    "mlp": ("ffn", "ffn_activation"),
    "moe_act": ("expert_activation",),
    "moe": ("router", "dispatch", "experts", "expert_activation"),
    "shared_experts": ("shared_expert",),
    "decoder_layer_input": ("layer_input",),
    "context": ("core_attention",),
    "qkv_proj": ("qkv",),
    "query_proj": ("qkv",),
    "key_proj": ("qkv",),
    "value_proj": ("qkv",),
    "out_proj": ("attention_output",),
    "mlpwi": ("ffn",),
    "mlpwi_0": ("ffn",),
    "mlpwi_1": ("ffn",),
    "mlpwo": ("ffn",),
    "moe_mlpwi_0": ("experts",),
    "moe_mlpwi_1": ("experts",),
    "moe_mlpwo": ("experts",),
}


class Placement(Section):
    """Order of the mesh axes over the devices, the one with neighbours in the fastest network first."""

    order: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")

    @model_validator(mode="after")
    def _complete(self) -> Placement:
        if sorted(self.order) != ["context", "data", "pipeline", "tensor"]:
            raise ValueError(f"order = {', '.join(self.order)}: needs each of tensor, context, data, pipeline once")
        return self


class Plan(Section):
    """How the job is split. Degrees count JAX devices; `data` defaults to what the other degrees leave.

    `shard` is ZeRO 1, 2, 3: what is split over the data ranks (`shard_degree` of them; default all).
    `stages` gives decoder layers per (virtual) stage, or a layout text such as `Et*3|(tt|)*29mL` (E embedding, t layer,
    m MTP module, L logits and loss); default as even as possible, embedding first, logits last.
    """

    data: Count | None = None
    tensor: Count = 1
    context: Count = 1
    pipeline: Count = 1
    expert: Count = 1
    expert_tensor: Count = 1
    sequence_parallel: bool = False
    shard: Literal["none", "optimizer", "gradients", "parameters"] = "none"
    shard_degree: Count | None = None
    microbatch_sequences: Count | None = None
    schedule: Schedule = "1f1b"
    virtual_stages: Count = 1
    stages: tuple[CountOrZero, ...] | str | None = None
    placement: Placement | None = None


class Lengths(Section):
    """Sequence lengths of an encoder-decoder, in tokens."""

    encoder: Count
    decoder: Count


class Batch(Section):
    """The global batch: sequences a step, tokens a sequence; `document_length` is the mean when packed."""

    sequences: Count
    length: Count | Lengths
    document_length: Count | None = None

    @property
    def encoder_length(self) -> int:
        """Tokens of the encoder; 0 without one."""
        return self.length.encoder if isinstance(self.length, Lengths) else 0

    @property
    def decoder_length(self) -> int:
        """Tokens of the decoder."""
        return self.length.decoder if isinstance(self.length, Lengths) else self.length


class Capacity(Section):
    """Slots per expert: factor x N (basis tokens) or factor x k x N (basis assignments), over E, per group of N tokens.

    facts on trainers: mesh-tf, flaxformer, GShard and axlearn multiply tokens; Megatron, MaxText and V-MoE assignments.
    """

    factor: Positive
    eval_factor: Positive | None = None
    basis: Literal["tokens", "assignments"]
    group_tokens: Count | None = None
    rounding: Literal["floor", "ceil", "round"] = "floor"
    minimum: Count = 4


class Dispatch(Section):
    """How tokens reach their experts: memory layout, and what carries them between devices."""

    layout: Literal["one_hot", "slots", "ragged"] | None = None
    transport: Literal["collective", "deepep", "hybridep", "fused"] = "collective"


class Routing(Section):
    """Model of the load on experts: even, by chance, Zipf (exponent), Dirichlet (concentration), or replayed.

    `placement` says which rank holds which experts: blocks by index (unrelated to popularity), dealt in turn from the
    most to the least popular, or packed by load. `replicas` are further slots of every rank for copies of hot experts
    (redundant experts, arXiv:2412.19437, section 3.4); `placement_file` lists the experts of each rank instead.
    `forced`: the trainer's tokens go where this model sends them, whatever the router wants, and the forecast takes
    exactly these loads.
    """

    model: Literal["even", "chance", "zipf", "dirichlet", "replay"] = "chance"
    exponent: Exponent | None = None
    concentration: Concentration | None = None
    file: str | None = None
    placement: Literal["contiguous", "dealt", "balanced"] = "contiguous"
    replicas: CountOrZero = 0
    placement_file: str | None = None
    forced: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Routing:
        for model, name in (("zipf", "exponent"), ("dirichlet", "concentration"), ("replay", "file")):
            value = getattr(self, name)
            if self.model == model and value is None:
                raise ValueError(f"model {model} needs {name}")
            if self.model != model and value is not None:
                raise ValueError(f"{name} = {value}: goes with model {model}, not {self.model}")
        if self.replicas and self.placement != "balanced":
            raise ValueError(f"replicas = {self.replicas}: goes with placement balanced, not {self.placement}")
        if self.forced and self.model == "chance":
            raise ValueError("forced = true: goes with model even, zipf, dirichlet or replay, not chance")
        if self.placement_file is not None and self.placement != "contiguous":
            raise ValueError(f"placement = {self.placement}: placement_file already places the experts")
        return self


class RematPolicy(Section):
    """Which forward results the backward pass finds saved, makes again, or fetches from host memory.

    `save` alone means only these; `recompute` or `offload` mean everything else is saved.
    """

    save: tuple[RematName, ...] = ()
    recompute: tuple[RematName, ...] = ()
    offload: tuple[RematName, ...] = ()

    @field_validator("save", "recompute", "offload", mode="before")
    @classmethod
    def _own_names(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            return value
        out: dict[str, None] = {}
        for name in value:
            out.update(dict.fromkeys(REMAT_ALIASES.get(name, (name,))))
        return tuple(out)

    @model_validator(mode="after")
    def _disjoint(self) -> RematPolicy:
        names = [*self.save, *self.recompute, *self.offload]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        if self.save and self.recompute:
            raise ValueError("save (only these) and recompute (all but these) exclude each other")
        return self


class Dtypes(Section):
    """Number formats of what stays in memory; None follows the stack (docs/model.md, memory).

    `saved_activations` is the format in which attention results and the inputs of the activation function wait for the
    backward pass (DeepSeek-V3 keeps them in 8 and 12 bits, arXiv:2412.19437, section 3.3.3).
    """

    parameters: Dtype | None = None
    master: Dtype | None = None
    gradients: Dtype | None = None
    gradient_reduction: Dtype | None = None
    first_moment: Dtype | None = None
    second_moment: Dtype | None = None
    saved_activations: Dtype | None = None


class Training(Section):
    """Choices of the training run that change its cost; `learning` is what only the trainer reads."""

    precision: Precision = "bf16"
    optimizer: Literal["adamw", "adam", "adafactor", "sgd"] = "adamw"
    remat: Literal["none", "full", "selective"] | RematPolicy = "none"
    capacity: Capacity | Literal["dropless"] = "dropless"
    dispatch: Dispatch = Dispatch()
    routing: Routing = Routing()
    dtypes: Dtypes = Dtypes()
    learning: Learning = Learning()
    run: Run = Run()


class Overlap(Section):
    """Which communication runs beside compute."""

    all_to_all: bool = False
    gradients: bool = True
    parameters: bool = True


class Software(Section):
    """The software that is assumed: its habits (attention kernels, number formats, recompute) change the cost.

    `attention` replaces the kernel of a torch stack: unfused writes all S x S scores, as Megatron did before Flash.
    """

    stack: Stack = "generic"
    release: str | None = None
    graphs: bool | None = None
    attention: Literal["fused", "unfused"] | None = None
    overlap: Overlap = Overlap()

    @model_validator(mode="after")
    def _own_kernel(self) -> Software:
        if self.attention is not None and self.stack not in ("generic", "megatron", "torchtitan"):
            raise ValueError(f"attention {self.attention}: stack {self.stack} has one kernel of its own; leave it out")
        return self


class Job(Section):
    """One question. `cluster` keeps what was asked; `hw_profiles.resolve_cluster` turns it into devices and links."""

    name: str = "job"
    model: Model
    cluster: str | dict[str, Any]
    plan: Plan = Plan()
    batch: Batch
    training: Training = Training()
    software: Software = Software()

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical resolved job, without names, notes, and what only says how long to run."""
        texts = {"notes", "source", "published", "name"}
        data = self.model_dump(mode="json", exclude={"name": True, "model": texts, "training": {"run": True}})
        if data["software"]["attention"] is None:
            # Jobs that leave it out keep the hash that they had before there was a choice.
            del data["software"]["attention"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def tokens_per_step(self) -> int:
        """Trained positions of encoder and decoder in the global batch."""
        return self.batch.sequences * (self.batch.encoder_length + self.batch.decoder_length)

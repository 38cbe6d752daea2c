"""What the trainer cannot run, refused by name before anything is compiled. docs/trainer.md lists the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never

from hw_profiles.errors import QuestionError
from simulator.job.job import RematPolicy
from simulator.job.rules import group_tokens

if TYPE_CHECKING:
    from simulator.job.job import Job
    from simulator.job.model import Attention, Moe
    from simulator.job.rules import Degrees

PRECISIONS = ("fp32", "bf16", "selective-bf16")


def _no(field: str, value: object, rule: str) -> Never:
    raise QuestionError(f"{field} = {value}: the trainer {rule}")


def check_runnable(job: Job, degrees: Degrees, platform: str) -> None:
    """QuestionError, one line with field, value and rule, for the first thing that the trainer cannot do."""
    _check_plan(job, degrees)
    _check_training(job, degrees, platform)
    _check_model(job, degrees)
    _check_groups(job, degrees)


def _check_plan(job: Job, d: Degrees) -> None:
    p, model = job.plan, job.model
    if d.context > 1:
        _no("plan.context", d.context, "does not split sequences over devices; use plan.tensor with sequence_parallel")
    if d.pipeline > 1:
        if p.schedule != "gpipe" or p.virtual_stages > 1:
            _no("plan.schedule", p.schedule, "runs gpipe only; other schedules are forecast, not run")
        if model.family != "decoder":
            _no("plan.pipeline", d.pipeline, f"has no pipeline for the family {model.family}")
        layers = model.decoder_layers
        share = len(layers) // d.pipeline
        stages = [layers[i : i + share] for i in range(0, len(layers), max(1, share))]
        if len(layers) % d.pipeline or any(s != stages[0] for s in stages):
            _no("plan.pipeline", d.pipeline, f"needs stages that are alike; {len(layers)} layers do not make them")
        sequences = d.microbatches * d.microbatch_sequences
        if sequences % d.pipeline:
            _no("plan.pipeline", d.pipeline, f"needs it to divide the {sequences} sequences of a data rank")
    if p.stages is not None and d.pipeline > 1:
        _no("plan.stages", repr(p.stages), "splits layers evenly")
    routing = job.training.routing
    if routing.replicas or routing.placement_file or routing.placement != "contiguous":
        _no("training.routing.placement", routing.placement, "has experts on ranks in blocks, once each")


def _check_training(job: Job, d: Degrees, platform: str) -> None:
    t = job.training
    if t.precision not in PRECISIONS:
        _no("training.precision", t.precision, f"computes in {', '.join(PRECISIONS)}")
    for name, known in (
        ("parameters", ("fp32", "bf16")),
        ("gradients", ("fp32",)),
        ("gradient_reduction", ("fp32", "bf16")),
        ("first_moment", ("fp32", "bf16")),
        ("second_moment", ("fp32",)),
        ("master", ()),
        ("saved_activations", ()),
    ):
        value = getattr(t.dtypes, name)
        if value is not None and value not in known:
            _no(f"training.dtypes.{name}", value, f"has {' or '.join(known)} here" if known else "has no such format")
    if isinstance(t.remat, RematPolicy) and t.remat.offload:
        if platform == "cpu":
            _no("training.remat.offload", ", ".join(t.remat.offload), "has no second memory on a CPU")
        if "layer_input" in t.remat.offload:
            _no("training.remat.offload", "layer_input", "keeps layers' inputs on the device")
    if t.dispatch.transport != "collective":
        _no("training.dispatch.transport", t.dispatch.transport, "exchanges tokens by collectives")
    if d.layout == "ragged" and platform == "cpu" and d.expert > 1:
        cluster = job.cluster if isinstance(job.cluster, str) else "not of a CPU"
        _no("cluster", cluster, "has no ragged all-to-all on a CPU, and other ways only for a cluster of chip cpu-host")
    ragged = d.layout in ("ragged", "blocks")
    if not ragged and t.capacity == "dropless":
        _no("training.capacity", "dropless", f"needs dispatch.layout ragged, not {d.layout}")
    if ragged and t.capacity != "dropless":
        _no("training.dispatch.layout", "ragged", "drops nothing with it; write capacity: dropless")


def _check_model(job: Job, d: Degrees) -> None:
    m = job.model
    if m.sampled_softmax:
        _no("model.sampled_softmax", m.sampled_softmax, "scores the whole vocabulary; leave it out")
    if m.mtp_layers:
        _no("model.mtp_layers", m.mtp_layers, "has no multi-token prediction; set it to 0")
    if m.embedding_tables != 1:
        _no("model.embedding_tables", m.embedding_tables, "shares one input table between the stacks")
    if m.vocab % d.tensor:
        _no("model.vocab", m.vocab, f"splits it over plan.tensor = {d.tensor} ranks evenly")
    longest = max(job.batch.encoder_length, job.batch.decoder_length)
    if m.positions == "learned" and (m.position_count or 0) < longest:
        _no("model.position_count", m.position_count, f"needs one for each of {longest} positions")
    if m.positions == "learned" and job.plan.sequence_parallel:
        _no("plan.sequence_parallel", "true", "does not split learned positions")
    if job.batch.sequences * longest >= 2**31:
        _no("batch.sequences", job.batch.sequences, "numbers the tokens of a batch with 31 bits")
    for stack, layers in (("encoder", m.encoder_layers), ("decoder", m.decoder_layers)):
        for layer in {id(x): x for x in layers}.values():
            if layer.attention is not None:
                _check_attention(job, layer.attention, d, stack)
            if layer.lstm is not None and (layer.lstm.projection or layer.lstm.cells) != m.hidden:
                state = layer.lstm.projection or layer.lstm.cells
                _no(f"model.{stack}.lstm", state, f"adds it to the stream, so it has to be the hidden size {m.hidden}")
            if layer.moe is not None:
                _check_moe(job, layer.moe, stack)


def _check_attention(job: Job, a: Attention, d: Degrees, stack: str) -> None:
    if a.qk_norm_full and d.tensor > 1:
        _no(f"model.{stack}.attention.qk_norm_full", "true", "norms whole projections on one tensor rank only")
    turned = a.mla.rope_dim if a.mla is not None else a.head_dim
    if job.model.positions == "rope" and turned % 2:
        _no(f"model.{stack}.attention", turned, "turns pairs: the rotary size must be even")


def _check_forced(job: Job, moe: Moe) -> None:
    """Forced routing names the experts of every token by its number."""
    if moe.router.kind not in ("softmax", "sigmoid"):
        rule = f"forces the choices of routers of kind softmax and sigmoid, not {moe.router.kind}"
        _no("training.routing.forced", "true", rule)
    if job.training.learning.router.second_choice == "random":
        _no("training.learning.router.second_choice", "random", "makes every choice that training.routing.forced says")


def _check_moe(job: Job, moe: Moe, stack: str) -> None:
    r, t = moe.router, job.training
    where = f"model.{stack}.moe"
    if t.routing.forced:
        _check_forced(job, moe)
    if moe.hierarchy is not None and r.kind != "noisy_top_k":
        _no(f"{where}.hierarchy", r.kind, "has two levels with router.kind noisy_top_k only")
    if r.kind == "expert_choice" and (t.capacity == "dropless" or t.dispatch.layout == "one_hot"):
        _no(
            f"{where}.router.kind",
            "expert_choice",
            "gives experts their capacity of tokens, with dispatch.layout slots",
        )
    if r.groups > 1 and r.kind not in ("sigmoid", "softmax"):
        _no(f"{where}.router.groups", r.groups, "limits groups with router.kind softmax or sigmoid")
    if r.bias and r.kind != "sigmoid":
        _no(f"{where}.router.bias", "true", "balances by bias with router.kind sigmoid only")


def _check_groups(job: Job, d: Degrees) -> None:
    """Routing groups, and sequences where losses are per sequence, must lie whole on a device."""
    capacity = job.training.capacity
    split = d.tensor
    if job.plan.sequence_parallel:
        split = d.tensor // d.expert_tensor
    elif d.tensor > 1:
        split = max(1, d.tensor // d.expert_tensor)
    for name, length in (("encoder", job.batch.encoder_length), ("decoder", job.batch.decoder_length)):
        stack = job.model.encoder if name == "encoder" else job.model.decoder
        if not length or stack is None or stack.moe is None:
            continue
        whole = d.microbatch_sequences * length
        here = whole // split
        if whole % split:
            _no("plan.tensor", d.tensor, f"splits the {whole} tokens of a microbatch evenly")
        scope = job.training.learning.router.balance_scope
        # Losses are over sequences where it is asked for, and where there are no groups. Tensor ranks share a sequence
        # in equal pieces, and under sequence parallelism always do.
        whole_or_pieces = job.plan.sequence_parallel or here % length == 0 or length % here == 0
        if scope == "sequence" and not whole_or_pieces:
            rule = f"needs whole sequences of {length} on a device, or equal pieces of one; it has {here} tokens"
            _no("training.learning.router.balance_scope", scope, rule)
        if capacity == "dropless" and not whole_or_pieces:
            rule = f"has sequences of {length} for groups, whole on a device or in equal pieces; it has {here} tokens"
            _no("training.capacity", capacity, rule)
        if capacity == "dropless":
            continue
        group = group_tokens(capacity, length, whole)
        if job.plan.sequence_parallel and here and (length // split) % group:
            rule = f"splits sequences: each part of {length // split} tokens has to hold whole groups"
            _no("training.capacity.group_tokens", group, rule)
        if here % group:
            rule = f"keeps groups whole on a device: {here} tokens of the {name} are there"
            _no("training.capacity.group_tokens", group, rule)

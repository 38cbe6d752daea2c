"""The small sibling of a big job: same family, same rules of layers, routers and plan, small enough for a few devices.

The recipe, in order; every change is reported:

1. Cluster: `cpu-host` with the devices asked for. Precision fp32, formats and software habits back to the trainer's.
2. Width: hidden 64 (an LSTM's cells too), 4 heads of 16 in the big job's ratio of query to key heads, latent ranks 32
   and 16, networks as wide for their hidden size as before (at most 4 x), one input table for a vocabulary of 384
   (bytes, specials, sentinels).
3. Experts: at most 16, of which a token takes at most a quarter (at least its one); groups and branches at most 4.
4. Depth: two periods of the layer pattern, or one where a period has four layers or more; one dense layer before them
   where there were any.
5. Plan: tensor and pipeline degrees above 1 become 2 where devices and layers allow, experts as many ways as fit, data
   the rest; the kind of sharding stays. Schedule gpipe.
6. Batch: two sequences of 128 tokens (encoder 128, decoder 40) per data rank, at least 16; routing groups of one
   sequence, or of the part of it that a tensor rank holds. A dropless job gets two slots per assignment, since XLA:CPU
   has no ragged all-to-all.
"""

from __future__ import annotations

from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.job import Capacity, Job
from simulator.job.load import job_from_mapping
from simulator.job.model import Attention, Ffn, Lstm, Moe, Stack

HIDDEN, HEADS, HEAD_DIM, VOCAB, LENGTH, TARGETS = 64, 4, 16, 384, 128, 40
Data = dict[str, Any]


def scale_job(job: Job, devices: int) -> Job:
    """The sibling of `job` on `devices` CPU devices; QuestionError where there can be none."""
    if not 1 <= devices <= 64:
        raise QuestionError(f"--devices {devices}: must be from 1 to 64")
    model = _model(job)
    plan = _plan(job, model, devices)
    training = _training(job, plan)
    per_rank = max(2, -(-16 // plan["data"]))
    length: Any = {"encoder": LENGTH, "decoder": TARGETS} if job.model.encoder is not None else LENGTH
    if plan["pipeline"] > 1:
        plan["microbatch_sequences"] = 1
    data: Data = {
        "name": f"{job.name}-small",
        "model": model,
        "cluster": {"chip": "cpu-host", "devices": devices},
        "plan": plan,
        "batch": {"sequences": per_rank * plan["data"], "length": length},
        "training": training,
        "software": {"stack": "moecast", "overlap": {"gradients": False, "parameters": False}},
    }
    return job_from_mapping(data, where=f"the small sibling of {job.name}")


def changes(big: Job, small: Job) -> list[tuple[str, Any, Any]]:
    """Every field that differs, as (name, value in the big job, value in the small one); texts aside."""
    texts = {"name", "source", "notes", "published"}
    a, b = (j.model_dump(mode="json", exclude={"name": True, "model": texts}) for j in (big, small))
    out: list[tuple[str, Any, Any]] = []

    def walk(path: str, x: Any, y: Any) -> None:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in dict.fromkeys((*x, *y)):
                walk(f"{path}.{key}" if path else key, x.get(key), y.get(key))
        elif x != y:
            out.append((path, x, y))

    walk("", a, b)
    return out


def _model(job: Job) -> Data:
    m = job.model
    out = m.model_dump(exclude={"published", "sampled_softmax", "mtp_layers", "notes", "position_count"})
    out |= {"name": f"{m.name} (small)", "source": f"{m.name} by the recipe of moecast scale", "hidden": HIDDEN}
    out |= {"vocab": VOCAB, "embedding_tables": 1}
    if m.positions == "learned":
        out["position_count"] = LENGTH
    out["decoder"] = _stack(m.decoder, m.hidden)
    out["encoder"] = None if m.encoder is None else _stack(m.encoder, m.hidden)
    return out


def _depth(stack: Stack) -> tuple[int, int]:
    """Layers of the small stack, and how many dense ones stand before the pattern."""
    moe = stack.moe
    pattern = len(stack.attention_pattern) if len(set(stack.attention_pattern)) > 1 else 1
    every = 1 if moe is None or moe.layers is not None else moe.every
    period = every if pattern == 1 else max(every, min(pattern, 4))
    first = 1 if moe is not None and moe.layers is None and moe.first_dense else 0
    repeated = period if period >= 4 else 2 * period
    return min(stack.layers, first + repeated), first


def _stack(stack: Stack, hidden: int) -> Data:
    layers, first = _depth(stack)
    out: Data = {"layers": layers}
    if stack.attention is not None:
        out["attention"] = _attention(stack.attention)
        out["variants"] = {k: _variant(v) for k, v in stack.variants.items()}
        out["attention_pattern"] = stack.attention_pattern[:layers]
        used = set(out["attention_pattern"])
        out["variants"] = {k: v for k, v in out["variants"].items() if k in used}
    if stack.lstm is not None:
        out["lstm"] = Lstm(cells=HIDDEN, projection=HIDDEN if stack.lstm.projection else None).model_dump()
    if stack.ffn is not None:
        out["ffn"] = _ffn(stack.ffn, hidden)
    if stack.ffn_layers is not None:
        out["ffn_layers"] = [i for i in stack.ffn_layers if i < layers]
    if stack.moe is not None:
        out["moe"] = _moe(stack.moe, hidden, layers, first)
    return out


def _attention(a: Attention) -> Data:
    heads = min(HEADS, a.heads)
    ratio = max(1, a.heads // a.kv)
    out = a.model_dump() | {"heads": heads, "kv_heads": max(1, heads // ratio), "head_dim": HEAD_DIM}
    if a.mla is not None:
        rank = 32 if a.mla.q_lora_rank else None
        out["mla"] = {"q_lora_rank": rank, "kv_lora_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
        out |= {"head_dim": 24, "kv_heads": None}
    return out | _variant({k: v for k, v in a.model_dump().items() if k in ("window", "chunk") and v})


def _variant(v: Data) -> Data:
    """Windows and chunks at most a quarter of the small sequence, so that they still cut something off."""
    return {k: min(n, LENGTH // 4) if k in ("window", "chunk") and n else n for k, n in v.items()
            if k in ("window", "chunk", "sinks", "qk_norm", "shared_kv")}  # fmt: skip


def _ffn(ffn: Ffn, hidden: int) -> Data:
    wide = min(4 * HIDDEN, max(16, round(ffn.hidden * HIDDEN / hidden / 16) * 16))
    return ffn.model_dump() | {"hidden": wide}


def _moe(moe: Moe, hidden: int, layers: int, first: int) -> Data:
    experts = min(16, moe.experts)
    if moe.experts < 16:
        experts = max(1, 1 << (moe.experts.bit_length() - 1))
    top_k = min(moe.top_k, max(1, experts // 4))
    router = moe.router.model_dump()
    groups = min(4, moe.router.groups)
    kept = max(1, round(moe.router.top_groups * groups / moe.router.groups))
    router |= {"groups": groups, "top_groups": kept}
    # The chosen groups must hold enough experts.
    top_k = min(top_k, kept * experts // groups)
    expert = _ffn(moe.expert, hidden)
    out = moe.model_dump() | {"experts": experts, "top_k": top_k, "expert": expert, "router": router}
    if moe.shared_hidden:
        shared = moe.shared_hidden * expert["hidden"] / moe.expert.hidden
        out["shared_hidden"] = max(16, round(shared / 16) * 16)
    if moe.hierarchy is not None:
        out["hierarchy"] = {"branches": min(4, moe.hierarchy.branches), "top_k": min(2, moe.hierarchy.top_k)}
        out["top_k"] = out["hierarchy"]["top_k"] * max(1, moe.top_k // moe.hierarchy.top_k)
    if moe.layers is not None:
        out["layers"] = [i for i in moe.layers if i < layers] or [layers - 1]
    else:
        out["first_dense"] = first
        out["offset"] = moe.offset if not first else 0
    return out


def _plan(job: Job, model: Data, devices: int) -> Data:
    p = job.plan
    lstm = job.model.family == "lstm"
    stack = model["decoder"]
    tensor = 2 if p.tensor > 1 and devices % 2 == 0 and not lstm else 1
    alike = job.model.encoder is None and not lstm and not (stack.get("moe") or {}).get("first_dense")
    moe = stack.get("moe") or {}
    # A stage must hold whole periods of the layer pattern.
    period = 1 if moe.get("layers") is not None else moe.get("every", 1)
    alike = alike and moe.get("layers") is None and stack.get("ffn_layers") is None
    alike = alike and (stack["layers"] // 2) % max(period, len(set(stack.get("attention_pattern", ["base"])))) == 0
    pipeline = 2 if p.pipeline > 1 and alike and (devices // tensor) % 2 == 0 else 1
    data = devices // tensor // pipeline
    experts = [s["moe"]["experts"] for s in (model["encoder"], stack) if s and s.get("moe")]
    slices = tensor if p.expert_tensor > 1 else 1
    expert = 1
    if experts and p.expert > 1:
        inner = data * tensor // slices
        fitting = [n for n in range(1, inner + 1) if inner % n == 0 and all(e % n == 0 for e in experts)]
        expert = max(n for n in fitting if n <= p.expert)
    # Tensor ranks divide the copies of heads that are there.
    return {
        "data": data,
        "tensor": tensor,
        "pipeline": pipeline,
        "expert": expert,
        "expert_tensor": slices,
        "sequence_parallel": p.sequence_parallel and tensor > 1,
        "shard": p.shard,
        "schedule": "gpipe",
    }


def _training(job: Job, plan: Data) -> Data:
    t = job.training
    twice = Capacity(factor=2.0, basis="assignments", minimum=1)
    capacity = twice if t.capacity == "dropless" else t.capacity
    # One sequence, or the part of one that a tensor rank holds.
    group = LENGTH // plan["tensor"] if plan["sequence_parallel"] else None
    adafactor = t.optimizer == "adafactor"
    learning = t.learning.model_dump()
    learning["learning_rate"] = {"peak": 0.03 if adafactor else 3e-3, "schedule": "rsqrt", "warmup_steps": 50}
    learning["data"] = learning["data"] | {"files": None, "tokenizer": "bytes"}
    learning["start"] = None
    layout = t.dispatch.layout if t.dispatch.layout == "one_hot" else "slots"
    return {
        "precision": "fp32",
        "optimizer": t.optimizer,
        "remat": t.remat if isinstance(t.remat, str) else "none",
        "capacity": capacity.model_dump() | {"group_tokens": group, "minimum": 1},
        "dispatch": {"layout": layout},
        "learning": learning,
        "run": {"steps": 300},
    }

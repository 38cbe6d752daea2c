"""The model of a Megatron-LM run, from its arguments."""

from __future__ import annotations

from math import ceil
from typing import Any

from simulator.job.convert.megatron_flags import OTHER_MODEL
from simulator.job.convert.megatron_layers import which_layers
from simulator.job.convert.settings import Settings


def model_of(s: Settings, tensor: int) -> dict[str, Any]:
    """The model section; QuestionError where the arguments are another kind of model."""
    for name in sorted(OTHER_MODEL):
        if s.given(name) and s.data[name] not in (False, 0, "0"):
            s.refuse(name, "is a model that does not convert; only decoders of equal attention layers do")
    hidden, layers, heads = s.needed("hidden-size"), s.needed("num-layers"), s.needed("num-attention-heads")
    bias = not s.flag("disable-bias-linear")
    gated = s.flag("swiglu")
    squared = s.flag("squared-relu")
    if gated and squared:
        s.refuse("squared-relu", "goes not together with --swiglu")
    activation = "swiglu" if gated else "relu2" if squared else "gelu"
    # arguments.py: two thirds of 4 x hidden in steps of 64 for a gated network.
    width = s.count("ffn-hidden-size") or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    model: dict[str, Any] = {"hidden": hidden, "vocab": _vocabulary(s, tensor)}
    model["tied_embeddings"] = not s.flag("untie-embeddings-and-output-weights")
    norms = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
    model["norm"] = norms[s.choice("normalization", norms, "LayerNorm")]
    model |= _positions(s)
    model["mtp_layers"] = s.count("mtp-num-layers", 0, least=0) or 0
    decoder: dict[str, Any] = {"layers": layers, "attention": _attention(s, hidden, heads, bias)}
    experts = s.count("num-experts", least=0)
    rule: dict[str, Any] = {}
    if experts:
        rule = which_layers(s, layers)
        decoder["moe"] = _moe(s, experts, width, activation, bias) | rule
    if not experts or rule:
        decoder["ffn"] = {"hidden": width, "activation": activation, "bias": bias}
    model["decoder"] = decoder
    return model


def _vocabulary(s: Settings, tensor: int) -> int:
    """The table's rows: padded to a multiple of `--make-vocab-size-divisible-by` times the tensor degree."""
    padded = s.count("padded-vocab-size")
    if padded is not None:
        s.count("vocab-size")
        s.count("make-vocab-size-divisible-by", 128)
        return padded
    vocab, step = s.needed("vocab-size"), s.needed("make-vocab-size-divisible-by", 128) * tensor
    return ceil(vocab / step) * step


def _positions(s: Settings) -> dict[str, Any]:
    known = {"learned_absolute": "learned", "rope": "rope", "relative": "relative_bias", "none": "none"}
    kind = known[s.choice("position-embedding-type", known, "learned_absolute")]
    s.flag("no-position-embedding")
    if s.flag("use-rotary-position-embeddings"):
        kind = "rope"
    found: dict[str, Any] = {"positions": kind}
    if kind == "learned":
        found["position_count"] = s.needed("max-position-embeddings")
    else:
        s.count("max-position-embeddings")
    if kind == "relative_bias":
        found["relative_buckets"] = s.needed("relative-attention-num-buckets", 32)
    return found


def _attention(s: Settings, hidden: int, heads: int, bias: bool) -> dict[str, Any]:
    attention: dict[str, Any] = {"heads": heads}
    grouped, groups = s.flag("group-query-attention"), s.needed("num-query-groups", 1)
    if grouped:
        attention["kv_heads"] = groups
    elif s.given("num-query-groups") and groups != 1:
        s.leave("num-query-groups", "has no effect without --group-query-attention")
    qk_norm = s.flag("qk-layernorm")
    attention["qkv_bias"] = s.flag("add-qkv-bias") or bias
    attention["output_bias"] = bias
    if s.flag("multi-latent-attention"):
        nope, rope = s.needed("qk-head-dim", 128), s.needed("qk-pos-emb-head-dim", 64)
        attention["mla"] = {
            "q_lora_rank": s.count("q-lora-rank"),
            "kv_lora_rank": s.needed("kv-lora-rank", 32),
            "nope_dim": nope,
            "rope_dim": rope,
            "value_dim": s.needed("v-head-dim", 128),
        }
        attention["head_dim"] = nope + rope
        s.leave("kv-channels", "latent attention takes its dimensions from --qk-head-dim and its like")
    else:
        attention["qk_norm"] = qk_norm
        attention["head_dim"] = s.count("kv-channels") or hidden // heads
        if not s.given("kv-channels") and hidden % heads:
            s.refuse("num-attention-heads", f"must divide --hidden-size {hidden} where --kv-channels is not given")
    attention["sinks"] = s.choice("softmax-type", ("vanilla", "learnable"), "vanilla") == "learnable"
    if s.given("window-size"):
        back = str(s.get("window-size")).strip("()[] ").split(",")[0]
        if not back.isdecimal() or not int(back):
            s.refuse("window-size", "must be tokens back, and 0 forward, such as 4096,0")
        attention["window"] = int(back)
    return attention


def _moe(s: Settings, experts: int, width: int, activation: str, bias: bool) -> dict[str, Any]:
    hidden = s.count("moe-ffn-hidden-size") or width
    router: dict[str, Any] = {"kind": s.choice("moe-router-score-function", ("softmax", "sigmoid"), "softmax")}
    router["bias"] = s.flag("moe-router-enable-expert-bias")
    top_k = s.needed("moe-router-topk", 2)
    # Softmax before the choice keeps the gates as they are; after it, and with sigmoid, they sum to 1.
    if s.flag("moe-router-pre-softmax") and top_k > 1:
        router["renormalise"] = router["kind"] == "sigmoid"
    router["groups"] = s.count("moe-router-num-groups") or 1
    router["top_groups"] = s.count("moe-router-group-topk") or 1
    router["scale"] = s.number("moe-router-topk-scaling-factor") or 1.0
    moe = {
        "experts": experts,
        "top_k": top_k,
        "expert": {"hidden": hidden, "activation": activation, "bias": bias},
        "router": router,
    }
    shared = s.count("moe-shared-expert-intermediate-size", least=0)
    if shared:
        # Megatron says the sum; how many experts it is divided into changes nothing.
        moe |= {"shared_experts": max(1, shared // hidden), "shared_hidden": shared}
    return moe

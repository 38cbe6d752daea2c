"""How each architecture of Hugging Face lays out a model: from its fields to a model section.

The rules follow the classes of that name in `transformers`, or in the model's own repository (Grok-1, Skywork, Pangu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.huggingface_fields import Fields

Data = dict[str, Any]
Kind = Callable[[int], str]

MOST_LAYERS = 10_000
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}
_WINDOWS = {"sliding_attention": ("window", "sliding_window"), "chunked_attention": ("chunk", "attention_chunk_size")}


def _full(_: int) -> str:
    return "full_attention"


def _last_full(every: int) -> Kind:
    """Full attention in the last of each `every` layers, sliding windows in the others."""
    return lambda i: "sliding_attention" if (i + 1) % every else "full_attention"


def _windows(f: Fields, default: bool) -> Kind:
    """Windows from a layer on; Mistral has them wherever a size is given, Qwen where it says so."""
    first = f.count("max_window_layers", 0, 0)
    windowed = f.flag("use_sliding_window", default) and f.get("sliding_window") is not None
    return lambda i: "sliding_attention" if windowed and i >= first else "full_attention"


def _attention(f: Fields, **features: Any) -> Data:
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    head_dim = f.optional("head_dim")
    if head_dim is None and hidden % heads:
        f.refuse("hidden_size", f"not a multiple of num_attention_heads {heads}, and there is no head_dim")
    biases = {"qkv_bias": True, "output_bias": True} if f.flag("attention_bias") else {}
    kv_heads = f.count("num_key_value_heads", heads)
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim or hidden // heads} | features | biases


def _stack(f: Fields, attention: Data, kind: Kind, full: Data | None = None) -> Data:
    """Layers with their kinds of attention, from `layer_types` or else by the rule `kind`; `full` changes full ones."""
    layers = f.count("num_hidden_layers", most=MOST_LAYERS)
    kinds = f.get("layer_types")
    if kinds is None:
        kinds = [kind(i) for i in range(layers)]
    elif not isinstance(kinds, list) or len(kinds) != layers:
        f.refuse("layer_types", f"a list of {layers} kinds of attention is needed")
    f.skip(*(field for _, field in _WINDOWS.values()))
    variants: dict[str, Data] = {"full_attention": full or {}}
    for i, name in enumerate(kinds):
        if name in _WINDOWS:
            key, field = _WINDOWS[name]
            variants[name] = {key: f.count(field)}
        elif name != "full_attention":
            known = ", ".join(("full_attention", *_WINDOWS))
            raise QuestionError(f"{f.where}: layer_types[{i}] = {name!r}: not in the model section; known: {known}")
    pattern = tuple(name if variants[name] else "base" for name in kinds)
    used = {name: change for name, change in variants.items() if name in pattern}
    return {"layers": layers, "attention": attention, "variants": used, "attention_pattern": pattern}


def _ffn(f: Fields, field: str = "intermediate_size", bias: bool = False) -> Data:
    name = "hidden_activation" if f.get("hidden_activation") else "hidden_act"
    return {"hidden": f.count(field), "activation": f.one_of(name, _ACTIVATIONS, "silu"), "bias": bias}


def _moe(f: Fields, experts: str, hidden: str, top_k: str = "num_experts_per_tok", bias: bool = False) -> Data:
    return {"experts": f.count(experts), "top_k": f.count(top_k), "expert": _ffn(f, hidden, bias)}


def _sparse(f: Fields, stack: Data, moe: Data, layers: list[int], dense: str = "intermediate_size") -> Data:
    """`stack` with `moe` in `layers`, and a dense network of the size in field `dense` in the others."""
    f.skip(dense)
    if len(layers) == stack["layers"]:
        return stack | {"moe": moe}
    return stack | {"ffn": _ffn(f, dense)} | ({"moe": moe | {"layers": layers}} if layers else {})


def _model(f: Fields, decoder: Data, tied: bool = False, **more: Any) -> Data:
    tied = f.flag("tie_word_embeddings", tied)
    return {
        "hidden": f.count("hidden_size"),
        "vocab": f.count("vocab_size"),
        "tied_embeddings": tied,
        "decoder": decoder,
    } | more


def _dense(f: Fields, kind: Kind, tied: bool = False, **features: Any) -> Data:
    stack = _stack(f, _attention(f, **features), kind)
    return _model(f, stack | {"ffn": _ffn(f, bias=f.flag("mlp_bias"))}, tied)


def _causal_gemma(f: Fields) -> None:
    f.skip("query_pre_attn_scalar")
    if f.get("use_bidirectional_attention") not in (None, False, "vision"):
        f.refuse("use_bidirectional_attention", "only causal text models are in the model section")


def _gemma(f: Fields, every: int, **features: Any) -> Data:
    _causal_gemma(f)
    every = f.optional("sliding_window_pattern") or f.optional("_sliding_window_pattern") or every
    return _dense(f, _last_full(every), tied=True, **features) | {"post_norms": True}


def _gemma4(f: Fields) -> Data:
    _causal_gemma(f)
    f.skip("vocab_size_per_layer_input", "moe_intermediate_size", "num_experts", "top_k_experts")
    full: Data = {"head_dim": f.count("global_head_dim", 512)}
    kv_heads = f.optional("num_global_key_value_heads")
    if f.flag("attention_k_eq_v"):
        full |= {"shared_kv": True} | ({"kv_heads": kv_heads} if kv_heads else {})
    stack = _stack(f, _attention(f, qk_norm=True), _last_full(6), full)
    if f.flag("enable_moe_block"):
        moe = _moe(f, "num_experts", "moe_intermediate_size", "top_k_experts")
        stack["moe"] = moe | {"shared_experts": 1, "shared_hidden": f.count("intermediate_size")}
    else:
        stack["ffn"] = _ffn(f)
    return _model(f, stack, True, post_norms=True)


def _mixtral(f: Fields, **more: Any) -> Data:
    experts = "num_experts" if "num_experts" in f.data else "num_local_experts"
    stack = _stack(f, _attention(f), _windows(f, True))
    return _model(f, stack | {"moe": _moe(f, experts, "intermediate_size")}, **more)


def _skywork(f: Fields) -> Data:
    # How gates are normalised; and two experts per token stand in the model's code, not in its config.
    f.skip("moe_use_logits_norm", "moe_feature_no_mul_topk")
    experts = f.get("num_experts")
    f.data = {"num_experts_per_tok": 2} | f.data
    if isinstance(experts, list) and len(experts) == 1:
        f.data["num_experts"] = experts[0]
    stack = _stack(f, _attention(f), _windows(f, True))
    step = f.count("moe_expert_interval", 1)
    sparse = [i for i in range(stack["layers"]) if (i + 1) % step == 0]
    return _model(f, _sparse(f, stack, _moe(f, "num_experts", "intermediate_size"), sparse))


def _olmoe(f: Fields) -> Data:
    stack = _stack(f, _attention(f, qk_norm_full=True), _full)
    return _model(f, stack | {"moe": _moe(f, "num_experts", "intermediate_size")})


def _gpt_oss(f: Fields) -> Data:
    bias = f.flag("attention_bias", True)
    attention = _attention(f, qkv_bias=bias, output_bias=bias, sinks=True)
    moe = _moe(f, "num_local_experts", "intermediate_size", bias=True) | {"router": {"linear_bias": True}}
    return _model(f, _stack(f, attention, _last_full(2)) | {"moe": moe})


def _gates(f: Fields) -> Data:
    """How the chosen experts' gates are made of their probabilities; the cost does not depend on it."""
    scale = f.get("routed_scaling_factor")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale <= 0):
        f.refuse("routed_scaling_factor", "a positive number is needed")
    gates: Data = {} if f.flag("norm_topk_prob", True) else {"renormalise": False}
    return gates if scale is None or scale == 1 else gates | {"scale": scale}


def _qwen_moe(f: Fields, **features: Any) -> Data:
    stack = _stack(f, _attention(f, **features), _windows(f, False))
    moe = _moe(f, "num_experts", "moe_intermediate_size") | {"router": _gates(f)}
    shared = f.count("shared_expert_intermediate_size", 0, 0)
    if shared:
        moe |= {"shared_experts": 1, "shared_hidden": shared, "shared_gate": True}
    step = f.count("decoder_sparse_step", 1)
    dense = f.layer_numbers("mlp_only_layers", stack["layers"]) or []
    sparse = [i for i in range(stack["layers"]) if (i + 1) % step == 0 and i not in dense]
    return _model(f, _sparse(f, stack, moe, sparse))


def _llama4(f: Fields) -> Data:
    f.skip("use_qk_norm")  # this norm of queries and keys has no weights
    layers = f.count("num_hidden_layers", most=MOST_LAYERS)
    rope = f.get("no_rope_layers")
    if rope and (not isinstance(rope, list) or len(rope) != layers):
        f.refuse("no_rope_layers", f"a list of {layers} zeros and ones is needed")
    step = f.count("no_rope_layer_interval", 4)
    with_rope = rope or [(i + 1) % step for i in range(layers)]
    stack = _stack(f, _attention(f), lambda i: "chunked_attention" if with_rope[i] else "full_attention")
    every = f.count("interleave_moe_layer_step", 1, 0)
    sparse = f.layer_numbers("moe_layers", layers)
    if sparse is None:
        sparse = list(range(every - 1, layers, every)) if every else []
    f.skip("intermediate_size", "num_local_experts", "num_experts_per_tok")
    moe: Data = {}
    if sparse:
        moe = _moe(f, "num_local_experts", "intermediate_size")
        moe |= {"shared_experts": 1, "shared_hidden": f.count("intermediate_size")}
    return _model(f, _sparse(f, stack, moe, sparse, dense="intermediate_size_mlp"))


def _deepseek(f: Fields, **more: Any) -> Data:
    if f.get("kv_lora_rank") is None:
        attention = _attention(f)
    else:
        if f.flag("attention_bias"):
            f.refuse("attention_bias", "latent attention with biases is not in the model section")
        f.skip("num_key_value_heads", "head_dim", "qk_head_dim")
        mla = {"q_lora_rank": f.optional("q_lora_rank"), "kv_lora_rank": f.count("kv_lora_rank")}
        mla |= {"nope_dim": f.count("qk_nope_head_dim"), "rope_dim": f.count("qk_rope_head_dim")}
        head_dim = f.count("qk_nope_head_dim") + f.count("qk_rope_head_dim")
        mla |= {"value_dim": f.count("v_head_dim")}
        attention = {"heads": f.count("num_attention_heads"), "head_dim": head_dim, "mla": mla}
    method, groups = f.get("topk_method"), f.count("n_group", 1, 0) or 1
    router: Data = {"kind": f.one_of("scoring_func", {"softmax": "softmax", "sigmoid": "sigmoid"}, "softmax")}
    router |= _gates(f)
    chosen = f.count("topk_group", groups, 0) or groups
    if method != "greedy" and chosen < groups:
        router |= {"groups": groups, "top_groups": chosen}
    moe = _moe(f, "n_routed_experts", "moe_intermediate_size") | {"router": router | {"bias": method == "noaux_tc"}}
    shared = f.count("n_shared_experts", 0, 0)
    if shared:
        moe |= {"shared_experts": shared, "shared_hidden": shared * f.count("moe_intermediate_size")}
    stack = _stack(f, attention, _full)
    first, every = f.count("first_k_dense_replace", 0, 0), f.count("moe_layer_freq", 1)
    sparse = [i for i in range(first, stack["layers"]) if i % every == 0]
    return _model(f, _sparse(f, stack, moe, sparse), mtp_layers=f.count("num_nextn_predict_layers", 0, 0), **more)


def _pangu(f: Fields) -> Data:
    f.alias = {
        "q_lora_rank": "attention_q_lora_dim",
        "kv_lora_rank": "attention_kv_lora_dim",
        "qk_nope_head_dim": "attention_qk_dim",
        "qk_rope_head_dim": "attention_qk_rope_dim",
        "v_head_dim": "attention_v_dim",
        "n_routed_experts": "num_routed_experts",
        "n_shared_experts": "num_shared_experts",
        "first_k_dense_replace": "num_dense_layers",
        "num_nextn_predict_layers": "num_mtp_layers",
    }
    f.data = {"scoring_func": "sigmoid"} | f.data
    return _deepseek(f, post_norms=f.flag("sandwich_norm", True))


def _gpt2(f: Fields) -> Data:
    f.alias = {"hidden_size": "n_embd"}
    hidden, heads = f.count("hidden_size"), f.count("n_head")
    if hidden % heads:
        f.refuse("n_embd", f"not a multiple of n_head {heads}")
    attention = {"heads": heads, "head_dim": hidden // heads, "qkv_bias": True, "output_bias": True}
    activation = f.one_of("activation_function", {"gelu_new": "gelu", "gelu": "gelu", "relu": "relu"}, "gelu_new")
    ffn = {"hidden": f.count("n_inner", 4 * hidden), "activation": activation, "bias": True}
    decoder = {"layers": f.count("n_layer", most=MOST_LAYERS), "attention": attention, "ffn": ffn}
    return _model(f, decoder, True, norm="layernorm", positions="learned", position_count=f.count("n_positions"))


def _t5(f: Fields) -> Data:
    f.alias = {"hidden_size": "d_model"}
    known = {"relu": "relu", "gelu": "gelu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
    ffn = {"hidden": f.count("d_ff"), "activation": f.one_of("feed_forward_proj", known, "relu")}
    attention = {"heads": f.count("num_heads"), "head_dim": f.count("d_kv")}
    encoder: Data = {"layers": f.count("num_layers", most=MOST_LAYERS), "attention": attention, "ffn": ffn}
    decoder = encoder | {"layers": f.count("num_decoder_layers", encoder["layers"], most=MOST_LAYERS)}
    buckets = f.count("relative_attention_num_buckets", 32)
    return _model(f, decoder, True, encoder=encoder, positions="relative_bias", relative_buckets=buckets)


def _switch(f: Fields) -> Data:
    model = _t5(f)
    moe: Data = {"experts": f.count("num_experts"), "top_k": f.count("num_selected_experts", 1)}
    moe |= {"expert": model["encoder"]["ffn"], "router": {"linear_bias": f.flag("router_bias")}}
    for name in ("encoder", "decoder"):
        layers, sparse = model[name]["layers"], f.count(f"num_sparse_{name}_layers", 0, 0)
        step = f.count(f"{name}_sparse_step", layers // sparse if sparse else 0, 0)
        chosen = [i for i in range(layers) if step and (step == 1 or i % step == 1)]
        if chosen:
            model[name] = model[name] | {"moe": moe | {"layers": chosen}}
    return model


ARCHITECTURES: dict[str, Callable[[Fields], Data]] = {
    "T5ForConditionalGeneration": _t5,
    "SwitchTransformersForConditionalGeneration": _switch,
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": lambda f: _dense(f, _full),
    "MistralForCausalLM": lambda f: _dense(f, _windows(f, True)),
    "Qwen2ForCausalLM": lambda f: _dense(f, _windows(f, False), qkv_bias=True),
    "Qwen3ForCausalLM": lambda f: _dense(f, _windows(f, False), qk_norm=True),
    "GemmaForCausalLM": lambda f: _dense(f, _full, tied=True),
    "Gemma2ForCausalLM": lambda f: _gemma(f, 2),
    "Gemma3ForCausalLM": lambda f: _gemma(f, 6, qk_norm=True),
    "Gemma3ForConditionalGeneration": lambda f: _gemma(f, 6, qk_norm=True),
    "Gemma4ForCausalLM": _gemma4,
    "Gemma4ForConditionalGeneration": _gemma4,
    "MixtralForCausalLM": _mixtral,
    "Grok1ModelForCausalLM": lambda f: _mixtral(f, post_norms=True),
    "GrokForCausalLM": lambda f: _mixtral(f, post_norms=True),
    "SkyworkForCausalLM": _skywork,
    "OlmoeForCausalLM": _olmoe,
    "GptOssForCausalLM": _gpt_oss,
    "Qwen2MoeForCausalLM": lambda f: _qwen_moe(f, qkv_bias=f.flag("qkv_bias", True)),
    "Qwen3MoeForCausalLM": lambda f: _qwen_moe(f, qk_norm=True),
    "Llama4ForCausalLM": _llama4,
    "Llama4ForConditionalGeneration": _llama4,
    "DeepseekForCausalLM": _deepseek,
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "PanguUltraMoEForCausalLM": _pangu,
}

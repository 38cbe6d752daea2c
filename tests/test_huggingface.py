"""config.json of published models against the presets, and bad ones against one-line errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_profiles.errors import QuestionError
from simulator.job.huggingface import is_huggingface, model_from_huggingface
from simulator.job.huggingface_families import ARCHITECTURES
from simulator.job.presets import load_preset
from simulator.workload.parameters import count_parameters

# What every published config carries besides the fields that matter here.
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.36.0", "rope_scaling": {"type": "yarn", "factor": 40}, "pretraining_tp": 1,
}  # fmt: skip
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "sliding_window": None, "output_router_logits": False, "router_aux_loss_coef": 0.02,
}  # fmt: skip
DEEPSEEK_V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_nextn_predict_layers": None,
    "scoring_func": "softmax", "topk_group": 3, "topk_method": "group_limited_greedy", "vocab_size": 102400,
}  # fmt: skip
QWEN3 = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_window_layers": 94, "mlp_only_layers": [], "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN2 = QWEN3 | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "head_dim": None, "hidden_size": 3584,
    "intermediate_size": 18944, "max_window_layers": 28, "moe_intermediate_size": 2560, "num_attention_heads": 28,
    "num_experts": 64, "num_hidden_layers": 28, "sliding_window": 131072, "shared_expert_intermediate_size": 20480,
}  # fmt: skip
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 18, "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8, "num_local_experts": 128,
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 768,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12, "n_positions": 512,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "vocab_size": 32128,
}  # fmt: skip
SWITCH = T5 | {
    "architectures": ["SwitchTransformersForConditionalGeneration"], "model_type": "switch_transformers", "d_ff": 3072,
    "decoder_sparse_step": 2, "encoder_sparse_step": 2, "expert_capacity": 64, "feed_forward_proj": "relu",
    "num_experts": 128, "num_selected_experts": 1, "num_sparse_decoder_layers": 6, "num_sparse_encoder_layers": 6,
    "router_bias": False, "router_dtype": "float32", "router_jitter_noise": 0.01, "router_type": "tokens_masked",
}  # fmt: skip
LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34},
    "text_config": COMMON | {
        "model_type": "llama4_text", "attention_chunk_size": 8192, "attn_temperature_tuning": True, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 2, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "moe_layers": list(range(1, 48, 2)), "no_rope_layers": [1, 1, 1, 0] * 12,
        "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "num_local_experts": 128, "use_qk_norm": False, "floor_scale": 8192, "vocab_size": 202048,
    },
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "tie_word_embeddings": True,
    "text_config": COMMON | {
        "model_type": "gemma4_text", "attention_k_eq_v": True, "enable_moe_block": True, "global_head_dim": 512,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2816, "intermediate_size": 2112,
        "hidden_size_per_layer_input": 0, "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5, "num_global_key_value_heads": 2,
        "num_hidden_layers": 30, "num_key_value_heads": 8, "num_kv_shared_layers": 0, "sliding_window": 1024,
        "top_k_experts": 8, "use_bidirectional_attention": "vision", "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
    },
}  # fmt: skip
PANGU = COMMON | {
    "architectures": ["PanguUltraMoEForCausalLM"], "model_type": "pangu_ultra_moe", "hidden_act": "silu",
    "attention_kv_lora_dim": 512, "attention_q_lora_dim": 1536, "attention_qk_dim": 128, "attention_qk_rope_dim": 64,
    "attention_v_dim": 128, "hidden_size": 7680, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 128, "num_dense_layers": 3, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_mtp_layers": 0, "num_routed_experts": 256, "num_shared_experts": 1,
    "sandwich_norm": True, "tie_word_embeddings": False, "vocab_size": 153600,
}  # fmt: skip
SKYWORK = LLAMA | {
    "architectures": ["SkyworkForCausalLM"], "model_type": "skywork", "hidden_size": 4608, "intermediate_size": 12288,
    "moe_2layer_gate": False, "moe_expert_interval": 1, "moe_feature_no_mul_topk": True, "moe_use_logits_norm": True,
    "moe_use_skywork_gating": False, "num_attention_heads": 36, "num_experts": [16], "num_hidden_layers": 52,
    "num_key_value_heads": 36, "sliding_window": None, "vocab_size": 65532,
}  # fmt: skip
GROK = LLAMA | {
    "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "hidden_size": 6144, "max_attn_value": 30.0,
    "intermediate_size": 32768, "num_attention_heads": 48, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 64, "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
OLMOE = LLAMA | {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "clip_qkv": None, "hidden_size": 2048,
    "intermediate_size": 1024, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "vocab_size": 50304,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3-8b": LLAMA,
    "mixtral-8x7b": MIXTRAL,
    "mistral-7b": LLAMA | {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "sliding_window": 4096},
    "deepseek-v3-mtp": DEEPSEEK_V3,
    "deepseek-v3": DEEPSEEK_V3 | {"num_nextn_predict_layers": 0},
    "deepseek-v2": DEEPSEEK_V2,
    "kimi-k2": DEEPSEEK_V3 | {
        "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "n_routed_experts": 384, "topk_group": 1,
        "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "vocab_size": 163840,
    },
    "qwen3-235b-a22b": QWEN3,
    "qwen2-57b-a14b": QWEN2,
    "gpt-oss-120b": GPT_OSS,
    "t5-base": T5,
    "switch-base-128": SWITCH,
    "llama4-maverick-17b-128e": LLAMA4,
    "gemma4-26b-a4b": GEMMA4,
    "pangu-ultra-moe-718b": PANGU,
    "skywork-moe-146b": SKYWORK,
    "grok-1": GROK,
    "olmoe-1b-7b": OLMOE,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_preset_are_the_same_model(name: str) -> None:
    model, preset = model_from_huggingface(CONFIGS[name], name), load_preset(name)
    assert count_parameters(model) == count_parameters(preset)
    if name != "switch-base-128":  # ReLU with 3,072 there, GEGLU with 2,048 in the paper: the same parameters
        ours = [
            (x.attention, x.moe and x.moe.top_k, bool(x.ffn)) for x in (*model.encoder_layers, *model.decoder_layers)
        ]
        theirs = [
            (x.attention, x.moe and x.moe.top_k, bool(x.ffn)) for x in (*preset.encoder_layers, *preset.decoder_layers)
        ]
        assert [_plain(x) for x in ours] == [_plain(x) for x in theirs]
    assert (model.tied_embeddings, model.mtp_layers) == (preset.tied_embeddings, preset.mtp_layers)


def _plain(layer: tuple[Any, Any, bool]) -> Any:
    """Equal heads of keys and queries may be written out or left out."""
    attention = layer[0]
    return attention.model_copy(update={"kv_heads": attention.kv}), layer[1], layer[2]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # Counts of the published checkpoints.
        ({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "n_ctx": 1024,
          "n_inner": None, "vocab_size": 50257, "activation_function": "gelu_new"}, 124_439_808),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
                  "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                  "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}, 7_615_616_512),
        (LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_size": 4096, "vocab_size": 151936,
                  "intermediate_size": 12288, "num_hidden_layers": 36}, 8_190_735_360),
        (LLAMA | {"architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_size": 2048, "num_key_value_heads": 1,
                  "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18, "vocab_size": 256000,
                  "hidden_act": "gelu", "tie_word_embeddings": None}, 2_506_172_416),
        (LLAMA | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 256, "hidden_size": 2304, "vocab_size": 256000,
                  "intermediate_size": 9216, "num_attention_heads": 8, "num_hidden_layers": 26, "sliding_window": 4096,
                  "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "tie_word_embeddings": None}, 2_614_341_888),
        (LLAMA | {"architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "hidden_size": 1152, "vocab_size": 262144,
                  "intermediate_size": 6912, "num_attention_heads": 4, "num_hidden_layers": 26, "sliding_window": 512,
                  "num_key_value_heads": 1, "_sliding_window_pattern": 6, "tie_word_embeddings": None}, 999_885_952),
    ],
    ids=["gpt2", "qwen2-7b", "qwen3-8b", "gemma-2b", "gemma-2-2b", "gemma-3-1b"],
)  # fmt: skip
def test_published_parameter_counts(config: dict[str, Any], parameters: int) -> None:
    assert count_parameters(model_from_huggingface(config, "m")).total == parameters


def test_windows_by_rule_without_layer_types() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [x.attention.window for x in model_from_huggingface(config, "m").decoder_layers if x.attention]

    without = {k: v for k, v in GPT_OSS.items() if k != "layer_types"}
    assert windows(without) == windows(GPT_OSS) == [128, None] * 18
    qwen = QWEN3 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 90}
    assert windows(qwen) == [None] * 90 + [4096] * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_model_type_alone_is_enough(name: str) -> None:
    config = {k: v for k, v in CONFIGS[name].items() if k != "architectures"}
    if name != "mistral-7b":  # its model_type here is still llama's
        assert model_from_huggingface(config, name) == model_from_huggingface(CONFIGS[name], name)


def test_text_model_of_a_multimodal_config_says_so() -> None:
    assert "text model only" in (model_from_huggingface(LLAMA4, "m").notes or "")


def test_is_huggingface() -> None:
    assert is_huggingface(MIXTRAL) and is_huggingface({"model_type": "llama"})
    assert not is_huggingface({"hidden": 4096, "vocab": 32000, "decoder": {}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["MixtralForCausaLM"]}, "m: architectures = 'MixtralForCausaLM': .*'MixtralForCausalLM'"),
        ({"architectures": ["MambaForCausalLM"]}, "m: architectures = 'MambaForCausalLM': .*; known: T5"),
        ({"architectures": ["Zzz\nzz"]}, r"m: architectures = 'Zzz\\nzz'"),
        ({"model_type": "rwkv"}, "m: model_type = 'rwkv': no reader"),
        ({"architectures": []}, "m: architectures: required, and missing"),
        ({"architectures": None, "model_type": None}, "m: architectures: required, and missing"),
        ({k: v for k, v in MIXTRAL.items() if k != "hidden_size"}, "m: hidden_size: required, and missing"),
        ({k: v for k, v in PANGU.items() if k != "num_routed_experts"}, "m: num_routed_experts: required, and missing"),
        ({k: v for k, v in T5.items() if k != "d_model"}, "m: d_model: required, and missing"),
        (MIXTRAL | {"num_hidden_layers": "32"}, "m: num_hidden_layers = '32': a whole number"),
        (MIXTRAL | {"num_hidden_layers": 10**9}, "m: num_hidden_layers = 1000000000: a whole number from 1 to 10000"),
        (MIXTRAL | {"hidden_size": 4096.5}, "m: hidden_size = 4096.5: a whole number"),
        (MIXTRAL | {"vocab_size": -1}, "m: vocab_size = -1: a whole number"),
        (MIXTRAL | {"num_local_experts": True}, "m: num_local_experts = True: a whole number"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "m: decoder.moe: top_k 9 exceeds experts 8"),
        (MIXTRAL | {"num_key_value_heads": 5}, "m: .*heads 32 is not a multiple of kv_heads 5"),
        (MIXTRAL | {"hidden_act": "xielu"}, "m: hidden_act = 'xielu': not known.*; known: silu"),
        (MIXTRAL | {"num_attention_heads": 7}, "m: hidden_size = 4096: not a multiple of num_attention_heads 7"),
        (MIXTRAL | {"attention_bias": "no"}, "m: attention_bias = 'no': true or false"),
        (GPT_OSS | {"layer_types": ["linear_attention"] * 36}, r"m: layer_types\[0\] = 'linear_attention': not in"),
        (GPT_OSS | {"layer_types": ["full_attention"]}, "m: layer_types = .*: a list of 36"),
        (QWEN3 | {"mlp_only_layers": [94]}, r"m: mlp_only_layers = \[94\]: a list of layer numbers from 0 to 93"),
        (QWEN3 | {"linear_num_value_heads": 32}, "m: linear_num_value_heads = 32: not understood"),
        (LLAMA | {"hybrid_override_pattern": "M-M*"}, "m: hybrid_override_pattern = 'M-M\\*': not understood"),
        (DEEPSEEK_V3 | {"index_topk": 2048}, "m: index_topk = 2048: not understood"),
        (DEEPSEEK_V3 | {"attention_bias": True}, "m: attention_bias = True: latent attention with biases"),
        (SKYWORK | {"moe_2layer_gate": True}, "m: moe_2layer_gate = True: not understood"),
        (SKYWORK | {"num_experts": [16, 32]}, r"m: num_experts = \[16, 32\]: a whole number"),
        (GEMMA4["text_config"] | {"num_kv_shared_layers": 20}, "m: num_kv_shared_layers = 20: not understood"),
        (GEMMA4 | {"text_config": 7}, "m: text_config: a mapping"),
        (T5 | {"feed_forward_proj": "gated-relu"}, "m: feed_forward_proj = 'gated-relu': not known; did you mean"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestionError, match=message) as caught:
        model_from_huggingface(config, "m")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.text(max_size=4), st.lists(st.integers(-1, 3), max_size=3)
)


@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_field_may_hold_anything(name: str, data: st.DataObject) -> None:
    config = CONFIGS[name]
    inner = config.get("text_config", config)
    field = data.draw(st.sampled_from(sorted(inner)))
    changed = inner | {field: data.draw(VALUES)}
    changed |= {"num_hidden_layers": 4} if field != "num_hidden_layers" and "layer_types" not in inner else {}
    whole = config | {"text_config": changed} if "text_config" in config else changed
    problem = "m: "
    try:
        count_parameters(model_from_huggingface(whole, "m"))
    except QuestionError as error:
        problem = str(error)
    assert problem.startswith("m: ") and "\n" not in problem


def test_every_architecture_is_tried_here() -> None:
    tried = {config["architectures"][0] for config in CONFIGS.values()}
    aliases = {"GrokForCausalLM", "Llama4ForCausalLM", "Gemma4ForCausalLM", "Gemma3ForConditionalGeneration"}
    counted = {"GPT2LMHeadModel", *(f"{x}ForCausalLM" for x in ("Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3"))}
    assert set(ARCHITECTURES) == tried | aliases | counted | {"DeepseekForCausalLM"}
    deepseek_moe = {k: v for k, v in DEEPSEEK_V2.items() if "lora" not in k and "head_dim" not in k}
    changes: dict[str, Any] = {
        "architectures": ["DeepseekForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
        "n_routed_experts": 64, "moe_intermediate_size": 1408,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 28,
        "topk_method": None, "n_group": None, "topk_group": None,
    }  # fmt: skip
    model = model_from_huggingface(deepseek_moe | changes, "m")
    assert count_parameters(model) == count_parameters(load_preset("deepseekmoe-16b"))

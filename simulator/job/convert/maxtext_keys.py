"""MaxText's keys: those that a job can say, those that it cannot, and the models that both know by name.

Names, defaults and meanings are those of `src/maxtext/configs/base.yml` at the commit of `SOURCE`; global batch =
per_device_batch_size x devices x gradient_accumulation_steps (`pyconfig`).
"""

from __future__ import annotations

from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.convert.settings import Settings
from simulator.job.convert.shell import read_pairs
from simulator.job.convert.words import words

SOURCE = "MaxText src/maxtext/configs/base.yml@000b810bb"

# model_name of MaxText, preset of moecast: the same dimensions (src/maxtext/configs/models/).
MODELS = {
    "llama2-7b": "llama2-7b", "llama2-70b": "llama2-70b", "llama3.1-8b": "llama3.1-8b", "llama3.1-70b": "llama3.1-70b",
    "llama3.1-405b": "llama3.1-405b", "mixtral-8x7b": "mixtral-8x7b", "mixtral-8x22b": "mixtral-8x22b",
    "qwen3-235b-a22b": "qwen3-235b-a22b",
}  # fmt: skip
AXES = ("data", "fsdp", "context", "tensor", "expert", "pipeline")
TENSORS = (
    "context", "mlpwi", "mlpwi_0", "mlpwi_1", "mlpwo", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo", "query_proj",
    "key_proj", "value_proj", "qkv_proj", "out_proj",
)  # fmt: skip

READ = frozenset(words("""
    model_name override_model_config decoder_block base_emb_dim base_num_query_heads base_num_kv_heads base_mlp_dim
    base_num_decoder_layers head_dim mlp_activations vocab_size logits_via_embedding num_experts num_experts_per_tok
    base_moe_mlp_dim shared_experts first_num_dense_layers routed_score_func routed_bias routed_scaling_factor
    n_routing_groups topk_routing_group use_qk_norm attention_type q_lora_rank kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim mtp_num_layers attention_sink attention_bias trainable_position_size norm_topk_prob
    global_parameter_scale
    per_device_batch_size gradient_accumulation_steps max_target_length steps num_pipeline_microbatches
    num_layers_per_pipeline_stage num_pipeline_repeats shard_optimizer_over_data
    capacity_factor sparse_matmul megablox dtype weight_dtype grad_dtype mu_dtype quantization remat_policy opt_type
    learning_rate lr_schedule_type learning_rate_final_fraction warmup_steps_fraction learning_rate_schedule_steps
    adam_b1 adam_b2 adam_weight_decay gradient_clipping_threshold load_balance_loss_weight routed_bias_update_rate
    enable_dropout dropout_rate init_weights_seed use_random_routing compile_topology compile_topology_num_slices
    hardware run_name
""")) | frozenset(TENSORS) | frozenset(f"{net}_{axis}_parallelism" for net in ("ici", "dcn")
    for axis in AXES)  # fmt: skip

_SAVES = "data, logging, checkpoints and evaluation are no part of a step"
_KERNELS = "kernels are those of the stack (docs/model.md, section 11)"
_ONE = "a job has no such axis; it must be 1"
WITHOUT: dict[str, str] = {
    **dict.fromkeys(words("""
        base_output_directory dataset_type dataset_path dataset_name tokenizer_path tokenizer_type enable_checkpointing
        async_checkpointing checkpoint_period save_checkpoint_on_start save_checkpoint_on_completion profiler
        profiler_steps skip_first_n_steps_for_profiler log_period enable_tensorboard gcs_metrics metrics_file
        enable_goodput_recording monitor_goodput eval_interval eval_steps jax_cache_dir reuse_example_batch
        save_config_to_gcs upload_all_profiler_results dump_hlo hf_path hf_access_token add_bos add_eos packing
        data_shuffle_seed enable_data_shuffling train_split eval_split eval_dataset_name max_corpus_chars
    """), _SAVES),
    **dict.fromkeys(words("""
        attention scan_layers use_iota_embed fused_qkv fused_mlp use_ragged_sort use_tokamax_gmm sa_block_q sa_block_kv
        sa_block_kv_compute sa_block_q_dkv sa_block_kv_dkv sa_block_kv_dkv_compute sa_block_q_dq sa_block_kv_dq
        sa_use_fused_bwd_kernel float32_logits float32_qk_product float32_gate_logits float32_weight_sum
        cast_logits_to_fp32 logits_dot_in_fp32 matmul_precision activations_in_float32 num_vocab_tiling
        use_custom_sort_vjp scan_pipeline_iterations param_scan_axis scan_layers_per_stage decoder_layer_input
        allow_split_physical_axes use_qwix_quantization
    """), _KERNELS),
    **dict.fromkeys(words("""
        normalization_layer_epsilon rope_max_timescale rope_type rope_factor rope_interleave rope_truncate
        rope_attention_scaling max_position_embeddings original_max_position_embeddings beta_fast mscale adam_eps
        adam_eps_root normalize_embedding_logits dense_init_scale mtp_loss_scaling_factor z_loss_multiplier
        rope_use_scale rope_linear_scaling_factor max_prefill_predict_length
    """), "numbers of the training that change no cost, and that a job has no place for"),
    **dict.fromkeys(
        [f"{net}_{axis}_parallelism" for net in ("ici", "dcn") for axis in (
            "fsdp_transpose", "sequence", "tensor_sequence", "autoregressive", "context_autoregressive", "diloco",
            "context_usp_ulysses", "tensor_transpose")], _ONE),
    **dict.fromkeys(
        ["optimizer_memory_host_offload", "parameter_memory_host_offload"],
        "states in host memory are not forecast"),
    "use_ring_of_experts": "gathered tokens are no transport of a job",
    "ragged_buffer_factor": "a job's ragged dispatch has no buffer to overflow",
    "pipeline_fsdp_ag_once": "a job gathers the weights in every pass",
}  # fmt: skip
KNOWN = READ | set(WITHOUT)


def read_yaml_of(data: dict[str, Any], where: str) -> Settings:
    """The keys of a YAML file; `None` as a word is null there."""
    return Settings({str(k): None if v == "None" else v for k, v in data.items()}, where, SOURCE)


def read_pairs_of(text: str, where: str) -> Settings:
    """The `key=value` words of a command line; QuestionError where one is given twice with different values."""
    data: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for line, key, value in read_pairs(text, where):
        if key.isupper():
            continue
        if key in data and data[key] != value:
            raise QuestionError(f"{where}, line {line}: {key} = {value}: line {lines[key]} has {data[key]}")
        data[key], lines[key] = value, line
    return Settings(data, where, SOURCE, "", lines)

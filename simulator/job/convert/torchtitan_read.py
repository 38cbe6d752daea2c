"""torchtitan's settings: a TOML file, `section.name` in one flat table.

Names and defaults are those of `torchtitan/config/job_config.py`, the last of the TOML era (`SOURCE`); earlier names of
the same settings are read as well.
"""

from __future__ import annotations

import tomllib
from typing import Any

from hw_profiles.errors import QuestionError
from simulator.job.convert.settings import Settings
from simulator.job.convert.words import words

SOURCE = "torchtitan torchtitan/config/job_config.py (last with [debug] and [quantize])"
# Name and flavour, preset: those whose every dimension is the preset's (torchtitan/models/*/__init__.py).
MODELS = {
    ("llama3", "8B"): "llama3-8b", ("llama3", "70B"): "llama3-70b", ("llama3", "405B"): "llama3.1-405b",
    ("deepseek_v3", "671B"): "deepseek-v3", ("qwen3", "30B-A3B"): "qwen3-30b-a3b",
    ("qwen3", "235B-A22B"): "qwen3-235b-a22b",
}  # fmt: skip
EARLIER = {
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor", "training.seed": "debug.seed",
    "float8.recipe_name": "quantize.linear.float8.recipe_name",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
}  # fmt: skip
_P = "parallelism."
READ = frozenset(
    [_P + n for n in words("""
        data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward tensor_parallel_degree
        pipeline_parallel_degree pipeline_parallel_schedule pipeline_parallel_layers_per_stage
        pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers
        pipeline_parallel_microbatch_size context_parallel_degree expert_parallel_degree expert_tensor_parallel_degree
        expert_parallel_comm_backend
    """)]
    + words("""
        model.name model.flavor model.converters optimizer.name optimizer.lr optimizer.beta1 optimizer.beta2
        optimizer.weight_decay lr_scheduler.warmup_steps lr_scheduler.decay_ratio lr_scheduler.decay_type
        lr_scheduler.min_lr_factor training.local_batch_size training.global_batch_size training.seq_len
        training.max_norm training.steps training.dtype training.mixed_precision_param activation_checkpoint.mode
        activation_checkpoint.selective_ac_option quantize.linear.float8.recipe_name debug.moe_force_load_balance
        debug.seed
    """)
)  # fmt: skip
# Whole sections, and single settings, without a counterpart in a job.
SECTIONS = {
    **dict.fromkeys(["job", "profiling", "metrics", "checkpoint", "validation", "comm", "memory_estimation",
                     "experimental"], "data, logging, checkpoints and evaluation are no part of a step"),
    "compile": "kernels are those of the stack (docs/model.md, section 11)",
    "fault_tolerance": "a job is one step without failures",
}  # fmt: skip
WITHOUT = {
    **dict.fromkeys(["training.dataset", "training.dataset_path", "training.gc_freq", "training.gc_debug",
                     "model.tokenizer_path", "model.hf_assets_path", "model.print_after_conversion",
                     "training.mixed_precision_reduce", "training.deterministic", "debug.deterministic",
                     "optimizer.eps", "optimizer.implementation", "optimizer.early_step_in_backward",
                     "lr_scheduler.total_steps", "activation_checkpoint.early_stop"],
                    "changes no cost that a job can say"),
    "training.enable_cpu_offload": "states in host memory are not forecast",
    "training.compile": "kernels are those of the stack (docs/model.md, section 11)",
    _P + "enable_async_tensor_parallel": "a job does not say whether tensor parallelism overlaps",
    _P + "disable_loss_parallel": "a job's logits are always split",
    _P + "enable_compiled_autograd": "kernels are those of the stack (docs/model.md, section 11)",
    _P + "context_parallel_rotate_method": "a job's keys and values go round a ring",
    _P + "context_parallel_load_balancer": "a job's context ranks are balanced",
    _P + "pipeline_parallel_expert_parallel_overlap": "only DualPipeV overlaps so, which is no schedule of a job",
    **dict.fromkeys(["quantize.linear.float8." + n for n in (
        "enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp", "filter_fqns", "emulate")]
        + ["quantize.grouped_mm.float8.fqns"], "a job has one precision for all products, and gathers in 16 bits"),
}  # fmt: skip
KNOWN = READ | set(WITHOUT)


def read_toml(text: str, where: str) -> Settings:
    """The settings of a TOML text; QuestionError where it is none."""
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise QuestionError(f"{where}: not TOML: {error}") from None
    flat: dict[str, Any] = {}

    def walk(table: dict[str, Any], path: str) -> None:
        for key, value in table.items():
            name = f"{path}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.")
            else:
                flat[EARLIER.get(name, name)] = value

    walk(tables, "")
    return Settings(flat, where, SOURCE)

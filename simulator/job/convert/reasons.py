"""Why a field of a job cannot be said in a trainer's configuration; the longest path that fits counts."""

from __future__ import annotations

EVERY = {
    "cluster": "no configuration of a trainer names its chips and their network",
    "software.stack": "the exported run is this trainer's",
    "software.release": "a trainer's release is what is installed",
    "training.routing": "a trainer routes as its router learns; a job's model of the load is a forecast's",
    "training.learning": "this trainer has no such setting, or another form of it",
    "training.capacity.eval_factor": "there is one factor for training and evaluation",
    "training.dtypes": "formats are the trainer's own",
    "training.dtypes.saved_activations": "no trainer of these keeps activations in another format by a setting",
    "batch.document_length": "packing is the data's, not the configuration's",
    "plan.placement": "the order of the mesh axes is the trainer's own",
    "software.overlap": "what overlaps is the trainer's own",
    "software.graphs": "there is no such setting",
    "software.attention": "the kernel is the trainer's own",
}

MEGATRON = {
    "plan.schedule": "Megatron-LM runs 1F1B, or interleaved 1F1B with virtual stages",
    "training.precision": "there is no flag for this format",
    "training.optimizer": "Megatron-LM has AdamW (its `adam`) and SGD",
    "training.remat": "--recompute-modules has fewer names, and recomputes nothing else",
    "training.capacity": "Megatron-LM counts k x tokens of a microbatch on a rank, rounds up, has no least number",
    "training.dispatch.transport": "Megatron-LM's dispatchers are all-to-all, DeepEP and HybridEP",
    "training.dispatch.layout": "tokens are permuted, or padded to slots; there is no einsum with a mask",
    "training.routing.model": "--moe-router-force-load-balancing draws random logits: balanced but for chance",
    "training.dtypes": "Megatron-LM's flags do not have this format here",
    "software.overlap.parameters": "--overlap-param-gather needs a sharded optimizer and --overlap-grad-reduce",
    "software.overlap.all_to_all": "--overlap-moe-expert-parallel-comm needs experts",
    "plan.shard_degree": "--num-distributed-optimizer-instances divides the ranks",
    "plan.sequence_parallel": "Megatron-LM turns it off without tensor parallelism",
}

MAXTEXT = {
    "plan.schedule": "MaxText's pipeline runs all forward passes first, like GPipe",
    "plan.stages": "MaxText's stages have the same number of layers",
    "plan.expert_tensor": "MaxText splits the experts' hidden size over the tensor axis",
    "plan.expert": "the expert axis is a part of the batch axes, and divides them",
    "plan.shard": "MaxText splits weights over fsdp and expert axes, or the optimizer over the data axis",
    "plan.shard_degree": "MaxText splits weights over fsdp, context and expert axes together",
    "plan.sequence_parallel": "it comes with MaxText's tensor axis",
    "plan.microbatch_sequences": "without a pipeline it is gradient_accumulation_steps, with one the microbatches",
    "training.precision": "quantization has no such format",
    "training.optimizer": "opt_type has AdamW, Adam of Pax, and SGD",
    "training.remat": "the custom policy names fewer tensors, and recomputes all others",
    "training.capacity": "MaxText counts k x tokens of a sequence, rounds down, at least 1",
    "training.dispatch": "MaxText dispatches by einsum with a capacity, and ragged without",
    "training.dtypes": "MaxText's weight_dtype, mu_dtype and grad_dtype do not say this",
}

TORCHTITAN = {
    "plan.schedule": "torchtitan has 1F1B, GPipe and Interleaved1F1B among these",
    "plan.stages": "torchtitan splits evenly, with a layer less on the first and the last stage",
    "plan.virtual_stages": "torchtitan's looped schedules have two stages a rank unless their layers are given",
    "plan.shard": "torchtitan shards parameters (FSDP), or nothing",
    "plan.sequence_parallel": "torchtitan's tensor parallelism is sequence parallel",
    "plan.expert_tensor": "torchtitan has 1, or the tensor degree",
    "training.precision": "torchtitan's converters are float8 (tensorwise) and MXFP8",
    "training.optimizer": "torchtitan has Adam and AdamW",
    "training.remat": "torchtitan recomputes all, nothing, or by its own list of operations",
    "training.capacity": "torchtitan drops no token",
    "training.dispatch": "torchtitan dispatches ragged, by all-to-all or DeepEP",
    "training.routing.model": "torchtitan forces exactly even loads, or none",
    "software.overlap": "torchtitan has no such setting; FSDP overlaps gathers and reductions",
}

TABLES = {"megatron": MEGATRON, "maxtext": MAXTEXT, "torchtitan": TORCHTITAN}
TITLES = {"megatron": "Megatron-LM", "maxtext": "MaxText", "torchtitan": "torchtitan"}


def why(form: str, path: str) -> str:
    """The reason for `path`, the trainer's own before the one for all; a general sentence where none is written."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for table in (TABLES[form], EVERY):
            if name in table:
                return table[name]
    return f"{TITLES[form]} has no such setting"

"""Megatron-LM's flags: those that a job can say, and those that it cannot, with the reason.

Names, defaults and meanings are those of `megatron/training/arguments.py` at the commit of `SOURCE`; flags of later
releases are marked. What a flag without a counterpart is about is said once per group.
"""

from __future__ import annotations

from simulator.job.convert.words import words

SOURCE = "Megatron-LM megatron/training/arguments.py@000c4ac24"
LATER = "Megatron-LM, later than 000c4ac24"

# Flags without a value.
BARE = frozenset(words("""
    group-query-attention swiglu squared-relu quick-geglu untie-embeddings-and-output-weights multi-latent-attention
    disable-bias-linear add-qkv-bias qk-layernorm use-rotary-position-embeddings no-position-embedding
    sequence-parallel use-distributed-optimizer use-megatron-fsdp use-torch-fsdp2 use-tp-pp-dp-mapping
    bf16 fp16 recompute-activations moe-layer-recompute moe-router-pre-softmax moe-router-enable-expert-bias
    moe-router-force-load-balancing moe-pad-expert-input-to-capacity moe-grouped-gemm moe-enable-deepep
    overlap-grad-reduce overlap-param-gather overlap-moe-expert-parallel-comm grad-reduce-in-bf16
    accumulate-allreduce-grads-in-fp32 use-precision-aware-optimizer enable-cuda-graph external-cuda-graph
    use-flash-attn use-mcore-models first-last-layers-bf16 fp8-param-gather
"""))  # fmt: skip

# Flags with values that a job has a place for.
VALUED = frozenset(words("""
    num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups kv-channels max-position-embeddings
    position-embedding-type relative-attention-num-buckets normalization vocab-size padded-vocab-size
    make-vocab-size-divisible-by window-size softmax-type mtp-num-layers
    q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
    num-experts moe-ffn-hidden-size moe-router-topk moe-layer-freq moe-shared-expert-intermediate-size
    moe-router-score-function moe-router-num-groups moe-router-group-topk moe-router-topk-scaling-factor
    moe-token-dispatcher-type moe-flex-dispatcher-backend moe-expert-capacity-factor
    moe-router-load-balancing-type moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps moe-router-bias-update-rate
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size pipeline-model-parallel-layout num-layers-per-virtual-pipeline-stage
    num-virtual-stages-per-pipeline-rank decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    data-parallel-sharding-strategy num-distributed-optimizer-instances
    micro-batch-size global-batch-size seq-length train-iters train-samples
    fp8-format fp8-recipe fp4-format optimizer recompute-granularity recompute-modules recompute-method
    recompute-num-layers main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype attention-backend
    cuda-graph-impl lr min-lr lr-decay-style lr-warmup-iters lr-decay-iters clip-grad weight-decay adam-beta1 adam-beta2
    hidden-dropout attention-dropout seed nproc-per-node nnodes world-size
"""))  # fmt: skip

_SAVES = "data, logging, checkpoints and evaluation are no part of a step"
_LAUNCH = "the launcher's; a job has its cluster instead"
_FUSED = "kernels are those of the stack (docs/model.md, section 11)"
_NUMERICS = "numbers of the training that change no cost, and that a job has no place for"
_COMMUNICATION = "how buffers are sent; a job says only what overlaps"

# Known flags without a counterpart in a job, by the reason.
WITHOUT: dict[str, str] = {
    **dict.fromkeys(words("""
        data-path train-data-path valid-data-path test-data-path data-args-path data-cache-path split mock-data
        tokenizer-type tokenizer-model vocab-file merge-file vocab-extra-ids tiktoken-pattern trust-remote-code
        no-mmap-bin-files num-workers dataloader-type reset-position-ids reset-attention-mask eod-mask-loss
        no-create-attention-mask-in-dataloader num-dataset-builder-threads legacy-tokenizer sft
        save load save-interval save-retain-interval ckpt-format ckpt-step no-load-optim no-load-rng no-save-optim
        no-save-rng finetune pretrained-checkpoint async-save use-dist-ckpt dist-ckpt-format dist-ckpt-strictness
        auto-detect-ckpt-format ckpt-fully-parallel-save ckpt-fully-parallel-load exit-on-missing-checkpoint
        use-checkpoint-args use-persistent-ckpt-worker ckpt-assume-constant-structure
        log-interval log-throughput log-params-norm log-num-zeros-in-grad log-progress log-timers-to-tensorboard
        log-memory-to-tensorboard log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-energy
        no-log-loss-scale-to-tensorboard logging-level timing-log-level timing-log-option tensorboard-dir
        tensorboard-log-interval tensorboard-queue-size wandb-project wandb-exp-name wandb-save-dir wandb-entity
        moe-per-layer-logging eval-iters eval-interval exit-interval exit-duration-in-mins exit-signal-handler profile
        profile-step-start profile-step-end profile-ranks use-pytorch-profiler record-memory-history
        memory-snapshot-path one-logger-project one-logger-run-name no-one-logger one-logger-async
    """), _SAVES),
    **dict.fromkeys(words("""
        node-rank master-addr master-port rdzv-id rdzv-backend rdzv-endpoint local-rank distributed-backend
        distributed-timeout-minutes nodes ntasks-per-node gpus-per-node container-image container-mounts
    """), _LAUNCH),
    **dict.fromkeys(words("""
        transformer-impl no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-masked-softmax-fusion
        no-rope-fusion cross-entropy-loss-fusion cross-entropy-fusion-impl no-gradient-accumulation-fusion
        moe-permute-fusion moe-router-fusion moe-use-legacy-grouped-gemm use-fused-weighted-squared-relu
        no-persist-layer-norm use-te-activation-func use-legacy-models moe-deepep-num-sms moe-hybridep-num-sms
        moe-router-padding-for-fp8 deterministic-mode cuda-graph-scope cuda-graph-warmup-steps te-rng-tracker
        apply-query-key-layer-scaling attention-softmax-in-fp32 moe-shared-expert-overlap delay-wgrad-compute
    """), _FUSED),
    **dict.fromkeys(words("""
        init-method-std init-method-xavier-uniform embedding-init-method-std norm-epsilon adam-eps sgd-momentum
        rotary-base rotary-percent rotary-interleaved rotary-scaling-factor rotary-seq-len-interpolation-factor
        use-rope-scaling rope-scaling-factor rope-type mscale mscale-all-dim loss-scale initial-loss-scale
        min-loss-scale loss-scale-window hysteresis start-weight-decay end-weight-decay weight-decay-incr-style
        lr-warmup-fraction lr-warmup-samples lr-warmup-init lr-decay-samples lr-wsd-decay-style lr-wsd-decay-iters
        mtp-loss-scaling-factor moe-router-dtype moe-token-drop-policy moe-apply-probs-on-input
        no-check-for-nan-in-loss-and-grad check-for-spiky-loss calculate-per-token-loss override-opt-param-scheduler
        use-checkpoint-opt-param-scheduler decoupled-lr decoupled-min-lr fp32-residual-connection fp16-lm-cross-entropy
        fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo no-fp8-wgrad manual-gc manual-gc-interval
        use-cpu-initialization rerun-mode
        relative-attention-max-distance activation-func-clamp-value glu-linear-offset apply-layernorm-1p
    """), _NUMERICS),
    **dict.fromkeys(words("""
        no-overlap-p2p-communication overlap-p2p-communication-warmup-flush no-align-grad-reduce no-align-param-gather
        ddp-num-buckets ddp-bucket-size ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw
        ddp-reduce-scatter-with-fp32-accumulation overlap-param-gather-with-optimizer-step use-nccl-ub use-sharp
        sharp-enabled-group no-scatter-gather-tensors-in-pipeline tp-comm-overlap tp-comm-overlap-cfg
        disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad tp-comm-bootstrap-backend
        cp-comm-type hierarchical-context-parallel-sizes nccl-communicator-config-path fsdp-double-buffer
        distribute-saved-activations high-priority-stream-groups disable-gloo-process-groups
        microbatch-group-size-per-virtual-pipeline-stage suggested-communication-unit-size
        init-model-with-meta-device keep-fp8-transpose-cache
        no-gradient-reduce-div-fusion torch-fsdp2-no-reshard-after-forward
    """), _COMMUNICATION),
    **dict.fromkeys(words("""
        cpu-offloading-num-layers optimizer-cpu-offload optimizer-offload-fraction overlap-cpu-optimizer-d2h-h2d
        use-torch-optimizer-for-cpu-offload
    """), "optimizer states and layers in host memory are not forecast"),
    **dict.fromkeys(["rampup-batch-size", "decrease-batch-size-if-needed"], "a job is one step of one batch size"),
    **dict.fromkeys(["fine-grained-activation-offloading", "offload-modules"],
                    "offloaded modules have other names than a job's; write training.remat.offload"),
}  # fmt: skip

# Flags of Megatron-LM that would make another model than the one read.
OTHER_MODEL = frozenset(words("""
    encoder-num-layers decoder-num-layers encoder-seq-length decoder-seq-length quick-geglu window-attn-skip-freq
    no-rope-freq mrope-section is-hybrid-model hybrid-attention-ratio hybrid-mlp-ratio hybrid-override-pattern
    heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json spec
    apply-residual-connection-post-layernorm
    qk-l2-norm retro-add-retriever openai-gelu yaml-cfg account-for-embedding-in-pipeline-split
    account-for-loss-in-pipeline-split
"""))  # fmt: skip

KNOWN = BARE | VALUED | OTHER_MODEL | set(WITHOUT)

# Destinations whose flag says the opposite, as a YAML of arguments has them.
OPPOSITE = {"add-bias-linear": "disable-bias-linear", "add-position-embedding": "no-position-embedding"}

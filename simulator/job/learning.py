"""What only a run of the job needs: losses of the router, learning rate, data, evaluation, checkpoints.

The simulator reads none of it, but for the seed of forced routing; the trainer reads all of it. Fields that change
neither the work of a step nor its outcome (how long, from which files, where to) stand in `Run` and are no part of the
job's hash.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from simulator.job.model import Count, CountOrZero, Section

Coefficient = Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]


class RouterTraining(Section):
    """Losses and noise of the router in training; how it makes gates of logits is the model's `router`.

    - `balance_loss` times E sum f P, 1 at balance (Switch Transformer, arXiv:2101.03961, eq. 4), f from the first
      choices only (GShard) or from `all` of them; per routing `group` and averaged, per `sequence` (DeepSeek-V3), or
      over the whole `batch` of a microbatch on all devices.
    - `z_loss` times the mean squared logsumexp of the logits (ST-MoE, arXiv:2202.08906, eq. 5).
    - `importance_loss`, `load_loss` times the squared coefficients of variation (Shazeer 2017, eq. 7 and 11), for
      `noisy_top_k`.
    - `jitter` multiplies the router's input by U(1 - jitter, 1 + jitter) (Switch).
    - `second_choice: random` keeps choices after the first with probability min(1, gate / threshold) (GShard, ST-MoE).
    - `priority: probability` seats the surest tokens first (batch-prioritised routing), in an encoder only.
    - `bias_update` moves the balance bias after each step (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    balance_loss: Coefficient = 0.01
    balance_scope: Literal["group", "sequence", "batch"] = "group"
    balance_counts: Literal["first", "all"] = "all"
    z_loss: Coefficient = 0.0
    importance_loss: Coefficient = 0.1
    load_loss: Coefficient = 0.1
    jitter: Fraction = 0.0
    second_choice: Literal["all", "random"] = "all"
    threshold: Rate = 0.2
    priority: Literal["position", "probability"] = "position"
    bias_update: Coefficient = 0.001


class LearningRate(Section):
    """Linear warm-up to `peak`, then constant, peak x sqrt(warmup / step) (`rsqrt`), or a cosine down to `final`."""

    peak: Rate = 1e-3
    schedule: Literal["constant", "rsqrt", "cosine"] = "rsqrt"
    warmup_steps: Count = 100
    decay_steps: Count | None = None
    final: Fraction = 0.1

    @model_validator(mode="after")
    def _complete(self) -> LearningRate:
        if (self.schedule == "cosine") != (self.decay_steps is not None):
            raise ValueError("schedule cosine and decay_steps go together")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps = {self.decay_steps}: must be above warmup_steps {self.warmup_steps}")
        return self


class Data(Section):
    """The text a run learns from, and how it becomes examples.

    `files` are text, JSONL or Parquet files or folders beside the job (`field` is the text's key or column); without
    them the Python standard library's sources are read. `tokenizer` is `bytes` or the name of a `tokenizers` JSON file.
    `span_corruption` is T5's objective for encoder-decoders (arXiv:1910.10683, section 3.1.4), `causal` next-token.
    Every `held_out`th document is for evaluation only.
    """

    files: tuple[str, ...] | None = None
    field: str = "text"
    tokenizer: str = "bytes"
    objective: Literal["causal", "span_corruption"] | None = None
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    mean_span: Annotated[float, Field(ge=1, le=100)] = 3.0
    packed: bool = True
    held_out: Annotated[int, Field(strict=True, ge=2, le=10**6)] = 20


class Run(Section):
    """How long a run lasts and what it writes; no part of the job's hash."""

    steps: Count = 200
    log_every: Count = 10
    evaluate_every: Count | None = None
    evaluation_batches: Count = 8
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 3
    telemetry: bool = True
    workers: CountOrZero = 0


class Start(Section):
    """Fine-tuning: weights from the newest good checkpoint in a folder beside the job, with parts of them frozen.

    `freeze` keeps `experts` (with their routers), `others` (all but the experts), or named parts of the tree.
    """

    checkpoint: str
    freeze: tuple[str, ...] = ()


class Learning(Section):
    """All that a run needs beside the work of a step."""

    router: RouterTraining = RouterTraining()
    learning_rate: LearningRate = LearningRate()
    clip_norm: Rate | None = 1.0
    weight_decay: Coefficient = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    dropout: Fraction = 0.0
    expert_dropout: Fraction | None = None
    logits_z_loss: Coefficient = 0.0
    init_scale: Rate = 0.1
    seed: CountOrZero = 0
    data: Data = Data()
    start: Start | None = None

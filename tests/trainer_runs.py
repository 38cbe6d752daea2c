"""A job's trainer, its first batch and parameters, and one step of it: what the trainer's tests and suites share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Mapping = dict[str, Any]


def make_trainer(mapping: Mapping) -> Any:
    """The trainer of a job, on the first devices."""
    import jax

    from hw_profiles.loader import resolve_cluster
    from simulator.job.load import load_job
    from simulator.job.rules import resolve
    from trainer.step import Trainer

    job = load_job(mapping)
    return Trainer.of(job, resolve(job, resolve_cluster(job.cluster)), jax.devices())


def make_batch(trainer: Any, seed: int = 0) -> Mapping:
    """A batch that no two devices see alike: words sorted over the batch, rare ones rarer, documents packed."""
    import jax
    import numpy as np

    draw = np.random.default_rng(seed)
    shapes = trainer.batch_shapes()
    vocab = trainer.job.model.vocab
    out: Mapping = {}
    for prefix in ("", "encoder_"):
        if f"{prefix}tokens_BS" not in shapes:
            continue
        b, s = shapes[f"{prefix}tokens_BS"].shape
        words = np.sort(draw.zipf(1.3, b * s) % vocab).reshape(b, s)
        cut = np.arange(s)[None] >= draw.integers(s // 4, s - 2, b)[:, None]
        segments = 1 + cut
        first = np.where(cut, cut.argmax(1)[:, None], 0)
        out[f"{prefix}tokens_BS"] = words
        out[f"{prefix}segments_BS"] = segments
        out[f"{prefix}positions_BS"] = np.arange(s)[None] - first
        if not prefix:
            out["targets_BS"] = (words * 7 + 3) % vocab
            # The last sequences have fewer targets that count.
            out["weights_BS"] = np.arange(s)[None] < s - 2 * np.arange(b)[:, None]
            out["sequence_B"] = np.arange(b)
    return {k: jax.device_put(v.astype(np.int32), shapes[k].sharding) for k, v in out.items()}


def stirred(path: Any, x: Any) -> Any:
    """An initial value as after some training: routers that prefer, biases that are not zero."""
    import zlib

    import numpy as np

    text = "/".join(str(getattr(k, "key", k)) for k in path)
    draw = np.random.default_rng(zlib.crc32(text.encode()))
    scale = 0.5 if "router" in text else 0.1
    return x + (scale * draw.standard_normal(x.size).reshape(x.shape)).astype(x.dtype)


def start(trainer: Any, reference: Any = None) -> Any:
    """Parameters on their devices: the trainer's own first values stirred, or those of the reference, reshaped."""
    import jax

    from trainer.parameters import initial_values

    shapes = trainer.state_shapes().params
    if reference is None:
        seed = trainer.job.training.learning.seed
        first = jax.jit(lambda: initial_values(trainer.abstract, seed, trainer.parameter_dtype))()
        reference = jax.tree_util.tree_map_with_path(stirred, jax.device_get(first))
    return jax.tree.map(lambda x, w: jax.device_put(x.reshape(w.shape), w.sharding), reference, shapes)


def difference(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    import numpy as np

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(float(np.abs(b).max(initial=0)), 1e-30)
    return float(np.abs(a.reshape(b.shape) - b).max(initial=0)) / scale


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths."""
    import jax

    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path), x


def one_step(mapping: Mapping, reference: Any = None, step: int = 3) -> tuple[Any, Any, Any]:
    """(parameters, gradients, metrics) of a step, on the host."""
    import jax
    import jax.numpy as jnp

    trainer = make_trainer(mapping)
    params = start(trainer, reference)
    gradients, metrics = jax.jit(trainer.gradients)(params, make_batch(trainer), jnp.int32(step))
    return jax.device_get((params, gradients, metrics))


def two_steps(mapping: Mapping, reference: Any) -> tuple[Any, Any, Any, float]:
    """(parameters after two steps, the metrics of both, the losses of the evaluation), on the host."""
    import jax
    import numpy as np

    from trainer.step import State

    trainer = make_trainer(mapping)
    params = start(trainer, reference)
    evaluated = trainer.evaluate(params, make_batch(trainer))
    seen = float(evaluated["loss"]) + sum(float(x) for x in evaluated["router"].values())
    shapes = trainer.state_shapes()
    optimizer = jax.jit(trainer.optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes.optimizer))
    state = State(jax.device_put(np.zeros((), np.int32), shapes.step.sharding), params, optimizer(params))
    told = []
    for seed in (0, 1):
        state, metrics = trainer.step(state, make_batch(trainer, seed))
        told.append(jax.device_get(metrics))
    return jax.device_get(state.params), *told, seen

"""One training step: loss and gradients of all devices in one `shard_map`, then the optimiser on sharded arrays.

Everything that devices say to each other in the forward and backward passes is written out, and checked by the types
of `shard_map` (`check_vma=True`): a sum that is missing does not compile. Gradients are those of the sum over devices
of what each computed, accumulated over microbatches without communication, and reduced once.

Letters: B sequences of this device, M microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from trainer.losses import finish, weighted
from trainer.mesh import Axes, make_axes, make_mesh
from trainer.model import forward, model_parameters
from trainer.optimizer import DTYPES, make_optimizer, schedule_of
from trainer.parameters import (
    Parameter,
    check_shardable,
    initial_values,
    is_parameter,
    shard_axes,
    spec_of,
    tree_map,
    varying_axes,
)
from trainer.pipeline import pipelined_forward
from trainer.routing import updated_bias
from trainer.setting import Setting, axes_of, varying, zeros_like

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.job.job import Job
    from simulator.job.rules import Degrees

Array = jax.Array
Tree = Any
COMPUTE = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "selective-bf16": jnp.bfloat16}
ENCODER_DECODER = ("encoder_tokens_BS", "encoder_segments_BS", "encoder_positions_BS")
BATCH = ("tokens_BS", "targets_BS", "segments_BS", "positions_BS", "weights_BS", "sequence_B")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a step changes: its number, the parameters, the optimiser's state."""

    step: Any
    params: Tree
    optimizer: Tree


@dataclass(frozen=True)
class Trainer:
    """A job made ready for its devices: abstract parameters, shardings, and the compiled steps."""

    job: Job
    degrees: Degrees
    axes: Axes
    mesh: Any
    platform: str

    @classmethod
    def of(cls, job: Job, degrees: Degrees, devices: Sequence[Any]) -> Trainer:
        """The trainer of `job` on the first devices of `devices`; QuestionError for what cannot be run."""
        axes = make_axes(job, degrees)
        out = cls(job, degrees, axes, make_mesh(axes, devices), str(devices[0].platform))
        check_shardable(out.abstract, axes)
        return out

    @cached_property
    def abstract(self) -> Tree:
        """The abstract tree of parameters."""
        return model_parameters(self.job, self.degrees)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The job's optimiser."""
        return make_optimizer(self.job, self.abstract)

    @property
    def parameter_dtype(self) -> Any:
        """Format in which parameters are kept: float32 unless the job says otherwise."""
        return DTYPES[self.job.training.dtypes.parameters or "fp32"]

    def specs(self, *, sharded: bool) -> Tree:
        """Partition specs of all parameters."""
        return tree_map(lambda p: spec_of(p, self.axes, sharded=sharded), self.abstract)

    @property
    def parameter_specs(self) -> Tree:
        """Where the parameters live: in shards only with `shard: parameters`."""
        return self.specs(sharded=self.job.plan.shard == "parameters")

    @property
    def gradient_specs(self) -> Tree:
        """Where gradients and optimiser states live: in shards with any `shard` but none."""
        return self.specs(sharded=self.job.plan.shard != "none")

    def place(self, specs: Tree) -> Tree:
        """Shardings on the mesh."""
        return jax.tree.map(
            lambda s: NamedSharding(self.mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )

    def batch_spec(self) -> PartitionSpec:
        """The batch is split over the data ranks."""
        return PartitionSpec(self.axes.data) if self.axes.data else PartitionSpec()

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a global batch."""
        batch = self.job.batch
        b = batch.sequences
        sharding = NamedSharding(self.mesh, self.batch_spec())
        names = BATCH + (ENCODER_DECODER if batch.encoder_length else ())
        out = {}
        for name in names:
            length = batch.encoder_length if name.startswith("encoder") else batch.decoder_length
            shape = (b,) if name == "sequence_B" else (b, length)
            out[name] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        return out

    def state_shapes(self) -> State:
        """Shapes, formats and shardings of the state: what checkpoints and compilation ahead of time need."""
        params = tree_map(
            lambda p: jax.ShapeDtypeStruct(p.shape, self.parameter_dtype if p.trained else jnp.float32), self.abstract
        )
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, self.place(self.parameter_specs)
        )
        states = jax.eval_shape(self.optimizer.init, params)
        specs = optimizer_specs(self.abstract, self.gradient_specs, states)
        states = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), states, self.place(specs)
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))
        return State(step, params, states)

    def init(self) -> State:
        """The first state, drawn on the devices that hold it."""
        shapes = self.state_shapes()
        shardings = jax.tree.map(lambda x: x.sharding, shapes)

        def make() -> State:
            params = initial_values(self.abstract, self.job.training.learning.seed, self.parameter_dtype)
            return State(jnp.int32(0), params, self.optimizer.init(params))

        out: State = jax.jit(make, out_shardings=shardings)()
        return out

    def setting(self, *, train: bool = True) -> Setting:
        """What the model needs to know."""
        compute = COMPUTE[self.job.training.precision]
        return Setting(self.job, self.degrees, self.axes, compute, self.platform, train)

    @cached_property
    def step(self) -> Any:
        """The jitted step: (state, batch) -> (state, metrics); the old state's memory is reused."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, None))

    @cached_property
    def evaluate(self) -> Any:
        """The jitted evaluation: (params, batch) -> metrics; evaluation's capacity, no noise."""
        return jax.jit(self._evaluate)

    def _step(self, state: State, batch: Tree) -> tuple[State, Tree]:
        gradients, metrics = self.gradients(state.params, batch, state.step)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        how = self.job.training.learning.router
        counts = metrics.get("experts", {})
        params = _move_biases(self.abstract, params, counts, how.bias_update)
        params = lax.with_sharding_constraint(params, self.place(self.parameter_specs))
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule_of(self.job.training.learning.learning_rate)(state.step)
        return State(state.step + 1, params, optimizer), metrics

    def gradients(self, params: Tree, batch: Tree, step: Array) -> tuple[Tree, Tree]:
        """Gradients of the mean loss, in the shards of `gradient_specs`, and metrics."""
        s, specs = self.setting(), self.batch_spec()
        run = jax.shard_map(
            lambda p, b, n: _gradients(self, s, p, b, n),
            mesh=self.mesh,
            in_specs=(self.parameter_specs, jax.tree.map(lambda _: specs, batch), PartitionSpec()),
            out_specs=(self.gradient_specs, PartitionSpec()),
            check_vma=True,
        )
        out: tuple[Tree, Tree] = run(params, batch, step)
        return out

    def _evaluate(self, params: Tree, batch: Tree) -> Tree:
        s, specs = self.setting(train=False), self.batch_spec()
        run = jax.shard_map(
            lambda p, b: _losses(self, s, p, b, None, _total_weight(s, b))[1],
            mesh=self.mesh,
            in_specs=(self.parameter_specs, jax.tree.map(lambda _: specs, batch)),
            out_specs=PartitionSpec(),
            check_vma=True,
        )
        return run(params, batch)


def optimizer_specs(abstract: Tree, specs: Tree, states: Tree) -> Tree:
    """Partition specs of the optimiser's state: a moment lies like its parameter, a factor like what is left of it."""
    shapes = {jax.tree_util.keystr(path): (p, s) for (path, p), s in zip(
        jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_parameter)[0],
        jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)), strict=True)}  # fmt: skip

    def of(path: Any, x: Any) -> PartitionSpec:
        text = jax.tree_util.keystr(path)
        # The longest parameter's path that the state's path contains: moments are trees of the parameters' form.
        name = max((n for n in shapes if n in text), key=len, default=None)
        if name is None:
            return PartitionSpec()
        p, spec = shapes[name]
        return _spec_like(x.shape, p.shape, tuple(spec))

    return jax.tree_util.tree_map_with_path(of, states)


def _spec_like(shape: tuple[int, ...], full: tuple[int, ...], spec: tuple[Any, ...]) -> PartitionSpec:
    """The spec for an array of the parameter's own shape, or without one of its last two dimensions; else whole."""
    if shape == full:
        return PartitionSpec(*spec)
    for at in (len(full) - 1, len(full) - 2):
        if at >= 0 and shape == full[:at] + full[at + 1 :]:
            return PartitionSpec(*spec[:at], *spec[at + 1 :])
    return PartitionSpec()


def _total_weight(s: Setting, batch: Tree) -> Array:
    """Targets that count in the whole global batch, so that microbatches and devices weigh as their tokens do."""
    total = batch["weights_BS"].sum().astype(jnp.float32)
    return jnp.maximum(lax.psum(total, s.axes.data) if s.axes.data else total, 1)


def _gradients(t: Trainer, s: Setting, params: Tree, batch: Tree, step: Array) -> tuple[Tree, Tree]:
    whole = t.job.plan.shard == "parameters"
    # Marked as differing between devices, gradients stay local until they are reduced, once, below.
    local = tree_map(lambda p, w: varying(w, varying_axes(p, t.axes, gathered=whole)), t.abstract, params)
    key = jax.random.fold_in(jax.random.key(t.job.training.learning.seed + 1), step)
    weight, count = _total_weight(s, batch), t.degrees.microbatches

    def loss(w: Tree, b: Tree) -> tuple[Array, Tree]:
        return _losses(t, s, w, b, key, weight)

    grad = jax.value_and_grad(loss, has_aux=True)
    if count == 1 or t.degrees.pipeline > 1:
        (_, metrics), gradients = grad(local, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

        def add(total: Tree, b: Tree) -> tuple[Tree, Tree]:
            (_, seen), g = grad(local, b)
            if t.job.plan.shard == "gradients":
                g = _reduced(t, g)
            return jax.tree.map(jnp.add, total, g), seen

        first = jax.tree.map(zeros_like, local)
        if t.job.plan.shard == "gradients":
            first = tree_map(lambda p, w: _shard_zeros(t, p, w), t.abstract, params)
        gradients, seen = lax.scan(add, first, parts)
        metrics = _over_microbatches(seen)
    if t.job.plan.shard != "gradients" or count == 1 or t.degrees.pipeline > 1:
        gradients = _reduced(t, gradients)
    return gradients, metrics


def _shard_zeros(t: Trainer, p: Parameter, w: Array) -> Array:
    """Zeros in the shape of this device's shard of a gradient."""
    axes, at = shard_axes(p, t.axes), p.shard_dimension()
    shape = list(w.shape)
    if axes and at is not None:
        shape[at] //= t.axes.size(axes)
    return varying(jnp.zeros(shape, w.dtype), tuple(axes_of(w)) + axes)


def _reduced(t: Trainer, gradients: Tree) -> Tree:
    """Sums over the devices that hold copies; with ZeRO each keeps its shard of the sum."""
    whole, zero = t.job.plan.shard == "parameters", t.job.plan.shard in ("optimizer", "gradients")
    kind = DTYPES[t.job.training.dtypes.gradient_reduction or "fp32"]

    def one(p: Parameter, g: Array) -> Array:
        if not p.trained:
            g = jnp.zeros_like(g)
        axes = [a for a in varying_axes(p, t.axes, gathered=whole) if a in axes_of(g)]
        piece = "experts.gradients" if p.expert else "gradients"
        given, shards, at = g.dtype, shard_axes(p, t.axes), p.shard_dimension()
        if zero and shards and at is not None:
            with jax.named_scope(f"{piece}.reduce_scatter"):
                g = lax.psum_scatter(varying(g, shards).astype(kind), shards, scatter_dimension=at, tiled=True)
            axes = [a for a in axes if a not in shards]
        if axes:
            with jax.named_scope(f"{piece}.all_reduce"):
                g = lax.psum(g.astype(kind), tuple(axes))
        return g.astype(given)

    return tree_map(one, t.abstract, gradients)


def _losses(t: Trainer, s: Setting, params: Tree, batch: Tree, key: Array | None, weight: Array) -> tuple[Array, Tree]:
    """The loss of a microbatch (its share of the step's mean), and metrics, summed over all devices."""
    run = pipelined_forward if t.degrees.pipeline > 1 else forward
    sums, reports = run(s, t.abstract, params, batch, key)
    learning, how = t.job.training.learning, t.job.training.learning.router
    axes = tuple(dict.fromkeys((*s.axes.pipeline, *s.axes.data)))
    sums = jax.tree.map(lambda x: lax.psum(varying(x, axes), axes) if axes else x, sums)
    loss = (sums["loss"] + learning.logits_z_loss * sums["z"]) / weight
    share = t.degrees.microbatches
    router: dict[str, Array] = {}
    experts: dict[str, list[Tree]] = {}
    for stack, found in reports.items():
        for parts, seen in found:
            losses = finish(_over_tokens(s, parts), how)
            loss = loss + _over_stages(s, weighted(losses, how)) / share
            for name, value in losses.items():
                router[name] = router.get(name, jnp.float32(0)) + _over_stages(s, value.sum()) / share
            experts.setdefault(stack, []).append(_all_layers(s, _over_tokens(s, seen)))
    metrics = {
        "loss": sums["loss"] / weight,
        "right": sums["right"] / weight,
        "weights": sums["weights"],
        "router": router,
        "experts": experts,
    }
    return loss, jax.tree.map(lax.stop_gradient, metrics)


def _over_stages(s: Setting, x: Array) -> Array:
    """The sum over pipeline stages, each of which has layers of its own."""
    return lax.psum(varying(x, s.axes.pipeline), s.axes.pipeline) if s.axes.pipeline else x


def _all_layers(s: Setting, seen: Tree) -> Tree:
    """Telemetry of the layers of all stages, [L, ...], from that of this stage, [M, layers here, ...]."""
    if not s.axes.pipeline:
        return seen

    def gather(x: Array) -> Array:
        x = lax.all_gather(varying(lax.stop_gradient(x), s.axes.pipeline), s.axes.pipeline, to="invarying")
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(gather, _over_microbatches(seen))


def _over_tokens(s: Setting, tree: Tree) -> Tree:
    """Sums (and the largest of what is called largest) over all devices that routed different tokens.

    Under sequence parallelism the slices of an expert see the same tokens without the types knowing: each counts as a
    part of one.
    """
    axes = (*s.axes.data, *(s.axes.tensor if s.sequence_axes else s.axes.token_split))
    copies = s.axes.size(s.axes.expert_tensor) if s.sequence_axes else 1

    def one(path: Any, x: Array) -> Array:
        if not axes:
            return x
        if "largest" in jax.tree_util.keystr(path):
            return lax.pmax(lax.stop_gradient(varying(x, axes)), axes)
        return lax.psum(varying(x / copies, axes), axes)

    return jax.tree_util.tree_map_with_path(one, tree)


def _over_microbatches(seen: Tree) -> Tree:
    """Metrics of a step from those of its microbatches, [M, ...]: sums, or the largest."""

    def one(path: Any, x: Array) -> Array:
        return x.max(0) if "largest" in jax.tree_util.keystr(path) else x.sum(0)

    return jax.tree_util.tree_map_with_path(one, seen)


def _move_biases(abstract: Tree, params: Tree, experts: Tree, step: float) -> Tree:
    """Balance biases after the step, from the counts of the global batch."""
    out = dict(params)
    for stack, found in experts.items():
        reports = iter(found)
        parts = []
        for spec, held in zip(abstract[stack]["segments"], params[stack]["segments"], strict=True):
            period = []
            for one, w in zip(spec, held, strict=True):
                counts = next(reports)["wanted_E"] if "moe" in one else None
                period.append(_with_moved_bias(w, counts, step))
            parts.append(period)
        out[stack] = params[stack] | {"segments": parts}
    return out


def _with_moved_bias(layer: Tree, counts: Array | None, step: float) -> Tree:
    if counts is None or "balance_bias" not in layer["moe"]["router"]:
        return layer
    router = layer["moe"]["router"]
    bias = router["balance_bias"]
    moved = updated_bias(bias, counts.reshape(bias.shape), step)
    return layer | {"moe": layer["moe"] | {"router": router | {"balance_bias": moved}}}

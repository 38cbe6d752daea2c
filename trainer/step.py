"""One training step: loss and gradients of all devices in one `shard_map`, then the optimiser on sharded arrays.

Everything that devices say to each other in the forward and backward passes is written out, and checked by the types
of `shard_map` (`check_vma=True`): a sum that is missing does not compile.

Letters: B sequences, S tokens, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from simulator.job.popularity import forced_counts
from trainer.forced import Forced
from trainer.gradients import local_gradients, local_losses
from trainer.mesh import Axes, make_axes, make_mesh
from trainer.model import model_parameters
from trainer.optimizer import DTYPES, frozen_parts, make_optimizer, schedule_of
from trainer.parameters import check_shardable, initial_values, is_parameter, spec_of, tree_map
from trainer.refuse import check_runnable
from trainer.routing import updated_bias
from trainer.setting import Setting

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
    forced: Forced | None = None

    @classmethod
    def of(cls, job: Job, degrees: Degrees, devices: Sequence[Any], folder: Path | None = None) -> Trainer:
        """The trainer of `job` on the first devices of `devices`; QuestionError for what cannot be run.

        `folder` is the job's, for recorded routing that is forced.
        """
        check_runnable(job, degrees, str(devices[0].platform))
        axes = make_axes(job, degrees)
        forced = Forced.of(job, forced_counts(job, folder or Path())) if job.training.routing.forced else None
        out = cls(job, degrees, axes, make_mesh(axes, devices), str(devices[0].platform), forced)
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
        out: State = self.first()
        return out

    @cached_property
    def first(self) -> Any:
        """The compiled function that draws the first state."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes())

        def make() -> State:
            params = initial_values(self.abstract, self.job.training.learning.seed, self.parameter_dtype)
            return State(jnp.int32(0), params, self.optimizer.init(params))

        return jax.jit(make, out_shardings=shardings).lower().compile()

    def setting(self, *, train: bool = True) -> Setting:
        """What the model needs to know."""
        compute = COMPUTE[self.job.training.precision]
        return Setting(self.job, self.degrees, self.axes, compute, self.platform, train, forced=self.forced)

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
        with jax.named_scope("optimizer.update"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        how = self.job.training.learning.router
        counts = metrics.get("experts", {})
        still = frozen_parts(self.job, self.abstract, biases=True)
        params = _move_biases(still, params, counts, how.bias_update)
        params = lax.with_sharding_constraint(params, self.place(self.parameter_specs))
        metrics["learning_rate"] = schedule_of(self.job.training.learning.learning_rate)(state.step)
        return State(state.step + 1, params, optimizer), metrics

    def gradients(self, params: Tree, batch: Tree, step: Array) -> tuple[Tree, Tree]:
        """Gradients of the mean loss, in the shards of `gradient_specs`, and metrics."""
        s, specs = self.setting(), self.batch_spec()
        run = jax.shard_map(
            lambda p, b, n: local_gradients(self, s, p, b, n),
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
            lambda p, b: local_losses(self, s, p, b, None)[1],
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


def _move_biases(frozen: Tree, params: Tree, experts: Tree, step: float) -> Tree:
    """Balance biases after the step, from the counts of the global batch; those of frozen routers stay."""
    out = dict(params)
    for stack, found in experts.items():
        reports = iter(found)
        parts = []
        for still, held in zip(frozen[stack]["segments"], params[stack]["segments"], strict=True):
            period = []
            for fixed, w in zip(still, held, strict=True):
                counts = next(reports)["wanted_E"] if "moe" in w else None
                period.append(_with_moved_bias(w, fixed, counts, step))
            parts.append(period)
        out[stack] = params[stack] | {"segments": parts}
    return out


def _with_moved_bias(layer: Tree, fixed: Tree, counts: Array | None, step: float) -> Tree:
    if counts is None or fixed["moe"]["router"].get("balance_bias", True):
        return layer
    router = layer["moe"]["router"]
    bias = router["balance_bias"]
    moved = updated_bias(bias, counts.reshape(bias.shape), step)
    return layer | {"moe": layer["moe"] | {"router": router | {"balance_bias": moved}}}

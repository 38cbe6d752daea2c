"""Small programs, compiled for a target in a process of their own: `python tests/compiled_programs.py cpu:8 [NAME]...`.

Prints JSON: name -> {text, cost_flops, memory}. With --save FOLDER it writes the texts as tests/data/hlo keeps them,
without the parts that nobody reads (back-end configurations, source lines).

Legend: T tokens of a device, D and F widths, L layers, G groups, C rows of a group.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.hlo import compile_lowered, read_program
from trainer.targets import parse_target

T, D, F, L, G, C = 64, 128, 256, 5, 4, 16
# XLA:TPU keeps an all-to-all synchronous, and on v3 and v4 an all-gather too, unless told otherwise.
ASYNC = {"xla_tpu_enable_async_all_to_all": "true", "xla_enable_async_all_gather": "true"}
CHAINED = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
OPTIONS: dict[str, dict[str, Any]] = {"moe_async": ASYNC, "gathered_chained": CHAINED}


def _mapped(
    devices: list[Any], f: Callable[..., Any], axes: tuple[int, int], specs: list[tuple[Any, ...]], out: Any
) -> Any:
    """A jitted shard_map over a mesh of axes a and b, lowered for arrays given as (shape, dtype, spec)."""
    mesh = Mesh(np.array(devices[: axes[0] * axes[1]]).reshape(axes), ("a", "b"))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=tuple(s[2] for s in specs), out_specs=out, check_vma=True)
    arrays = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in specs]
    return jax.jit(mapped).lower(*arrays)


def _plain(devices: list[Any], f: Callable[..., Any], *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    where = NamedSharding(Mesh(np.array(devices[:1]), ("a",)), P())
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, dtype, sharding=where) for s in shapes))


def all_kinds(devices: list[Any]) -> Any:
    def f(x: Any) -> Any:
        with jax.named_scope("decoder.moe.dispatch_all_to_all"):
            moved = lax.all_to_all(x, "b", 0, 0, tiled=True)
        with jax.named_scope("decoder.parameters.all_gather"):
            gathered = lax.all_gather(x, "b", tiled=True)
        with jax.named_scope("gradients.reduce_scatter"):
            scattered = lax.psum_scatter(x, "a", tiled=True)
        with jax.named_scope("decoder.attention.kv_exchange"):
            passed = lax.ppermute(x, "b", [(k, (k + 1) % 4) for k in range(4)])
        with jax.named_scope("gradients.all_reduce"):
            summed = lax.psum(x, ("a", "b"))
        return moved, gathered, scattered, passed, summed

    both = P(("a", "b"))
    return _mapped(devices, f, (2, 4), [((8 * T, D), jnp.float32, both)], (both, both, both, both, P()))


def merged_sums(devices: list[Any]) -> Any:
    def f(x: Any, y: Any) -> Any:
        with jax.named_scope("decoder.gradients.all_reduce"):
            first = lax.psum(x, "a")
        with jax.named_scope("logits.gradients.all_reduce"):
            return first, lax.psum(y, "a")

    specs = [((8 * T, D), jnp.float32, P("a")), ((8 * T, F), jnp.float32, P("a"))]
    return _mapped(devices, f, (8, 1), specs, (P(), P()))


def bf16_all_to_all(devices: list[Any]) -> Any:
    def f(x: Any) -> Any:
        return lax.all_to_all(x, "a", 0, 0, tiled=True)

    return _mapped(devices, f, (8, 1), [((8 * T, D), jnp.bfloat16, P("a"))], P("a"))


def _layers(devices: list[Any], last: Callable[[Any], Any], remat: bool) -> Any:
    def layer(x: Any, w: Any) -> Any:
        with jax.named_scope("decoder.ffn.up"):
            h = jax.nn.relu(x @ w[0])
        with jax.named_scope("decoder.ffn.down"):
            return last(h @ w[1]), None

    def loss(up: Any, down: Any, x: Any) -> Any:
        return jnp.sum(lax.scan(jax.checkpoint(layer) if remat else layer, x, (up, down))[0] ** 2)

    return _plain(devices, jax.grad(loss, (0, 1)), (L, D, F), (L, F, D), (T, D))


def mlp(devices: list[Any]) -> Any:
    return _layers(devices, jnp.sin, remat=False)


def mlp_remat(devices: list[Any]) -> Any:
    return _layers(devices, jnp.sin, remat=True)


def mlp_remat_linear_end(devices: list[Any]) -> Any:
    return _layers(devices, lambda y: y, remat=True)


def nested(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        def inner(c: Any, _: Any) -> Any:
            return jnp.tanh(c @ w), None

        def outer(c: Any, _: Any) -> Any:
            return lax.scan(inner, c, length=4)[0], None

        return lax.scan(outer, x, length=3)[0]

    return _plain(devices, f, (T, D), (D, D))


def batched(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        with jax.named_scope("decoder.moe.experts.up"):
            return jnp.einsum("gcd,gdf->gcf", x, w)

    return _plain(devices, f, (G, C, D), (G, D, F))


def two_products(devices: list[Any]) -> Any:
    return _plain(devices, lambda x, w, v: (x @ w) @ v, (T, D), (D, F), (F, D))


def branches(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        return lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: jnp.tanh(x @ w) @ w)

    return _plain(devices, f, (T, D), (D, D))


def until(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        return lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: c @ w, x)

    return _plain(devices, f, (T, D), (D, D))


def until_without_products(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        return lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: c + 1, x) @ w

    return _plain(devices, f, (T, D), (D, D))


def gathered_chained(devices: list[Any]) -> Any:
    """Gathered weights of layers in a loop, bf16, so big that XLA:TPU hides the gather under the products."""

    def f(x: Any, up: Any, down: Any) -> Any:
        def layer(c: Any, w: Any) -> Any:
            with jax.named_scope("decoder.parameters.all_gather"):
                up, down = (lax.all_gather(one, "a", tiled=True) for one in w)
            with jax.named_scope("decoder.ffn.up"):
                h = jax.nn.relu(c @ up)
            with jax.named_scope("decoder.ffn.down"):
                return h @ down, None

        return lax.scan(layer, x, (up, down))[0]

    weight = ((3, 1024, 1024), jnp.bfloat16, P(None, "a"))
    return _mapped(devices, f, (8, 1), [((8 * 1024, 1024), jnp.bfloat16, P("a")), weight, weight], P("a"))


def wide(devices: list[Any]) -> Any:
    """Two gathered weights and the gradient's scatter over all devices, bf16."""

    def f(x: Any, up: Any, down: Any) -> Any:
        with jax.named_scope("decoder.parameters.all_gather"):
            up, down = (lax.all_gather(one, "a", tiled=True) for one in (up, down))
        with jax.named_scope("decoder.ffn.up"):
            h = jax.nn.relu(x @ up) @ down
        with jax.named_scope("decoder.gradients.reduce_scatter"):
            return lax.psum_scatter(x.T @ h, "a", tiled=True), lax.psum_scatter(h.T @ x, "a", tiled=True)

    specs = [((1024 * len(devices), 1024), jnp.bfloat16, P("a")), *[((1024, 1024), jnp.bfloat16, P("a"))] * 2]
    return _mapped(devices, f, (len(devices), 1), specs, (P("a"), P("a")))


def moe_async(devices: list[Any]) -> Any:
    """A layer's dispatch, expert product and combine in a loop over L layers, with the experts of 8 devices; bf16."""

    def f(x: Any, experts: Any) -> Any:
        def layer(c: Any, w: Any) -> Any:
            with jax.named_scope("decoder.moe.dispatch_all_to_all"):
                sent = lax.all_to_all(c.reshape(8, T // 8, D), "a", 0, 0, tiled=True)
            with jax.named_scope("decoder.moe.experts.up"):
                made = jnp.einsum("gcd,df->gcf", sent, w[0])
            with jax.named_scope("decoder.moe.combine_all_to_all"):
                return c + lax.all_to_all(made, "a", 0, 0, tiled=True).reshape(T, D), None

        return lax.scan(layer, x, experts)[0]

    specs = [((8 * T, D), jnp.bfloat16, P("a")), ((L, 8, D, D), jnp.bfloat16, P(None, "a"))]
    return _mapped(devices, f, (8, 1), specs, P("a"))


def scattered(devices: list[Any]) -> Any:
    """Gradients of two products, weights split over both axes by the compiler's own partitioner; bf16."""
    mesh = Mesh(np.array(devices[:32]).reshape(8, 4), ("data", "tensor"))

    def loss(up: Any, down: Any, x: Any) -> Any:
        with jax.named_scope("decoder.ffn.up"):
            h = jax.nn.relu(x @ up)
        with jax.named_scope("decoder.ffn.down"):
            y = h @ down
        return jnp.sum(y.astype(jnp.float32) ** 2)

    shapes = {(2048, 8192): P("data", "tensor"), (8192, 2048): P("tensor", "data"), (16384, 2048): P("data")}
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in shapes.items()]
    out = tuple(a.sharding for a in arrays[:2])
    return jax.jit(jax.grad(loss, (0, 1)), out_shardings=out).lower(*arrays)


def ragged(devices: list[Any]) -> Any:
    def f(x: Any, w: Any) -> Any:
        with jax.named_scope("decoder.moe.experts.up"):
            return lax.ragged_dot(x, w, jnp.full((G,), T // G, jnp.int32))

    return _plain(devices, f, (T, D), (G, D, F), dtype=jnp.bfloat16)


CPU = (
    all_kinds, merged_sums, bf16_all_to_all, mlp, mlp_remat, mlp_remat_linear_end, nested, batched, two_products,
    branches, until, until_without_products, moe_async,
)  # fmt: skip
PROGRAMS = {f.__name__: f for f in (*CPU, gathered_chained, scattered, ragged, wide)}


def kept(text: str) -> str:
    """A module's text without back-end configurations, source lines and the sizes of what XLA placed where."""
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)
    lines = [line.partition(", backend_config={")[0] for line in text.splitlines()]
    return "\n".join(re.sub(r" stack_frame_id=\d+|, frontend_attributes=\{arg_layout.*", "", x) for x in lines) + "\n"


def main(target: str, *names: str) -> None:
    place = parse_target(target)
    devices = place.jax_devices()
    folder = Path(names[1]) if names[:1] == ("--save",) else None
    out = {}
    for name in names[2:] if folder else names or [f.__name__ for f in CPU]:
        options = OPTIONS.get(name) if place.platform == "tpu" else None
        compiled, report = compile_lowered(PROGRAMS[name](devices), place.platform, options)
        if folder:
            (folder / f"{place.generation}_{name}.txt").write_text(kept(compiled.as_text()), encoding="utf-8")
        memory = compiled.memory_analysis()
        out[name] = {
            "text": compiled.as_text(),
            "cost_flops": compiled.cost_analysis()["flops"],
            "peak_bytes": memory.peak_memory_in_bytes,
            "report": report,
        }
        if not folder and not name.startswith("until"):
            out[name]["read"] = read_program(compiled, place.platform, report).to_dict()
    if not folder:
        json.dump(out, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

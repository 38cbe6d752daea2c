"""The LSTM layer of the 2017 mixture of experts (Shazeer et al., arXiv:1701.06538, appendix C).

Letters: B sequences, S steps, D hidden, c cells, r state (the projection, or the cells).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from trainer.parameters import Parameter
from trainer.setting import Noise, Setting, dropped, zeros_like

if TYPE_CHECKING:
    from simulator.job.model import Lstm

Array = jax.Array


def lstm_parameters(lstm: Lstm, hidden: int, scale: float) -> dict[str, Parameter]:
    """Input, recurrent (and projection) matrices; gates in the order input, forget, output, candidate."""
    state = lstm.projection or lstm.cells
    out = {
        "input": Parameter((hidden, 4 * lstm.cells), ("hidden", None), "fan_in", scale),
        "recurrent": Parameter((state, 4 * lstm.cells), (None, None), "fan_in", scale),
        "bias": Parameter((4 * lstm.cells,), (None,), "zeros"),
    }
    if lstm.projection:
        out["projection"] = Parameter((lstm.cells, state), (None, None), "fan_in", scale)
    return out


def lstm_layer(s: Setting, lstm: Lstm, x_BSD: Array, first_BS: Array, p: dict[str, Any], noise: Noise | None) -> Array:
    """The layer with its residual sum; `first_BS` is true where a document begins, and the state starts anew.

    Input products of all steps at once, then one recurrent product a step (Sak et al. 2014, arXiv:1402.1128, without
    peepholes; the forget gate has a bias of 1, Jozefowicz et al. 2015).
    """
    w = {k: v.astype(s.compute) for k, v in p.items()}
    with s.scope("lstm.input"):
        given_BSc = checkpoint_name(jnp.einsum("bsd,dc->bsc", x_BSD, w["input"]) + w["bias"], "qkv")

    def step(carry: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        state, cell = carry
        given, first = now
        state, cell = (jnp.where(first[:, None], 0, v) for v in (state, cell))
        with s.scope("lstm.recurrent"):
            gates = checkpoint_name(given + jnp.einsum("br,rc->bc", state, w["recurrent"]), "qkv")
        with s.scope("lstm.cell"):
            i, f, o, g = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
            cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            out = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(s.compute)
        if lstm.projection:
            with s.scope("lstm.projection"):
                out = jnp.einsum("bc,cr->br", out, w["projection"])
        return (out, cell), out

    start = (
        zeros_like(x_BSD[:, 0, :1].repeat(lstm.projection or lstm.cells, axis=-1)),
        zeros_like(x_BSD[:, 0, :1].repeat(lstm.cells, axis=-1), jnp.float32),
    )
    out_SBr = lax.scan(step, start, (given_BSc.swapaxes(0, 1), first_BS.swapaxes(0, 1)))[1]
    rate = s.job.training.learning.dropout
    return x_BSD + dropped(out_SBr.swapaxes(0, 1), rate, noise, 0)

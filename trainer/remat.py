"""Which forward results the backward pass finds saved, and which it makes again, by the job's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import jax

from simulator.job.job import RematName, RematPolicy

if TYPE_CHECKING:
    from trainer.setting import Setting

# The names under which layers file their results (`checkpoint_name`); `weights` are copies that are always remade.
WEIGHTS = "weights"


def policy_of(remat: str | RematPolicy) -> Callable[..., Any]:
    """JAX's policy for `training.remat`; names are those of docs/job.md (`selective`: the core attention is remade).

    Only named results are kept, never "all but these names": JAX would then keep what a name was given to, the result
    of the product or gather before it, and remake nothing. So every product and collective of a layer files its result.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.save_any_names_but_these(WEIGHTS)
    if remat == "full":
        return policies.nothing_saveable
    if remat == "selective":
        return policies.save_any_names_but_these(WEIGHTS, "core_attention")
    assert isinstance(remat, RematPolicy)
    if remat.offload:
        kept = remat.save or set(get_args(RematName)) - set(remat.recompute) - set(remat.offload)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(kept),
            names_which_can_be_offloaded=[n for n in remat.offload if n != "layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    if remat.save:
        return policies.save_only_these_names(*remat.save)
    return policies.save_any_names_but_these(WEIGHTS, *remat.recompute)


def checkpointed(s: Setting, layer: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
    """`layer` under the job's policy; outside of a scan it needs a barrier, or XLA joins what is remade with the first.

    XLA:CPU drops barriers: there a layer that is not scanned over is computed once, whatever the policy.
    """
    if not s.train:
        return layer
    wrapped: Callable[..., Any] = jax.checkpoint(layer, policy=policy_of(s.job.training.remat), prevent_cse=not scanned)
    return wrapped

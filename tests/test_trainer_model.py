"""What a position sees, shown by gradients: causality, documents, windows and chunks, for every kind of layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.attention import relative_bucket
from trainer.model import forward, segments
from trainer_jobs import DECODER, LATENT, LSTM, SWITCH, merged
from trainer_runs import make_trainer, start

S = 16
ONE: dict[str, Any] = {"model": {"decoder": {"layers": 1}}, "batch": {"sequences": 1, "length": S}}
# Where nothing is dropped no token pushes another one out, and what flows is smooth.
AMPLE = {"training": {"capacity": {"factor": 16.0, "basis": "tokens"}, "learning": {"dropout": 0.0}}}


def influence(job: dict[str, Any], documents: Any, encoder: Any = None) -> Any:
    """[t, s]: whether the loss at position t depends on the word at s; with an encoder its words follow, [t, S + s]."""
    trainer = make_trainer(merged(job, AMPLE))
    params = start(trainer)
    s = trainer.setting(train=False)
    documents = np.asarray(documents)
    positions = np.concatenate([np.arange((documents == d).sum()) for d in np.unique(documents)])
    batch = {"tokens_BS": np.arange(S), "targets_BS": 63 - np.arange(S), "segments_BS": documents,
             "positions_BS": positions}  # fmt: skip
    width = S
    if encoder is not None:
        encoder = np.asarray(encoder)
        batch |= {"encoder_tokens_BS": S + np.arange(S), "encoder_segments_BS": encoder,
                  "encoder_positions_BS": np.arange(S)}  # fmt: skip
        width = 2 * S
    batch = {k: jnp.asarray(v)[None] for k, v in batch.items()} | {"sequence_B": jnp.zeros(1, jnp.int32)}

    def loss(table: Any, weights_S: Any) -> Any:
        moved = params | {"embedding": params["embedding"] | {"table": table}}
        return forward(s, trainer.abstract, moved, batch | {"weights_BS": weights_S[None]}, None)[0]["loss"]

    slopes = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params["embedding"]["table"], jnp.eye(S))
    return np.abs(np.asarray(slopes)[:, :width]).max(-1) > 0


def seen(*, window: int = S, chunk: int = S, documents: Any = (1,) * S) -> Any:
    """The mask [t, s] by hand."""
    out = np.zeros((S, S), bool)
    for t in range(S):
        for s in range(t + 1):
            start = documents.index(documents[t])
            same = documents[t] == documents[s] and (t - start) // chunk == (s - start) // chunk
            out[t, s] = same and t - s < window
    return out


PACKED = (1,) * 6 + (2,) * 7 + (3,) * 3
ATTENTION: dict[str, dict[str, Any]] = {
    "grouped": {},
    "latent": {"kv_heads": 4, "mla": {"kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}},
    "window": {"window": 5, "sinks": True},
    "chunk": {"chunk": 4},
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_sees_its_document_window_and_chunk_and_no_future(kind: str) -> None:
    given = ATTENTION[kind]
    job = merged(merged(DECODER, ONE), {"model": {"decoder": {"attention": given}}})
    sizes = {k: given[k] for k in ("window", "chunk") if k in given}
    np.testing.assert_array_equal(influence(job, PACKED), seen(documents=PACKED, **sizes))


def test_windows_of_two_layers_add_up() -> None:
    job = merged(merged(DECODER, ONE), {"model": {"decoder": {"layers": 2, "attention": {"window": 4}}}})
    np.testing.assert_array_equal(influence(job, [1] * S), seen(window=7))


@pytest.mark.parametrize("job", [LATENT, LSTM], ids=["first dense, shared experts", "lstm"])
def test_whole_models_see_the_past_of_their_document(job: dict[str, Any]) -> None:
    small = merged(job, {"batch": {"sequences": 1, "length": S}})
    np.testing.assert_array_equal(influence(small, PACKED), seen(documents=PACKED))


def test_a_decoder_sees_all_of_the_encoder_but_padding_and_other_documents() -> None:
    small = merged(
        SWITCH, {"model": {"tied_embeddings": False}, "batch": {"sequences": 1, "length": {"encoder": S, "decoder": S}}}
    )
    decoder = (1,) * 9 + (2,) * 7
    encoder = (1,) * 5 + (2,) * 8 + (0,) * 3
    found = influence(small, decoder, encoder)
    np.testing.assert_array_equal(found[:, :S], seen(documents=decoder))
    np.testing.assert_array_equal(found[:, S:], np.equal.outer(decoder, encoder))


def test_relative_buckets_of_t5() -> None:
    # Causal, 32 buckets: 16 exact ones, then logarithmic up to 128. By hand from the formula of T5.
    buckets = relative_bucket(-jnp.arange(200), 32, False)
    assert np.asarray(buckets[:16]).tolist() == list(range(16))
    assert [int(buckets[i]) for i in (16, 20, 31, 32, 64, 127, 128, 199)] == [16, 17, 21, 21, 26, 31, 31, 31]
    # Both ways: half of them for the future.
    both = relative_bucket(jnp.asarray([-3, 0, 3, 7, 8, 300]), 32, True)
    assert np.asarray(both).tolist() == [3, 0, 19, 23, 24, 31]


def test_layers_are_scanned_by_their_period() -> None:
    trainer = make_trainer(merged(LATENT, {"model": {"decoder": {"layers": 6, "moe": {"first_dense": 2}}}}))
    parts = segments(trainer.job.model.decoder_layers)
    assert [(p.first, len(p.period), p.count) for p in parts] == [(0, 1, 2), (2, 1, 4)]
    layers = make_trainer(merged(SWITCH, {"model": {"encoder": {"layers": 8}}})).job.model.encoder_layers
    assert [(p.first, len(p.period), p.count) for p in segments(layers)] == [(0, 2, 4)]

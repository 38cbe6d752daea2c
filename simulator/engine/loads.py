"""Load on the expert ranks, drawn per (layer, microbatch, group) and never per source and expert.

Letters: L layers with experts, M microbatches, G expert groups, R ranks of a group, E experts. A load is in assignments
(token x choice) that arrive at a rank in one microbatch. Popularity is drawn per layer and step; on top of it tokens
choose k different experts each, which spreads the counts (`simulator.workload.routing.choice_spread`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hw_profiles.errors import QuestionError
from simulator.engine.placement import Ranks, balance, place_contiguous, place_dealt, read_placement, split_matrix
from simulator.job.job import Job, Routing
from simulator.job.model import Moe
from simulator.job.popularity import layer_generator, layer_shares, one_width, recorded_counts
from simulator.job.rules import Degrees, rows_per_block
from simulator.workload.blocks import balanced_rows, works_in_blocks
from simulator.workload.feedforward import slots_of
from simulator.workload.routing import Slots, choice_spread

Array = NDArray[np.float64]

# Below this mean per rank a normal load is too symmetric: its busiest rank of 64 is 1 % low at 50 and 4 % at 10.
FEWEST_FOR_NORMAL = 50


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A layer with experts: its number in the model (MTP modules follow the layers), its tokens, where it runs.

    `tokens` are those of one expert group in one microbatch, `length` those of a sequence; `stage` is the model stage.
    """

    number: int
    moe: Moe
    tokens: float
    length: int
    stage: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What loads are drawn for. `recorded` are counts per layer, [E] each; `fixed` a placement per layer.

    `blocks`: experts work through their rows in blocks (the trainer on a CPU), so that work is in whole ones.
    """

    layers: tuple[MoeLayer, ...]
    stages: int
    routing: Routing
    ranks: int
    microbatches: int
    groups: int
    dropless: bool
    noise: bool = True
    recorded: tuple[Array, ...] | None = None
    fixed: tuple[Ranks, ...] | None = None
    blocks: bool = False


def moe_layers(job: Job, degrees: Degrees) -> tuple[MoeLayer, ...]:
    """The layers with experts of all model stages, in order of execution."""
    model = job.model
    kinds = [(x, job.batch.encoder_length) for x in model.encoder_layers]
    kinds += [(x, job.batch.decoder_length) for x in model.decoder_layers]
    plain = len(kinds)
    kinds += [kinds[-1]] * model.mtp_layers
    modules, out = plain, []
    for stage in range(degrees.pipeline * len(degrees.chunks[0])):
        chunk = degrees.chunks[stage % degrees.pipeline][stage // degrees.pipeline]
        for number in (*range(chunk.first, chunk.first + chunk.layers), *range(modules, modules + chunk.mtp)):
            layer, length = kinds[number]
            if layer.moe is not None:
                tokens = degrees.microbatch_sequences * length * degrees.data / degrees.expert_data
                out.append(MoeLayer(number, layer.moe, tokens, length, stage))
        modules += chunk.mtp
    return tuple(out)


def expert_loads(
    job: Job, degrees: Degrees, groups: int, seed: int, *, folder: Path | None = None, noise: bool = True
) -> ExpertLoads:
    """Loads of `groups` expert groups over a step of `job`.

    `folder` is the job's, for recorded counts and placement files; without `noise` every microbatch has exactly the
    expected load, and so has forced routing, whose popularity is drawn from `training.learning.seed`. Raises
    QuestionError, one line, for a bad file or more replicas than experts.
    """
    routing, ranks = job.training.routing, degrees.expert
    layers = moe_layers(job, degrees) if ranks > 1 or routing.model == "replay" else ()
    for moe in {id(x.moe): x.moe for x in layers}.values():
        if moe.experts // ranks + routing.replicas > moe.experts:
            raise QuestionError(
                f"training.routing.replicas = {routing.replicas}: with its {moe.experts // ranks} own experts a rank"
                f" would hold more than the {moe.experts} there are"
            )
    fixed = None
    if routing.placement_file is not None and layers:
        experts = one_width([x.moe for x in layers], "training.routing.placement_file", routing.placement_file)
        fixed = tuple(read_placement(routing.placement_file, folder or Path(), len(layers), experts, ranks))
    return ExpertLoads(
        LoadPlan(
            layers=layers,
            stages=degrees.pipeline * len(degrees.chunks[0]),
            routing=routing,
            ranks=ranks,
            microbatches=degrees.microbatches,
            groups=groups,
            dropless=job.training.capacity == "dropless",
            noise=noise and routing.model != "even" and not routing.forced,
            recorded=_recorded(job, layers, folder or Path()) if routing.model == "replay" and layers else None,
            fixed=fixed,
            blocks=works_in_blocks(job, degrees),
        ),
        job.training.learning.seed if routing.forced else seed,
    )


def _recorded(job: Job, layers: tuple[MoeLayer, ...], folder: Path) -> tuple[Array, ...]:
    """Recorded counts of each layer, [E]; QuestionError for a bad file."""
    return recorded_counts(job, [(x.number, x.moe, x.length) for x in layers], folder)


class ExpertLoads:
    """Loads of a step; equal for equal plan and seed."""

    def __init__(self, plan: LoadPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self._known: dict[bytes, Ranks] = {}
        self._last: tuple[int, Array] | None = None
        shape = (len(plan.layers), plan.groups, plan.microbatches)
        excess, rows = np.zeros(shape), np.zeros(shape)
        self._most = 0.0
        if plan.ranks > 1:
            for i, layer in enumerate(plan.layers):
                peaks = self.draw_layer(i).max(axis=-1)
                self._most = max(self._most, float(peaks.max()))
                excess[i] = peaks * (plan.ranks / (layer.tokens * layer.moe.top_k)) - 1
                if plan.blocks:
                    rows[i] = self.block_rows(i).max(axis=-1) / self._priced_rows(layer) - 1
        elif plan.layers:
            self._most = max(x.tokens * x.moe.top_k for x in plan.layers)
        self._mean = 1 + float(excess.mean()) if excess.size else 1.0
        by_stage = np.zeros((plan.groups, plan.stages, plan.microbatches))
        for stage in range(plan.stages):
            own = [i for i, x in enumerate(plan.layers) if x.stage == stage]
            # Slots pad every rank to the same work.
            if own and plan.dropless:
                by_stage[:, stage] = (rows if plan.blocks else excess)[own].mean(axis=0)
        # Lists of plain numbers: the engine looks one up per event.
        self._excess: list[list[list[float]]] = np.maximum(by_stage, 0.0).tolist()

    def resample(self, seed: int) -> ExpertLoads:
        """Another step of the same job: popularity and choices drawn anew, but for forced routing."""
        return ExpertLoads(self.plan, self.seed if self.plan.routing.forced else seed)

    def excess(self, group: int, stage: int, microbatch: int) -> float:
        """Busiest rank over the mean, minus one, averaged over the layers with experts of a model stage.

        In blocks: its rows, in whole ones, over what work at balance is priced with. Zero under a capacity, where
        slots pad every rank to the same work.
        """
        return self._excess[group][stage][microbatch]

    def rank_loads(self, layer: int, microbatch: int, group: int) -> Array:
        """Assignments at each rank, [R], before any drops; `layer` counts the layers with experts from 0."""
        if self._last is None or self._last[0] != layer:
            self._last = (layer, self.draw_layer(layer))
        loads: Array = self._last[1][group, microbatch]
        return loads

    def busiest_overall(self) -> float:
        """Busiest rank over the mean, averaged over layers, microbatches and groups."""
        return self._mean

    def max_tokens_on_a_rank(self) -> float:
        """Most assignments at one rank in one microbatch of the step: what dropless buffers must hold."""
        return self._most

    def shares(self, layer: int) -> Array:
        """Chance that a token of `layer` chooses each expert, [E]; sums to k."""
        return self._shares(layer_generator(self.seed, layer), layer)

    def _shares(self, rng: np.random.Generator, i: int) -> Array:
        recorded = None if self.plan.recorded is None else self.plan.recorded[i]
        shares: Array = layer_shares(rng, self.plan.routing, self.plan.layers[i].moe, recorded)
        return shares

    def placement(self, layer: int) -> Ranks:
        """Experts of each rank of `layer`."""
        return self._placement(layer, self.shares(layer))

    def _placement(self, i: int, shares: Array) -> Ranks:
        plan, experts = self.plan, len(shares)
        if plan.fixed is not None:
            return plan.fixed[i]
        if plan.routing.placement == "contiguous":
            return place_contiguous(experts, plan.ranks)
        if plan.routing.placement == "dealt":
            return place_dealt(shares, plan.ranks)
        # Layers whose popularity differs only in who is popular (Zipf) are packed once.
        order = np.argsort(-shares, kind="stable")
        key = shares[order].tobytes()
        if key not in self._known:
            slots = experts // plan.ranks + plan.routing.replicas
            self._known[key] = balance(shares[order].tolist(), plan.ranks, slots)
        return [[int(order[e]) for e in own] for own in self._known[key]]

    def draw_layer(self, i: int) -> Array:
        """Loads of one layer (counted from 0), [G, M, R]; the generator depends on seed and layer only."""
        plan = self.plan
        if plan.blocks:
            loads, split = self._expert_loads(i)
            return loads @ split.T
        rng = layer_generator(self.seed, i)
        layer = plan.layers[i]
        shares = self._shares(rng, i)
        split = split_matrix(self._placement(i, shares), len(shares))
        noise = plan.noise and layer.moe.router.kind != "expert_choice"
        return draw_loads(rng, layer.tokens, layer.moe.top_k, shares, split, (plan.groups, plan.microbatches), noise)

    def _expert_loads(self, i: int) -> tuple[Array, Array]:
        """Loads of the experts of one layer, [G, M, E], and the part of each that is on each rank, [R, E]."""
        rng, layer, plan = layer_generator(self.seed, i), self.plan.layers[i], self.plan
        shares = self._shares(rng, i)
        split = split_matrix(self._placement(i, shares), len(shares))
        alone, shape = np.eye(len(shares)), (plan.groups, plan.microbatches)
        return draw_loads(rng, layer.tokens, layer.moe.top_k, shares, alone, shape, plan.noise), split

    def block_rows(self, i: int) -> Array:
        """Rows that each rank works on in one layer, [G, M, R]: its experts' loads, each rounded up to whole blocks."""
        loads, split = self._expert_loads(i)
        layer = self.plan.layers[i]
        block = rows_per_block(layer.tokens * layer.moe.top_k / layer.moe.experts)
        # A billionth absorbs what shares lose of whole numbers.
        blocks = np.ceil(loads[..., None, :] * split / block - 1e-9)
        rows: Array = block * np.maximum(blocks, 0.0).sum(axis=-1)
        return rows

    def _priced_rows(self, layer: MoeLayer) -> float:
        """Rows of a rank with which the workload prices the layer's experts."""
        each = layer.moe.experts / self.plan.ranks
        return float(each * balanced_rows(self.plan.routing, layer.tokens * layer.moe.top_k / layer.moe.experts))


def draw_loads(
    rng: np.random.Generator,
    tokens: float,
    top_k: int,
    shares_E: Array,
    split_RE: Array,
    shape: tuple[int, ...],
    noise: bool = True,
) -> Array:
    """Loads of ranks, [*shape, R], when `tokens` tokens choose k different experts each; they sum to tokens x k.

    Normal with the exact mean and covariance where a rank has 50 assignments or more on average; below, a multinomial
    whose deviations are scaled to the variance of choosing without replacement. Exact for k = 1; for k > 1 the busiest
    rank is within 2 % of choosing token by token from 12 tokens a group on, within 6 % (once 13 %) below.
    """
    ranks, experts = split_RE.shape
    mean = tokens * (split_RE @ shares_E)
    if not noise or ranks == 1:
        return np.broadcast_to(mean, (*shape, ranks))
    spread = choice_spread(shares_E, top_k)
    copied = bool((split_RE.max(axis=0) < 1).any())
    if tokens * top_k / ranks >= FEWEST_FOR_NORMAL:
        part = split_RE @ spread
        z = rng.standard_normal((*shape, ranks))
        if copied:
            # Copies share the fate of their expert: independent numbers per expert, seen through the split. Not `@`:
            # BLAS starts threads for such small products, which takes ten times as long on a busy machine.
            both = np.einsum("re,qe->rq", split_RE * spread, split_RE) + np.eye(ranks) * (1e-12 * part.max() + 1e-300)
            z = np.einsum("...q,rq->...r", z, np.linalg.cholesky(both))
        else:
            z *= np.sqrt(part)
        total = z.sum(axis=-1, keepdims=True)
        z -= total * (part / max(float(part.sum()), 1e-300))
        z *= tokens**0.5
    else:
        # With copies an expert's count is drawn whole, and then split.
        unit = shares_E if copied else split_RE @ shares_E
        c = spread if copied else split_RE @ spread
        p = unit / unit.sum()
        number = round(tokens * top_k)
        true, plain = float((c - c * c / max(float(c.sum()), 1e-300)).sum()), top_k * float((p - p * p).sum())
        z = (rng.multinomial(number, p, size=shape) - number * p) * (true / max(plain, 1e-300)) ** 0.5
        z = z @ split_RE.T if copied else z
    z += mean
    most = tokens * np.minimum(split_RE.sum(axis=1), min(top_k, experts))
    return _within(z, most, tokens * top_k)


def _within(loads: Array, most_R: Array, total: float) -> Array:
    """Loads between 0 and the most that a rank can get; what that cuts is spread, so that the sum stays `total`."""
    bad = ((loads < 0) | (loads > most_R)).any(axis=-1)
    if bad.any():
        cut = np.clip(loads[bad], 0.0, most_R)
        left = total - cut.sum(axis=-1, keepdims=True)
        room = np.where(left > 0, most_R - cut, cut)
        loads[bad] = cut + left * room / np.maximum(room.sum(axis=-1, keepdims=True), 1e-300)
    return loads


def dropped_fraction(loads_E: Array, slots: Slots) -> float:
    """Share of assignments over capacity when expert e has `loads_E[e]` of a group's assignments on average.

    sum E[(X - C)+] / sum loads, X binomial over the tokens of the group (Johnson, Kotz and Kemp 1992, section 3.3).
    """
    from scipy.special import bdtrc

    n, slot = slots.group, slots.per_expert
    if slot >= n:
        return 0.0
    mean = np.asarray(loads_E, dtype=np.float64)
    p = np.minimum(mean / n, 1.0)
    over = n * p * bdtrc(slot - 1, n - 1, p) - slot * bdtrc(slot, n, p)
    return float(np.maximum(over, 0.0).sum() / mean.sum())


def expected_drops(job: Job, degrees: Degrees, *, folder: Path | None = None, seed: int = 0) -> float:
    """Share of assignments that capacity drops under the job's routing, mean over its layers with experts."""
    if job.training.capacity == "dropless":
        return 0.0
    layers = moe_layers(job, degrees)
    seed = job.training.learning.seed if job.training.routing.forced else seed
    recorded = _recorded(job, layers, folder or Path()) if job.training.routing.model == "replay" and layers else None
    plan = LoadPlan(layers, 1, job.training.routing, 1, 1, 1, dropless=False, recorded=recorded)
    known: dict[bytes, float] = {}
    out = []
    for i, layer in enumerate(layers):
        slots = slots_of(job, layer.moe, layer.length, degrees.microbatch_sequences * layer.length)
        assert slots is not None
        recorded_E = None if recorded is None else recorded[i]
        shares = layer_shares(layer_generator(seed, i), plan.routing, layer.moe, recorded_E)
        key = np.sort(shares).tobytes()
        if plan.routing.model == "even" or layer.moe.router.kind == "expert_choice":
            out.append(max(0.0, 1 - slots.per_expert / (slots.group * float(shares[0]))))
            continue
        if key not in known:
            known[key] = dropped_fraction(slots.group * shares, slots)
        out.append(known[key])
    return float(np.mean(out)) if out else 0.0

"""Rows of published collectives (NCCL sweeps, MoE dispatch and combine) as questions to the network model.

Sizes: nccl-tests' for collectives. For MoE rows the bytes are tokens x ranks that a token goes to (once each, its own
included) x hidden x bytes of an element: what DeepEP, UCCL, HybridEP and TensorRT-LLM move.

Bandwidths as the libraries define them, and what time follows:
- nccl-tests: busbw = bytes x 2(n-1)/n (all-reduce) or (n-1)/n, over time.
- DeepEP and UCCL, "bottleneck": inside a node, copies to ranks, own included; between nodes ("RDMA"), copies to nodes,
  own node included. UCCL prints time beside bandwidth: 4,096 tokens, 500 us, 320 GB/s are 5.3 ranks a token; 1,196 us,
  50 GB/s over two nodes are 2.0 nodes a token.
- HybridEP, "algorithm bandwidth": taken as the same two counts, which its README does not spell out.
- MORI: per-link-kind bandwidths without a formula: no time follows, rows are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.errors import QuestionError
from hw_profiles.loader import SCALE_OUT_NAMES, resolve_cluster
from hw_profiles.schema import Chip
from simulator.calibration.questions import Answer, Question
from simulator.network.collectives import NVLS_FROM, collective_rate, transport_rate

CHIPS = {
    "A100-40 SXM": "a100-40", "A100-80 SXM": "a100-80", "A100 SXM": "a100-80", "B200": "b200", "B300": "b300",
    "Blackwell proxy (unnamed; 275 GB and 1100 W => B300-class)": "b300", "GB200": "gb200", "GB300": "gb300",
    "H100 SXM": "h100-sxm", "H200": "h200", "H200 SXM": "h200", "H800": "h800", "MI300X": "mi300x",
    "MI355X": "mi355x", "TPU v5e": "tpu-v5e", "V100": "v100", "V100 SXM": "v100",
}  # fmt: skip
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PASSES = {"all_reduce": 2.0}
# Cards that differ from the profile's, GB/s a device: 4 x 100 Gbit/s for 8 A100, 4 x HDR for 8 A100 (a page each).
CARDS = {("a100-80", "4x100G"): 6.25, ("a100-40", "4x100G"): 6.25, ("a100-80", "4x HDR"): 12.5}
# Values in fp8 hold a scale of four bytes for 128 values; nvfp4 one byte for 16.
ELEMENT_BYTES = {"fp8": 1 + 4 / 128, "bf16": 2.0, "bfloat16": 2.0, "nvfp4": 0.5625}
TRANSPORTS = {"DeepEP normal": "deepep", "DeepEP V1 normal": "deepep", "UCCL-EP normal": "deepep"}


@dataclass(frozen=True, slots=True)
class CollectiveCase:
    """One row as a question: the collective on its cluster, and the seconds that were measured."""

    chip: str
    cluster: Mapping[str, Any]
    nodes: int
    kind: str
    size: int
    stride: int
    bytes: float
    between: float
    transport: str
    sms: float | None
    library: str
    seconds: float

    def answer(self, chip: Chip | None = None) -> Answer:
        """The forecast by `chip` (None: the shipped profile), its interval, and the seconds of the bare ports."""
        cluster = resolve_cluster(self.cluster, chip=chip)
        seconds = self._forecast_s(cluster)
        spread = None if self.kind.startswith("moe_") else residuals(cluster, self.kind, self.size * self.stride)
        interval = None if spread is None else (seconds * spread["p10"], seconds * spread["p90"])
        return Answer(seconds, port_seconds(cluster, self.kind, self.size, self.bytes, self.between), interval)

    def forecast_s(self) -> float:
        """Seconds that the network model gives."""
        return self._forecast_s(resolve_cluster(self.cluster))

    def _forecast_s(self, cluster: Cluster) -> float:
        rate = None
        if self.transport:
            rate = transport_rate(cluster, self.transport, self.kind.removeprefix("moe_"), self.size, self.sms)
        if rate is None:
            kind = "all_to_all" if self.kind.startswith("moe_") else self.kind
            rate = collective_rate(cluster, kind, self.size, self.stride, self.between)
        return float(rate.seconds(self.bytes))


def residuals(cluster: Cluster, kind: str, span: int) -> Mapping[Any, float] | None:
    """Quantiles of measured over modelled time of a collective over `span` devices; None where no fit carries them."""
    if cluster.torus is not None or span > cluster.levels[0].devices:
        return None
    family = {"all_gather": "ring", "reduce_scatter": "ring"}.get(kind, kind)
    if kind == "all_reduce" and cluster.levels[0].in_switch_efficiency and span >= NVLS_FROM:
        family = "in_switch"
    out = cluster.chip.scale_out
    only_out = out is not None and cluster.levels[0].name in SCALE_OUT_NAMES.values()
    known = out.collectives if out is not None and only_out else cluster.chip.scale_up.collectives
    fits = {str(name): fit for name, fit in known.items()}
    if kind in fits:
        family = kind
    return fits[family].residuals if family in fits else None


def port_seconds(cluster: Cluster, kind: str, size: int, bytes_: float, between: float = 1.0) -> float | None:
    """Seconds of a collective if what it sends over the slowest network it crosses went at the rate of the ports.

    nccl-tests' bus bytes: S(n-1)/n, twice for an all-reduce; an all-to-all over domains sends only what leaves its own.
    """
    passes = PASSES.get(kind, 1.0)
    if size < 2 or not bytes_:
        return None
    if cluster.torus is not None:
        return passes * bytes_ * (size - 1) / size / (cluster.chip.scale_up_bytes_per_s / cluster.chip.devices_per_chip)
    inner = cluster.levels[0]
    if size <= inner.devices:
        return passes * bytes_ * (size - 1) / size / inner.bytes_per_s
    outer = cluster.levels[-1]
    if kind == "all_to_all" or kind.startswith("moe_"):
        return bytes_ * between * (size - inner.devices) / size / outer.bytes_per_s
    return passes * bytes_ * (size - 1) / size / (outer.bytes_per_s * inner.devices)


def collective_question(row: Mapping[str, str]) -> Question:
    """The question of a row; QuestionError with the reason where it is none that the profiles answer."""
    case = collective_case(row)
    name = f"{case.kind.replace('_', ' ')}, {'one domain' if case.nodes == 1 else 'nodes'}"
    return Question(
        row["id"], "time", "s", case.chip, "", name, case.kind, case.seconds,
        lambda chip, engine: case.answer(chip),
    )  # fmt: skip


def distinct(domains: int, experts_per_token: int, reach: int | None = None) -> float:
    """Domains that a token goes to on average, choices independent, at most `reach` of them (group-limited routers)."""
    n = min(domains, reach or domains)
    return n * (1 - (1 - 1 / n) ** experts_per_token)


def collective_case(row: Mapping[str, str]) -> CollectiveCase:
    """The question of a row; QuestionError with the reason where it is none that the profiles answer."""
    kind, chip = row["collective"], CHIPS.get(row["chip"])
    if row["fit"] != "yes":
        raise QuestionError("listed apart: a badly tuned system")
    if row["chip"] == "":
        raise QuestionError("the chip is not stated")
    if chip is None and row["chip"].startswith("TPU"):
        raise QuestionError("TPU: the shape of the slice is not stated")
    if chip is None:
        raise QuestionError(f"no profile of {row['chip']}")
    if kind.endswith("_ll"):
        raise QuestionError("low-latency kernels (inference) are not modelled")
    if kind == "moe_prepare":
        raise QuestionError("the preparation of a dispatch is no transfer")
    if kind not in (*KINDS, "moe_dispatch", "moe_combine"):
        raise QuestionError(f"{kind}: not a collective of the model")
    if not row["n_devices"]:
        raise QuestionError("the number of devices is not stated")
    if "marin" in row["source_key"] or row["source_key"] == "scaling_book_gpu":
        raise QuestionError("timed from JAX: carries 0.4 to 0.6 ms of the host")
    if chip == "tpu-v5e":
        return _tpu(row)
    return _moe(row, chip) if kind.startswith("moe_") else _nccl(row, chip)


def _cluster(row: Mapping[str, str], chip: str, n: int) -> tuple[dict[str, Any], int]:
    """The cluster that holds `n` devices of a row, and its domains."""
    if chip in ("gb200", "gb300"):
        # Compute trays of four, all in one NVLink domain.
        return {"chip": chip, "racks": 1}, 1
    nodes = int(float(row["n_nodes"])) if row["n_nodes"] else 0
    if not nodes or n % nodes:
        raise QuestionError("the number of nodes is not stated")
    name: Any = chip
    for (of, words), rate in CARDS.items():
        if of == chip and words in row["inter_node"]:
            name = {"name": chip, "scale_out.nic_gb_per_s": rate}
    if nodes == 1:
        # A group inside one node, its other devices idle.
        return {"chip": name, "nodes": 1}, 1
    return {"chip": name, "nodes": nodes, "chips_per_node": n // nodes}, nodes


def _tpu(row: Mapping[str, str]) -> CollectiveCase:
    if not row["message_bytes_per_rank"] or not row["time_us"]:
        raise QuestionError("bytes or time are not stated")
    n, bytes_ = int(row["n_devices"]), float(row["message_bytes_per_rank"])
    spec = {"chip": "tpu-v5e", "slice": "4x4"}
    return CollectiveCase(
        "tpu-v5e", spec, 1, row["collective"], n, 1, bytes_, 1.0, "", None, row["library"], float(row["time_us"]) * 1e-6
    )


def _nccl(row: Mapping[str, str], chip: str) -> CollectiveCase:
    kind, n = row["collective"], int(row["n_devices"])
    if not row["message_bytes_per_rank"]:
        raise QuestionError("bytes are not stated")
    bytes_ = float(row["message_bytes_per_rank"])
    wire = PASSES.get(kind, 1.0) * bytes_ * (n - 1) / n
    if row["time_us"]:
        seconds = float(row["time_us"]) * 1e-6
    elif row["busbw_GBps"]:
        seconds = wire / (float(row["busbw_GBps"]) * 1e9)
    else:
        raise QuestionError("neither time nor bandwidth is stated")
    spec, nodes = _cluster(row, chip, n)
    told_ring = row["dtype"] == "int8" or "Ring" in row["library"]
    adds = nodes == 1 and n >= NVLS_FROM and bool(resolve_cluster(spec).levels[0].in_switch_efficiency)
    if kind == "all_reduce" and told_ring and adds:
        raise QuestionError("a ring where the switch adds floats: integers, or told to")
    return CollectiveCase(chip, spec, nodes, kind, n, 1, bytes_, 1.0, "", None, row["library"], seconds)


def _moe(row: Mapping[str, str], chip: str) -> CollectiveCase:
    kind, n, library = row["collective"], int(row["n_devices"]), row["library"]
    if not (row["tokens_per_rank"] and row["hidden"] and row["topk"]):
        raise QuestionError("tokens, hidden size or experts per token are not stated")
    if library.startswith("MORI"):
        raise QuestionError("MORI's bandwidths come without a formula, so no time follows")
    if "API" in library:
        raise QuestionError("timed through the framework's API: permutes and launches are in it")
    transport = next((t for words, t in TRANSPORTS.items() if library.startswith(words)), "")
    transport = "hybridep" if library.startswith("HybridEP") else transport
    tokens, hidden, k = (int(float(row[key])) for key in ("tokens_per_rank", "hidden", "topk"))
    form = row["dtype"].split(" ")[0]
    element = 2.0 if kind == "moe_combine" else ELEMENT_BYTES.get(form, 0.0)
    if not element:
        raise QuestionError(f"number format {row['dtype']!r}: not known")
    spec, nodes = _cluster(row, chip, n)
    # DeepEP's own test lets a token go to four groups (nodes) at most.
    reach = 4 if library.startswith(("DeepEP", "UCCL")) else None
    ranks, visited = distinct(n, k), distinct(nodes, k, reach)
    copy = tokens * hidden * element
    if row["time_us"]:
        seconds = float(row["time_us"]) * 1e-6
    elif row["algbw_GBps"]:
        seconds = copy * (ranks if nodes == 1 else visited) / (float(row["algbw_GBps"]) * 1e9)
    else:
        raise QuestionError("neither time nor bandwidth is stated")
    sms = float(row["sms"]) if row["sms"] else None
    between = visited / ranks if nodes > 1 else 1.0
    return CollectiveCase(
        chip, spec, nodes, kind, n, 1, copy * ranks, between, transport, sms, library.split(" (")[0], seconds
    )

"""The records a hardware profile is made of: every number with its unit, source, date and confidence.

Units stand in the key names of the data files (`peak_tflops`, `memory_bandwidth_gb_per_s`). Inside the simulator
everything is SI; the properties at the end of `Chip` convert. A key that the schema does not know is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidence = Literal["high", "medium", "low", "disputed", "assumption"]
Dtype = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

GIB = 2**30


class Record(BaseModel):
    """Base of all profile records: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


class Alternative(Record):
    """The value another source gives for a disputed number."""

    value: PositiveFloat
    source: str


class Quantity(Record):
    """One number with where it comes from."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: str
    date: str
    confidence: Confidence
    disputed: tuple[Alternative, ...] = ()
    note: str | None = None


class Curve(Record):
    """Fraction of the dense peak that a kernel reaches, over its FLOPs, linear in log10(FLOPs) between points.

    `points` are (FLOPs of the whole kernel on one device, fraction in (0, 1]); outside the range the end values hold.
    `residuals` are quantiles of measured/modelled time over the rows that the curve was fitted on.
    """

    points: tuple[tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]], ...]
    source: str
    date: str
    confidence: Confidence
    basis: Literal["measured", "compiler", "data sheet", "borrowed", "assumption"]
    residuals: dict[Literal["p10", "p50", "p90"], PositiveFloat] | None = None
    rows: int | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Curve:
        sizes = [x for x, _ in self.points]
        if not sizes or any(b <= a for a, b in zip(sizes, sizes[1:], strict=False)):
            raise ValueError("points must be in ascending order of FLOPs, at least one")
        return self


class OpClass(Record):
    """What a pass of one class of ops takes in a step, as multiples of what the roofline says of it.

    seconds = `launches` x kernel overhead + `arithmetic` x its arithmetic alone + `traffic` x its memory traffic alone.
    Fitted on traced steps (docs/calibration.md). `together` says that the data could not tell these apart, and one
    factor was fitted. `sizes` are the smallest and largest roofline seconds of one op that were fitted; `residuals` are
    quantiles of measured/modelled time when a job is left out of the fit.
    """

    launches: Annotated[float, Field(ge=0)]
    arithmetic: Annotated[float, Field(ge=0)]
    traffic: Annotated[float, Field(ge=0)]
    together: bool = False
    sizes: tuple[PositiveFloat, PositiveFloat]
    residuals: dict[Literal["p10", "p50", "p90"], PositiveFloat]
    rows: int
    jobs: int


CollectiveFamily = Literal["ring", "reduce_scatter", "all_reduce", "in_switch", "all_to_all"]


# Families of collectives that take n - 1 steps among n.
Stepwise = Literal["ring", "all_to_all"]


class Sharing(Record):
    """By how much each of `devices` at work at once is slower than the profile says, since they share a host.

    Factors of time: of compute, of memory traffic, of a collective's start, and of a byte on the wire; `families` has
    start and wire of those that were fitted apart. While a group of n of the D devices is in a call, the cores compute
    for the others: the call starts 1 + `waits` x (1 - n / D) times as late, and `filled` x (1 - n / D) of its time
    their compute takes less. `waits` is by family, of those whose algorithm has n - 1 steps.
    """

    devices: Annotated[int, Field(ge=1)]
    compute: PositiveFloat
    memory: PositiveFloat
    start: PositiveFloat
    wire: PositiveFloat
    families: dict[CollectiveFamily, tuple[PositiveFloat, PositiveFloat]] = {}
    waits: dict[Stepwise, Annotated[float, Field(ge=0)]] = {}
    filled: Annotated[float, Field(ge=0, le=1)] = 0.0

    def of(self, family: CollectiveFamily) -> tuple[float, float]:
        """Start and wire of a family's collectives."""
        return self.families.get(family, (self.start, self.wire))


class StepSpread(Record):
    """How far whole steps were from forecasts that had not seen them: what a calibrated forecast's interval is made of.

    A forecast's own spread is the root of the sum over op classes of (share of the step x spread of the class)^2, each
    doubled for every decade outside the sizes that were fitted. The interval is `quantile` of these spreads, about
    `centre` times the forecast; `covered` is the share of `steps` left-out steps within it.
    """

    centre: PositiveFloat
    quantile: Annotated[float, Field(ge=0)]
    floor: Annotated[float, Field(ge=0)]
    steps: int
    covered: Annotated[float, Field(ge=0, le=1)]


class Tile(Record):
    """Granularity of the matrix unit: dimensions of a product are padded up to multiples of these."""

    rows: int
    columns: int
    depth: int
    source: str


class Efficiency(Record):
    """How much of the peaks is reached: products by dtype, attention by direction, memory streams.

    `caches` are (bytes of one op, how many times as fast as from memory they move), ascending, the last 1: what fits in
    a cache is not fetched from memory. Linear in log10(bytes) between points; the end values hold outside.
    `grouped_slowdown` is the time of a grouped (per expert) product over that of one dense product of the same FLOPs.
    """

    matmul: dict[Dtype | Literal["fp8_block"], Curve]
    grouped_slowdown: Quantity
    attention_forward: Quantity
    attention_backward: Quantity
    memory: Quantity
    caches: tuple[tuple[PositiveFloat, PositiveFloat], ...] = ()
    tile: Tile


class Regime(Record):
    """One protocol of a collective: `start` + `step` x steps of latency, a share of the wire rate of large messages.

    `start` and `step` count in `latency_us` of the network, so that a changed latency changes every size.
    """

    start: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    step: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Regimes(Record):
    """The protocols that a library chooses from, smallest messages first; a message takes the fastest.

    The last has share 1, the network's efficiency. `own` is the time of a byte that stays on the device over that
    of a byte on the wire, for groups in one domain. `passes` are the bytes that the library sends over those of the
    simulator's algorithm. `array`: where a merged call goes array by array, a further one's start over the first's.
    `residuals` are quantiles of measured/modelled time, fitted rows.
    """

    protocols: Annotated[tuple[Regime, ...], Field(min_length=1)]
    own: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    passes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    array: Annotated[float, Field(ge=0, le=1)] = 1.0
    source: str
    date: str
    confidence: Confidence
    residuals: dict[Literal["p10", "p50", "p90"], PositiveFloat] | None = None
    rows: int | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _last_is_large(self) -> Regimes:
        if self.protocols[-1].share != 1:
            raise ValueError(
                "the last of protocols must have share 1: the network's efficiency is that of large messages"
            )
        return self


class TokenTransport(Record):
    """A library that moves tokens to experts itself: fixed time, wire efficiency, and what one SM (or CU) moves.

    Its time is start_us + max(bytes / (SMs x sm rate), bytes that leave / (port x efficiency)).
    """

    start_us: Quantity
    efficiency: Quantity
    dispatch_sm_gb_per_s: Quantity
    combine_sm_gb_per_s: Quantity
    sms: Quantity


class ScaleUp(Record):
    """The fast network next to the chip: ICI torus, NVLink, xGMI or the memory of a host.

    `in_switch_efficiency` is given where the switch adds (NVLS): buffer size over time and port rate of an all-reduce.
    `collectives` says how small messages depart from latency and bandwidth: `ring` is all-gather, and reduce-scatter
    where that has no family of its own.
    """

    kind: Literal["torus2d", "torus3d", "nvswitch", "cube_mesh", "full_mesh", "pcie", "host_memory"]
    chips_per_domain: int | None = None
    links_per_chip: int
    link_gb_per_s: Quantity | None = None
    total_gb_per_s: Quantity | None = None
    latency_us: Quantity
    ring_efficiency: Quantity
    all_to_all_efficiency: Quantity
    in_switch_efficiency: Quantity | None = None
    collectives: dict[CollectiveFamily, Regimes] = {}
    transports: dict[Literal["deepep", "hybridep"], TokenTransport] = {}


class ScaleOut(Record):
    """The network between domains: InfiniBand, RoCE, EFA, data-centre network; per chip and direction."""

    kind: Literal["infiniband", "ethernet", "dcn"]
    nic_gb_per_s: Quantity
    latency_us: Quantity
    ring_efficiency: Quantity
    all_to_all_efficiency: Quantity
    collectives: dict[CollectiveFamily, Regimes] = {}


class Price(Record):
    """Dollars per chip and hour, as offered on a day."""

    usd_per_chip_hour: PositiveFloat
    terms: Literal["on_demand", "reserved", "spot", "capacity_block"]
    source: str
    date: str
    note: str | None = None


class FittedTable(Record):
    """A table that a profile was fitted on, and the short hashes of its rows that were used.

    A hash (`measurement_hash` in simulator/results) tells a row again in a copy, a subset or a renumbered table;
    `sha256` is that of the file as it was.
    """

    name: str
    sha256: str
    rows: Annotated[int, Field(ge=1)]
    ids_sha256: tuple[str, ...]

    @model_validator(mode="after")
    def _complete(self) -> FittedTable:
        if len(self.ids_sha256) != self.rows:
            raise ValueError(f"rows = {self.rows}, and ids_sha256 lists {len(self.ids_sha256)}")
        return self


class Calibration(Record):
    """Where the numbers of a calibrated profile come from: tables, day, version; `base` is the profile it began as."""

    tables: Annotated[tuple[FittedTable, ...], Field(min_length=1)]
    date: str
    moecast_version: str
    base: str | None = None
    note: str | None = None


class Chip(Record):
    """One accelerator, as sold (a chip), with what one JAX device of it has.

    All numbers are per chip; a JAX device is `1 / devices_per_chip` of it (TPU v2, v3 and 7x have two).
    A peak that is not listed does not exist on the chip; a price that is not listed is not known. `op_classes`,
    `sharing` and `step_spread` are there once a profile has been calibrated on steps that really ran.
    """

    name: str
    title: str
    vendor: Literal["google", "nvidia", "amd", "generic"]
    kind: Literal["tpu", "gpu", "cpu"]
    aliases: tuple[str, ...] = ()
    devices_per_chip: int = 1
    chips_per_host: int
    peak_tflops: dict[Dtype, Quantity]
    memory_gib: Quantity | None = None
    memory_gb: Quantity | None = None
    memory_bandwidth_gb_per_s: Quantity
    framework_reserve_gib: Quantity
    kernel_overhead_us: Quantity
    host_step_overhead_us: Quantity
    efficiency: Efficiency
    scale_up: ScaleUp
    scale_out: ScaleOut | None = None
    host_launch_us: Quantity | None = None
    host_link_gb_per_s: Quantity | None = None
    overlap_slowdown: Quantity
    power_tdp_w: Quantity | None = None
    prices: tuple[Price, ...] = ()
    op_classes: dict[str, OpClass] = {}
    sharing: tuple[Sharing, ...] = ()
    step_spread: StepSpread | None = None
    calibration: Calibration | None = None
    notes: str | None = None

    @model_validator(mode="after")
    def _one_memory_size(self) -> Chip:
        if (self.memory_gib is None) == (self.memory_gb is None):
            raise ValueError("give exactly one of memory_gib and memory_gb")
        if self.scale_up.link_gb_per_s is None and self.scale_up.total_gb_per_s is None:
            raise ValueError("scale_up needs link_gb_per_s or total_gb_per_s")
        return self

    @property
    def device_memory_bytes(self) -> float:
        """Memory of one JAX device, bytes."""
        if self.memory_gib is not None:
            return self.memory_gib.value * GIB / self.devices_per_chip
        assert self.memory_gb is not None
        return self.memory_gb.value * 1e9 / self.devices_per_chip

    @property
    def device_memory_bytes_per_s(self) -> float:
        """Data-sheet memory bandwidth of one JAX device, bytes/s."""
        return self.memory_bandwidth_gb_per_s.value * 1e9 / self.devices_per_chip

    def device_peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak of one JAX device for `dtype`, FLOP/s. KeyError where the chip has none."""
        return self.peak_tflops[dtype].value * 1e12 / self.devices_per_chip  # type: ignore[index]

    @property
    def scale_up_bytes_per_s(self) -> float:
        """All scale-up links of one chip together, bytes/s and direction."""
        up = self.scale_up
        if up.total_gb_per_s is not None:
            return up.total_gb_per_s.value * 1e9
        assert up.link_gb_per_s is not None
        return up.link_gb_per_s.value * up.links_per_chip * 1e9

"""Fit the scale-up network of a chip on NCCL sweeps: `python -m benchmarks.fit_links TABLE [--chip NAME]`.

Prints, as YAML for the chip files, the protocols of each collective (schema.Regimes) and the efficiencies that go with
them. The model is that of `simulator/network`: the fastest of three protocols, each a latency of start + step x steps
and a share of the wire rate; the share of the buffer that stays on the device is copied too. Fitted is on every second
size (`is_fit_size`), so that `score_collectives` has rows that no number has seen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.fit_efficiencies import LARGE_BYTES, SMALL_BYTES, collective_terms
from benchmarks.fit_tables import Row, number, quantiles, read_rows, sources
from hw_profiles import Chip, QuestionError, load_chip
from simulator.calibration.collective_rows import CollectiveCase, collective_case

Array = NDArray[np.float64]
PROTOCOLS = ("ring", "all_reduce", "in_switch", "all_to_all")

# Chips whose own rows have two and four GPUs only learn the growth with the group from their neighbours of eight.
POOL = {"gb200": ("gb200", "b200"), "gb300": ("gb300", "b300")}
# No row of GB300 has the six GPUs from which the switch adds; those of B300 show no gain from it.
IN_SWITCH_FROM = {"gb300": ("b200",)}
FITTED_SWITCH = ("b300",)
CHIPS_FITTED = ("a100-80", "h100-sxm", "h200", "b200", "b300", "gb200", "gb300")
# The switch's reduction starts here; rows of JAX carry 0.4 to 0.6 ms of host time.
NVLS_FROM = 6
HOST_TIMED = ("marin_report", "marin_h100", "scaling_book_gpu")
STARTS = 12


def is_fit_size(bytes_: float) -> bool:
    """Whether rows of this size are fitted on: those of an even power of two; the others are kept for scoring."""
    return math.floor(math.log2(bytes_)) % 2 == 0


def family(r: Row, chip: Chip) -> str:
    """The protocols that a row is a sample of; empty where its library was told to do something else."""
    kind = r["collective"]
    if kind in ("all_gather", "reduce_scatter"):
        return "ring"
    if kind != "all_reduce":
        return kind if kind == "all_to_all" else ""
    told_ring = "Ring" in r["library"] or r["dtype"] == "int8"
    if chip.scale_up.in_switch_efficiency and number(r, "n_devices") >= NVLS_FROM and not told_ring:
        return "in_switch"
    return "" if "NVLS" in r["library"] and not told_ring else "all_reduce"


def protocol_rows(chip: Chip, rows: Sequence[Row], name: str) -> list[Row]:
    """The rows that the protocols of `name` are fitted on: one-node sweeps of every second size."""
    pool = POOL.get(chip.name, (chip.name,))
    names = IN_SWITCH_FROM.get(chip.name, pool) if name == "in_switch" else pool
    return [
        r
        for r in rows
        if r["profile"] in names
        and r["fit"] == "yes"
        and r["n_nodes"] in ("1", "1.0")
        and r["message_bytes_per_rank"]
        and (r["time_us"] or r["busbw_GBps"])
        and r["source_key"] not in HOST_TIMED
        and family(r, chip) == name
        and number(r, "message_bytes_per_rank") >= SMALL_BYTES / 2
        and is_fit_size(number(r, "message_bytes_per_rank"))
    ]


class ProtocolFit:
    """Protocols of one collective on one chip: robust least squares of log(modelled/measured) from several starts."""

    def __init__(self, name: str, rows: Sequence[Row], speed: float, efficiency: float | None = None) -> None:
        self.name, self.speed, self.fixed, self.rows = name, speed, efficiency, rows
        self.n = np.array([number(r, "n_devices") for r in rows])
        self.bytes = np.array([number(r, "message_bytes_per_rank") for r in rows])
        self.seconds = np.array([collective_terms(r)[2] for r in rows])
        ones = np.ones(len(rows))
        steps = np.minimum(self.n - 1, 2 * np.ceil(np.log2(self.n)) + 1) if name == "all_reduce" else self.n - 1
        # The switch adds for all at once; of the last protocol a start is seen, and no growth that could be carried on.
        self.steps = 0 * ones if name == "in_switch" else steps
        passes = 2.0 if name == "all_reduce" else 1.0
        self.wire = self.bytes * (1.0 if name == "in_switch" else passes * (self.n - 1) / self.n)
        self.own = self.bytes / self.n * (name != "in_switch")
        self.x = self._solve()

    def parts(self, x: Array) -> tuple[float, float, list[tuple[float, float, float]]]:
        """Efficiency, cost of the own share, (start, step, share) of the protocols: logarithms and logits in `x`."""
        lines = []
        for k in (2, 5):
            lines.append((math.exp(x[k]), math.exp(x[k + 1]), 1 / (1 + math.exp(-x[k + 2]))))
        efficiency = self.fixed if self.fixed is not None else math.exp(x[0])
        return efficiency, math.exp(x[1]), [*lines, (math.exp(x[8]), 0.0, 1.0)]

    def model(self, x: Array) -> Array:
        """Seconds of every row."""
        efficiency, own, lines = self.parts(x)
        work = (self.wire + own * self.own) / (self.speed * efficiency)
        return np.asarray(np.min([start + step * self.steps + work / share for start, step, share in lines], axis=0))

    def _solve(self) -> Array:
        low, high = np.full(9, -20.0), np.full(9, 5.0)
        low[0], high[0], high[1] = math.log(0.2), math.log(0.95), math.log(1.5)
        first = np.array([-0.3, -1.0, -12.2, -13.8, -3.0, -11.7, -13.5, 0.5, -9.9])
        rng = np.random.default_rng(0)
        found = []
        for k in range(STARTS):
            start = np.clip(first + rng.normal(0, 0.4, 9) * (k > 0), low + 1e-3, high - 1e-3)
            gap = lambda x: np.log(self.model(x) / self.seconds)  # noqa: E731
            found.append(least_squares(gap, start, bounds=(low, high), loss="soft_l1", f_scale=0.1))
        return np.asarray(min(found, key=lambda s: float(s.cost)).x)

    def yaml(self, unit_s: float) -> list[str]:
        """The lines of a chip file; latencies in units of the network's, protocols that win nowhere left out."""
        efficiency, own, lines = self.parts(self.x)
        work = (self.wire + own * self.own) / (self.speed * efficiency)
        winner = np.argmin([start + step * self.steps + work / share for start, step, share in lines], axis=0)
        last = len(lines) - 1
        steps = float(self.steps.max())
        lines = [(a, b * bool(steps), c) for k, (a, b, c) in enumerate(lines) if k == last or k in winner]
        lines = [*sorted(lines[:-1], key=lambda x: x[0] + x[1] * steps), lines[-1]]
        chips = sorted({r["profile"] for r in self.rows})
        groups = ", ".join(str(int(n)) for n in sorted(set(self.n)))
        spread = quantiles(self.seconds / self.model(self.x))
        out = [f"    {self.name}:", "      protocols:"]
        for start, step, share in lines:
            out.append(f"        - {{start: {start / unit_s:.3g}, step: {step / unit_s:.3g}, share: {share:.3g}}}")
        if self.own.any():
            out.append(f"      own: {own:.3g}")
        source = (
            f"fitted on {len(self.rows)} published measurements (sizes of even powers of two): {sources(self.rows)}"
        )
        return [
            *out,
            f'      source: "{source}"',
            '      date: "2026-11"',
            f"      confidence: {'medium' if len(self.rows) >= 12 else 'low'}",
            f"      residuals: {{p10: {spread['p10']:g}, p50: {spread['p50']:g}, p90: {spread['p90']:g}}}",
            f"      rows: {len(self.rows)}",
            f'      note: "{", ".join(chips)}; groups of {groups}"',
        ]


def protocol_fits(chip: Chip, rows: Sequence[Row]) -> dict[str, ProtocolFit]:
    """The protocols of `chip` on the fit half of one-node rows; ring and all-reduce share the efficiency of rings."""
    out: dict[str, ProtocolFit] = {}
    for name in PROTOCOLS:
        mine = protocol_rows(chip, rows, name)
        if len(mine) >= 8:
            fixed = out["ring"].parts(out["ring"].x)[0] if name == "all_reduce" and "ring" in out else None
            known = chip.scale_up.in_switch_efficiency
            if name == "in_switch" and known is not None and chip.name not in FITTED_SWITCH:
                # Fitted on the largest messages alone, of several groups; the protocols only add what smaller ones do.
                fixed = known.value
            out[name] = ProtocolFit(name, mine, chip.scale_up_bytes_per_s, fixed)
    return out


def between_rows(chip: Chip, rows: Sequence[Row]) -> list[Row]:
    """Sweeps over three nodes or more that the tree step between nodes is fitted on.

    Rows of 256 KiB and less of such a sweep may hold connection set-up of milliseconds; those above 64 MiB say nothing.
    """
    return [
        r
        for r in rows
        if r["profile"] == chip.name
        and r["fit"] == "yes"
        and r["collective"] == "all_reduce"
        and r["n_nodes"]
        and number(r, "n_nodes") > 2
        and r["source_key"] not in HOST_TIMED
        and r["message_bytes_per_rank"]
        and 2**18 < number(r, "message_bytes_per_rank") <= LARGE_BYTES
        and is_fit_size(number(r, "message_bytes_per_rank"))
    ]


def between_fit(chip: Chip, rows: Sequence[Row]) -> list[str]:
    """The latency of an all-reduce's tree step between nodes, where a chip has such a sweep; YAML."""
    mine = between_rows(chip, rows)
    if len(mine) < 4 or chip.scale_out is None:
        return []
    waits = []
    for r in mine:
        nodes = number(r, "n_nodes")
        speed = chip.scale_out.nic_gb_per_s.value * 1e9 * chip.scale_out.ring_efficiency.value
        _, wire, seconds = collective_terms(r)
        left = seconds - wire / (speed * number(r, "n_devices") / nodes)
        waits.append(left / min(2 * (nodes - 1), 2 * math.ceil(math.log2(nodes))))
    step = float(np.median(waits)) / (chip.scale_out.latency_us.value * 1e-6)
    return [
        "    all_reduce:",
        f"      protocols: [{{start: 0, step: {step:.3g}}}]",
        f'      source: "fitted on {len(mine)} published measurements (1 to 64 MiB): {sources(mine)}"',
        '      date: "2026-11"',
        "      confidence: low",
        f"      rows: {len(mine)}",
        f'      note: "step of a tree over nodes, {mine[0]["inter_node"]}"',
    ]


def transport_rows(chip: Chip, rows: Sequence[Row]) -> list[tuple[Row, CollectiveCase]]:
    """The rows, and their questions, that DeepEP inside a node is fitted on: SMs stated, every second size."""
    out = []
    for r in rows:
        if r["profile"] != chip.name or not r["sms"] or not r["library"].startswith("DeepEP normal"):
            continue
        try:
            case = collective_case(r)
        except QuestionError:
            continue
        if case.transport == "deepep" and case.nodes == 1 and not is_fit_size(number(r, "tokens_per_rank")):
            out.append((r, case))
    return out


def transport_fit(chip: Chip, rows: Sequence[Row]) -> list[str]:
    """DeepEP inside one node: fixed time, wire efficiency, and what one SM moves; YAML."""
    pairs = transport_rows(chip, rows)
    used, cases = [r for r, _ in pairs], [case for _, case in pairs]
    if len(cases) < 8:
        return []
    seconds, bytes_, n, sms = (
        np.array([getattr(c, k) for c in cases], float) for k in ("seconds", "bytes", "size", "sms")
    )
    dispatch = np.array([c.kind == "moe_dispatch" for c in cases])

    def model(x: Array) -> Array:
        start, at_dispatch, at_combine, efficiency = np.exp(x)
        cores = 1 / (np.where(dispatch, at_dispatch, at_combine) * 1e9 * sms)
        port = (n - 1) / n / (chip.scale_up_bytes_per_s * efficiency)
        return np.asarray(start + bytes_ * np.maximum(cores, port))

    found = [
        least_squares(
            lambda x: np.log(model(x) / seconds),
            np.log([3e-5, 16.0, 20.0, e]),
            bounds=([-16, 0, 0, -3], [-6, 5, 5, -0.05]),
            loss="soft_l1",
            f_scale=0.1,
        )
        for e in (0.4, 0.5, 0.6, 0.7, 0.8)
    ]
    x = min(found, key=lambda s: float(s.cost)).x
    start, at_dispatch, at_combine, efficiency = np.exp(x)
    spread = quantiles(seconds / model(x))
    spread_text = f"measured/modelled p10 {spread['p10']:g}, p90 {spread['p90']:g}"
    about = (
        f'source: "fitted on {len(used)} published measurements: {sources(used)}", date: "2026-11", confidence: medium'
    )
    values = {
        "start_us": f"{start * 1e6:.3g}",
        "efficiency": f"{efficiency:.3g}",
        "dispatch_sm_gb_per_s": f"{at_dispatch:.3g}",
        "combine_sm_gb_per_s": f"{at_combine:.3g}",
    }
    out = ["    deepep:", *(f"      {k}: {{value: {v}, {about}}}" for k, v in values.items())]
    out[2] = out[2][:-1] + f', note: "{spread_text}"}}'
    sms_text = 'source: "deepseek-ai/DeepEP: Buffer.num_sms = 20", date: "2026-11", confidence: medium'
    return [*out, f"      sms: {{value: 20, {sms_text}}}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the table and print the fits as YAML."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="collectives.csv")
    parser.add_argument("--chip", help="fit this profile only")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.table)
        chips = [load_chip(name) for name in ([args.chip] if args.chip else CHIPS_FITTED)]
    except (OSError, QuestionError) as error:
        print(f"fit_links: {error}", file=sys.stderr)
        return 2
    efficiencies = {
        "ring": "ring_efficiency",
        "in_switch": "in_switch_efficiency",
        "all_to_all": "all_to_all_efficiency",
    }
    for chip in chips:
        fits = protocol_fits(chip, rows)
        print(f"# {chip.name}")
        for name, fit in fits.items():
            if name in efficiencies:
                print(f"#   {efficiencies[name]}: {fit.parts(fit.x)[0]:.3f}")
        print("  collectives:")
        for fit in fits.values():
            print("\n".join(fit.yaml(chip.scale_up.latency_us.value * 1e-6)))
        tokens = transport_fit(chip, rows)
        if tokens:
            print("  transports:")
            print("\n".join(tokens))
        between = between_fit(chip, rows)
        if between:
            print("# scale_out\n  collectives:")
            print("\n".join(between))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

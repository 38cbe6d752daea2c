"""The lists behind `moecast models`, `chips` and `clusters`: plain dictionaries first, then a table or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from hw_profiles.cluster import Cluster
from hw_profiles.loader import chip_names, cluster_names, load_chip, resolve_cluster
from hw_profiles.schema import Chip
from reports import units
from simulator.analysis.placements import Placed
from simulator.job.presets import load_preset, preset_names, unavailable
from simulator.results.forecast import Forecast
from simulator.workload.parameters import count_parameters


def _json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _model_row(name: str) -> dict[str, Any]:
    model = load_preset(name)
    count = count_parameters(model)
    moe = model.moes[0] if model.moes else None
    return {
        "name": name,
        "family": model.family,
        "layers": len(model.encoder_layers) + len(model.decoder_layers),
        "hidden": model.hidden,
        "experts": moe.experts if moe else 0,
        "top_k": moe.top_k if moe else 0,
        "total_parameters": count.total,
        "active_parameters": count.active,
        "source": model.source,
    }


def show_models(as_json: bool) -> None:
    """Print all presets, and which published models have none."""
    rows = [_model_row(name) for name in preset_names()]
    if as_json:
        return _json({"models": rows, "unavailable": unavailable()})
    cells = [
        (r["name"], str(r["layers"]), str(r["hidden"]), f"{r['experts']}/{r['top_k']}" if r["experts"] else "-",
         units.count(r["total_parameters"]), units.count(r["active_parameters"]))
        for r in rows
    ]  # fmt: skip
    names = ", ".join(unavailable())
    _table(
        "Model presets",
        ("name", "layers", "hidden", "experts/k", "total", "active"),
        cells,
        f"without a preset: {names} (why: --json)",
    )
    return None


def show_model(name: str, as_json: bool) -> None:
    """Print one preset with its counts beside the published ones."""
    model = load_preset(name)
    count = count_parameters(model)
    data = {
        "model": model.model_dump(mode="json", exclude_unset=True),
        "parameters": asdict(count) | {"total": count.total, "active": count.active},
    }
    if as_json:
        return _json(data)
    published = model.published
    rows = [("total", units.count(count.total)), ("active for a token", units.count(count.active)),
            ("without embedding and logits", units.count(count.without_embeddings)),
            ("routed experts", units.count(count.routed))]  # fmt: skip
    if published is not None:
        for label, value in (
            ("published total", published.total_parameters),
            ("published active", published.active_parameters),
        ):
            if value:
                rows.append((label, units.count(value)))
    caption = " ".join(x for x in (f"source: {model.source}.", model.notes, published.note if published else None) if x)
    _table(model.name, ("parameters", "count"), rows, caption)
    print(json.dumps(data["model"], indent=1))
    return None


def _chip_row(chip: Chip) -> dict[str, Any]:
    peaks = {k: q.value for k, q in chip.peak_tflops.items()}
    return {
        "name": chip.name,
        "devices_per_chip": chip.devices_per_chip,
        "peak_tflops": peaks,
        "memory_gib": chip.device_memory_bytes * chip.devices_per_chip / 2**30,
        "memory_bandwidth_gb_per_s": chip.memory_bandwidth_gb_per_s.value,
        "usd_per_chip_hour": chip.prices[0].usd_per_chip_hour if chip.prices else None,
        "matmul_basis": {k: c.basis for k, c in chip.efficiency.matmul.items()},
    }


def show_chips(as_json: bool) -> None:
    """Print all chips."""
    rows = [_chip_row(load_chip(n)) for n in chip_names()]
    if as_json:
        return _json(rows)
    cells = []
    for r in rows:
        sixteen = r["peak_tflops"].get("bf16") or r["peak_tflops"].get("fp16") or r["peak_tflops"].get("fp32")
        basis = r["matmul_basis"].get("bf16") or next(iter(r["matmul_basis"].values()))
        cells.append((r["name"], f"{sixteen:g}", f"{r['peak_tflops']['fp8']:g}" if "fp8" in r["peak_tflops"] else "-",
                      f"{r['memory_gib']:.0f}", f"{r['memory_bandwidth_gb_per_s']:.0f}",
                      f"{r['usd_per_chip_hour']:g}" if r["usd_per_chip_hour"] else "-", basis))  # fmt: skip
    heads = ("chip", "16 bit TF/s", "fp8 TF/s", "GiB", "GB/s", "$/h", "curve")
    return _table("Chips (dense peaks; K40 and CPU in fp32)", heads, cells, "every number's source: moecast chips NAME")


def _quantities(data: Any, path: str = "") -> list[tuple[str, str, str, str]]:
    if isinstance(data, dict) and "value" in data and "source" in data:
        disputed = "".join(f"; or {d['value']:g} ({d['source']})" for d in data.get("disputed", ()))
        note = f" [{data['note']}]" if data.get("note") else ""
        return [
            (path, f"{data['value']:g}", str(data["confidence"]), f"{data['source']}, {data['date']}{disputed}{note}")
        ]
    if isinstance(data, dict) and "points" in data:
        text = " ".join(f"{y:.2f}@{x:.0e}" for x, y in data["points"])
        return [(path, text, f"{data['basis']}, {data['confidence']}", f"{data['source']}, {data['date']}")]
    if isinstance(data, dict) and "usd_per_chip_hour" in data:
        return [(path, f"{data['usd_per_chip_hour']:g} USD/h {data['terms']}", "", f"{data['source']}, {data['date']}")]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [row for key, value in items for row in _quantities(value, f"{path}.{key}" if path else str(key))]


def show_chip(name: str, as_json: bool) -> None:
    """Print one chip with the source, date and confidence of every number."""
    from rich.console import Console
    from rich.markup import escape

    chip = load_chip(name)
    data = chip.model_dump(mode="json", exclude_none=True)
    data["per_device"] = {
        "peak_tflops": {k: q.value / chip.devices_per_chip for k, q in chip.peak_tflops.items()},
        "memory_gib": chip.device_memory_bytes / 2**30,
        "memory_bandwidth_gb_per_s": chip.device_memory_bytes_per_s / 1e9,
    }
    if as_json:
        return _json(data)
    console = Console()
    console.print(f"[bold]{escape(chip.title)}[/bold]", highlight=False)
    if chip.devices_per_chip > 1:
        one = data["per_device"]
        peaks = ", ".join(f"{k} {v:g}" for k, v in one["peak_tflops"].items())
        console.print(
            f"{chip.devices_per_chip} JAX devices a chip, each: {peaks} TFLOP/s, {one['memory_gib']:g} GiB,"
            f" {one['memory_bandwidth_gb_per_s']:g} GB/s; below per chip",
            highlight=False,
        )
    # A line for the number and one for its source: sources are too long for a column.
    for path, value, confidence, source in _quantities(data):
        console.print(f"{path} [bold]{escape(value)}[/bold] {escape(confidence)}", highlight=False)
        console.print(f"    {source}", style="dim", highlight=False, markup=False)
    if data.get("notes"):
        console.print(data["notes"], markup=False, highlight=False)
    return None


def _cluster_data(cluster: Cluster) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": cluster.name, "description": cluster.description, "chip": cluster.chip.name, "devices": cluster.devices,
        "chips": cluster.chips, "slices": cluster.slices, "levels": [asdict(x) for x in cluster.levels],
    }  # fmt: skip
    if cluster.torus is not None:
        data["torus"] = asdict(cluster.torus)
    return data


def show_clusters(as_json: bool) -> None:
    """Print all named clusters."""
    found = [resolve_cluster(n) for n in cluster_names()]
    if as_json:
        return _json([_cluster_data(c) for c in found])
    cells = [(n, c.chip.name, str(c.devices), c.description) for n, c in zip(cluster_names(), found, strict=True)]
    return _table(
        "Named clusters",
        ("name", "chip", "devices", "what"),
        cells,
        "any TPU slice also has a name: v5p-128, v6e-256, tpu-v3-32",
    )


def show_cluster(name: str, as_json: bool) -> None:
    """Print one cluster with its networks."""
    cluster = resolve_cluster(name)
    if as_json:
        return _json(_cluster_data(cluster))
    rows = [("chip", cluster.chip.title), ("devices", str(cluster.devices)), ("chips", str(cluster.chips))]
    if cluster.torus is not None:
        t = cluster.torus
        axes = " x ".join(f"{n}{' (ring)' if w else ''}" for n, w in zip(t.dims, t.wrap, strict=True))
        rows.append(("torus", f"{axes}, {t.link_bytes_per_s / 1e9:g} GB/s a link and direction"))
    for level in cluster.levels:
        rows.append(
            (
                level.name,
                f"{level.devices} devices, {level.bytes_per_s / 1e9:g} GB/s each, step {level.latency_s * 1e6:g} us",
            )
        )
    return _table(cluster.name, ("what", "value"), rows, cluster.description)


def show_links(answer: Forecast, top: int, as_json: bool) -> None:
    """Print the busiest links of a forecast by events."""
    assert answer.events is not None
    links = answer.events.links[:top]
    if as_json:
        return _json({"job": answer.job.name, "step_time_s": answer.step_time_s, "links": [asdict(x) for x in links]})
    cells = [
        (x.name, x.level, f"{100 * x.utilisation:.1f} %", f"{x.bytes / 1e9:.3g} GB", f"{x.bytes_per_s / 1e9:g} GB/s")
        for x in links
    ]
    caption = "busy: bytes carried over what the link could carry in the step; links loaded alike are one row"
    return _table(f"Busiest links of {answer.job.name}", ("link", "level", "busy", "carried", "rate"), cells, caption)


def show_placements(found: Sequence[Placed], as_json: bool) -> None:
    """Print orders of the mesh axes and their step times."""
    if as_json:
        return _json([asdict(p) for p in found])
    best = found[0].step_time_s
    cells = [
        (", ".join(p.order), units.seconds(p.step_time_s), f"{100 * (p.step_time_s / best - 1):+.1f} %",
         units.seconds(p.exposed_communication_s))
        for p in found
    ]  # fmt: skip
    heads = ("axes, neighbours first", "step", "over best", "exposed communication")
    return _table("Placements", heads, cells, "use one with --set 'plan.placement={order: [...]}'")

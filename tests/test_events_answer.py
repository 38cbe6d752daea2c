"""The answer by events: contention, skew, recorded routing, a fabric of one's own, and faults in their inputs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hw_profiles.errors import QuestionError
from moecast.cli import main
from simulator.analysis.event_options import EventOptions
from simulator.analysis.forecast import forecast
from simulator.job.load import job_from_mapping, load_job
from simulator.results.forecast import Events, Forecast

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE: dict[str, Any] = {
    "model": "mixtral-8x7b",
    "cluster": {"chip": "h100-sxm", "nodes": 4},
    "plan": {"pipeline": 2, "expert": 8, "microbatch_sequences": 1, "shard": "optimizer"},
    "batch": {"sequences": 128, "length": 4096},
    "training": {"routing": {"model": "even"}},
}


def run(changes: dict[str, Any] | None = None, **options: Any) -> Forecast:
    return forecast(load_job(BASE | (changes or {})), options=EventOptions(**options))


def events(result: Forecast) -> Events:
    assert result.events is not None
    return result.events


def skewed(routing: dict[str, Any]) -> dict[str, Any]:
    return {"training": {"routing": routing}}


SKEWS: list[dict[str, Any]] = [
    {"model": "chance"},
    {"model": "zipf", "exponent": 0.3},
    {"model": "zipf", "exponent": 0.7},
    {"model": "dirichlet", "concentration": 2.0},
]


@pytest.mark.parametrize("routing", SKEWS, ids=str)
def test_folded_and_unfolded_means_agree_within_one_per_cent_under_skew(routing: dict[str, Any]) -> None:
    def mean(fold: bool) -> float:
        return sum(run(skewed(routing), seed=s, fold=fold, samples=1).step_time_s for s in range(8)) / 8

    assert mean(fold=False) == pytest.approx(mean(fold=True), rel=0.01)


def test_more_skew_is_slower_and_spreads_more() -> None:
    results = [run(skewed(r), samples=40) for r in SKEWS[1:3]]
    assert results[0].step_time_s < results[1].step_time_s
    for result in results:
        spread = events(result).percentiles_s
        assert spread is not None and spread["p50"] <= spread["p95"] <= spread["p99"]
        assert spread["p50"] == pytest.approx(result.step_time_s, rel=0.15)
        assert events(result).out_of_memory_probability is not None


def test_memory_runs_out_more_often_the_less_is_left() -> None:
    risks = []
    for gib in (200, 85, 60):
        cluster = {"chip": {"name": "h100-sxm", "memory_gib": str(gib)}, "nodes": 4}
        result = run({"cluster": cluster} | skewed({"model": "zipf", "exponent": 0.7}), samples=20)
        risks.append(events(result).out_of_memory_probability)
    assert risks[0] == 0.0 and risks[-1] == 1.0 and risks == sorted(risks, key=float)


def test_contention_only_costs_and_a_slow_link_costs_more() -> None:
    plan = {"plan": {"expert": 32, "expert_tensor": 1, "microbatch_sequences": 1, "shard": "none"}}
    plan["plan"]["expert"] = 8
    alone, shared = (run(plan, contention=c).step_time_s for c in (False, True))
    assert shared >= alone * 0.99
    slow = run(slow_links={"gpu 0 of node 0": 0.25})
    assert slow.step_time_s > run().step_time_s * 1.01
    with pytest.raises(QuestionError, match=r"no link of .* has this in its name"):
        run(slow_links={"no such thing": 0.5})


def test_links_carry_what_the_job_sends() -> None:
    """The busiest NVLink of a node carries its GPU's share of the expert all-to-alls, and no link is over-full."""
    result = run()
    links = events(result).links
    assert links and all(0 < x.utilisation <= 1 for x in links)
    inside = max(x.bytes for x in links if x.level == "NVLink")
    assert inside >= result.all_to_all.bytes_per_device * 7 / 8


def test_critical_path_sums_to_the_step() -> None:
    result = run(skewed({"model": "chance"}))
    assert sum(events(result).critical_path_s.values()) == pytest.approx(result.step_time_s, rel=1e-6)


def counts_file(folder: Path, text: str) -> Path:
    path = folder / "counts.csv"
    path.write_text(text)
    return path


def test_recorded_routing_is_replayed(tmp_path: Path) -> None:
    """All tokens on two experts of rank 0: the busiest of eight ranks has four times the mean (k = 2 of 8 experts)."""
    sent = 128 * 4096
    hot = [sent, sent, 0, 0, 0, 0, 0, 0]
    rows = [f"0,{layer},{e},{n}" for layer in range(32) for e, n in enumerate(hot)]
    counts_file(tmp_path, "step,layer,expert,tokens\n" + "\n".join(rows) + "\n")
    data = BASE | skewed({"model": "replay", "file": "counts.csv"})
    job = job_from_mapping(data, folder=tmp_path)
    result = forecast(job, folder=tmp_path)
    assert result.routing.max_over_mean_load == pytest.approx(4.0, rel=0.01)
    assert result.step_time_s > run().step_time_s * 1.5


HEAD = "step,layer,expert,tokens\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step,layer,expert,tokens\n0,0,0,nan\n", "tokens"),
        ("step,layer,expert,tokens\n0,0,99,5\n", "expert"),
        (HEAD + "".join(f"0,{x},{e},{10**11}\n" for x in range(32) for e in range(8)), "tokens"),
        ("layer,tokens\n0,5\n", "column"),
    ],
    ids=["nan", "unknown expert", "more than was sent", "missing column"],
)
def test_a_bad_routing_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    counts_file(tmp_path, text)
    job = job_from_mapping(BASE | skewed({"model": "replay", "file": "counts.csv"}), folder=tmp_path)
    with pytest.raises(QuestionError, match=says) as caught:
        forecast(job, folder=tmp_path)
    assert "\n" not in str(caught.value) and "counts.csv" in str(caught.value)


def fabric(devices: int, rate: float) -> dict[str, Any]:
    """Devices round one switch, as node-link JSON."""
    nodes: list[dict[str, Any]] = [{"id": f"g{i}", "device": i} for i in range(devices)]
    link = {"bandwidth_gb_per_s": rate, "latency_us": 2.0, "level": "own"}
    pairs = [(f"g{i}", "switch") for i in range(devices)]
    links = [{"source": a, "target": b, **link} for x, y in pairs for a, b in ((x, y), (y, x))]
    return {"directed": True, "multigraph": False, "graph": {}, "nodes": [*nodes, {"id": "switch"}], "links": links}


def test_a_fabric_of_ones_own(tmp_path: Path) -> None:
    steps = []
    for rate in (400.0, 5.0):
        path = tmp_path / f"own-{rate:g}.json"
        path.write_text(json.dumps(fabric(32, rate)))
        steps.append(run(graph=path))
    assert steps[1].step_time_s > 2 * steps[0].step_time_s
    assert events(steps[1]).links[0].level == "own"


@pytest.mark.parametrize("fault", ["zero", "cut", "few"])
def test_a_broken_fabric_is_named(tmp_path: Path, fault: str) -> None:
    data = fabric(8 if fault == "few" else 32, 400.0)
    if fault == "zero":
        data["links"][0]["bandwidth_gb_per_s"] = 0
    if fault == "cut":
        data["links"] = [x for x in data["links"] if "g5" not in (x["source"], x["target"])]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    with pytest.raises(QuestionError, match=r"own|g5|devices"):
        run(graph=path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["moecast", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_perfetto_and_link_load_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    example, trace = str(EXAMPLES / "qwen3-235b-a22b.yaml"), tmp_path / "trace.json.gz"
    assert call(monkeypatch, "forecast", example, "--perfetto", str(trace), "--json") == 0
    assert json.loads(capsys.readouterr().out)["events"]["folded"] is True
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert call(monkeypatch, "link-load", example, "--top", "3", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["links"]) == 3
    assert call(monkeypatch, "placement", example, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["step_time_s"] <= min(p["step_time_s"] for p in found)
    assert call(monkeypatch, "forecast", example, "--straggler", "x=2") == 2
    assert capsys.readouterr().err == "moecast: --straggler x: a device is a number from 0\n"

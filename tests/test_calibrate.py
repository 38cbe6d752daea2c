"""Calibration in worlds whose truth is known: what was put in comes out, and what cannot be told apart is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip, load_chip_file, resolve_cluster
from hw_profiles.schema import Sharing
from hw_profiles.sharing import at_work, factors
from moecast.calibrate import profile_text
from simulator.analysis.forecast import forecast
from simulator.calibration.calibrate import calibrate
from simulator.calibration.fit_machine import fit_machine, fit_sharing
from simulator.calibration.fit_network import Timed, fit_network
from simulator.calibration.fit_ops import home
from simulator.calibration.terms import terms_of
from simulator.kernels.roofline import Kernels
from simulator.network.collectives import collective_rate, merged_starts
from simulator.results.measurement import Measurement, MeasurementTable
from tests.calibration_worlds import COMMON, FIT, HELD, plain_world, small_job

CPU = load_chip("cpu-host")


def product(shape: tuple[int, int, int, int], seconds: float, devices: int = 2) -> Measurement:
    flops = 2.0 * math.prod(shape)
    name = "product" if shape[0] == 1 else "grouped_product"
    key = f"{name}.{'x'.join(map(str, shape))}.{devices}"
    return Measurement(
        key, **COMMON, kind="kernel", name=name, seconds=seconds, shape=shape, dtype="fp32", flops=flops,
        devices=devices,
    )  # fmt: skip


def test_steps_that_were_not_seen_are_forecast() -> None:
    """Without noise a world of the model's own form is learnt: held-out widths and experts within 1 %."""
    world = plain_world()
    found = calibrate([world.table([small_job(*s) for s in FIT])], CPU)
    for size in HELD:
        job = small_job(*size)
        truth = world.step(job)[0]
        before = forecast(job).step_time_s
        after = forecast(job, chip=found.chip).step_time_s
        assert abs(after / truth - 1) < 0.01 < abs(before / truth - 1)
    assert all(abs(modelled / measured - 1) < 0.02 for _, measured, modelled in found.left_out)


def test_intervals_cover_and_differ() -> None:
    """With noise the 80 % interval covers about as often as it says, and is wider away from what was fitted."""

    def width(size: tuple[int, int, int]) -> float:
        low, high = forecast(small_job(*size), chip=found.chip, engine="closed-form").step_time_interval_s
        return math.log(high / low)

    inside = total = 0
    near, far = [], []
    for seed in range(8):
        world = plain_world(noise=0.15, seed=seed)
        found = calibrate([world.table([small_job(*s) for s in (*FIT, (112, 160, 8), (96, 448, 4))])], CPU)
        for size in (*HELD, (96, 256, 8), (128, 384, 4)):
            job = small_job(*size)
            low, high = forecast(job, chip=found.chip, engine="closed-form").step_time_interval_s
            inside += low <= world.step(job)[0] <= high
            total += 1
        near.append(width((112, 224, 8)))
        far.append(width((1024, 4096, 8)))
    assert total == 40 and 0.6 <= inside / total <= 0.98
    assert sum(far) > 2 * sum(near) and min(f / n for f, n in zip(far, near, strict=True)) > 1
    answer = forecast(small_job(112, 224, 8), chip=found.chip)
    assert "80 %" in answer.interval_meaning and answer.evidence.calibration.startswith("calibrated")


def test_the_machine_is_learnt_exactly() -> None:
    """Products by a known curve, twice as slow per expert; four devices at work are three times as slow."""
    kernels = Kernels(CPU)
    peak = kernels.peak("fp32")
    shapes = [(1, 64, 64, 64), (1, 256, 256, 256), (1, 1024, 512, 1024), (4, 64, 64, 64), (8, 128, 64, 128),
              (8, 256, 128, 256)]  # fmt: skip
    share = {64: 0.2, 256: 0.5, 1024: 0.8}

    def seconds(shape: tuple[int, int, int, int]) -> float:
        flops = 2.0 * math.prod(shape)
        sizes = [2.0 * n * d * c for n, d, c in ((64, 64, 64), (256, 256, 256), (1024, 512, 1024))]
        x = [math.log10(s) for s in sizes]
        y, at = list(share.values()), math.log10(flops)
        i = 0 if at <= x[1] else 1
        reached = y[i] + (y[i + 1] - y[i]) * min(max((at - x[i]) / (x[i + 1] - x[i]), 0), 1)
        return (2.0 if shape[0] > 1 else 1.0) * flops / (peak * reached)

    rows = [product(s, seconds(s)) for s in shapes] + [product(s, 3 * seconds(s), 4) for s in shapes]
    chip, notes = fit_machine(CPU, rows)
    points = dict(chip.efficiency.matmul["fp32"].points)
    assert [round(y, 6) for y in points.values()] == [0.2, 0.5, 0.8]
    assert chip.efficiency.grouped_slowdown.value == pytest.approx(2.0)
    assert any("products per expert" in n for n in notes)
    sharing = fit_sharing(rows)
    assert [(s.devices, s.compute) for s in sharing] == [(2, 1.0), (4, pytest.approx(3.0))]
    slow = at_work(chip.model_copy(update={"sharing": sharing}), 4)
    assert dict(slow.efficiency.matmul["fp32"].points)[points.popitem()[0]] == pytest.approx(0.8 / 3)


def test_sharing_between_and_beyond() -> None:
    known = (Sharing(devices=2, compute=1, memory=1, start=1, wire=1),
             Sharing(devices=8, compute=4, memory=9, start=16, wire=4))  # fmt: skip
    assert factors(known, 1).compute == 1
    assert factors(known, 4).compute == pytest.approx(2) and factors(known, 4).memory == pytest.approx(3)
    assert factors(known, 16).compute == 8 and factors(known, 16).start == 16


def test_a_peak_may_be_raised_only_where_nobody_was_sure() -> None:
    shape = (1, 1024, 1024, 1024)
    fast = product(shape, 2.0 * math.prod(shape) / 1e13)
    raised, notes = fit_machine(CPU, [fast])
    assert raised.peak_tflops["fp32"].value == pytest.approx(10) and "a product ran that fast" in notes[0]
    sure = CPU.peak_tflops["fp32"].model_copy(update={"confidence": "high"})
    with pytest.raises(QuestionError, match="is more than the fp32 peak of cpu-host"):
        fit_machine(CPU.model_copy(update={"peak_tflops": {"fp32": sure}}), [fast])


def test_what_cannot_be_told_apart_is_said() -> None:
    """Jobs that differ in nothing but their batch: terms grow together, and one factor is fitted for all."""
    world = plain_world()
    jobs = [
        small_job(64, 128, 4).model_copy(update={"name": f"j{n}", "batch": small_job(64, 128, 4).batch.model_copy(
            update={"sequences": n})}) for n in (8, 16, 32, 64, 128)
    ]  # fmt: skip
    found = calibrate([world.table(jobs)], CPU)
    assert found.chip.op_classes["moe.experts.up:forward"].together
    assert any("could not be told apart" in n for n in found.notes)


def test_a_profile_is_a_file_that_says_the_same(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    found = calibrate([plain_world().table([small_job(*s) for s in FIT])], CPU)
    path = tmp_path / "here.yaml"
    path.write_text(profile_text(found, ["world.parquet"]))
    job = small_job(*HELD[0])
    again = forecast(job, chip=load_chip_file(path)).step_time_s
    assert again == pytest.approx(forecast(job, chip=found.chip).step_time_s, rel=1e-5)


def test_a_class_takes_its_terms() -> None:
    """A profile whose class says (2, 0, 0) takes twice the launches, whatever the op."""
    job = small_job(64, 128, 4)
    found = calibrate([plain_world().table([small_job(*s) for s in FIT])], CPU)
    known = found.chip.op_classes["moe.router:forward"].model_copy(
        update={"launches": 2.0, "arithmetic": 0.0, "traffic": 0.0}
    )
    chip = CPU.model_copy(update={"op_classes": {"moe.router:forward": known}})
    row = next(o for o in forecast(job, chip=chip).ops if o.scope == "decoder.moe.router" and o.phase == "forward")
    assert row.time_s == pytest.approx(2 * terms_of(job, CPU)["moe.router", "forward"].launches_s)


@pytest.mark.parametrize(
    ("jobs", "change", "rule"),
    [
        (2, {}, r"world.parquet: 2 jobs were measured; a fit needs at least 3"),
        (3, {"chip": "h100-sxm"}, r"world.parquet: .*:step is of 'h100-sxm'; the base profile is cpu-host"),
        (3, {"job_hash": "f" * 64}, r"world.parquet: .*: the table does not carry its job"),
    ],
)
def test_what_no_fit_can_be_made_of(jobs: int, change: dict[str, str], rule: str) -> None:
    table = plain_world().table([small_job(*s) for s in FIT[:jobs]])
    changed = MeasurementTable(tuple(replace(r, **change) for r in table.rows), table.jobs, {}, table.name)  # type: ignore[arg-type]
    with pytest.raises(QuestionError, match=rule):
        calibrate([changed], CPU)


def test_each_measured_pass_has_a_home() -> None:
    """Recomputed forwards that the roofline has in its backward pass go there, and not with the update."""
    known = {("attention.core", "backward"), ("norm", "recompute"), ("layers.saved", "forward"),
             ("optimizer.update", "forward")}  # fmt: skip
    for key, wanted in (
        (("norm", "recompute"), ("norm", "recompute")),
        (("attention.core", "recompute"), ("attention.core", "backward")),
        (("step.sums", "forward"), ("layers.saved", "forward")),
        (("step.sums", "backward"), ("optimizer.update", "forward")),
    ):
        assert home(key, known) == wanted


def test_starts_and_bytes_are_told_apart_by_family() -> None:
    """Eight devices at work: all-reduces start four times as late, all-to-alls move bytes nine times as slowly."""
    shared = Sharing(devices=8, compute=1, memory=1, start=2, wire=2)
    two = Sharing(devices=2, compute=1, memory=1, start=1, wire=1)
    chip = CPU.model_copy(update={"sharing": (two, shared)})
    factors = {"all_reduce": (4.0, 2.0), "all_to_all": (2.0, 9.0)}
    rows = []
    for devices in (2, 8):
        alone = resolve_cluster({"chip": "cpu-host", "devices": devices}, chip=chip.model_copy(update={"sharing": ()}))
        for family, apart in factors.items():
            start, wire = apart if devices == 8 else (1.0, 1.0)
            rate = collective_rate(alone, family, 2, 1)
            for arrays, size in ((1, 4e3), (1, 1e5), (1, 4e6), (12, 1e5), (12, 4e6), (30, 1e6), (1, 3e7)):
                # A further array of a merged call starts in a third of the first one's time.
                more = 1 + (arrays - 1) / 3 if family == "all_reduce" else 1.0
                seconds = start * more * rate.latency_s + wire * size * rate.seconds_per_byte
                merged = arrays if family == "all_reduce" else 1
                rows.append(Timed(family, 2, size, float(seconds), devices, True, arrays=merged))
    found, _ = fit_network(chip, rows, "made", "2026-11-22")
    assert found.scale_up.collectives["all_reduce"].array == pytest.approx(1 / 3, rel=0.02)
    for family, (start, wire) in factors.items():
        assert found.sharing[1].of(family) == pytest.approx((start, wire), rel=0.05)
    cluster = resolve_cluster({"chip": "cpu-host", "devices": 8}, chip=found)
    for row in rows[len(rows) // 2 :]:
        starts = merged_starts(cluster, row.arrays)
        seconds = starts * collective_rate(cluster, row.kind, 2, 1).seconds(row.bytes / starts)
        assert seconds == pytest.approx(row.seconds, rel=0.05)

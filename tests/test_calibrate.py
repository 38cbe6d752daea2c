"""Calibration in worlds whose truth is known: what was put in comes out, and what cannot be told apart is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hw_profiles.errors import QuestionError
from hw_profiles.loader import load_chip, load_chip_file, resolve_cluster
from hw_profiles.schema import Chip, Sharing
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


def shared_cores(filled: float, wire: float = 3.0) -> Chip:
    """A host whose devices slow down to a quarter when there are eight of them, not two."""
    two = Sharing(devices=2, compute=1, memory=1, start=1, wire=1)
    eight = Sharing(devices=8, compute=4, memory=4, start=40, wire=wire, filled=filled)
    return CPU.model_copy(update={"sharing": (two, eight)})


@pytest.mark.parametrize(("degree", "outside"), [(8, 0.0), (4, 0.5), (2, 0.75)])
def test_groups_in_calls_leave_their_cores_to_others(degree: int, outside: float) -> None:
    """A call of 4 of 8 devices gives the others' compute half of `filled` of its time; one of all 8 nothing."""
    job = small_job(128, 256, 8, 8, degree)
    plain, less = (forecast(job, chip=shared_cores(f), engine="closed-form") for f in (0.0, 0.8))
    assert less.all_to_all.time_s == plain.all_to_all.time_s > 0
    saved = 0.8 * outside * plain.all_to_all.time_s
    assert plain.step_time_s - less.step_time_s == pytest.approx(saved, abs=1e-12)
    # By op as in all, and by events as by formula.
    assert sum(o.time_s for o in plain.ops) - sum(o.time_s for o in less.ops) == pytest.approx(saved, abs=1e-12)
    assert forecast(job, chip=shared_cores(0.8)).step_time_s == pytest.approx(less.step_time_s, rel=1e-6)


def test_cores_left_to_others_are_no_more_than_there_are() -> None:
    """However long a call of 4 of 8 devices takes: no device computes faster than if the other four were not there."""
    job = small_job(128, 256, 8, 8, 4)
    plain, less = (forecast(job, chip=shared_cores(f, wire=1e4), engine="closed-form") for f in (0.0, 1.0))
    layers = [sum(o.time_s for o in f.ops if o.scope.startswith("decoder.")) for f in (plain, less)]
    assert layers[1] == pytest.approx(layers[0] / 2)


def test_what_sharing_costs_steps_is_learnt() -> None:
    """Benchmarks say three times as long on eight devices; steps say four, less what calls of half of them leave."""
    shapes = [(1, n, n, n) for n in (64, 256, 1024)]
    seconds = [2.0 * math.prod(s) / 5e10 for s in shapes]
    slow = {2: 1.0, 8: 3.0}
    stream = replace(product(shapes[0], 1e-3), name="stream", flops=None, bytes=1e7)
    benches = [
        *(product(s, x * slow[n], n) for n in (2, 8) for s, x in zip(shapes, seconds, strict=True)),
        *(replace(stream, id=f"stream.{n}", devices=n, seconds=1e-3 * slow[n]) for n in (2, 8)),
    ]
    chip = fit_machine(CPU, [r for r in benches if r.devices == 2])[0]
    world = replace(plain_world(), chip=chip.model_copy(update={"sharing": shared_cores(0.7).sharing}))
    on_two = [small_job(*s) for s in FIT]
    for groups, wanted in (((8, 4), 0.7), ((8,), 0.0)):
        on_eight = [small_job(*s, 8, p) for s in ((64, 128, 8), (128, 256, 8), (96, 320, 8)) for p in groups]
        table = world.table([*on_two, *on_eight])
        found = calibrate([MeasurementTable((*table.rows, *benches), table.jobs, {}, "world.parquet")], CPU)
        eight = found.chip.sharing[1]
        assert eight.filled == pytest.approx(wanted, abs=0.05)
        if wanted:
            assert eight.compute == pytest.approx(4, rel=0.05)
            held = small_job(112, 224, 8, 8, 4)
            assert forecast(held, chip=found.chip).step_time_s == pytest.approx(world.step(held)[0], rel=0.03)
            assert {c.jobs for c in found.chip.op_classes.values()} == {len(FIT)}
            assert any(f"other groups compute in {eight.filled:.2f} of a call" in n for n in found.notes)


def test_without_benchmarks_of_both_classes_are_fitted_on_all_devices() -> None:
    """Nothing says that devices share a host: more of them are as good as few."""
    world = plain_world()
    jobs = [*(small_job(*s) for s in FIT), *(small_job(*s, 8) for s in FIT[:3])]
    found = calibrate([world.table(jobs)], CPU)
    assert not found.chip.sharing and found.chip.op_classes["moe.experts.up:forward"].jobs == len(jobs)


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
    """Eight devices at work: all-reduces start four times as late, all-to-alls move bytes nine times as slowly.

    And all-to-alls start 1 + 1.6 (1 - n / 8) times as late where the others of the eight compute.
    """
    shared = Sharing(devices=8, compute=1, memory=1, start=2, wire=2)
    two = Sharing(devices=2, compute=1, memory=1, start=1, wire=1)
    chip = CPU.model_copy(update={"sharing": (two, shared)})
    factors = {"all_reduce": (4.0, 2.0), "all_to_all": (2.0, 9.0)}
    rows = []
    for devices in (2, 8):
        alone = resolve_cluster({"chip": "cpu-host", "devices": devices}, chip=chip.model_copy(update={"sharing": ()}))
        for family, apart in factors.items():
            start, wire = apart if devices == 8 else (1.0, 1.0)
            for n in (2, 4, 8) if devices == 8 and family == "all_to_all" else (2,):
                waits = 1 + 1.6 * (1 - n / devices) if family == "all_to_all" else 1.0
                rate = collective_rate(alone, family, n, 1)
                for arrays, size in ((1, 4e3), (1, 1e5), (1, 4e6), (12, 1e5), (12, 4e6), (30, 1e6), (1, 3e7)):
                    # A further array of a merged call starts in a third of the first one's time.
                    more = 1 + (arrays - 1) / 3 if family == "all_reduce" else 1.0
                    seconds = start * waits * more * rate.latency_s + wire * size * rate.seconds_per_byte
                    merged = arrays if family == "all_reduce" else 1
                    rows.append(Timed(family, n, size, float(seconds), devices, True, arrays=merged))
    found, _ = fit_network(chip, rows, "made", "2026-11-22")
    assert found.scale_up.collectives["all_reduce"].array == pytest.approx(1 / 3, rel=0.02)
    for family, (start, wire) in factors.items():
        assert found.sharing[1].of(family) == pytest.approx((start, wire), rel=0.05)
    assert found.sharing[1].waits == {"all_to_all": pytest.approx(1.6, rel=0.05)}
    cluster = resolve_cluster({"chip": "cpu-host", "devices": 8}, chip=found)
    for row in (r for r in rows if r.devices == 8):
        starts = merged_starts(cluster, row.arrays)
        seconds = starts * collective_rate(cluster, row.kind, row.size, 1).seconds(row.bytes / starts)
        assert seconds == pytest.approx(row.seconds, rel=0.05)

"""A run of a job: batches in, steps, evaluation, checkpoints, telemetry and metrics out, until done, stopped or failed.

Steps are dispatched ahead: the metrics of step n are looked at while step n + 1 runs (but on several CPU devices, which
share threads). A state is written only when its
losses, its gradient norm and every number in it are finite.

Letters: B sequences of the global batch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hw_profiles.errors import Interrupted, WorkFailed
from hw_profiles.files import inside, write_whole
from hw_profiles.loader import resolve_cluster
from simulator.job.rules import resolve
from trainer.batches import batches_here, placed, rows_here
from trainer.checkpoint import Checkpoints, Manifest, all_finite, restore_parameters
from trainer.data import Batches, Entropies, corpus_entropies
from trainer.folder import check_folder, claimed
from trainer.metrics import MetricsFile, not_finite, read_lines, step_record
from trainer.processes import StopSignal, Watch, agree, working
from trainer.report import LAST_STEPS, Progress, Result, summarised
from trainer.step import State, Trainer
from trainer.telemetry import Telemetry, layer_numbers, seen_layers, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.job.job import Job

# A step may take as long as the longest so far times this, and never less than a time in which any should end.
PATIENCE, STEP_S, COMPILE_S = 30.0, 900.0, 7200.0


def run(
    job: Job,
    folder: Path,
    out: Path,
    *,
    devices: Sequence[Any],
    steps: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    parent: int | None = None,
) -> Result:
    """Train `job` on `devices` for `steps` steps in all (default: the job's), writing into the folder `out`.

    `folder` is the job's, for its files. `resume` goes on from the newest whole checkpoint in `out`, or begins. Raises
    QuestionError for a wrong job or folder, WorkFailed where the run fails, Interrupted after Ctrl-C or SIGTERM, the
    state saved. `parent` is the process whose end ends this one.
    """
    progress = progress or Progress()
    degrees = resolve(job, resolve_cluster(job.cluster))
    trainer = Trainer.of(job, degrees, devices, folder)
    lead = jax.process_index() == 0
    if lead:
        check_folder(out, job, resume=resume)
    rows = rows_here(trainer)
    batches = batches_here(job, folder, rows, "train", job.training.learning.seed)
    if job.training.run.evaluate_every is not None:
        batches_here(job, folder, rows, "held_out", 0).close()
    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        watch = Watch(parent)
        stack.callback(watch.close)
        existing = stack.enter_context(claimed(out, job, resume=resume)) if lead else False
        with watch.waiting("process 0 to open the run's folder", STEP_S):
            existing = bool(agree(int(existing)))
        return _Run(job, folder, out, trainer, batches, watch, progress, steps or job.training.run.steps).go(existing)


class _Run:
    """The state of one run in one process."""

    def __init__(
        self, job: Job, folder: Path, out: Path, trainer: Trainer, batches: Batches, watch: Watch, progress: Progress,
        total: int,
    ) -> None:  # fmt: skip
        self.job, self.folder, self.out, self.trainer, self.batches = job, folder, out, trainer, batches
        self.watch, self.progress, self.total = watch, progress, total
        self.lead = jax.process_index() == 0
        self.rows = rows_here(trainer)
        self.shapes = trainer.batch_shapes()
        self.numbers = layer_numbers(job, trainer.degrees)
        self.layers = sum(len(n) for found in self.numbers.values() for n in found)
        self.checkpoints = Checkpoints(out, job, job.training.run.keep_checkpoints, watch)
        self.stop = StopSignal()
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.metrics: MetricsFile | None = None
        self.telemetry: Telemetry | None = None
        self.longest_s = self.compile_s = 0.0
        self.last_time = time.monotonic()
        # The devices of one CPU share its threads: two programs at once, both waiting for each other's collectives, may
        # take all of them.
        self.in_turn = trainer.platform == "cpu" and trainer.mesh.size > 1
        whole = NamedSharding(trainer.mesh, PartitionSpec())
        self.finite = jax.jit(all_finite, out_shardings=whole)

    def go(self, existing: bool) -> Result:
        """The whole run."""
        failed = True
        try:
            found = self.checkpoints.newest(self._say) if existing else None
            with working("the first state"), self.watch.waiting("the first state", COMPILE_S):
                state = self._first_state(found)
            done = found.step if found else 0
            self._open_files(done, existing)
            entropies = corpus_entropies(self.job, self.folder, seed=self.job.training.learning.seed)
            if self.lead:
                named = {"unigram entropy": entropies.unigram_nats, "bigram entropy": entropies.bigram_nats}
                write_whole(self.out / "entropies.json", json.dumps(named).encode())
            if done < self.total:
                step = self._compiled(state)
                self.progress.begin(done, self.total, entropies)
                with self._stopping():
                    done = self._steps(step, state, done)
            failed = False
            return self._result(done, found, entropies)
        except OSError as error:
            said = f"{error.filename or self.out}: {error.strerror or error}"
            raise WorkFailed(f"{said}; {self.checkpoints.describe_last()}") from None
        finally:
            self._close(failed)

    def _say(self, text: str) -> None:
        self.notes.append(text)
        if self.lead:
            self.progress.say(text)

    def _first_state(self, found: Manifest | None) -> State:
        if found is not None:
            state = self.checkpoints.restore(found, self.trainer)
            self.batches.set_state(found.data)
            return state
        state = self.trainer.init()
        start = self.job.training.learning.start
        if start is None:
            return state
        where = f"training.learning.start.checkpoint = {start.checkpoint!r:.60}"
        path = inside(start.checkpoint, self.folder, where)
        params = restore_parameters(path, self.trainer, self.watch, self._say, where)
        return State(state.step, params, state.optimizer)

    def _open_files(self, done: int, existing: bool) -> None:
        if existing and not done:
            self._say("no finished checkpoint in the folder: the run begins anew")
        if not self.lead:
            return
        self.records = [r for _, r in read_lines(self.out / "metrics.jsonl") if r["step"] <= done][-LAST_STEPS:]
        self.metrics = MetricsFile(self.out, done)
        if self.job.training.run.telemetry and self.layers:
            self.telemetry = Telemetry(self.out, done)

    def _compiled(self, state: State) -> Any:
        begun = time.monotonic()
        with working("compiling the step"), self.watch.waiting("the step to be compiled", COMPILE_S):
            step = self.trainer.step.lower(state, self.shapes).compile()
        self.compile_s = time.monotonic() - begun
        return step

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Within, the first Ctrl-C or SIGTERM asks the run to stop; a second one interrupts it as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(*_: Any) -> None:
            self.stop.asked = True
            restore()

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()

    def _steps(self, step: Any, state: State, done: int) -> int:
        every = self.job.training.run
        self.last_time = time.monotonic()
        pending: tuple[int, Any] | None = None
        while done < self.total:
            with working(f"step {done + 1}"), self.watch.waiting(f"step {done + 1} to begin", self._patience()):
                state, metrics = step(state, placed(self.shapes, self.rows, next(self.batches)))
            done += 1
            if pending is not None:
                self._write(self._fetched(*pending))
            pending = (done, metrics)
            if self.in_turn:
                with working(f"step {done}"), self.watch.waiting(f"step {done} to end", self._patience()):
                    jax.block_until_ready((state, metrics))
            self.checkpoints.check()
            stopping, last = self.stop.due(done), done == self.total
            evaluate = every.evaluate_every is not None and (last or done % every.evaluate_every == 0)
            save = stopping or last or (every.checkpoint_every is not None and done % every.checkpoint_every == 0)
            if evaluate or save:
                record = self._fetched(*pending)
                pending = None
                if evaluate:
                    record["held_out_nats"] = self._evaluated(state, done)
                self._write(record)
                if save:
                    self._save(state, done)
                self.last_time = time.monotonic()
            if stopping and not last:
                self.checkpoints.wait()
                raise Interrupted(f"stopped after step {done} of {self.total}, saved; --resume goes on")
        self.checkpoints.wait()
        return done

    def _patience(self) -> float:
        return max(STEP_S, PATIENCE * self.longest_s)

    def _fetched(self, done: int, metrics: Any) -> dict[str, Any]:
        """The line of step `done` once it has run; WorkFailed where a loss is not finite."""
        with working(f"step {done}"), self.watch.waiting(f"step {done} to end", self._patience()):
            values = jax.device_get(metrics)
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        self.longest_s = max(self.longest_s, seconds)
        record = step_record(self.job, done, values, self.layers)
        wrong = not_finite(record)
        if wrong:
            self._fail(f"step {done}: {wrong}")
        if self.layers:
            seen = seen_layers(done, values["experts"], self.numbers, self.trainer.degrees.expert)
            record |= summary(seen)
            if self.telemetry is not None:
                self.telemetry.add(seen)
        return record | {"seconds": seconds, "tokens_per_s": self.job.tokens_per_step / seconds}

    def _fail(self, text: str) -> None:
        self.checkpoints.wait()
        hint = "a lower learning_rate, clip_norm or init_scale, or a router z_loss may help"
        raise WorkFailed(f"{text}; {self.checkpoints.describe_last()}; {hint}")

    def _write(self, record: dict[str, Any]) -> None:
        self.records = [*self.records, record][-LAST_STEPS * 10 :]
        if self.metrics is not None:
            step = record["step"]
            board = step % self.job.training.run.log_every == 0 or step in (1, self.total) or "held_out_nats" in record
            self.metrics.write(record, board=board)
        if self.lead:
            self.progress.step(record)

    def _evaluated(self, state: State, done: int) -> float:
        """Mean cross-entropy per target of the first held-out batches, always the same ones."""
        batches = batches_here(self.job, self.folder, self.rows, "held_out", 0)
        total = weight = 0.0
        try:
            for _ in range(self.job.training.run.evaluation_batches):
                what = f"the evaluation after step {done}"
                with working(what), self.watch.waiting(what, COMPILE_S):
                    seen = jax.device_get(
                        self.trainer.evaluate(state.params, placed(self.shapes, self.rows, next(batches)))
                    )
                total += float(seen["loss"]) * float(seen["weights"])
                weight += float(seen["weights"])
        finally:
            batches.close()
        nats = total / max(1.0, weight)
        if not np.isfinite(nats):
            self._fail(f"step {done}: held-out loss is {nats}")
        return nats

    def _save(self, state: State, done: int) -> None:
        with working(f"step {done}"), self.watch.waiting(f"the state of step {done}", COMPILE_S):
            good = bool(np.asarray(self.finite(state)))
        if not good:
            self._fail(f"step {done}: a parameter or a moment is not finite")
        if self.telemetry is not None:
            self.telemetry.publish()
        self.checkpoints.save(done, state, self.batches.get_state())

    def _close(self, failed: bool) -> None:
        """Close all files; after a failure, errors in doing so would hide the first."""
        with contextlib.ExitStack() as stack:
            if failed:
                stack.enter_context(contextlib.suppress(OSError))
            # With a process gone, a save under way would wait for it.
            if not failed or jax.process_count() == 1:
                stack.callback(self.checkpoints.close)
            if self.metrics is not None:
                stack.callback(self.metrics.close)
            if self.telemetry is not None:
                self.telemetry.publish()

    def _result(self, done: int, found: Manifest | None, entropies: Entropies) -> Result:
        return Result(
            job=self.job.name, hash=self.job.hash, out=str(self.out), steps=done,
            resumed_from=found.step if found else None, checkpoint=self.checkpoints.last_good,
            unigram_nats=entropies.unigram_nats, bigram_nats=entropies.bigram_nats, compile_s=self.compile_s,
            devices=self.trainer.mesh.size, platform=self.trainer.platform, processes=jax.process_count(),
            notes=self.notes, **summarised(self.records),
        )  # fmt: skip

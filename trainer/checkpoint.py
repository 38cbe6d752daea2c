"""Checkpoints: the whole state written by Orbax beside the running steps, and a manifest that says it is whole.

`checkpoints/00000040/` holds the arrays (`arrays/params`, `arrays/rest`) and `manifest.json`, which is written last, to
a name aside, and renamed: step, position in the data, the job, and size and SHA-256 of every file. What has no manifest
was never finished; what does not agree with its manifest is damaged, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from hw_profiles.errors import QuestionError, WorkFailed
from hw_profiles.files import sync_folder, write_whole
from simulator.job.job import Job
from trainer.folder import check_same_job, digest_of, job_record, read_json
from trainer.processes import Watch, agree, short
from trainer.step import State, Trainer

FOLDER, MANIFEST, ARRAYS = "checkpoints", "manifest.json", "arrays"
VERSION = 1
SAVE_S = 3600.0
RESTORE_S = 3600.0
Tree = Any


# Orbax logs every failure with a page of its own frames, and asyncio each of its abandoned writes; here it is one line,
# raised.
for noisy in ("absl", "asyncio"):
    logging.getLogger(noisy).setLevel(logging.CRITICAL)


class Damaged(Exception):
    """A checkpoint is not what its manifest says, or has none; the text says what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest says."""

    path: Path
    step: int
    data: dict[str, Any]
    hash: str
    job: dict[str, Any]
    arrays: dict[str, dict[str, list[Any]]]


def array_table(tree: Tree) -> dict[str, list[Any]]:
    """[shape, format] of every array of `tree`, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): [list(x.shape), str(jnp.dtype(x.dtype))] for path, x in leaves}


def parts(state: State) -> dict[str, Tree]:
    """The state as Orbax items: parameters apart, which fine-tuning reads alone."""
    return {"params": state.params, "rest": {"step": state.step, "optimizer": state.optimizer}}


def all_finite(tree: Tree) -> jax.Array:
    """Whether every number of `tree` is finite."""
    found = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack(found).all() if found else jnp.bool_(True)


class Checkpoints:
    """The checkpoints of one run; `save` returns as soon as the state has been copied."""

    def __init__(self, out: Path, job: Job, keep: int, watch: Watch) -> None:
        self._folder = out / FOLDER
        self._job, self._keep, self._watch = job, keep, watch
        self._lead = jax.process_index() == 0
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=ocp.AsyncOptions(timeout_secs=int(SAVE_S))
        )
        self._finishing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._good: list[int] = []
        self._failed: Path | None = None

    @property
    def last_good(self) -> int | None:
        """The step of the newest checkpoint known to be whole."""
        return self._good[-1] if self._good else None

    def describe_last(self) -> str:
        """The newest whole checkpoint, for an error."""
        last = self.last_good
        return "no checkpoint was written" if last is None else f"last good checkpoint: step {last}"

    def save(self, step: int, state: State, data: Mapping[str, Any]) -> None:
        """Begin to write the state after `step` steps, once the save before it is done.

        Raises WorkFailed where that one failed, or this one cannot begin.
        """
        self.wait()
        path = self._folder / f"{step:08d}"
        record: dict[str, Any] = {
            "version": VERSION, "step": step, "data": dict(data), "hash": self._job.hash, "job": job_record(self._job),
            "arrays": {name: array_table(tree) for name, tree in parts(state).items()},
        }  # fmt: skip
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in parts(state).items()}
        with self._watch.waiting(f"the state of step {step} to be copied", SAVE_S), self._failing(step, path):
            if self._lead:
                self._folder.mkdir(exist_ok=True)
                _check_space(self._folder, state)
                # Left over from a run that was killed, or damaged: the run has come here again.
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            self._saver.save((path / ARRAYS).resolve(), args=ocp.args.Composite(**items))
        self._finishing = threading.Thread(target=self._finish, args=(step, path, record), name="checkpoint")
        self._finishing.start()

    def wait(self) -> None:
        """Wait for the save under way; WorkFailed, one line, where it failed."""
        if self._finishing is not None:
            with self._watch.waiting("a checkpoint to be written", SAVE_S):
                self._finishing.join()
            self._finishing = None
        self.check()

    def check(self) -> None:
        """WorkFailed where a save has failed since the last look."""
        error, self._error = self._error, None
        if error is not None:
            raise WorkFailed(str(error)) from None

    def close(self) -> None:
        """Wait for the save under way, and stop Orbax's threads; a failure is left for `check`."""
        if self._finishing is not None:
            with self._watch.waiting("a checkpoint to be written", SAVE_S):
                self._finishing.join()
        with contextlib.suppress(Exception):  # what it failed at has been reported
            self._saver.close()
        if self._failed is not None:
            # Only now has every thread stopped writing there.
            shutil.rmtree(self._failed, ignore_errors=True)

    @contextlib.contextmanager
    def _failing(self, step: int, path: Path) -> Any:
        """Errors within, of whatever kind the layers below raise, as WorkFailed; what was begun is removed."""
        try:
            yield
        except Exception as error:
            self._failed = path if self._lead else None
            raise WorkFailed(
                f"the checkpoint of step {step} could not be written: {reason(error)}; {self.describe_last()}"
            ) from None

    def _finish(self, step: int, path: Path, record: dict[str, Any]) -> None:
        try:
            with self._failing(step, path):
                self._saver.wait_until_finished()
                if self._lead:
                    record["files"] = file_table(path / ARRAYS)
                    write_whole(path / MANIFEST, json.dumps(sealed(record)).encode())
                    sync_folder(self._folder)
            self._good.append(step)
            if self._lead:
                self._remove_old()
        except BaseException as error:
            self._error = error

    def _remove_old(self) -> None:
        for step in self._good[: -self._keep]:
            path = self._folder / f"{step:08d}"
            # Without its manifest first, so that a half-removed one is not taken for damaged.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        self._good = self._good[-self._keep :]

    def newest(self, say: Callable[[str], None]) -> Manifest | None:
        """The newest whole checkpoint, known to all processes; see `newest_good`."""
        found, failure = None, None
        if self._lead:
            try:
                found = newest_good(self._folder, say)
            except WorkFailed as error:
                failure = error
        step = agree(-2 if failure else -1 if found is None else found.step)
        if step == -2:
            raise failure or WorkFailed(f"{self._folder}: no checkpoint is whole")
        if step == -1:
            return None
        self._good = sorted(s for s in _steps(self._folder) if s <= step and (self._path(s) / MANIFEST).exists())
        return found or read_manifest(self._path(step))

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    def restore(self, manifest: Manifest, trainer: Trainer) -> State:
        """The state in `manifest`, in the shardings of `trainer`; QuestionError where it is of another job or form."""
        check_same_job(manifest.job, self._job, f"checkpoint of step {manifest.step}")
        shapes = parts(trainer.state_shapes())
        _check_arrays(manifest, shapes, formats=True)
        with self._watch.waiting(f"the checkpoint of step {manifest.step} to be read", RESTORE_S):
            found = _read_items(manifest.path, shapes)
        return State(found["rest"]["step"], found["params"], found["rest"]["optimizer"])


def restore_parameters(folder: Path, trainer: Trainer, watch: Watch, say: Callable[[str], None], where: str) -> Tree:
    """The parameters alone from the newest whole checkpoint of the run in `folder`, in the shardings of `trainer`.

    Raises QuestionError, beginning with `where`, for a folder without checkpoints or of another model.
    """
    base = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    found = newest_good(base, say) if base.is_dir() else None
    if found is None:
        raise QuestionError(f"{where}: holds no checkpoint")
    shapes = {"params": trainer.state_shapes().params}
    _check_arrays(found, shapes, formats=False, where=where)
    with watch.waiting(f"the parameters of {where} to be read", RESTORE_S):
        return _read_items(found.path, shapes)["params"]


def _read_items(path: Path, shapes: Mapping[str, Tree]) -> Any:
    args = {
        name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in shapes.items()
    }
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        return reader.restore((path / ARRAYS).resolve(), args=ocp.args.Composite(**args))
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise WorkFailed(f"{path}: cannot be read: {reason(error)}") from None
    finally:
        reader.close()


def _check_arrays(manifest: Manifest, shapes: Mapping[str, Tree], *, formats: bool, where: str = "") -> None:
    """QuestionError naming the first array that is not in the checkpoint as the job wants it."""
    where = where or f"checkpoint of step {manifest.step}"
    for item, tree in shapes.items():
        there: dict[str, Any] = manifest.arrays.get(item, {})
        here = array_table(tree)
        for name in dict.fromkeys([*here, *there]):
            old, new = there.get(name), here.get(name)
            if old is None or new is None:
                word = "the checkpoint lacks it" if old is None else "the job's model has no such array"
                raise QuestionError(f"{where}: {item}{name}: {word}")
            if old[0] != new[0]:
                rule = f"shape {old[0]} there, {new[0]} in the job"
                raise QuestionError(f"{where}: {item}{name}: {rule} (another model, or plan.pipeline or plan.tensor)")
            if formats and old[1] != new[1]:
                raise QuestionError(f"{where}: {item}{name}: {old[1]} there, {new[1]} in the job")


def newest_good(folder: Path, say: Callable[[str], None]) -> Manifest | None:
    """The newest whole checkpoint in `folder`; each newer one that is not is named to `say`.

    None where none was ever finished; WorkFailed where all that were are damaged.
    """
    damaged = 0
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"{step:08d}"
        if not (path / MANIFEST).exists():
            say(f"checkpoint of step {step}: was never finished; looking at the one before")
            continue
        try:
            return verified(path)
        except Damaged as error:
            damaged += 1
            say(f"checkpoint of step {step} is damaged: {error}; looking at the one before")
    if damaged:
        raise WorkFailed(f"{folder}: no checkpoint is whole ({damaged} damaged)")
    return None


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(x.name) for x in folder.iterdir() if x.is_dir() and x.name.isdecimal() and len(x.name) == 8]


def _check_space(folder: Path, state: State) -> None:
    """WorkFailed where the state is larger than what is free: a full disk harms others than this run."""
    needed = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorkFailed(f"No space left on device ({needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free)")


def file_table(folder: Path) -> dict[str, list[Any]]:
    """[bytes, SHA-256] of every file in `folder`, by its path within."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    return {x.relative_to(folder).as_posix(): [x.stat().st_size, digest_of(x)] for x in files}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of the rest of it."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in `path`, its own seal checked; Damaged otherwise."""
    return _manifest(path)[0]


def _manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    try:
        record = read_json(path / MANIFEST)
        if not isinstance(record, dict) or sealed({k: v for k, v in record.items() if k != "seal"}) != record:
            raise Damaged(f"{MANIFEST} is not as it was written")
        if record["version"] != VERSION:
            raise Damaged("not of this version of the trainer")
        manifest = Manifest(path, record["step"], record["data"], record["hash"], record["job"], record["arrays"])
        return manifest, dict(record["files"])
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {str(error.strerror).lower()}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None


def verified(path: Path) -> Manifest:
    """The manifest of the checkpoint in `path`, every file of which is as it was written; Damaged otherwise."""
    manifest, files = _manifest(path)
    for name, (size, digest) in files.items():
        file = path / ARRAYS / name
        try:
            if file.stat().st_size != size:
                raise Damaged(f"{ARRAYS}/{name} has {file.stat().st_size:,} bytes, not {size:,}")
            if digest_of(file) != digest:
                raise Damaged(f"{ARRAYS}/{name} has other bytes than were written")
        except OSError as error:
            raise Damaged(f"{ARRAYS}/{name}: {str(error.strerror).lower()}") from None
    return manifest


def reason(error: BaseException) -> str:
    """What went wrong below, in a few words: TensorStore's own text is a page."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = short(error, 10_000)
    for words in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if words in text:
            return words
    return short(error, 160)

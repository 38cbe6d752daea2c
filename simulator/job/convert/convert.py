"""Jobs from other trainers' configurations and back: which reader and writer, and what got lost (docs/convert.md)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.loader import load_chip, resolve_cluster
from hw_profiles.yaml_reader import parse_yaml
from simulator.job.convert import megatron_flags, notes, reasons
from simulator.job.convert.settings import Default, Left, Settings
from simulator.job.convert.shell import read_flags, read_pairs
from simulator.job.job import Job
from simulator.job.load import job_from_mapping
from simulator.job.model import Model
from simulator.job.rules import resolve

FORMS = ("megatron", "maxtext", "torchtitan")
# Fields that resolve to the same plan in more than one way of writing.
_WAYS = {
    "plan.data", "plan.microbatch_sequences", "plan.stages", "plan.shard_degree", "plan.placement",
    "training.dispatch.layout",
}  # fmt: skip
_TEXTS = {"notes", "source", "published", "name"}


@dataclass(frozen=True, slots=True)
class Imported:
    """A job, the form it was read from, and what became of the settings.

    `read` were understood; `defaults` are settings not given, with the trainer's own values; `left` have no place in a
    job; `unknown` were not understood; `kept` came from the notes of an earlier export.
    """

    job: Job
    form: str
    read: dict[str, Any]
    defaults: tuple[Default, ...]
    left: tuple[Left, ...]
    unknown: tuple[Left, ...]
    kept: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The lists as plain data."""
        lists = {n: [asdict(x) for x in getattr(self, n)] for n in ("defaults", "left", "unknown")}
        return {"from": self.form, "hash": self.job.hash, "read": self.read, **lists, "kept": self.kept}


@dataclass(frozen=True, slots=True)
class Exported:
    """A trainer's configuration as text; its settings; what it cannot say, and what it says in another way."""

    text: str
    form: str
    settings: dict[str, Any]
    left: tuple[Left, ...]
    same: tuple[Left, ...]

    def to_dict(self) -> dict[str, Any]:
        """The lists as plain data."""
        lists = {n: [asdict(x) for x in getattr(self, n)] for n in ("left", "same")}
        return {"to": self.form, "settings": self.settings, **lists}


def form_of(text: str, where: str) -> str:
    """Which trainer's configuration `text` is, or `job`; QuestionError where it looks like none."""
    from simulator.job.convert.maxtext_keys import KNOWN as maxtext

    try:
        found = tomllib.loads(text)
        sections = {"model", "training", "parallelism", "job", "optimizer"} & set(found)
        if any(isinstance(found[name], dict) for name in sections):
            return "torchtitan"
    except tomllib.TOMLDecodeError:
        pass
    try:
        data = parse_yaml(text, where)
    except QuestionError:
        data = None
    if isinstance(data, dict):
        if {"model", "cluster", "batch"} <= set(data):
            return "job"
        return "maxtext" if len(set(data) & maxtext) > len(data) // 3 else "megatron"
    try:
        flags = sum(f.name in megatron_flags.KNOWN for f in read_flags(text, where))
        pairs = sum(key in maxtext for _, key, _ in read_pairs(text, where))
    except QuestionError:
        flags = pairs = 0
    if not flags and not pairs:
        raise QuestionError(f"{where}: looks like none of {', '.join(FORMS)}, or a job; say which with --from")
    return "megatron" if flags > pairs else "maxtext"


def _cluster(given: Any, kept: Mapping[str, Any], chip: str, devices: int | None, settings: Settings) -> Any:
    """The cluster as asked, as noted, or the launcher's number of GPUs of the given chip."""
    if given is not None:
        return given
    if chip:
        profile = load_chip(chip)
        if profile.kind != "gpu" or devices is None:
            what = "the number of GPUs" if profile.kind == "gpu" else "the slice or devices"
            raise QuestionError(f"{settings.where}: does not say {what}; give --cluster, such as --cluster v5p-128")
        size = profile.chips_per_host
        if devices > size and devices % size:
            raise QuestionError(f"{settings.where}: {devices} GPUs are no whole number of nodes with {size} each")
        nodes = {"chip": chip, "nodes": max(1, devices // size)}
        return nodes if devices >= size else nodes | {"chips_per_node": devices}
    if "cluster" in kept:
        return kept["cluster"]
    rule = "does not say on which chips it runs; give --cluster (a name or {chip: h100-sxm, nodes: 32}) or --chip"
    raise QuestionError(f"{settings.where}: {rule}")


def import_text(
    text: str, where: str, form: str = "auto", *, cluster: Any = None, chip: str = "", overrides: Sequence[str] = (),
    name: str = "job",
) -> Imported:  # fmt: skip
    """The job in a trainer's configuration; `overrides` are `key=value` in the trainer's own names.

    QuestionError, one line with file, setting, value and rule, for values that are none and for contradictions.
    """
    form = form_of(text, where) if form == "auto" else form
    if form not in FORMS:
        raise QuestionError(f"--from {form!r:.40}: known: auto, {', '.join(FORMS)}{nearest(form, FORMS)}")
    kept = notes.read_notes(text, where)
    settings, known = _settings(text, where, form)
    for change in overrides:
        key, equals, value = change.partition("=")
        key = key.lstrip("-")
        if not equals or not key:
            raise QuestionError(f"{change!r:.60}: write an override as KEY=VALUE")
        settings.data[key if form != "megatron" else key.replace("_", "-")] = (
            parse_yaml(value, key) if form != "megatron" else value
        )
    data, found = _job(settings, form, lambda devices: _cluster(cluster, kept, chip, devices, settings))
    model_name = data["model"].get("name") if isinstance(data["model"], dict) else None
    data.setdefault("name", name)
    if isinstance(data["model"], dict) and "preset" not in data["model"] and model_name is None:
        data["model"]["name"] = name
    data["cluster"] = found
    for path, value in kept.items():
        if path != "cluster":
            notes.put(data, path, value)
    job = job_from_mapping(data, where=where)
    # The rules between plan, model and cluster: a contradiction shows itself here.
    try:
        resolve(job, resolve_cluster(job.cluster))
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from None
    unread = [n for n in settings.unread() if n not in settings.used]
    unknown = tuple(
        Left(n, settings.data[n], f"not understood{nearest(n, known)}".replace("'", settings.mark and "'"))
        for n in unread
    )
    return Imported(
        job, form, settings.used, tuple(settings.defaults.values()), tuple(settings.left.values()), unknown, kept
    )


def _settings(text: str, where: str, form: str) -> tuple[Settings, frozenset[str]]:
    """The settings in `text`, and all names that the form knows."""
    if form == "torchtitan":
        from simulator.job.convert.torchtitan_read import KNOWN, read_toml

        return read_toml(text, where), KNOWN
    try:
        data = parse_yaml(text, where)
    except QuestionError:
        data = None
    if form == "maxtext":
        from simulator.job.convert.maxtext_keys import KNOWN, read_pairs_of, read_yaml_of

        return (read_yaml_of(data, where) if isinstance(data, dict) else read_pairs_of(text, where)), KNOWN
    from simulator.job.convert.megatron_read import read_command, read_mapping

    settings = read_mapping(data, where) if isinstance(data, dict) else read_command(text, where)
    return settings, frozenset(megatron_flags.KNOWN)


def _job(settings: Settings, form: str, cluster_of: Any) -> tuple[dict[str, Any], Any]:
    """The job's mapping and its cluster."""
    if form == "megatron":
        from simulator.job.convert.megatron_import import devices_of, megatron_job

        started = devices_of(settings)
        cluster = cluster_of(started)
        devices = resolve_cluster(cluster).devices
        if started is not None and started != devices:
            name = next(n for n in ("nproc-per-node", "world-size") if settings.given(n))
            settings.refuse(name, f"{started} GPUs are started; the cluster has {devices}")
        return megatron_job(settings, devices), cluster
    if form == "maxtext":
        from simulator.job.convert.maxtext_import import maxtext_job, slice_of

        cluster = cluster_of(None) if slice_of(settings) is None else slice_of(settings)
        return maxtext_job(settings, resolve_cluster(cluster).devices), cluster
    from simulator.job.convert.torchtitan_import import torchtitan_job

    cluster = cluster_of(None)
    return torchtitan_job(settings, resolve_cluster(cluster).devices), cluster


def export_job(job: Job, form: str) -> Exported:
    """The configuration of `job` for a trainer, and all that it cannot say.

    The text is read again at once: what does not come back is listed, and kept in its notes. QuestionError where the
    trainer cannot run the model at all.
    """
    if form not in FORMS:
        raise QuestionError(f"--to {form!r:.40}: known: job, {', '.join(FORMS)}{nearest(form, ('job', *FORMS))}")
    settings, text = _written(job, form)
    back = import_text(text, job.name, form, cluster=job.cluster).job
    left, same = {}, {}
    for path, (here, there) in notes.differences(_data(job), _data(back)).items():
        if path.startswith("model."):
            if _meaning(job.model) != _meaning(back.model):
                raise QuestionError(
                    f"{path} = {here!s:.60}: {reasons.TITLES[form]} cannot say this of {job.model.name};"
                    f" its settings mean {there!s:.60}"
                )
            same[path] = here
        elif _is_same(job, path, there):
            same[path] = here
        else:
            left[path] = here
    left = {"cluster": _data(job)["cluster"]} | left
    kept = {"name": job.name, "model.name": job.model.name} | left | same
    head = f"# {job.name} for {reasons.TITLES[form]}, written by moecast; the notes keep what it cannot say.\n"
    whole = head + notes.write_notes(kept) + text
    again = import_text(whole, job.name, form).job
    if again.hash != job.hash:
        raise AssertionError(f"{job.name}: not the same job after {form} and back")
    return Exported(
        whole,
        form,
        settings,
        tuple(Left(path, value, reasons.why(form, path)) for path, value in left.items()),
        tuple(Left(path, value, "comes back in another way of writing") for path, value in same.items()),
    )


def _written(job: Job, form: str) -> tuple[dict[str, Any], str]:
    cluster = resolve_cluster(job.cluster)
    degrees = resolve(job, cluster)
    if form == "megatron":
        from simulator.job.convert.megatron_export import command, megatron_flags

        flags = megatron_flags(job, degrees)
        return flags, command(flags, cluster)
    if form == "maxtext":
        from simulator.job.convert.maxtext_export import command_line, maxtext_keys

        keys = maxtext_keys(job, degrees, cluster)
        return keys, command_line(keys)
    from simulator.job.convert.torchtitan_export import as_toml, torchtitan_keys

    sections = torchtitan_keys(job, degrees)
    return sections, as_toml(sections)


def _data(job: Job) -> dict[str, Any]:
    """What makes a job's hash, as plain data."""
    return job.model_dump(mode="json", exclude={"name": True, "model": _TEXTS, "training": {"run": True}})


def _is_same(job: Job, path: str, there: Any) -> bool:
    """Whether the other value of `path` means the same plan."""
    if path in ("training.remat.recompute", "training.remat.save", "training.remat.offload"):
        here = getattr(job.training.remat, path.rpartition(".")[2], None)
        return isinstance(there, list) and here is not None and set(here) == set(there)
    if path not in _WAYS:
        return False
    data = job.model_dump(mode="json")
    notes.put(data, path, there)
    try:
        other = Job.model_validate(data)
        cluster = resolve_cluster(job.cluster)
        return resolve(other, cluster) == resolve(job, cluster)
    except ValueError:
        return False


def _meaning(model: Model) -> dict[str, Any]:
    """The model without the ways of writing that make no difference."""
    data = model.model_dump(mode="json", exclude={*_TEXTS, "decoder", "encoder"})
    for name, layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        data[name] = [_layer(layer.model_dump(mode="json")) for layer in layers]
    return data


def _layer(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with its defaults filled in, and without the rule of which layers have experts."""
    attention, moe = layer["attention"], layer["moe"]
    if attention:
        attention["kv_heads"] = attention["heads"] if attention["mla"] else attention["kv_heads"] or attention["heads"]
    if moe:
        for key in ("shared_experts", "every", "offset", "first_dense", "layers"):
            del moe[key]
        if moe["top_k"] == 1:
            del moe["router"]["renormalise"]
    return layer

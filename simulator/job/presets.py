"""Model presets by name: one YAML file each in `presets/`, read and validated on demand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hw_profiles.errors import QuestionError, nearest
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml
from simulator.job.model import Model

FOLDER = Path(__file__).parent / "presets"


@cache
def preset_files() -> dict[str, Path]:
    """Preset files by lower-case name; a file is named as the preset, in lower case."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def unavailable() -> dict[str, str]:
    """Published models that no preset can express, with the reason."""
    data = read_yaml(FOLDER / "unavailable.yml")
    return {str(name): str(reason) for name, reason in data.items()}


def preset_names() -> list[str]:
    """Names of all presets, lower case, sorted."""
    return list(preset_files())


@cache
def load_preset(name: str) -> Model:
    """The preset `name` (any case); QuestionError with the nearest name if there is none."""
    files = preset_files()
    path = files.get(name.lower())
    if path is None:
        for known, reason in unavailable().items():
            if known.lower() == name.lower():
                raise QuestionError(f"model: {known} has no preset: {reason}")
        raise QuestionError(f"model: unknown model {name!r}{nearest(name, files) or '; see `moecast models`'}")
    return validate(Model, read_yaml(path), f"preset {path.stem}")

"""Chips, links, clusters and prices, every number with its source; the ground floor, which imports no other floor.

The names below are loaded on first use, so that `import hw_profiles` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hw_profiles.cluster import Cluster, Level, Torus
    from hw_profiles.cluster_spec import ClusterSpec
    from hw_profiles.errors import QuestionError
    from hw_profiles.loader import (
        Preset,
        chip_names,
        cluster_names,
        load_chip,
        load_chip_file,
        load_preset,
        resolve_cluster,
    )
    from hw_profiles.schema import Chip

_HOME = {
    "Chip": "schema",
    "Cluster": "cluster",
    "ClusterSpec": "cluster_spec",
    "Level": "cluster",
    "Preset": "loader",
    "QuestionError": "errors",
    "Torus": "cluster",
    "chip_names": "loader",
    "cluster_names": "loader",
    "load_chip": "loader",
    "load_chip_file": "loader",
    "load_preset": "loader",
    "resolve_cluster": "loader",
}

__all__ = [
    "Chip",
    "Cluster",
    "ClusterSpec",
    "Level",
    "Preset",
    "QuestionError",
    "Torus",
    "chip_names",
    "cluster_names",
    "load_chip",
    "load_chip_file",
    "load_preset",
    "resolve_cluster",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hw_profiles.{_HOME[name]}"), name)

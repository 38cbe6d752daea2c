"""moecast: what a mixture-of-experts training run costs, before the cluster is rented.

>>> import moecast
>>> job = moecast.load_job({"model": "mixtral-8x7b", "cluster": {"chip": "h100-sxm", "nodes": 8},
...                         "plan": {"expert": 8, "shard": "optimizer"}, "batch": {"sequences": 256, "length": 4096}})
>>> answer = moecast.forecast(job)
>>> answer.memory.fits
False
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hw_profiles.errors import QuestionError
    from hw_profiles.loader import chip_names, cluster_names, load_chip, load_chip_file, resolve_cluster
    from reports.page import write_html
    from simulator.analysis.forecast import forecast
    from simulator.job.job import Job
    from simulator.job.load import load_job
    from simulator.job.presets import load_preset, preset_names
    from simulator.results.forecast import Forecast
    from simulator.workload.parameters import count_parameters

# Where each public name lives; imported on first use, so that `import moecast` costs nothing.
_HOMES = {
    "Forecast": "simulator.results.forecast",
    "Job": "simulator.job.job",
    "QuestionError": "hw_profiles.errors",
    "chip_names": "hw_profiles.loader",
    "cluster_names": "hw_profiles.loader",
    "count_parameters": "simulator.workload.parameters",
    "forecast": "simulator.analysis.forecast",
    "load_chip": "hw_profiles.loader",
    "load_chip_file": "hw_profiles.loader",
    "load_job": "simulator.job.load",
    "load_preset": "simulator.job.presets",
    "preset_names": "simulator.job.presets",
    "resolve_cluster": "hw_profiles.loader",
    "write_html": "reports.page",
}

__all__ = [
    "Forecast",
    "Job",
    "QuestionError",
    "chip_names",
    "cluster_names",
    "count_parameters",
    "forecast",
    "load_chip",
    "load_chip_file",
    "load_job",
    "load_preset",
    "preset_names",
    "resolve_cluster",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moecast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

"""What starting up costs: a question answered by formulas imports none of the heavy packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"jax", "matplotlib", "networkx", "pandas", "plotly", "scipy", "simpy"}
LIGHT = HEAVY | {"numpy"}
COMMAND = """
import sys
from moecast.cli import main
sys.argv = ["moecast", *{arguments!r}]
try:
    main()
except SystemExit as left:
    assert left.code in (0, None), left.code
"""
EXAMPLE = "examples/deepseek-v3.yaml"


def _imported_by(code: str) -> set[str]:
    """Top-level packages in `sys.modules` after `code` has run in a Python of its own."""
    report = (
        "\nimport json, sys\nprint(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "never"),
    [
        (["--help"], LIGHT | {"pydantic", "yaml", "rich"}),
        (["forecast", EXAMPLE, "--engine", "closed-form", "--json"], LIGHT | {"rich"}),
        (["forecast", EXAMPLE, "--engine", "closed-form", "--set", "plan.expert=32"], LIGHT),
        (["plan", "examples/mixtral-8x7b.yaml", "--json", "--constraint", "plan.pipeline<=1"], HEAVY | {"rich"}),
        (["models", "--json"], LIGHT | {"rich"}),
        (["chips", "h100-sxm"], LIGHT),
        (["clusters", "--json"], LIGHT | {"rich"}),
        (["schema"], LIGHT | {"rich"}),
        (["import", "tests/samples/kineto.json", "--chip", "h100", "--json"], LIGHT | {"rich", "pyarrow"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_nothing_heavy(arguments: list[str], never: set[str]) -> None:
    imported = _imported_by(COMMAND.format(arguments=arguments))
    assert "moecast" in imported and not imported & never


@pytest.mark.parametrize(
    ("code", "never"),
    [
        ("import simulator, moecast, hw_profiles, reports", LIGHT | {"typer", "pydantic", "yaml", "rich"}),
        ("from simulator.analysis.forecast import forecast", LIGHT | {"typer", "rich"}),
        (
            "from moecast import forecast, load_job; forecast(load_job(EXAMPLE), engine='closed-form')",
            LIGHT | {"typer"},
        ),
    ],
)
def test_an_import_brings_nothing_heavy(code: str, never: set[str]) -> None:
    assert not _imported_by(code.replace("EXAMPLE", repr(EXAMPLE))) & never


def test_every_public_name_is_there() -> None:
    import moecast

    assert sorted(moecast.__all__) == sorted(moecast._HOMES)
    assert all(getattr(moecast, name) is not None for name in moecast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'forcast'"):
        _ = moecast.forcast


def test_validation_draws_nothing_unless_asked(tmp_path: Path) -> None:
    """A table of collectives needs scipy for ranks, and neither pandas, plotly, pyarrow nor networkx."""
    table = tmp_path / "c.csv"
    names = (
        "id,source_key,source,chip,n_devices,n_nodes,inter_node,collective,message_bytes_per_rank,time_us,algbw_GBps,"
        "busbw_GBps,dtype,library,tokens_per_rank,hidden,topk,sms,fit"
    )
    lines = [f"{i},x,made,H100 SXM,8,1,,all_gather,{2**20 * i},{20 * i},,,half,NCCL,,,,,yes" for i in (1, 2, 3)]
    table.write_text("\n".join([names, *lines]) + "\n")
    imported = _imported_by(COMMAND.format(arguments=["validate", str(table), "--json"]))
    assert "scipy" in imported and not imported & (HEAVY | {"pyarrow"}) - {"scipy"}

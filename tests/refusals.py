"""A good job to change, and what a line that refuses one may say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
JOB = """
model: mixtral-8x7b
cluster: {chip: h100-sxm, nodes: 8}
plan: {expert: 8, shard: optimizer}
batch: {sequences: 256, length: 4096}
"""
FORMULA = ("--engine", "closed-form")
# What only a programmer would say.
JARGON = re.compile(
    r"Traceback|pydantic|[Ii]nput should|Value error|constrained-|\.Capacity|dictionary|valid integer|\[type="
)
# What the fixture `refused` of conftest.py is.
Refused = Callable[..., None]


def real_command(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moecast", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, check=False, timeout=60, **options)

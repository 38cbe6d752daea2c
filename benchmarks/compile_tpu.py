"""Our own train step as XLA compiles it for TPUs that are not there, beside the forecast (compile_tpu.py --help).

Needs the extra `tpu` (libtpu), 1 to 3 minutes a job on two cores. Prints executed FLOPs, bytes of every kind of
collective, arguments and peak memory, and the worst errors; names choose jobs (`compile_tpu.py v5p`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIXTRAL = {"capacity": {"factor": 1.25, "basis": "assignments", "minimum": 1}, "dispatch": {"layout": "slots"}}
SWITCH = {
    "precision": "selective-bf16",
    "optimizer": "adafactor",
    "capacity": {"factor": 1.25, "basis": "tokens", "group_tokens": 512},
    "dispatch": {"layout": "slots"},
}
LENGTHS = {"encoder": 512, "decoder": 128}
# Layers are scanned over, so that the real depth costs no compile time; job, target.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "switch-base-128 v3": (
        "tpu:v3:4x4",
        {
            "model": "switch-base-128",
            "plan": {"expert": 32, "microbatch_sequences": 16},
            "batch": {"sequences": 1024, "length": LENGTHS},
            "training": SWITCH | {"remat": "full"},
        },
    ),
    "st-moe-l v3": (
        "tpu:v3:4x4",
        {
            "model": "st-moe-l",
            "plan": {"expert": 32},
            "batch": {"sequences": 128, "length": LENGTHS},
            "training": SWITCH | {"remat": "full"},
        },
    ),
    "mixtral-8x7b v5p": (
        "tpu:v5p:4x4x4",
        {
            "model": "mixtral-8x7b",
            "plan": {"expert": 8, "shard": "parameters"},
            "batch": {"sequences": 256, "length": 4096},
            "training": MIXTRAL | {"remat": "full"},
        },
    ),
    "deepseek-v2-lite v5p": (
        "tpu:v5p:4x4x4",
        {
            "model": "deepseek-v2-lite",
            "plan": {"expert": 16, "shard": "optimizer"},
            "batch": {"sequences": 128, "length": 4096},
            "training": MIXTRAL | {"remat": "full"},
        },
    ),
    "mixtral-8x7b v6e": (
        "tpu:v6e:8x8",
        {
            "model": "mixtral-8x7b",
            "plan": {"expert": 8, "shard": "parameters"},
            "batch": {"sequences": 64, "length": 4096},
            "training": MIXTRAL | {"remat": "full"},
        },
    ),
    "qwen3-30b-a3b v6e": (
        "tpu:v6e:8x8",
        {
            "model": "qwen3-30b-a3b",
            "plan": {"tensor": 4, "expert": 16, "sequence_parallel": True, "shard": "optimizer"},
            "batch": {"sequences": 32, "length": 4096},
            "training": {
                "capacity": {"factor": 1.25, "basis": "assignments", "group_tokens": 1024, "minimum": 1},
                "dispatch": {"layout": "slots"},
                "remat": "full",
            },
        },
    ),
}


def compile_job(name: str, folder: Path) -> dict[str, Any] | str:
    """The comparison of one job, or what went wrong."""
    target, job = JOBS[name]
    cluster = {"v3": "4x4", "v5p": "4x4x4", "v6e": "8x8"}[target.split(":")[1]]
    job = {"cluster": {"chip": f"tpu-{target.split(':')[1]}", "slice": cluster}, "software": {"stack": "moecast"}} | job
    path = folder / f"{name.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "moecast", "compile", str(path), "--target", target, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    found: dict[str, Any] = json.loads(done.stdout)["comparison"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of jobs; default all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    chosen = [n for n in JOBS if not asked.names or any(part in n for part in asked.names)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            found[name] = compile_job(name, Path(folder))
            if not asked.json:
                show(name, found[name])
    if asked.json:
        print(json.dumps(found, indent=2))


def show(name: str, found: dict[str, Any] | str) -> None:
    if isinstance(found, str):
        print(f"{name}: {found}")
        return
    print(f"{name} on {JOBS[name][0]}", flush=True)
    for row in found["rows"]:
        error = "" if row["error"] is None else f"{100 * row['error']:+8.2f} %"
        unit = "FLOPs" if row["unit"] == "FLOPs" else "bytes"
        print(f"  {row['what']:22s} {row['forecast']:12.5g} {row['compiled']:12.5g} {unit} {error}", flush=True)
    for text in found["differences"]:
        print(f"  differs: {text}")


if __name__ == "__main__":
    main()

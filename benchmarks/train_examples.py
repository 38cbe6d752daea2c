"""What the trainer shows: families below the text's bigram entropy, z-loss, number of experts, fine-tuning.

    python benchmarks/train_examples.py families     # the five small siblings, 8 devices, some minutes each
    python benchmarks/train_examples.py z-loss       # ST-MoE's point: an unstable setting, with and without z-loss
    python benchmarks/train_examples.py experts      # Switch table 7's direction: more experts at equal FLOPs per token
    python benchmarks/train_examples.py fine-tune    # from a checkpoint, with experts frozen

Each run is `moecast train` in a process of its own; figures are printed as they come out, with their seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FAMILIES = ("switch-base-128", "st-moe-l", "mixtral-8x7b", "deepseek-v3", "moe-32")
ONE = ("cluster={chip: cpu-host, devices: 1}", "plan={}")


def train(job: Path, out: Path, steps: int, *changes: str) -> dict[str, Any]:
    """The result of a run, or {"failed": the line it ended with}."""
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "moecast", "train", str(job), "--steps", str(steps), "--out", str(out), "--json"]
    done = subprocess.run([*command, *sets], capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def losses(out: Path) -> list[float]:
    """Cross-entropy of every step, nats."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["nats"]) for line in lines]


def last(values: list[float], count: int = 20) -> float:
    """Mean of the last steps."""
    return sum(values[-count:]) / len(values[-count:])


def families(folder: Path, steps: int) -> None:
    print(f"{'job':18s} {'nats':>7s} {'unigram':>8s} {'bigram':>7s} {'dropped':>8s}")
    for name in FAMILIES:
        out = folder / name
        result = train(EXAMPLES / "small" / f"{name}.yaml", out, steps)
        if "failed" in result:
            print(f"{name:18s} {result['failed']}")
            continue
        text = result["entropies"]
        nats, dropped = last(losses(out)), 100 * result["dropped_fraction"]
        print(
            f"{name:18s} {nats:7.3f} {text['unigram_nats']:8.3f} {text['bigram_nats']:7.3f} {dropped:7.1f} %",
            flush=True,
        )


def z_loss(folder: Path, steps: int) -> None:
    """Large initial weights and a high learning rate, with and without the router z-loss, three seeds each."""
    shaky = ("training.learning.init_scale=8", "training.learning.learning_rate={peak: 0.05, warmup_steps: 10}",
             "training.learning.clip_norm=null", "training.learning.router.balance_loss=0.01")  # fmt: skip
    print(f"{'z-loss':>8s} {'seed':>5s} {'nats at end':>12s} {'worst after 50':>15s} {'largest logit':>14s}")
    for weight in (0.0, 0.001, 0.01):
        for seed in (0, 1, 2):
            out = folder / f"z{weight}-{seed}"
            changes = (f"training.learning.router.z_loss={weight}", f"training.learning.seed={seed}")
            result = train(EXAMPLES / "tiny-moe.yaml", out, steps, *ONE, *shaky, *changes)
            if "failed" in result:
                print(f"{weight:8g} {seed:5d} {result['failed'][:60]}", flush=True)
                continue
            found = losses(out)
            import pandas as pd

            logit = float(pd.read_parquet(out / "router.parquet")["logit_largest"].max())
            print(f"{weight:8g} {seed:5d} {last(found):12.3f} {max(found[50:]):15.3f} {logit:14.1f}", flush=True)


def experts(folder: Path, steps: int) -> None:
    """Top-1 of E experts, so the same FLOPs a token whatever E."""
    print(f"{'experts':>8s} {'seed':>5s} {'nats at end':>12s}")
    for count in (1, 4, 16, 64):
        found = []
        for seed in (0, 1):
            out = folder / f"e{count}-{seed}"
            capacity = "training.capacity={factor: 1.25, basis: assignments, group_tokens: 1024, minimum: 4}"
            moe = ("model.decoder.moe.top_k=1", f"model.decoder.moe.experts={count}")
            changes = (*moe, capacity, f"training.learning.seed={seed}")
            result = train(EXAMPLES / "tiny-moe.yaml", out, steps, *ONE, *changes)
            found.append(math.nan if "failed" in result else last(losses(out), 50))
            print(f"{count:8d} {seed:5d} {found[-1]:12.3f} {result.get('failed', '')}", flush=True)


def fine_tune(folder: Path, steps: int) -> None:
    """A first run on the standard library, then another text (this repository's documents) from its checkpoint."""
    job = folder / "tiny-moe.yaml"
    job.write_text((EXAMPLES / "tiny-moe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    text = folder / "text"
    text.mkdir()
    for path in sorted((EXAMPLES.parent / "docs").glob("*.md")):
        for i, part in enumerate(path.read_text(encoding="utf-8").split("\n## ")):
            (text / f"{path.stem}-{i:02d}.txt").write_text(part, encoding="utf-8")
    first = train(job, folder / "first", steps, *ONE)
    if "failed" in first:
        print(f"first run: {first['failed']}")
        return
    print(f"first run, standard library: {last(losses(folder / 'first')):.3f} nats", flush=True)
    data = "training.learning.data.files=[text]"
    start = "training.learning.start={checkpoint: first, freeze: [%s]}"
    for name, change in (
        ("from scratch", ()),
        ("from the checkpoint", (start % "",)),
        ("... experts frozen", (start % "experts",)),
        ("... expert dropout 0.4", (start % "", "training.learning.expert_dropout=0.4")),
    ):
        out = folder / name.replace(" ", "-").replace(".", "")
        result = train(job, out, steps // 4, *ONE, data, *change)
        if "failed" in result:
            print(f"{name:24s} {result['failed']}", flush=True)
            continue
        found = losses(out)
        print(f"{name:24s} first step {found[0]:.3f}, last 20 steps {last(found):.3f} nats", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("families", "z-loss", "experts", "fine-tune"))
    parser.add_argument("--steps", type=int, default=0, help="steps a run (default 800 for families, else 400)")
    asked = parser.parse_args()
    steps = asked.steps or (800 if asked.what == "families" else 400)
    show = {"families": families, "z-loss": z_loss, "experts": experts, "fine-tune": fine_tune}[asked.what]
    with tempfile.TemporaryDirectory() as folder:
        show(Path(folder), steps)


if __name__ == "__main__":
    main()

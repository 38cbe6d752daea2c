"""What the trainer shows: families below the text's bigram entropy, z-loss, number of experts, fine-tuning.

    python benchmarks/train_examples.py families     # the five small siblings, 8 devices, some minutes each
    python benchmarks/train_examples.py z-loss       # ST-MoE's point: unstable settings, with and without z-loss
    python benchmarks/train_examples.py experts      # Switch table 7's direction: more experts at equal FLOPs per token
    python benchmarks/train_examples.py fine-tune    # from a checkpoint, with experts frozen

Each run is `moecast train` in a process of its own; figures are printed as they come out, with their seeds.
"""

from __future__ import annotations

import argparse
import json
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


def spikes(nats: list[float]) -> list[int]:
    """Steps (from 1) whose loss is above the mean of the 50 steps before by more than a nat, the first 50 left out."""
    return [i + 1 for i in range(50, len(nats)) if nats[i] > last(nats[:i], 50) + 1]


UNSTABLE = (
    # GEGLU multiplies two projections, four layers multiply what one does: ST-MoE's own suspects (section 3).
    "model.decoder.layers=4",
    "model.decoder.moe.top_k=1",
    "model.decoder.moe.expert={hidden: 64, activation: geglu}",
    # Nothing bounds a gradient, and few tokens a step make it noisy; routers stay float32, as everywhere.
    "training.precision=bf16",
    "training.learning.clip_norm=null",
    "batch={sequences: 8, length: 64}",
)
RATE = "training.learning.learning_rate={peak: %g, warmup_steps: 20, schedule: constant}"
# Rates are chosen by the control, one expert and so no router: the highest of those tried (in brackets) at which none
# of its runs was unstable.
SHAKY = {
    # Layers that see the stream as it is (0.005, 0.007, 0.01; seeds 0 to 3).
    "no norms, Adam, 0.007": (*UNSTABLE, "model.norm=none", "training.learning.beta2=0.999", RATE % 0.007),
    # Steps that move a router's logits by several nats each (0.06, 0.12, 0.25; seeds 0 and 1).
    "norms, Adam, 0.12": (*UNSTABLE, "training.learning.beta2=0.999", RATE % 0.12),
}


def z_loss(folder: Path, steps: int, seeds: int) -> None:
    """Two settings near the edge, each without and with the router z-loss, and with one expert, so without a router."""
    print("unstable: a loss or gradient norm that is no finite number, or a spike, a step whose loss is above the mean")
    print("of the 50 before by more than 1 nat (after step 50)")
    print(
        f"{'experts':>7s} {'z-loss':>6s} {'seed':>4s} {'steps':>5s} {'spikes':>6s} {'nats at end':>11s} {'logit':>8s}"
    )
    cases = ((16, 0.0), (16, 0.001), (16, 0.01), (1, 0.0))
    for name, setting in SHAKY.items():
        print(name, flush=True)
        unstable: dict[tuple[int, float], list[bool]] = {case: [] for case in cases}
        ends: dict[tuple[int, float], list[float]] = {case: [] for case in cases}
        for seed in range(seeds):
            for count, weight in cases:
                out = folder / f"{name}-{count}-{weight}-{seed}"
                size, z = f"model.decoder.moe.experts={count}", f"training.learning.router.z_loss={weight}"
                result = train(EXAMPLES / "tiny-moe.yaml", out, steps, *ONE, *setting, size, z,
                               f"training.learning.seed={seed}")  # fmt: skip
                why = result.get("failed", "")
                diverged = any(f" is {value}" in why for value in ("nan", "inf", "-inf"))
                print(f"{count:7d} {weight:6g} {seed:4d}", end=" ")
                if why and not diverged:
                    print(why, flush=True)
                    continue
                found = losses(out)
                at = spikes(found)
                unstable[count, weight].append(diverged or bool(at))
                if not diverged:
                    ends[count, weight].append(last(found))
                end = why.partition(";")[0].removeprefix("moecast: ") or f"{last(found):11.3f}"
                print(f"{len(found):5d} {len(at):6d} {end} {largest_logit(out):8.4g}", flush=True)
        for (count, weight), runs in unstable.items():
            nats = ends[count, weight]
            said = f"{sum(runs)} of {len(runs)} runs unstable, {len(runs) - len(nats)} diverged"
            if nats:
                said += f"; the others end at {sum(nats) / len(nats):.3f} nats ({min(nats):.3f} to {max(nats):.3f})"
            print(f"  {count} experts, z-loss {weight:g}: {said}", flush=True)


def largest_logit(out: Path) -> float:
    """The largest router logit of a run, of all layers and steps."""
    import pandas as pd

    return float(pd.read_parquet(out / "router.parquet")["logit_largest"].max())


def flops_per_token(job: Path, *changes: str) -> float:
    """Model FLOPs of one trained token, forward and backward, as the forecast counts them."""
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "moecast", "forecast", str(job), "--engine", "closed-form", "--json", *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return float(json.loads(done.stdout)["flops"]["model_per_token"])


def experts(folder: Path, steps: int, seeds: int) -> None:
    """Top-1 of E experts of one width, so the same FLOPs a token whatever E, but for the router's column an expert.

    A single expert that is a little wider has more FLOPs a token than any of them: the control.
    """
    setting = (
        # Experts as narrow as the model: what the feed-forward layers can hold is what limits.
        "model.decoder.moe.top_k=1",
        "model.decoder.moe.expert={hidden: 64}",
        # Seats enough that next to no token is dropped: expert counts are compared, not drops. FLOPs of the model do
        # not count seats that stay empty.
        "training.capacity={factor: 2.0, eval_factor: 2.0, basis: assignments, group_tokens: 1024}",
        # Of 0.00125, 0.0025, 0.005 and 0.01, tried for 1 and 16 experts alike (1,500 steps, seed 0), 0.0025 was best
        # for 1, and within 0.003 nats of the best for 16. A cosine to a tenth, so that runs end settled.
        f"training.learning.learning_rate={{peak: 0.0025, warmup_steps: {min(100, steps // 2)}, "
        f"schedule: cosine, decay_steps: {steps}}}",
        # One evaluation, at the end, of the same 65,536 held-out tokens for all.
        f"training.run={{evaluate_every: {steps}, evaluation_batches: 64, telemetry: false}}",
    )
    tiny = EXAMPLES / "tiny-moe.yaml"
    # (experts, hidden size of one): 72 hidden units are 3 % more FLOPs than the router of 16 experts costs.
    cases = (*((count, 64) for count in (1, 2, 4, 8, 16)), (1, 72))
    sizes = {(e, h): (f"model.decoder.moe.experts={e}", f"model.decoder.moe.expert.hidden={h}") for e, h in cases}
    found: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    print(f"{steps} steps; held-out nats at the end", flush=True)
    for seed in range(seeds):
        for (e, h), size in sizes.items():
            out = folder / f"e{e}-{h}-{seed}"
            result = train(tiny, out, steps, *ONE, *setting, *size, f"training.learning.seed={seed}")
            if "failed" in result:
                print(f"seed {seed}, {e} experts of {h}: {result['failed']}", flush=True)
                continue
            found[e, h].append(result["held_out_nats"])
            said = f"{result['held_out_nats']:.4f} nats, training {last(losses(out), 100):.4f}"
            print(f"seed {seed}, {e} experts of {h}: {said}, dropped {result['dropped']:.1%}", flush=True)
    print(f"{'experts':>8s} {'hidden':>7s} {'FLOPs a token':>14s} {'runs':>5s} {'mean':>7s} {'low':>7s} {'high':>8s}")
    for (e, h), nats in found.items():
        flops = flops_per_token(tiny, *ONE, *setting, *sizes[e, h])
        if nats:
            mean = sum(nats) / len(nats)
            spread = f"{len(nats):5d} {mean:7.4f} {min(nats):7.4f} {max(nats):8.4f}"
            print(f"{e:8d} {h:7d} {flops:14,.0f} {spread}", flush=True)


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
    parser.add_argument("--steps", type=int, help="steps a run (default: those of the figures in docs/trainer.md)")
    parser.add_argument("--seeds", type=int, help="seeds of z-loss (default 4) and experts (default 3)")
    asked = parser.parse_args()
    if asked.what in ("families", "fine-tune") and asked.seeds is not None:
        parser.error(f"{asked.what} runs one seed")
    steps = asked.steps or {"families": 800, "fine-tune": 400, "z-loss": 400, "experts": 3000}[asked.what]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.what == "families":
            families(folder, steps)
        elif asked.what == "z-loss":
            z_loss(folder, steps, asked.seeds or 4)
        elif asked.what == "experts":
            experts(folder, steps, asked.seeds or 3)
        else:
            fine_tune(folder, steps)


if __name__ == "__main__":
    main()

"""Kills a training run with SIGKILL at random steps and resumes it: are all losses the same, bit for bit?

Prints one line per trial: the step it was killed after, what it resumed from, whether losses and gradient norms of all
steps equal those of a run that nothing happened to, and seconds of the resumed run. Arguments: trials, devices.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from runs import finish, losses, start, train, wait_for_steps, write_tiny

STEPS = 60


def main(trials: int, devices: int) -> int:
    options = ["--steps", STEPS, "--set", "training.run.checkpoint_every=7", "--json", "--devices", devices]
    if devices > 1:
        options += ["--set", f"plan.expert={min(4, devices)}"]
    equal = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, cache = write_tiny(folder), folder / "compiled"
        code, _, error = train(job, *options, "--out", folder / "whole", cache=cache, optimised=True)
        assert code == 0, error
        whole = losses(folder / "whole")
        for trial in range(trials):
            out = folder / f"run-{trial}"
            running: subprocess.Popen[str] = start(job, *options, "--out", out, cache=cache, optimised=True)
            wait_for_steps(running, out, random.randint(1, STEPS - 5))
            running.kill()
            finish(running)
            done = out.joinpath("metrics.jsonl").read_bytes().count(b"\n")
            begun = time.monotonic()
            code, printed, error = train(job, *options, "--out", out, "--resume", cache=cache, optimised=True)
            assert code == 0, error
            same = losses(out) == whole
            equal += same
            came = json.loads(printed)["resumed_from"] or "the start"
            said = "equal bit for bit" if same else "DIFFERENT"
            print(
                f"killed after step {done}, resumed from {came}: {said}, {time.monotonic() - begun:.1f} s", flush=True
            )
    print(f"{equal} of {trials} equal bit for bit ({STEPS} steps, {devices} devices)")
    return 0 if equal == trials else 1


if __name__ == "__main__":
    given = [int(x) for x in sys.argv[1:3]]
    raise SystemExit(main(*given, *(10, 1)[len(given) :]))

"""`python -m benchmarks.netlab`: build each topology, measure, fit on some, score the others, and tear all down.

Needs root and iproute2. Ends within `LONGEST_S`, whatever happens; exit codes as moecast's (2: cannot be asked here, 4:
the work failed, 130: interrupted).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.netlab.cases import CASES, SAMPLES, STEPS, TRACED, Case, collectives, job
from benchmarks.netlab.crew import Crew, crew
from benchmarks.netlab.forecasts import Score, busiest_link, scores, write_graph
from benchmarks.netlab.lab import Lab, lab
from benchmarks.netlab.plan import HOSTS
from benchmarks.netlab.show import show
from benchmarks.netlab.tables import joined, pair_seconds, slow_host
from hw_profiles.errors import QuestionError, WorkFailed
from moecast.progress import FAILED, INTERRUPTED, bar
from simulator.calibration.tables import read_table

LONGEST_S = 900
ANSWER_S = 240.0


@dataclass
class Found:
    """What the run has measured and said: tables of each case, scores of those held out, the slow host by both sides.

    `causes` has for each held-out case the host that the measurements name (None: no host is slow), how many times the
    median host it takes, and the busiest link of the forecast with the share of the step that it is busy.
    """

    notes: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    causes: list[tuple[str, int | None, float, str, float]] = field(default_factory=list)
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab", description=__doc__, epilog="Example: python -m benchmarks.netlab --json"
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="Keep tables, graphs and the profile in this folder.")
    asked = parser.parse_args(arguments)
    try:
        if asked.keep is not None and not asked.keep.is_dir():
            raise QuestionError(f"--keep {asked.keep}: no such folder")
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST_S)
        with tempfile.TemporaryDirectory(prefix="mcnetlab-") as scratch:
            found = everything(asked.keep or Path(scratch))
    except QuestionError as error:
        print(f"moecast: {error}", file=sys.stderr)
        return 2
    except (WorkFailed, OSError) as error:
        print(f"moecast: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.alarm(0)
    if asked.json:
        print(json.dumps(asdict(found), indent=2, allow_nan=False))
    else:
        show(found.notes, found.scores, found.causes, found.seconds)
    return 0


def _too_long(number: int, frame: object) -> None:
    raise WorkFailed(f"netlab: took longer than {LONGEST_S} s, and was ended")


def everything(folder: Path) -> Found:
    """Measure all cases, fit, score; tables stay in `folder`."""
    from hw_profiles.loader import load_chip
    from simulator.calibration.calibrate import calibrate

    begun = time.monotonic()
    found, tables = Found(), {}
    pairs: dict[str, dict[int, float]] = {}
    with bar("netlab", 1 + len(CASES)) as done, lab() as network:
        done.say("hosts meet")
        # They meet over the first topology's cables.
        network.plug(CASES[0].plan)
        with crew(HOSTS, folder) as hosts:
            for case in CASES:
                done.advance()
                done.say(case.name)
                tables[case.name], own = measured(case, network, hosts)
                if not case.fitted:
                    pairs[case.name] = own
    fitted = [t for case in CASES if case.fitted for t in tables[case.name]]
    calibrated = calibrate(fitted, load_chip("cpu-host"))
    found.notes = calibrated.notes
    for case in CASES:
        if case.fitted:
            continue
        topology = write_graph(case.plan, folder)
        for table in tables[case.name]:
            found.scores += scores(case.name, table, topology, None, calibrated.chip)
        named, ratio = slow_host(pairs[case.name])
        link, busy = busiest_link(job(case.models[0], case.plan.host_mbit), topology, calibrated.chip)
        found.causes.append((case.name, named, ratio, link, busy))
    found.seconds = time.monotonic() - begun
    return found


def measured(case: Case, network: Lab, hosts: Crew) -> tuple[list[Any], dict[int, float]]:
    """Tables of the case's collectives and jobs, and what pairs of hosts took."""
    network.plug(case.plan)
    mbit = case.plan.host_mbit
    request = {
        "do": "collectives", "case": case.name, "job": job(case.models[0], mbit), "list": collectives(case),
        "samples": SAMPLES,
    }  # fmt: skip
    paths = hosts.ask(request, ANSWER_S)
    tables = [joined(paths, f"collectives of {case.name}")]
    for model in case.models:
        request = {
            "do": "steps", "case": case.name, "job": job(model, mbit), "steps": STEPS,
            "traced": TRACED if case.fitted else 0,
        }  # fmt: skip
        # The hosts have told the first one what they saw (trainer/measured.py).
        tables.append(replace(read_table(hosts.ask(request, ANSWER_S)[0]), name=f"steps of {case.name}"))
    return tables, pair_seconds(paths)


if __name__ == "__main__":
    sys.exit(main())

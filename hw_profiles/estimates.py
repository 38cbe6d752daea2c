"""What the TPU compiler expects of a chip, in place of the shipped efficiencies: `cluster: {curves: compiler}`.

The files in `estimates/` are fitted on the tables beside them by `python -m benchmarks.fit_estimates`
(docs/estimates.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from hw_profiles.errors import QuestionError
from hw_profiles.schema import Chip, Curve, Dtype, Quantity, Record
from hw_profiles.validation import validate
from hw_profiles.yaml_reader import read_yaml

FOLDER = Path(__file__).parent / "estimates"


class Estimates(Record):
    """Numbers of a chip that follow from the compiler's cycles; keys as in a chip's file."""

    matmul: dict[Dtype | Literal["fp8_block"], Curve]
    grouped_slowdown: Quantity
    memory: Quantity
    kernel_overhead_us: Quantity


@cache
def estimate_names() -> tuple[str, ...]:
    """Chips that the compiler was asked about, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def load_estimates(chip: str) -> Estimates:
    """The estimates for the chip called `chip`; QuestionError if there are none."""
    if chip not in estimate_names():
        known = ", ".join(estimate_names())
        raise QuestionError(f"cluster.curves = compiler: the compiler was not asked about {chip}; known: {known}")
    path = FOLDER / f"{chip}.yaml"
    return validate(Estimates, read_yaml(path), where=str(path))


def with_estimates(chip: Chip) -> Chip:
    """`chip` with the compiler's numbers; formats it was not asked about borrow its bf16 curve."""
    found = load_estimates(chip.name)
    base = found.matmul["bf16"]
    borrowed = base.model_copy(update={"basis": "borrowed", "confidence": "low", "residuals": None, "rows": None})
    matmul = {name: found.matmul.get(name, borrowed) for name in chip.efficiency.matmul}
    changes = {"matmul": matmul, "grouped_slowdown": found.grouped_slowdown, "memory": found.memory}
    efficiency = chip.efficiency.model_copy(update=changes)
    return chip.model_copy(update={"efficiency": efficiency, "kernel_overhead_us": found.kernel_overhead_us})


def profile_name(chip: Chip) -> str:
    """What a forecast calls a profile that is no file of the user's."""
    theirs = any(curve.basis == "compiler" for curve in chip.efficiency.matmul.values())
    return f"{chip.name} {'by its compiler' if theirs else 'as shipped'}"

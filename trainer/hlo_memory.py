"""Bytes per device that a compiled program needs, as the compiler states them; nothing is executed.

On TPU the peak is the "Total bytes" of XLA's memory-usage report for the memory space `default`, as in XLA's own
out-of-memory message. `memory_analysis()` does not give it: `peak_memory_in_bytes` leaves fragmentation out and counts
what XLA placed in VMEM (on small programs up to 3.7 times the total), arguments + temporaries are 0.9 to 1.3 times it
(measured on v3 to TPU7x, jax 0.10.2, November 2026; docs/compile.md). So a TPU program is compiled by
`compile_lowered`.

On CPU the peak is by definition `peak_memory_in_bytes`, which leaves the temporaries out (arguments + outputs - aliased
to 100 bytes, in every program tried); `allocated_bytes` has them.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.hlo_text import HloError

_TOTAL = re.compile(r"^Memory Space: (\S+).*\n\s*Total bytes: (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per device. `peak_source` says which of the compiler's numbers the peak is.

    `allocated_bytes` is all that is held at once: on TPU the peak, on CPU arguments, outputs that are no argument's
    buffer, and the one block of temporaries.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    generated_code_bytes: int
    peak_bytes: int
    peak_source: str
    allocated_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def report_total(report: str) -> int:
    """The total of XLA's memory-usage report for HBM, bytes; HloError if it has none.

    The space called `default` only: VMEM has a block of its own, and on v4 so has CMEM, under the name `hbm`.
    """
    for space, total in _TOTAL.findall(report):
        if space == "default":
            return int(total)
    raise HloError("the memory-usage report has no block 'Memory Space: default' with its 'Total bytes'")


def compile_lowered(lowered: Any, platform: str, options: dict[str, Any] | None = None) -> tuple[Any, str | None]:
    """Compile a `jax.stages.Lowered` for `cpu` or `tpu`; on TPU with XLA's memory-usage report as text beside it.

    HloError if the compiler wrote no report. What the compiler raises (out of memory, say) goes through.
    """
    if platform != "tpu":
        return lowered.compile(compiler_options=options or {}), None
    with tempfile.TemporaryDirectory(prefix="moecast-xla-") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*"}
        compiled = lowered.compile(compiler_options={**(options or {}), **dump})
        reports = sorted(Path(folder).glob("*memory-usage-report.txt"), key=lambda p: p.stat().st_size)
        if not reports:
            raise HloError("XLA wrote no memory-usage report: is this the TPU compiler?")
        return compiled, reports[-1].read_text(encoding="utf-8")


def peak_memory(compiled: Any, platform: str, report: str | None = None) -> Memory:
    """The memory of a `jax.stages.Compiled`, bytes per device; for `tpu` the report of `compile_lowered` is needed.

    On CPU the peak is XLA's `peak_memory_in_bytes`. HloError if a number is absent.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise HloError("the compiler states no memory for this program")
    arguments, temporaries = int(stats.argument_size_in_bytes), int(stats.temp_size_in_bytes)
    outputs, aliased = int(stats.output_size_in_bytes), int(stats.alias_size_in_bytes)
    if platform == "tpu":
        if report is None:
            raise HloError("the peak of a TPU program is in the memory-usage report: compile with compile_lowered")
        peak, source = report_total(report), "memory-usage report, default space"
        allocated = peak
    else:
        peak, source = int(stats.peak_memory_in_bytes), "peak_memory_in_bytes"
        allocated = arguments + outputs - aliased + temporaries
    return Memory(
        argument_bytes=arguments,
        output_bytes=outputs,
        alias_bytes=aliased,
        temporary_bytes=temporaries,
        generated_code_bytes=int(stats.generated_code_size_in_bytes),
        peak_bytes=peak,
        peak_source=source,
        allocated_bytes=allocated,
    )

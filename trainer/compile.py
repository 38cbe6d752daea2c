"""The real train step of a job, compiled ahead of time for devices that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hw_profiles.errors import QuestionError
from simulator.job.rules import Degrees
from trainer.hlo import CompiledProgram, compile_lowered, read_program
from trainer.targets import Target, TargetError

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.job.job import Job


def compile_step(job: Job, degrees: Degrees, target: Target, folder: Path | None = None) -> tuple[CompiledProgram, str]:
    """What XLA makes of one training step of `job` on `target`, and the program's text; `folder` is the job's.

    QuestionError for what the trainer cannot run; TargetError where the compiler runs out of the device's memory or
    refuses the program, with its first line.
    """
    from trainer.step import Trainer

    if degrees.devices != target.devices:
        raise QuestionError(f"--target {target.name}: has {target.devices} devices; the plan makes {degrees.devices}")
    trainer = Trainer.of(job, degrees, target.jax_devices(), folder)
    lowered = trainer.step.lower(trainer.state_shapes(), trainer.batch_shapes())
    try:
        compiled, report = compile_lowered(lowered, target.platform)
    except Exception as error:  # XLA raises what its own layers raise
        raise TargetError(f"{target.name}: the compiler refuses the program: {_said(error)}") from None
    return read_program(compiled, target.platform, report), compiled.as_text()


def _said(error: Any) -> str:
    """The telling line of the compiler's message: how much memory was missing, or its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Used" in line or "exceed" in line.lower()]
    return f"{(telling or lines or ['no reason given'])[0]:.300}"

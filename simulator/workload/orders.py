"""Pipeline schedules as data: the order in which each device runs its forwards and backwards.

Nothing here knows how long anything takes; the engine runs the order with real waiting, and bubbles emerge.

- GPipe (arXiv:1811.06965): all forwards, then all backwards, last microbatch first.
- 1F1B (PipeDream-Flush, arXiv:2006.09503): P - p - 1 forwards, then one forward, one backward.
- Interleaved (Megatron-LM, arXiv:2104.04473): V chunks a device, microbatches in rounds of P per chunk.
- ZB-H1 (arXiv:2401.10241): 1F1B with the weight gradient split off; device p runs it p microbatches late, which keeps
  1F1B's activations and fills the tail.
- DualPipe (arXiv:2412.19437): microbatches enter from both ends; the eight phases of its published schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of an order: pass (F forward, B whole backward, I input gradient, W weight gradient), where and what.

    `chunk` counts the device's chunks (virtual stages; under DualPipe 0 and 1 are the two directions). `pair` is a
    second action that runs at the same time (DualPipe's forward beside a backward).
    """

    kind: str
    chunk: int
    microbatch: int
    pair: Action | None = None


def gpipe(device: int, devices: int, microbatches: int, virtual: int) -> list[Action]:
    """All forwards, then all backwards in reverse."""
    del device, devices, virtual
    forwards = [Action(FORWARD, 0, i) for i in range(microbatches)]
    return forwards + [Action(BACKWARD, 0, i) for i in reversed(range(microbatches))]


def one_forward_one_backward(device: int, devices: int, microbatches: int, virtual: int) -> list[Action]:
    """Warm-up forwards, alternation, remaining backwards."""
    del virtual
    warm = min(devices - device - 1, microbatches)
    out = [Action(FORWARD, 0, i) for i in range(warm)]
    for i in range(microbatches - warm):
        out += [Action(FORWARD, 0, warm + i), Action(BACKWARD, 0, i)]
    return out + [Action(BACKWARD, 0, i) for i in range(microbatches - warm, microbatches)]


def interleaved(device: int, devices: int, microbatches: int, virtual: int) -> list[Action]:
    """Megatron-LM's order: forwards and backwards of chunks in rounds of P microbatches; M must be a multiple of P."""
    total = microbatches * virtual

    def nth(k: int, forward: bool) -> tuple[int, int]:
        round_, inside = divmod(k, devices * virtual)
        chunk = inside // devices
        return (chunk if forward else virtual - 1 - chunk), round_ * devices + inside % devices

    warm = min(total, 2 * (devices - device - 1) + (virtual - 1) * devices)
    out = [Action(FORWARD, *nth(k, True)) for k in range(warm)]
    for k in range(total - warm):
        out += [Action(FORWARD, *nth(warm + k, True)), Action(BACKWARD, *nth(k, False))]
    return out + [Action(BACKWARD, *nth(k, False)) for k in range(total - warm, total)]


def zb_h1(device: int, devices: int, microbatches: int, virtual: int) -> list[Action]:
    """1F1B with input and weight gradients apart; the weight gradient waits for `device` further input gradients."""
    out: list[Action] = []
    waiting: list[int] = []
    for action in one_forward_one_backward(device, devices, microbatches, virtual):
        if action.kind == FORWARD:
            out.append(action)
            continue
        out.append(Action(INPUT, 0, action.microbatch))
        waiting.append(action.microbatch)
        if len(waiting) > device:
            out.append(Action(WEIGHT, 0, waiting.pop(0)))
    return out + [Action(WEIGHT, 0, i) for i in waiting]


class _Dual:
    """Builds DualPipe's order of one device; `chunk` is the direction as the device sees it (0: the nearer end)."""

    def __init__(self, mirrored: bool) -> None:
        self.mirrored = mirrored
        self.out: list[Action] = []
        self.next = {(k, c): 0 for k in (FORWARD, BACKWARD) for c in (0, 1)}
        self.weights: list[tuple[int, int]] = []

    def _take(self, kind: str, near: int) -> tuple[int, int]:
        chunk = near ^ self.mirrored
        i = self.next[kind, chunk]
        self.next[kind, chunk] += 1
        return chunk, i

    def forward(self, near: int) -> None:
        self.out.append(Action(FORWARD, *self._take(FORWARD, near)))

    def backward(self, near: int, split: bool = False) -> None:
        chunk, i = self._take(BACKWARD, near)
        self.out.append(Action(INPUT if split else BACKWARD, chunk, i))
        if split:
            self.weights.append((chunk, i))

    def weight(self) -> None:
        self.out.append(Action(WEIGHT, *self.weights.pop(0)))

    def both(self, forward: int, backward: int) -> None:
        beside = Action(BACKWARD, *self._take(BACKWARD, backward))
        self.out.append(Action(FORWARD, *self._take(FORWARD, forward), pair=beside))


def dualpipe(device: int, devices: int, microbatches: int, virtual: int) -> list[Action]:
    """The eight phases of DualPipe for M microbatches in all, half from each end; P even, M even and at least 2 P."""
    del virtual
    half, mirrored = devices // 2, device >= devices // 2
    near = min(device, devices - 1 - device)
    d = _Dual(mirrored)
    for _ in range(2 * (half - near - 1)):
        d.forward(0)
    for _ in range(near + 1):
        d.forward(0)
        d.forward(1)
    for _ in range(half - near - 1):
        d.backward(1, split=True)
        d.weight()
        d.forward(1)
    for i in range(microbatches // 2 - devices + near + 1):
        if i == 0 and near == half - 1:
            # The middle devices have just sent what the other needs: nothing to overlap yet.
            d.forward(0)
            d.backward(1)
        else:
            d.both(0, 1)
        d.both(1, 0)
    for _ in range(half - near - 1):
        d.backward(1)
        d.both(1, 0)
    split = False
    for i in range(near + 1):
        if i == (near + 1) // 2 and near % 2 == 1:
            split = True
        d.backward(1, split)
        if i == (near + 1) // 2 and near % 2 == 0:
            split = True
        d.backward(0, split)
    for _ in range(half - near - 1):
        d.weight()
        d.backward(0, split=True)
    for _ in range(near + 1):
        if d.weights:
            d.weight()
    while d.weights:
        d.weight()
    return d.out


ORDERS: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "dualpipe": dualpipe,
}


def model_stage(schedule: str, device: int, chunk: int, devices: int) -> int:
    """Index, in the order of the model's layers, of the (virtual) stage that `chunk` of `device` is."""
    if schedule == "dualpipe":
        return device if chunk == 0 else devices - 1 - device
    return chunk * devices + device


def place_of(schedule: str, stage: int, devices: int, direction: int) -> tuple[int, int]:
    """(device, chunk) that holds model stage `stage`; `direction` tells DualPipe's two copies apart."""
    if schedule == "dualpipe":
        return (stage, 0) if direction == 0 else (devices - 1 - stage, 1)
    return stage % devices, stage // devices

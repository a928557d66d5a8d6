"""Measured times that are on file, checked: the kernels that take most of a step are timed again.

Whatever disturbs a kernel (another process, a cold clock) makes it slower, never faster. So a time that turns out shorter shows
that the first measurement was disturbed: the kernel is measured anew, and the shortest of its times counts, this check's among
them. One that turns out longer replaces nothing: the machine may be busy now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from planner.log import PROFILER
from planner.profiler.profile import KernelCost

_SHARE = 0.5
"""Kernels are timed again until they cover this part of a step."""
_MOST = 5
"""Or until there are this many."""
_MOST_NS = 2_000_000_000
"""Or until timing them is expected to take so long, in ns."""
_CALLS = 8
"""Calls of a kernel while it is timed again: warm-up, and a few pairs."""
_TOLERANCE = 0.1
"""Part by which times that agree among themselves may differ from another process's: memory lies elsewhere, clocks drift."""


def kernels_to_recheck(known: Mapping[str, KernelCost], counts: Mapping[str, int]) -> list[str]:
    """The kernels to time again: those that take most of a step, within bounds.

    Args:
        known: measured costs.
        counts: how often a step calls each kernel.
    """
    total_ns = sum(known[key].time_ns * counts[key] for key in known)
    found: list[str] = []
    covered_ns = spent_ns = 0
    for key in sorted(known, key=lambda key: (-known[key].time_ns * counts[key], key)):
        if len(found) == _MOST or covered_ns >= _SHARE * total_ns:
            break
        call_ns = known[key].time_ns
        if call_ns and spent_ns + _CALLS * call_ns <= _MOST_NS:
            found.append(key)
            spent_ns += _CALLS * call_ns
            covered_ns += call_ns * counts[key]
    return found


@dataclass(frozen=True, slots=True)
class Checked:
    """What timing kernels again has shown, by kernel: (time on file, time now) in ns of one step's calls.

    Attributes:
        same: within the spread.
        faster: beyond it.
        slower: beyond it.
        times: costs as timed now, whose workspace may be left out.
    """

    same: Mapping[str, tuple[int, int]]
    faster: Mapping[str, tuple[int, int]]
    slower: Mapping[str, tuple[int, int]]
    times: Mapping[str, KernelCost]

    @property
    def was_disturbed(self) -> bool:
        """Most of the time that was checked is of kernels that are faster now: so are probably those that were not checked."""
        first = {name: sum(before for before, _ in getattr(self, name).values()) for name in ("same", "faster", "slower")}
        return first["faster"] > first["same"] + first["slower"]

    def log(self, known: Mapping[str, KernelCost], counts: Mapping[str, int], num_again: int) -> None:
        """Say what was found, and how many kernels are measured anew."""
        step_ns = sum(known[key].time_ns * counts[key] for key in known)
        pairs = [*self.same.values(), *self.faster.values(), *self.slower.values()]
        share = sum(before for before, _ in pairs) / max(1, step_ns)
        text = "timed %d kernels on file again, %.0f %% of the step's time: %d differ beyond their spread"
        about = (len(pairs), 100 * share, len(self.faster) + len(self.slower))
        if not self.faster and not self.slower:
            PROFILER.info(text, *about)
        if self.faster:
            more = "; %d are faster by %.0f %%, so the first measurement was disturbed: %d kernels are measured anew"
            PROFILER.info(text + more, *about, len(self.faster), -_change(self.faster.values()), num_again)
        if self.slower:
            more = "; %d are slower by %.0f %%: this machine may be busy, their times are kept (remeasure=True replaces them)"
            PROFILER.info(text + more, *about, len(self.slower), _change(self.slower.values()))


def _change(pairs: Iterable[tuple[int, int]]) -> float:
    before, now = map(sum, zip(*pairs, strict=True))
    return 100 * (now / max(1, before) - 1)


def check(
    known: Mapping[str, KernelCost],
    counts: Mapping[str, int],
    time_again: Callable[[list[str]], Iterable[tuple[str, KernelCost]]],
) -> Checked:
    """Time the kernels that take most of a step again.

    Args:
        known: measured costs, by kernel.
        counts: how often a step calls each kernel.
        time_again: times kernels; leaves out those that fail.
    """
    same: dict[str, tuple[int, int]] = {}
    faster: dict[str, tuple[int, int]] = {}
    slower: dict[str, tuple[int, int]] = {}
    times: dict[str, KernelCost] = {}
    for key, now in time_again(kernels_to_recheck(known, counts)):
        pair = (known[key].time_ns * counts[key], now.time_ns * counts[key])
        group = same if agree(known[key], now) else faster if now.time_ns < known[key].time_ns else slower
        group[key], times[key] = pair, now
    return Checked(same, faster, slower, times)


def agree(one: KernelCost, other: KernelCost) -> bool:
    """Two measurements of a kernel differ by no more than the spread of the faster one, which was less disturbed."""
    quiet, loud = sorted((one, other), key=lambda cost: cost.time_ns)
    return loud.time_ns - quiet.time_ns <= max(quiet.spread_ns, _TOLERANCE * quiet.time_ns)

"""Plans for several submodules at once: a ladder of levels for each, from its lowest peak to its plain one."""

from __future__ import annotations

from collections.abc import Mapping

from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.graph.structure import fingerprint
from planner.limits import Limits
from planner.profiled import ProfiledStep, allocator_margin
from planner.results.plan import Plan
from planner.solver.solve import Solver

LEVELS = 8
"""How many steps there are between every submodule at its lowest peak and every submodule plain."""


def plans_by_level(found: Mapping[str, ProfiledStep], limits: Limits) -> dict[str, list[Plan]]:
    """Per submodule, a plan for each level, the lowest peak first. Equal submodules are solved once."""
    groups: dict[str, list[str]] = {}
    for name, step in found.items():
        groups.setdefault(fingerprint(step.graph), []).append(name)
    plans: dict[str, list[Plan]] = {}
    for names in groups.values():
        budgets, solutions = _solutions(found[names[0]], limits.share(1 / len(groups)))
        for name in names:
            mine = found[name]
            margins = [allocator_margin(mine.graph, budget) for budget in budgets]
            rows = zip(budgets, margins, solutions, strict=True)
            plans[name] = [Plan(mine.graph, budget, margin, solution, mine.provenance) for budget, margin, solution in rows]
    return plans


def _solutions(step: ProfiledStep, limits: Limits) -> tuple[list[int], list[Solution]]:
    """Budgets from the lowest peak found to the plain one, evenly spaced, and the solutions; the plain one always fits."""
    graph = step.graph
    solver = Solver(graph)
    high = simulate(graph, keep_all(graph)).peak_bytes
    low = solver.lowest_peak(limits.share(1 / 3))
    low = min(high, low + allocator_margin(graph, low))
    budgets = [low + (high - low) * k // LEVELS for k in range(LEVELS + 1)]
    free = [budget - allocator_margin(graph, budget) for budget in budgets]
    answers = solver.sweep(free, limits.share(2 / 3))
    rows = [(budget, answers[capacity]) for budget, capacity in zip(budgets, free, strict=True)]
    solved = [(budget, answer) for budget, answer in rows if isinstance(answer, Solution)]
    padded = [solved[0]] * (len(rows) - len(solved)) + solved  # a level that has no plan takes the next one's
    return [budget for budget, _ in padded], [solution for _, solution in padded]

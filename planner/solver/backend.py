"""The one place that talks to PuLP and HiGHS: a mixed-integer program as plain lists, and its answer.

PuLP writes the model. Rows, columns and bounds that come later go to HiGHS's own model, which then starts from where it
stood. Effort is counted: linear programs stop after a number of simplex iterations, integer ones after a number of HiGHS's
calls of the interrupt callback, which come at the same points of every run of one thread (a limit of nodes would not help:
nearly all time goes into the root).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any, Literal

import pulp

from planner.errors import SolverMissingError
from planner.solver.tuning import BUILD_UNITS, LP_UNITS, MIP_UNITS
from planner.solver.work import Work

_INTEGER = 1e-6
"""A column so near to an integer is one: HiGHS's own tolerance."""

SCALE = 1e4
"""What the largest sum of a program's costs, or of a memory row, is brought to: HiGHS's tolerances are absolute."""

Status = Literal["optimal", "feasible", "infeasible", "unknown", "failed"]
_STOPPED = ("kIterationLimit", "kTimeLimit", "kInterrupt")
Pairs = list[tuple[int, float]]
"""A linear expression: (column, coefficient)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the solver said.

    Attributes:
        status: "optimal" (within the gap asked for), "feasible" (stopped early), "infeasible" (proven),
            "unknown" (stopped early, with nothing), "failed" (HiGHS gave up: more work would not help).
        values: one per column; empty unless optimal or feasible.
        bound: no solution has a smaller objective; -inf where nothing was proven, inf where infeasible.
        objective: of `values`; inf without.
    """

    status: Status
    values: tuple[float, ...]
    bound: float
    objective: float = math.inf


@dataclass(slots=True)
class Program:
    """Minimise a linear cost over columns in [0, upper] under rows `sum(coefficient * column) <= limit`."""

    costs: list[float] = field(default_factory=list)
    uppers: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[tuple[Pairs, float]] = field(default_factory=list)

    def column(self, cost: float = 0.0, *, upper: float = 1.0, binary: bool = False) -> int:
        """Add a column with lower bound 0 and return its index."""
        self.costs.append(cost)
        self.uppers.append(upper)
        self.binary.append(binary)
        return len(self.costs) - 1

    def row(self, pairs: Pairs, limit: float) -> None:
        """Require `sum(coefficient * column) <= limit`; a column may occur more than once."""
        self.rows.append((pairs, limit))


def solve(program: Program, work: Work, *, gap: float = 0.0, relax: bool = False) -> Answer:
    """Solve once; see `Model.solve`."""
    return Model(program).solve(work, gap=gap, relax=relax)


class Model:
    """A program that is solved again after small changes, by HiGHS from where it stood.

    Columns and rows may be added to `program` between two solves; what is there already changes by the methods.
    """

    def __init__(self, program: Program) -> None:
        """Raises SolverMissingError where HiGHS cannot be run."""
        require_highs()
        self.program = program
        self._highs: Any = None
        self._num_columns = self._num_rows = self._num_entries = 0
        self._fixed: dict[int, int] = {}

    def upper(self, column: int, upper: float) -> None:
        """Change a column's upper bound."""
        self.program.uppers[column] = upper
        self._bounds(column, 0.0, upper)

    def cost(self, column: int, cost: float) -> None:
        """Change a column's cost."""
        self.program.costs[column] = cost
        if self._highs is not None and column < self._num_columns:
            self._highs.changeColCost(column, cost)

    def relax_and_fix(self, work: Work, *, gap: float = 0.0) -> Answer:
        """Solve the linear program, and in integers only what it leaves fractional: that much smaller a program is quick.

        Where that is not within the gap of the linear optimum, solve the whole.
        """
        linear = self.solve(work, relax=True)
        if linear.status != "optimal":
            return linear
        at = {i: round(x) for i, x in enumerate(linear.values) if self.program.binary[i] and abs(x - round(x)) <= _INTEGER}
        self._fix(at)
        try:
            answer = self.solve(work, gap=gap)
        finally:
            self._fix({})
        if answer.values and answer.objective <= linear.bound + gap:
            return replace(answer, status="optimal", bound=linear.bound)
        whole = self.solve(work, gap=gap)
        return whole if whole.values or not answer.values else replace(answer, status="feasible", bound=linear.bound)

    def _fix(self, at: Mapping[int, int]) -> None:
        """Hold these columns where they are, and let go those held before."""
        for column in sorted(self._fixed.keys() | at.keys()):
            self._bounds(column, at.get(column, 0), at.get(column, self.program.uppers[column]))
        self._fixed = dict(at)

    def _bounds(self, column: int, lower: float, upper: float) -> None:
        if self._highs is not None and column < self._num_columns:
            self._highs.changeColBounds(column, lower, upper)

    def solve(self, work: Work, *, gap: float = 0.0, relax: bool = False, prove: bool = False) -> Answer:
        """Solve as the program is now.

        Args:
            work: what may be spent; with a solution found by then the status is "feasible". An integer program starts again in
                each call: give it more work than in the last one.
            gap: absolute, in units of the objective.
            relax: drop integrality; then `bound` is the optimum of the linear program.
            prove: it is the bound that matters: no effort for HiGHS's heuristics.
        """
        relax = relax or not any(self.program.binary)
        answer = self._solve(work, gap, relax, prove)
        if self._is_stale(answer):
            self._highs = None
            answer = self._solve(work, gap, relax, prove)
        return answer

    def _solve(self, work: Work, gap: float, relax: bool, prove: bool) -> Answer:
        self._bring_up_to_date(work)
        highs, options = self._highs, {"mip_abs_gap": gap, "solve_relaxation": relax}
        options["mip_heuristic_effort"] = 0.0 if prove else 0.05  # HiGHS's own default
        if relax:
            options["simplex_iteration_limit"] = 1 + int(min(work.left / LP_UNITS, 2**31 - 2))
            self._run(options, work)
            work.charge(LP_UNITS * (1 + highs.getInfo().simplex_iteration_count))
        else:
            price = MIP_UNITS * (1 + self._num_entries)
            calls = _Calls(1 + int(min(work.left / price, 2**31)))
            highs.clearSolver()  # HiGHS 1.16 may return the last solution of the program before it was changed
            highs.cbMipInterrupt.subscribe(calls)
            try:
                self._run(options | {"simplex_iteration_limit": 2**31 - 1}, work)
            finally:
                highs.cbMipInterrupt.unsubscribe(calls)
            work.charge(price * (1 + calls.count))
        return self._read(mip=not relax)

    def _run(self, options: Mapping[str, Any], work: Work) -> None:
        highs = self._highs
        # The clock of linear programs runs on from solve to solve, that of integer ones starts at 0.
        limit_s = max(0.05, work.seconds) + (highs.getRunTime() if options["solve_relaxation"] else 0.0)
        for name, value in {**options, "time_limit": limit_s}.items():
            highs.setOptionValue(name, value)
        highs.run()
        if highs.getModelStatus().name == "kNotset":
            # The number of threads is global to the process: somebody else has already chosen another one.
            highs.setOptionValue("threads", 0)
            highs.run()

    def _is_stale(self, answer: Answer) -> bool:
        """Solved again after a change, HiGHS 1.16 may return the last solution with the new objective (1 in 1000, seen)."""
        cost = sum(cost * value for cost, value in zip(self.program.costs, answer.values, strict=False))
        return bool(answer.values) and abs(cost - answer.objective) > 1e-6 * max(1.0, abs(answer.objective))

    def _bring_up_to_date(self, work: Work) -> None:
        """Build HiGHS's model, or add what came to the program since the last solve."""
        program, entries = self.program, self._num_entries
        if self._highs is None:
            self._highs, entries = _build(program), 0
            self._num_columns, self._num_rows, self._num_entries = len(program.costs), 0, 0
            for column, value in self._fixed.items():
                self._bounds(column, value, value)
        else:
            for column in range(self._num_columns, len(program.costs)):
                self._highs.addCol(program.costs[column], 0.0, program.uppers[column], 0, [], [])
                if program.binary[column]:
                    self._highs.changeColIntegrality(column, _highspy().HighsVarType.kInteger)
            self._num_columns = len(program.costs)
            for pairs, limit in program.rows[self._num_rows :]:
                summed = _summed(pairs)
                self._highs.addRow(-math.inf, limit, len(summed), list(summed), list(summed.values()))
        self._num_entries += sum(len(pairs) for pairs, _ in program.rows[self._num_rows :])
        self._num_rows = len(program.rows)
        work.charge(BUILD_UNITS * (self._num_entries - entries))

    def _read(self, *, mip: bool) -> Answer:
        facts, name = self._highs.getInfo(), self._highs.getModelStatus().name
        if name in ("kInfeasible", "kUnboundedOrInfeasible"):  # costs are >= 0 over columns >= 0: never unbounded
            return Answer("infeasible", (), math.inf)
        solved = name in ("kOptimal", "kModelEmpty")
        found = solved or (mip and facts.primal_solution_status == 2)
        proven = facts.objective_function_value if solved else -math.inf
        bound = facts.mip_dual_bound if mip else proven
        if not found:
            return Answer("unknown" if name in _STOPPED else "failed", (), bound)
        values = tuple(self._highs.getSolution().col_value)
        return Answer("optimal" if solved else "feasible", values, bound, facts.objective_function_value)


class _Calls:
    """Counts HiGHS's calls of the interrupt callback, and stops it at the last that is allowed."""

    def __init__(self, most: int) -> None:
        self.count, self._most = 0, most

    def __call__(self, event: Any) -> None:
        self.count += 1
        event.interrupt(self.count >= self._most)  # HiGHS keeps what an earlier run was told


@cache
def require_highs() -> None:
    """Raise SolverMissingError where HiGHS cannot be run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3.3 announces the names of PuLP 4
        if not pulp.HiGHS(msg=False).available():
            raise SolverMissingError("HiGHS cannot be run. Install it with `pip install highspy`.")
    _print_banner_nowhere()


@cache
def _highspy() -> Any:
    return import_module("highspy")


def _print_banner_nowhere() -> None:
    """HiGHS writes a line to file descriptor 1 when its first object is made, before any option can be set."""
    with suppress(ImportError), _stdout_closed():
        _highspy().Highs()


@contextmanager
def _stdout_closed() -> Iterator[None]:
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _summed(pairs: Pairs) -> dict[int, float]:
    summed: dict[int, float] = {}
    for i, coefficient in pairs:
        summed[i] = summed.get(i, 0.0) + coefficient
    return summed


def _build(program: Program) -> Any:
    """HiGHS's model of a program, by PuLP; its columns and rows are in the order of the program's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        problem = pulp.LpProblem("planner", pulp.LpMinimize)
        columns = [
            pulp.LpVariable(
                f"x{i:09}", 0, None if math.isinf(upper) else upper, pulp.LpInteger if binary else pulp.LpContinuous
            )
            for i, (upper, binary) in enumerate(zip(program.uppers, program.binary, strict=True))
        ]
        problem.addVariables(columns)
        problem.setObjective(pulp.LpAffineExpression([(columns[i], cost) for i, cost in enumerate(program.costs)]))
        for pairs, limit in program.rows:
            expression = pulp.LpAffineExpression([(columns[i], coefficient) for i, coefficient in _summed(pairs).items()])
            problem.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintLE, rhs=limit))
        solver = pulp.HiGHS(msg=False, gapRel=0.0, threads=1)
        solver.createAndConfigureSolver(problem)
        solver.buildSolverModel(problem)
    assert all(column.index == i for i, column in enumerate(columns)), "PuLP changed the order of the columns"
    return problem.solverModel

"""The one place that talks to PuLP, HiGHS and CBC: a mixed-integer program as plain lists, and its answer."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any, Literal

import pulp

from planner.errors import SolverMissingError

_HEURISTICS = 0.05
"""HiGHS's own share of effort for them."""
_INTEGER = 1e-6
"""A column so near to an integer is one."""

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
Pairs = list[tuple[int, float]]
"""A linear expression: (column, coefficient)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver said.

    Attributes:
        status: "optimal" (within the gap asked for), "feasible" (stopped early), "infeasible" (proven), "unknown".
        values: one per column; empty unless optimal or feasible.
        bound: no solution has a smaller objective; -inf where nothing was proven, inf where infeasible.
        gap: objective less bound.
        solver: "HiGHS" or "CBC".
    """

    status: Status
    values: tuple[float, ...]
    bound: float
    solver: str
    gap: float = math.inf


@dataclass(slots=True)
class Program:
    """Minimise a linear cost over columns in [0, upper] under rows `sum(coefficient * column) <= limit`."""

    costs: list[float] = field(default_factory=list)
    uppers: list[float | None] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[tuple[Pairs, float]] = field(default_factory=list)

    def column(self, cost: float = 0.0, *, upper: float | None = 1.0, binary: bool = False) -> int:
        """Add a column with lower bound 0 and return its index."""
        self.costs.append(cost)
        self.uppers.append(upper)
        self.binary.append(binary)
        return len(self.costs) - 1

    def row(self, pairs: Pairs, limit: float) -> None:
        """Require `sum(coefficient * column) <= limit`; a column may occur more than once."""
        self.rows.append((pairs, limit))


def solve(program: Program, *, time_limit_s: float, gap: float = 0.0, relax: bool = False) -> Answer:
    """Solve once; see `Model.solve`."""
    return Model(program).solve(time_limit_s=time_limit_s, gap=gap, relax=relax)


class Model:
    """A program that is built once and solved again after small changes, by HiGHS from where it stood.

    HiGHS solves it, or CBC, from the beginning each time, where highspy is missing.
    """

    def __init__(self, program: Program) -> None:
        """Raises SolverMissingError where neither solver can be run."""
        self.program = program
        self._name, self._make = _solver()
        self._problem: Any = None
        self._columns: list[Any] = []
        self._solver: Any = None
        self._fixed: dict[int, int] = {}

    def upper(self, column: int, upper: float) -> None:
        """Change a column's upper bound."""
        self.program.uppers[column] = upper
        if self._problem is not None:
            self._bounds(column, 0.0, upper)

    def cost(self, column: int, cost: float) -> None:
        """Change a column's cost."""
        self.program.costs[column] = cost
        if self._problem is not None and self._name == "HiGHS":
            self._problem.solverModel.changeColCost(self._columns[column].index, cost)

    def relax_and_fix(self, *, time_limit_s: float, gap: float = 0.0) -> Answer:
        """Solve the linear program, and in integers only what it leaves fractional: that much smaller a program is quick.

        Where that is not within the gap of the linear optimum, solve the whole.
        """
        end = time.monotonic() + time_limit_s
        linear = self.solve(time_limit_s=time_limit_s, relax=True)
        if linear.status != "optimal":
            return linear
        at = {i: round(x) for i, x in enumerate(linear.values) if self.program.binary[i] and abs(x - round(x)) <= _INTEGER}
        self._fix(at)
        try:
            answer = self.solve(time_limit_s=end - time.monotonic(), gap=gap)
        finally:
            self._fix({})
        if answer.values and answer.bound + answer.gap <= linear.bound + gap:
            return replace(answer, status="optimal", bound=linear.bound, gap=answer.bound + answer.gap - linear.bound)
        return self.solve(time_limit_s=end - time.monotonic(), gap=gap)

    def _fix(self, at: Mapping[int, int]) -> None:
        """Hold these columns where they are, and let go those held before."""
        for column in self._fixed.keys() | at.keys():
            if self._problem is not None:
                self._bounds(column, at.get(column, 0), at.get(column, self.program.uppers[column]))
        self._fixed = dict(at)

    def _bounds(self, column: int, lower: float, upper: float | None) -> None:
        self._columns[column].lowBound, self._columns[column].upBound = lower, upper
        if self._name == "HiGHS":
            self._problem.solverModel.changeColBounds(self._columns[column].index, lower, math.inf if upper is None else upper)

    def solve(self, *, time_limit_s: float, gap: float = 0.0, relax: bool = False, prove: bool = False) -> Answer:
        """Solve as the program is now.

        Args:
            time_limit_s: wall seconds; with a solution found by then the status is "feasible".
            gap: absolute, in units of the objective.
            relax: drop integrality; then `bound` is the optimum of the linear program.
            prove: it is the bound that matters: no time for HiGHS's heuristics.
        """
        seconds = max(0.05, time_limit_s)
        with warnings.catch_warnings():
            # PuLP 3.3 announces the names of PuLP 4; both 3.x spellings must work here.
            warnings.simplefilter("ignore", DeprecationWarning)
            if self._name == "CBC":
                problem, columns = _build(self.program, self._fixed)
                solver = self._make(msg=False, mip=not relax, timeLimit=seconds, gapAbs=gap, gapRel=0.0, threads=1)
                return _run_cbc(problem, columns, solver, gap=gap, relax=relax)
            _print_banner_nowhere()
            options = {"mip_abs_gap": gap, "solve_relaxation": relax, "mip_heuristic_effort": 0.0 if prove else _HEURISTICS}
            answer = self._solve_highs(seconds, options)
            if self._is_stale(answer):
                self._problem = None
                answer = self._solve_highs(seconds, options)
        return answer

    def _solve_highs(self, seconds: float, options: dict[str, Any]) -> Answer:
        self._run(seconds, options, threads=1)
        if self._problem.solverModel.getModelStatus().name == "kNotset":
            # The number of threads is global to the process: somebody else has already chosen another one.
            self._problem = None
            self._run(seconds, options, threads=None)
        return _read_highs(self._problem, self._columns, mip=not options["solve_relaxation"] and any(self.program.binary))

    def _is_stale(self, answer: Answer) -> bool:
        """Solved again after a change, HiGHS 1.16 may hand out the last solution with the new objective (1 in 1000, seen)."""
        objective = answer.bound + answer.gap
        cost = sum(cost * value for cost, value in zip(self.program.costs, answer.values, strict=False))
        return bool(answer.values) and abs(cost - objective) > 1e-6 * max(1.0, abs(objective))

    def _run(self, seconds: float, options: dict[str, Any], threads: int | None) -> None:
        if self._problem is None:
            self._problem, self._columns = _build(self.program, self._fixed)
            self._solver = self._make(msg=False, gapRel=0.0, threads=threads)
            self._solver.createAndConfigureSolver(self._problem)
            self._solver.buildSolverModel(self._problem)
        model = self._problem.solverModel
        # The clock of linear programs runs on from solve to solve, that of integer ones starts anew.
        spent = 0.0 if any(self.program.binary) and not options["solve_relaxation"] else model.getRunTime()
        for name, value in {**options, "time_limit": spent + seconds}.items():
            model.setOptionValue(name, value)
        self._solver.callSolver(self._problem)


def solver_name() -> str:
    """The name of the solver that `solve` uses: HiGHS or CBC.

    Raises:
        SolverMissingError: neither can be run.
    """
    return _solver()[0]


def _solver() -> tuple[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name, make in (("HiGHS", pulp.HiGHS), ("CBC", pulp.PULP_CBC_CMD), ("CBC", pulp.COIN_CMD)):
            if make(msg=False).available():
                return name, make
    raise SolverMissingError(
        "neither HiGHS nor CBC can be run. Install HiGHS with `pip install highspy`, or CBC with `pip install 'pulp[cbc]'`."
    )


@cache
def _print_banner_nowhere() -> None:
    """HiGHS writes a line to file descriptor 1 when its first object is made, before any option can be set."""
    with suppress(ImportError), _stdout_closed():
        highspy: Any = import_module("highspy")
        highspy.Highs()


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


def _build(program: Program, fixed: Mapping[int, int]) -> tuple[Any, list[Any]]:
    problem = pulp.LpProblem("planner", pulp.LpMinimize)
    columns = [
        pulp.LpVariable(f"x{i}", fixed.get(i, 0), fixed.get(i, upper), pulp.LpInteger if binary else pulp.LpContinuous)
        for i, (upper, binary) in enumerate(zip(program.uppers, program.binary, strict=True))
    ]
    problem.setObjective(pulp.LpAffineExpression([(columns[i], cost) for i, cost in enumerate(program.costs)]))
    for pairs, limit in program.rows:
        summed: dict[int, float] = {}
        for i, coefficient in pairs:
            summed[i] = summed.get(i, 0.0) + coefficient
        expression = pulp.LpAffineExpression([(columns[i], coefficient) for i, coefficient in summed.items()])
        problem.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintLE, rhs=limit))
    return problem, columns


def _read_highs(problem: Any, columns: list[Any], *, mip: bool) -> Answer:
    model = problem.solverModel
    facts, name = model.getInfo(), model.getModelStatus().name
    if name in ("kInfeasible", "kUnboundedOrInfeasible"):  # costs are >= 0 over columns >= 0: never unbounded
        return Answer("infeasible", (), math.inf, "HiGHS")
    solved = name in ("kOptimal", "kModelEmpty")
    found = solved or (mip and facts.primal_solution_status == 2)
    proven = facts.objective_function_value if solved else -math.inf
    bound = facts.mip_dual_bound if mip else proven
    if not found:
        return Answer("unknown", (), bound, "HiGHS")
    by_index = model.getSolution().col_value
    values = tuple(by_index[column.index] for column in columns)
    return Answer("optimal" if solved else "feasible", values, bound, "HiGHS", facts.objective_function_value - bound)


def _run_cbc(problem: Any, columns: list[Any], solver: Any, *, gap: float, relax: bool) -> Answer:
    problem.solve(solver)
    if problem.sol_status == pulp.LpSolutionInfeasible:
        return Answer("infeasible", (), math.inf, "CBC")
    solved = problem.sol_status == pulp.LpSolutionOptimal
    if not solved and problem.sol_status != pulp.LpSolutionIntegerFeasible:
        return Answer("unknown", (), -math.inf, "CBC")
    values = tuple(0.0 if column.varValue is None else float(column.varValue) for column in columns)
    objective = sum(coefficient * column.varValue for column, coefficient in problem.objective.items() if column.varValue)
    # PuLP does not hand on CBC's dual bound; an optimal end is within the gap, an early one proves nothing.
    bound = objective - (0.0 if relax else gap) if solved else -math.inf
    return Answer("optimal" if solved else "feasible", values, bound, "CBC", objective - bound)

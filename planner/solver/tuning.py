"""The tuned constants, each with its unit and its reason. Tolerances, scales and fixed grids stand where they are used."""

from __future__ import annotations

# Prices of work, in units of about a second of one core; measured on the programs of the corpus (benchmarks/graphs).
LP_UNITS = 15e-6
"""One simplex iteration: 9 to 28 us in small and large programs."""
MIP_UNITS = 1.7e-6
"""One interrupt callback of HiGHS's integer solver, for each non-zero: most of them 1 to 5 us."""
BUILD_UNITS = 4e-6
"""One non-zero brought into a model: 4 to 11 us."""
EVENT_UNITS = 1e-7
"""One event (a read or a write) of a simulated schedule, with what is done around it; a simulation costs 300 more."""

# When to stop.
GAP = 0.001
"""How far from the optimum to stop, as a fraction of the plain step's time: a thousandth is within the noise of a step."""
PATIENCE = 32.0
"""Units of work for a gap of one percent of the plain step: a gap of g percent is accepted after PATIENCE * g**2, for g up to
0.5, so that the smaller the gap, the sooner the search ends. With a wider one it goes on until its work is spent."""
FIRST_SLICE = 0.1
"""Work of each stage's first slice, about one linear program; each further slice is twice as large as the last."""
BACKSTOP = 30.0
"""Wall seconds for each unit of work after which the clock ends a search: even a busy machine is not that slow."""

# How closely to look.
FEW = 3
"""How many cuts, schedules or tries are looked at where one is not enough, and how many ops apart or around count as near: of
more, the later ones hardly ever bring anything. Lists that are cheap to look at are some `FEW` long."""
SLACK = 0.1
"""Share of the budget: a schedule that misses it by less is worth making fit, a cut that leaves less room makes a program easy;
half of it is what a value takes that is heavy."""
PIECES = 100
"""Into how many pieces a forward is cut at most; half as many where each may be recomputed more than once."""
NARROW = 1.02
"""Bytes that cross a place in the forward, over the fewest around it, up to which it may be cut there: a recurrent net carries
a little more from step to step."""

# Derived.
LOOSE_GAP = 5 * GAP
"""A gap that is good enough once `PATIENCE` for it is spent; below it no further stage is begun."""
LEVELS = 20 * PIECES
"""Steps in which the tables over pieces count a budget."""

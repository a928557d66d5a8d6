"""Every constant that was tuned, each with its unit and its reason."""

from __future__ import annotations

LP_UNITS = 15e-6
"""Work of one simplex iteration: 9 to 28 us on programs of the corpus, whatever their size."""
MIP_UNITS = 1.7e-6
"""Work of one interrupt callback of HiGHS's integer solver, for each non-zero: 1 to 8 us, most of them 2 to 5."""
BUILD_UNITS = 4e-6
"""Work of bringing one non-zero into a model: 4 to 11 us."""
EVENT_UNITS = 1e-7
"""Work of one event (a read or a write) of a simulated schedule, with what is done around it; a simulation has 300 more."""
FEW = 3
"""Cuts, rows or copies that are looked at together, and how far apart cuts lie: one more a round costs more than it says."""
CROWDED = 0.9
"""Share of the budget that an op must need by itself to be a cut from the first round on."""
MOMENTS_UNITS = 30.0
"""Work in which heavy values can be watched between two cuts; one cut takes a few."""
PIECES = 100
"""Into how many pieces a forward is cut at most; half as many where each may be recomputed more than once."""
OPTIONS = 8
"""Ways to keep some of a run's values, beside keeping all and none: more change the plan by less than a thousandth."""
LEVELS = 1000
"""Steps of memory that stand for the budget."""
MOST_ROOM = 1.6
"""Share of the budget up to which a rough count of memory may go: it is on the careful side."""
WINDOW_UNITS = 3.0
"""Work of one program of the neighbourhood search: what is not found by then takes too long, and fewer choices are opened."""
GAP = 0.001
"""How far from the optimum to stop, as a fraction of the plain step's time: a thousandth is within the noise of a step."""
NEAR = 1.1
"""Peak over budget up to which a schedule of segments is worth making fit."""
PATIENCE = 32.0
"""Work that a gap of one percent of the step is worth; twice as wide a gap is worth four times as much."""
FIRST_SLICE = 0.1
"""Work that every stage gets in the first turn; a turn gives twice as much as the one before."""
EFFORT = 10.0
"""Work for one budget, if nobody says."""
BACKSTOP = 10.0
"""Wall seconds for each unit of work after which the clock ends a search."""
TINY_OPS = 10
"""Up to so many ops, every schedule is looked at."""
JUDGED_UNITS = 4e-6
"""Work of one step of a schedule that is judged on the original graph."""

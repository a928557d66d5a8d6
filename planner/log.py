"""The loggers of this package: "planner" and, below it, one for each subpackage.

DEBUG is detail (one kernel, one measured step), INFO a step of planning, WARNING what changes what the user gets. The package
adds no handler that writes: nothing is shown until a program configures `logging`. Nothing is logged in a planned step that
has been seen before.
"""

from __future__ import annotations

import logging

PLANNER = logging.getLogger("planner")
"""What `plan`, `sweep`, `max_batch` and `plan_units` do, one line a step."""
TRACER = logging.getLogger("planner.tracer")
"""Captures: what was captured, again and why, which submodules run as they are."""
PROFILER = logging.getLogger("planner.profiler")
"""Kernels: measured, found in the cache, or not to be measured and why."""
SOLVER = logging.getLogger("planner.solver")
"""Stages of the solver, each slice with its work and what it gained."""
VERIFICATION = logging.getLogger("planner.verification")
"""Steps that were run and measured, and plans that were made again for less."""
RUNTIME = logging.getLogger("planner.runtime")
"""What is captured while the model trains: other shapes, other backwards."""

PLANNER.addHandler(logging.NullHandler())

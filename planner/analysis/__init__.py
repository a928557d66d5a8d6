"""Questions about a graph that the solver answers, as plain data: many budgets, why a plan is as it is, reference schedules."""

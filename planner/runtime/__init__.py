"""What exists while a planned step runs.

module.py       CheckpointedModule: what happens in one training call, from top to bottom
guards/         whether a call, the model and Python's state are those the plan was made for
executable.py   the step's graphs compiled for one model; autograd.py runs them as autograd Functions
outputs.py      the model's output, and Python state, made of the graph's results
other_*.py      calls of other sizes; backwards that the plan was not made for
in_flight.py    forwards that wait and found_gradients.py gradients that are there, beside what the plan counts: said once
garbage.py      planning within a step leaves nothing that holds the step's tensors
audit.py        the original forward beside the planned one, now and then
ranks.py        ranks of a distributed job compare their plans
install.py      the user's own model trains planned
"""

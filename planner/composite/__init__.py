"""Plans of a model's units: submodules that are planned one by one and called by the model's own Python code.

unit_names.py     which submodules are units
training_step.py  a real step of a model: its output, what it holds, its peak
trial.py          steps of a copy of the model, with planned units
in_place.py       other tensors in a call's own lists and dictionaries, while a step is observed
kinds.py          equal units captured, profiled and solved once
search.py         a point of its front for each unit, within the budget
verify.py         planned and plain steps compared
planned.py        what users hold
units.py          plan_units, apply_units
"""

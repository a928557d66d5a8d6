"""Plans of a model's units: submodules that are planned one by one and called by the model's own Python code.

choose.py   which submodules are units
trial.py    real steps of a copy of the model
kinds.py    equal units captured, profiled and solved once
search.py   a point of its front for each unit, within the budget
planned.py  what users hold
units.py    plan_units, apply_units
"""

"""Guards: a planned step runs only where everything that the capture held fixed is still the same.

call.py compares a call with the one that was planned for, and asks the other two: model_state.py about the model's modules,
hooks and tensors, host_state.py about Python's state. Each answers with a `Mismatch` (mismatch.py), or None. backward.py
compares, when a backward begins, what code of the model's own reads there.
"""

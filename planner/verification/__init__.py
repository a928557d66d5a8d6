"""Runs planned steps to see whether they are exact, keep their budget, and how long they take.

check_step.py  one step at the end of `plan`
measured.py    peak and time of a planned step; plans again for less where the step needs more
verify.py      planned and plain steps side by side, on copies
"""

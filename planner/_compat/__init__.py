"""The one home of torch's and inductor's private names: importing it checks that the installed torch has them.

`private_names.py` lists them. The other files are the functions that use them, by subject.

Raises:
    UnsupportedTorchError: a name is missing.
"""

from planner._compat.private_names import REQUIRED, check

check(REQUIRED)

"""One thread: the models are tiny, and on a busy machine threads that wait for one another take most of a step's time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start inherit it

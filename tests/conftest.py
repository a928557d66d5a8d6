"""One thread: the models are tiny, and threads waiting for one another took most of the time (30 times as long, measured)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start inherit it

"""A differential fuzzer: random models with random Python around the kernels, trained by eager and by a plan.

`python -m tests.fuzz --seed 17` runs one case and shows its program; `--cases 10000 --start 0` runs many, in processes of 200.
"""

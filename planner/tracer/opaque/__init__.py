"""Submodules that run as they are: which ones, how their calls are recorded, traced and run inside a planned step."""

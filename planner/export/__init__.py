"""Writes a planned step as one Python file that needs torch alone.

A room above the runtime, not part of the rewriter: a file holds the rewriter's graphs and also what the runtime does around
them, so it reads the runtime's step, guards and model.

source.py      export_source: the file's parts put together
lines.py       a graph as statements; body.py their text; fold.py repeated blocks as functions; names.py names and literals
skeleton.py    the model's parameters, arguments and outputs as text
standalone.py  code that is copied into every file
"""

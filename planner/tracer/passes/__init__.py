"""The normal form, one pass per file: each takes a `TracedGraph` and changes it in place. `normalize.PASSES` is their order."""

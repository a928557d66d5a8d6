"""Kernels of a captured graph: the package's own, keys of their calls, and facts about them."""

"""Kernels of a captured graph: the package's own, what makes two calls the same, and what is known of each."""

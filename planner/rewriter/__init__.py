"""A schedule turned back into a module that trains."""

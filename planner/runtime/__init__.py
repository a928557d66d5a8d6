"""What exists while a step runs: the planned module, its autograd functions, guards, install."""

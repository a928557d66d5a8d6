"""Models that the tests and the benchmarks train: `build()` returns `(model, args, kwargs)`."""

"""Private names of torch and inductor."""

"""What running a planned step shows: whether it is exact, keeps its budget, and how long it takes."""

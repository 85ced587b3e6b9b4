"""Numbers without a model: T x T solvers, long rows and their inner products."""

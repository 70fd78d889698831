"""Training steps: pure functions (state, batch) -> (state, metrics)."""

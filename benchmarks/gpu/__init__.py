"""A plan for a GPU that is there for a quarter of an hour: what is measured on it, in order of value."""

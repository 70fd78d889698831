"""The folder of a run: its config, checkpoints, metrics, lock and results."""

"""Configs of the experiments: `--config=NAME` of a command is NAME.py here."""

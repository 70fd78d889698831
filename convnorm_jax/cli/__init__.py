"""The commands: `convnorm train`, `eval`, `sweep`, `spectra` and `export`."""

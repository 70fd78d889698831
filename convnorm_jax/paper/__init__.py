"""The claims of the paper (arXiv 2103.00673) as a grid of runs: what is run, the fair protocol, and the statistics."""

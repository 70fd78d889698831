"""Training steps: pure functions (state, batch) -> (state, metrics).

- ``state``: the state of a run, its optimizer, the average of its parameters
- ``classify``: the clean training step and the evaluation step
- ``adversarial``: Free, Fast, PGD and TRADES training
- ``gan``, ``gan_losses``: the step of a GAN and its losses
"""

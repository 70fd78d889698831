"""Measures a trained model: accuracy, robustness, generated images, spectra and operator norms of its layers.

- ``classifier``: clean and robust accuracy
- ``suite``: the standard suite of robustness measurements
- ``spectral``, ``operators``, ``layers``: spectra and operator norms
- ``sampler``, ``features``, ``generative``, ``inception``, ``inception_weights``: the scores of a GAN
"""

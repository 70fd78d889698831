"""What a trained model is worth: accuracy, robustness, generated pictures, spectra of its layers."""

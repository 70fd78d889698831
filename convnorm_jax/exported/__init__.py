"""Saves a trained net as one file that runs without its code (`save.save_exported`), and loads it (`load`)."""

"""A trained net as one file that runs without its code: `save.save_exported` and `load.load_exported`."""

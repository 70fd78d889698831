"""The config of a run that is there, for commands that only read it."""


def run_config(workdir):
    """The config of the run in a folder, checked; keys that are younger than the run have their defaults.

    Raises:
      ValueError: there is no run, or its config cannot be used.
    """
    from convnorm_jax.configs import default
    from convnorm_jax.runs.workdir import load_config
    from convnorm_jax.training.config import check_config

    config = default.get_config()
    _fill(config, load_config(workdir))
    check_config(config)
    return config


def _fill(config, saved):
    for key, value in saved.items():
        if isinstance(value, dict) and key in config:
            _fill(config[key], value)
        elif key in config:
            with config.ignore_type():
                config[key] = tuple(value) if isinstance(value, list) else value

"""From a config to a trained net: nets, batches, schedules, the one training loop."""

"""Training: the driver, the worker's loop, the step, checkpoints and metrics."""

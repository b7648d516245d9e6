"""Training: the state, the step and the loop, the lock of a workdir, metrics and the report."""

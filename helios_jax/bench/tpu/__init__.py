"""A performance model of any TPU program: its schedule, read from the compiler, and its time."""

"""What is right: float64 oracles, the cases they judge, and bounds that an error must keep."""

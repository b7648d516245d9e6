"""Compiles whole steps for TPUs, and compares the planner's predictions with them."""

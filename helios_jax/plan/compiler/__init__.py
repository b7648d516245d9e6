"""What the compiler makes of a whole step for TPUs, and how near the planner comes to it."""

"""What knows Lightning's loops: flags, steps, resuming, evaluation, and what is refused."""

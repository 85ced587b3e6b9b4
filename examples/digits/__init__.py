"""The two-digit problem: classify one digit and reconstruct the other from one shared code."""

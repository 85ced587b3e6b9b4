"""The ways of taking gradients, one file each."""

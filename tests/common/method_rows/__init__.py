"""Rows of the table of methods, by family."""

"""Modules of libraries that `make ci` does not install are imported by their slow tests alone."""

# Otherwise the search for doctests would import them at collection.
collect_ignore = ["bert.py", "gcn.py", "mpnn.py"]

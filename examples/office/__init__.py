"""Office-31 and Office-Home: one label set in several domains, each a task with its own images."""

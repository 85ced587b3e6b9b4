"""Settings of the rows of a comparison: tried on validation data, the best of them reported."""

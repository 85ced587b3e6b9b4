"""One training step, from the losses of a batch to the record of what was done."""

"""Two logic gates on two shared neurons: the ablation of the tensioner paper, tables 1 to 4."""

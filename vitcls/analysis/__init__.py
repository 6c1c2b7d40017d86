"""Reports and comparisons of runs, made from their workdirs and checkpoints."""

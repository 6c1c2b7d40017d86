"""What runs left, read and weighed: reports, comparisons. Reads workdirs and checkpoints only."""

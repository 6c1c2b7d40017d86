"""`python -m vitcls.export`: checkpoints for other programs."""

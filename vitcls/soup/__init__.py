"""`python -m vitcls.soup`: means of several checkpoints."""

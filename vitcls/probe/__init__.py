"""`python -m vitcls.probe`: cheap heads on features that are computed once."""

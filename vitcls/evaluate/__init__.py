"""`python -m vitcls.evaluate`: exact metrics of any checkpoint on any split."""

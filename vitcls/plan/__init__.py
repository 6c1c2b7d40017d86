"""`python -m vitcls.plan`: a run, looked at before it is started."""

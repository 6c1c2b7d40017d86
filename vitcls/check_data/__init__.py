"""`python -m vitcls.check_data`: a data set, looked at before it is trained on."""

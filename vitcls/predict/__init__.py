"""`python -m vitcls.predict`: class names and probabilities of image files."""

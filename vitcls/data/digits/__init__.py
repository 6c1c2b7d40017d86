"""Handwritten digits as a tfds data set; `digits.py` holds the builder."""

"""Letters and digits drawn with many fonts and distorted: the quick start's pretraining data."""

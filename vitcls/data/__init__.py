"""Data sets: how they are prepared, which example comes when, and batches of them."""

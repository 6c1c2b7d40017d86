"""Whose files lie in a folder, and who may write there."""

"""Formats of files that weights and configs are stored in."""

"""Owners of files, locks between processes, and the user's folders."""

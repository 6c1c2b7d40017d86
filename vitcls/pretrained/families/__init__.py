"""One file per family of networks: its config and its key table."""

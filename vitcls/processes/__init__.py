"""Several processes, the signals that end them, and the locks between them."""

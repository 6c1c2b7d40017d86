"""Several processes, the signals and the watchdog that end them, and their memory."""

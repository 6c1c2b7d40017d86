"""Where a run's numbers come from: what it writes down, and what a continued run must share."""

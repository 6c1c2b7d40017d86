"""What a run reports: metrics, progress, parameters."""

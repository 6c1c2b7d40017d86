"""What a run is made from, by its config, and what it leaves."""

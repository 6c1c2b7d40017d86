"""Networks, in Flax."""

"""Pixels and targets of a batch on the device: normalising, augmenting, mixing."""

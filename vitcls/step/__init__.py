"""The training and evaluation step: state, losses, metrics, optimizer, sharding."""

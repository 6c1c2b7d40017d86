"""What a compiled step takes: memory, operations, bytes, and what devices can do."""

"""Which command owns the files of a folder, and locks between processes."""

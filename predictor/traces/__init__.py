"""What was recorded of a model: rows, labels and importance on disk, and how they are read."""

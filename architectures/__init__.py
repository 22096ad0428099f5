"""What collection and export both need to know of a model family."""

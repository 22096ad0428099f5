"""One HTML page of measured results."""

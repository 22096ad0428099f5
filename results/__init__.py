"""Documents of results: each is written and read by the same dataclasses."""

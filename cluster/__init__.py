"""Work that is spread over a Ray cluster; without `--ray` nothing of Ray is imported."""

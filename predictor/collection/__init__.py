"""Running a model and recording it."""

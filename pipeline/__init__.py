"""From a checkpoint to a measured PowerInfer file, by the code of the single commands."""

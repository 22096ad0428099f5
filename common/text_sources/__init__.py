"""What `--data` may name: files of several kinds, packed or not, folders, pipes and datasets."""

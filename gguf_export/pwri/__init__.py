"""PowerInfer's file format: its constants, reading it, and what follows from what a file holds."""

"""`bench-powerinfer`: speed and quality of an exported file against dense baselines."""

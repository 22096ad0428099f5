"""`doctor`: whether this machine, its programs and a file are fit for PowerInfer."""

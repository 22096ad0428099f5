"""What work costs: bytes, bandwidths and a roofline of a decoded token; items on a cluster."""

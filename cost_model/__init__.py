"""What a decoded token costs: bytes, bandwidths and a roofline over both devices."""

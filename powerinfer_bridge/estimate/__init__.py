"""What bytes and bandwidths allow an exported file."""

"""FID and its relatives."""

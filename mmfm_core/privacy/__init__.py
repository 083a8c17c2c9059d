"""Patient-level differential privacy."""

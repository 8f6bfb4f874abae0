"""Benchmark items and texts, read from what `mobie.sources` fetched."""

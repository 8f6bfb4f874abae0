"""Harnesses that try to break the suite; each saves what it found for RELIABILITY.md."""

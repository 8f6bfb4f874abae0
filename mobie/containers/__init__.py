"""Apptainer images of the suite: hash-checked locks, a Debian root file system, a digest of what is inside."""

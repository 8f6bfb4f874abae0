"""Bringing repositories of the hub here: listing, lock, download, local mirror, and what goes wrong on the way."""

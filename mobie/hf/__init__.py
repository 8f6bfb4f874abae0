"""Packed checkpoints in the library's own model classes: modules, quantizer, model card."""

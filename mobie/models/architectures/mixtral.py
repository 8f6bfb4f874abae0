"""Mixtral: as OLMoE; its router always divides the weights of the chosen experts by their sum."""

from mobie.models.architecture import Architecture

ARCHITECTURE = Architecture("mixtral")

"""OLMoE: every block has experts and ordinary attention."""

from mobie.models.architecture import Architecture

ARCHITECTURE = Architecture("olmoe")

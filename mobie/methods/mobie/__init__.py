"""MoBiE, part by part as the paper tells it: CEJD (4.1), GLAS (4.2), mixed-order binarization (B.3.3), NGES (4.3)."""

from mobie.methods.mobie.method import MoBiE

__all__ = ["MoBiE"]

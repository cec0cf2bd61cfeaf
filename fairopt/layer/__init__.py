"""The fairness layer: a torch module, and the same as a function."""

from fairopt.layer.module import FairnessLayer, project

__all__ = ["FairnessLayer", "project"]

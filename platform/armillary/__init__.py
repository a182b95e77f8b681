"""Armillary: the experiment platform for embedding learning.

Importing this package costs nothing: every heavy dependency is imported where it is used.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]

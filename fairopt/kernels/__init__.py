"""Everything compiled, and how it is loaded: the only package that imports Numba."""

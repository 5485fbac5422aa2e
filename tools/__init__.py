"""Tools beside training and evaluation. Usage: python -m tools.NAME --help."""

import support  # noqa: F401 - first: OpenMP reads a variable of it when torch is imported

"""Tools beside training and evaluation. Usage: python -m tools.NAME --help."""

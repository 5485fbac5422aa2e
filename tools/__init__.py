"""What people run beside: python -m tools.NAME, each with --help."""

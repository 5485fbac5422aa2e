"""Tools beside training and evaluation. Usage: python -m tools.NAME --help."""

import support  # noqa: F401 - before torch: sets OMP_WAIT_POLICY, read when torch is imported

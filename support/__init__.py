"""What any such program needs and the paper does not mention.

tokenizer/      text to token ids and back: SentencePiece, tekken.json, tokenizer.json
text.py         documents to tokens to batches
corpus.py       the built-in corpus
checkpoints.py  checkpoints of all formats and families, and the authors' release
runs.py         a run's folder: settings, log, checkpoints, resuming
results.py      a file of results that grows line by line
settings.py     dataclasses of settings as JSON and as command-line options
files.py        UTF-8 text, JSON and JSON lines
device.py       devices, their free memory, dtypes
terminal.py     the command line: status line, errors, exit codes
"""

import os

# OpenMP reads this when torch is imported, so import support first. Threads that wait then sleep.
# By default they spin, which slows a run many times if another program uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

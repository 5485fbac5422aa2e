"""Parts that any such program needs and that the paper does not mention.

tokenizer/      text to token ids and back: SentencePiece, tekken.json, tokenizer.json
text.py         documents to tokens to batches
corpus.py       the built-in corpus
checkpoints.py  checkpoints of all formats and families, and the authors' release
runs.py         the folder of a run: settings, log, checkpoints, resuming
results.py      a file of results that grows line by line
settings.py     dataclasses of settings as JSON and as command-line options
files.py        UTF-8 text, JSON and JSON lines
device.py       devices, their free memory, dtypes
terminal.py     the command line: status line, errors, exit codes
"""

import os

# OpenMP reads this when torch is imported. Waiting threads then sleep; by default they spin, which
# makes a run many times slower if another program uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Parts that any such program needs and that the paper does not mention.

tokenizer/      text to token ids and back: SentencePiece, tekken.json, tokenizer.json
text.py         documents to tokens to batches
corpus.py       the built-in corpus
checkpoints.py  checkpoints of all formats and families, and the authors' release
runs.py         the folder of a run: settings, log, checkpoints, resuming
questions.py    the questions of GSM8K and CommonsenseQA
results.py      a file of results that grows line by line, and tables of scores
memory.py       the memory and the operations of a training step, counted on the meta device
settings.py     dataclasses of settings as JSON and as command-line options
files.py        UTF-8 text, JSON and JSON lines
device.py       devices, their free memory, dtypes
terminal.py     the command line: status line, errors, exit codes
"""

import os

# OpenMP reads this when torch is imported, so programs import this package first. Waiting threads
# then sleep; by default they spin, which makes a run many times slower beside another program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

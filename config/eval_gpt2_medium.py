"""
The validation loss of OpenAI's gpt2-medium on OpenWebText, on which it was not trained.

Parameters: 354M, all active.
Tokens: none, it only evaluates.
To expect: 2.84, as nanoGPT's readme reports. Not yet measured, see eval_gpt2.py.
"""

from eval_gpt2 import *

init_from = "gpt2-medium"

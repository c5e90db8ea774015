"""
The validation loss of OpenAI's gpt2-large on OpenWebText, on which it was not trained.

Parameters: 773M, all active.
Tokens: none, it only evaluates.
To expect: 2.67, as nanoGPT's readme reports. Not yet measured, see eval_gpt2.py.
"""

from eval_gpt2 import *

init_from = "gpt2-large"

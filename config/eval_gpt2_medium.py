"""
The validation loss of OpenAI's gpt2-medium on OpenWebText, on which it was not trained.

Parameters: 354M, all active.
Tokens: none, it only evaluates.
To expect: 2.84, as nanoGPT's readme reports. Not yet measured with this code, because the weights
could not be downloaded where it was written.
"""

from eval_gpt2 import *

init_from = "gpt2-medium"

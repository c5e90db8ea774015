"""
The validation loss of OpenAI's gpt2-xl on OpenWebText, on which it was not trained.

Parameters: 1.56B, all active.
Tokens: none, it only evaluates.
To expect: 2.54, as nanoGPT's readme reports. Not yet measured with this code, because the weights
could not be downloaded where it was written.
"""

init_from = "gpt2-xl"
eval_only = True
dataset = "openwebtext"

batch_size = 8
eval_iters = 500  # 4,000 windows of 1024 tokens

"""
The validation loss on OpenWebText of OpenAI's gpt2-medium, which was not trained on it.

Parameters: 354M, all active. Tokens: none, it only evaluates.
To expect: 2.84, as nanoGPT's readme says; not yet measured with this code, for want of the weights where it was written.
"""

init_from = "gpt2-medium"
eval_only = True
dataset = "openwebtext"

batch_size = 8
eval_iters = 500  # 4,000 windows of 1024 tokens

"""
OpenAI's GPT-2 fine-tuned on tiny Shakespeare, as in nanoGPT. It takes a few minutes on a GPU; on a
CPU use the smallest model (--init_from=gpt2). The weights are downloaded from the Hugging Face hub
once; --init_from=FOLDER takes them from a folder. After an interruption, resume with
--init_from=resume.

Parameters: 1.56B, all active (gpt2: 124M).
Tokens: 0.66M (20 steps of 32,768), 2.2 epochs.
To expect: not yet measured, because the weights could not be downloaded where this was written.
"""

init_from = "gpt2-xl"
out_dir = "out/finetune-shakespeare"
wandb_project = "shakespeare"
wandb_run_name = "finetune-gpt2-xl"
dataset = "shakespeare"

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False

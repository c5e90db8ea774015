"""
What train.py, sample.py and the tools build on. You can trust it without reading it.

errors       how a script ends: one line and an exit code
dataset      token files, the order of the training windows, the fixed validation windows
tokenizer    text to token ids and back
checkpoint   write, verify, find the newest good one, read
run_dir      what a run writes into its out_dir: checkpoints and log.jsonl
init_from    how a run begins: from scratch, resumed, or with another model's weights
upcycle      a dense model's weights as a MoE's
optim        AdamW, and Muon for stacked experts, too; an optimizer's state
distributed  many processes: meet, exchange small things, spread a model over GPUs
device       device, precision, peak speed, memory
routes       which experts the tokens of a text visit, and the loss without each expert
sizes        how large a model is, and the width that makes it as large as another
log          log.jsonl, written and read; a step's numbers for it and for the console
trackers     the same numbers for wandb and TensorBoard
monitor      steps that must be skipped
hf/          models of transformers: their classes, reading and writing them, the tokenizer
"""

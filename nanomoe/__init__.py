"""
What train.py, sample.py and the tools build on. You can trust it without reading it.

How a run is set up
    settings     the rules about train.py's settings: limits, what is inherited, what has no effect
    schedule     how long a run is, and its learning rate
    init_from    how a run begins: from scratch, resumed, or with another model's weights
    inherit      what it takes from the model it begins with: settings, weights, training state
    upcycle      a dense model's weights as a MoE's
    device       device, precision, compiling, memory, the time of steps
    distributed  what processes tell each other, and the signals that stop them
    parallel     one model on many processes: DDP and FSDP
    errors       how a script ends: one line and an exit code
What it reads
    dataset      token files, the order of the training windows, the fixed validation windows
    tokenizer    text to token ids and back; a dataset's meta.json
    bpe          byte-level BPE from a tokenizer.json
    load         any model by its name
    nanogpt      nanoGPT's checkpoints and datasets
How it learns
    optim        AdamW, and Muon for stacked experts, too; an optimizer's state
    guard        which steps are skipped, and where a number stopped being finite
What it writes
    checkpoint   our format: write, verify, prune, read
    run_dir      out_dir, its lock, earlier runs; saving beside the training
    log          log.jsonl, written and read; a step's numbers for it and for the console
    trackers     the same numbers for wandb and TensorBoard
    hf           models of transformers, read and written
"""

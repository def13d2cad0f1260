# GPT-2's size on OpenWebText with rotary positions, normalized queries and keys, and Muon, for a quarter of
# train_gpt2.py's tokens. Not yet measured: the rates are those that the small model on a CPU likes.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-fast'

# 12 sequences * 1024 tokens * 40 micro-steps, over all processes = 491,520 tokens an iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

pos = 'rope'
qk_norm = True

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3            # of embedding and norms
weight_decay = 0.0
schedule = 'linear'
cooldown = 0.6
max_iters = 150000              # 74B tokens
lr_decay_iters = max_iters
warmup_iters = 250

eval_interval = 1000
eval_iters = 200
log_interval = 10

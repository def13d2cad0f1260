# GPT-2 (124M) on OpenWebText on GPUs of the H100's class, one or eight: the same updates as train_gpt2.py, in larger
# micro-batches. Not yet measured: on less than 80 GB halve batch_size and double gradient_accumulation_steps.
# $ python train.py config/train_gpt2_h100.py
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_h100.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-h100'

# 60 sequences * 1024 tokens * 8 micro-steps, over all processes = 491,520 tokens an iteration
batch_size = 60
block_size = 1024
gradient_accumulation_steps = 8

max_iters = 600000              # 300B tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1

# GPT-2 on your own source code
# $ python data/my_code/prepare.py --source=~/projects
# $ python train.py config/finetune_code.py

out_dir = 'out-code'
dataset = 'my_code'
init_from = 'gpt2'
eval_interval = 250
eval_iters = 40
log_interval = 10
always_save_checkpoint = False

wandb_project = 'code'
wandb_run_name = 'gpt2'

# 16 sequences * 512 tokens * 4 micro-steps = 32,768 tokens an iteration
batch_size = 16
block_size = 512
gradient_accumulation_steps = 4
dropout = 0.1

learning_rate = 1e-5
max_iters = 3000
lr_decay_iters = max_iters
min_lr = 1e-6
warmup_iters = 100

# GPT-2 on questions and their SQL; the loss counts the SQL alone, by the mask that the dataset has
# $ python data/sql/prepare.py
# $ python train.py config/finetune_sql.py
# $ python sample.py --out_dir=out-sql --temperature=0 --start=$'# Question: How many products are there?\n# SQL:\n'

out_dir = 'out-sql'
dataset = 'sql'
init_from = 'gpt2'
eval_interval = 100
eval_iters = 40
log_interval = 10
always_save_checkpoint = False

wandb_project = 'sql'
wandb_run_name = 'gpt2'

# 8 sequences * 256 tokens * 4 micro-steps = 8,192 tokens an iteration, the training split has 215,506
batch_size = 8
block_size = 256
gradient_accumulation_steps = 4
dropout = 0.1

learning_rate = 5e-5
max_iters = 500
lr_decay_iters = max_iters
min_lr = 5e-6
warmup_iters = 50

# a smaller GPT on the characters of Shakespeare for a laptop's CPU: 0.8M parameters, validation loss about 1.9
# in 2 to 3 minutes
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_cpu.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
dtype = 'float32'               # everywhere the same; --dtype=auto is faster on a CPU with bfloat16
compile = False                 # would take longer than it saves
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64                 # characters of context

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0                   # 2000 iterations are too few to overfit

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 100

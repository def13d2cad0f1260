# the smaller GPT on the characters of Shakespeare for a laptop's CPU, with rotary positions, normalized queries and
# keys, one head of these, and Muon: 1.61 in the time in which train_shakespeare_char_cpu.py reaches 1.91
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_cpu_fast.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
device = 'cpu'
dtype = 'float32'               # everywhere the same, but for Muon, which uses bfloat16 where the CPU has it
compile = False                 # would take longer than it saves
eval_interval = 225
eval_iters = 10
log_interval = 10
always_save_checkpoint = False

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu-fast'

gradient_accumulation_steps = 1
batch_size = 24                 # Muon's step costs the same for any, so twice as many as train_shakespeare_char_cpu.py
block_size = 64                 # characters of context

n_layer = 4
n_head = 2
n_embd = 128
dropout = 0.0
pos = 'rope'
n_kv_head = 1
qk_norm = True

optimizer = 'muon'
muon_lr = 0.025
learning_rate = 6e-3            # of embedding and norms
weight_decay = 0.0
beta2 = 0.95
schedule = 'linear'
cooldown = 0.8
max_iters = 900                 # with --max_iters=190 --lr_decay_iters=190 1.88 in a quarter of the time
lr_decay_iters = max_iters
warmup_iters = 0

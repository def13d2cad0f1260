# the small GPT on the characters of Shakespeare with rotary positions, normalized queries and keys, and Muon: at the
# size for a GPU what gains on a CPU (train_shakespeare_char_cpu_fast.py). Not yet measured there.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_fast.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 100             # it overfits sooner, so look more often
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-fast'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256                # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
pos = 'rope'
qk_norm = True

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3            # of embedding and norms
weight_decay = 0.0
beta2 = 0.95
schedule = 'linear'
cooldown = 0.6
max_iters = 1500
lr_decay_iters = max_iters
warmup_iters = 0

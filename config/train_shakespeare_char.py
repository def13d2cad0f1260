# a small GPT on the characters of Shakespeare: 10.6M parameters, best validation loss about 1.47, 3 minutes on an A100
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250             # it overfits, so look often
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # at improvements, every save_interval seconds, on an interruption and at the end

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256                # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2                   # against overfitting

learning_rate = 1e-3            # a small model bears more
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99                    # few tokens an iteration, so average over more of them
warmup_iters = 100

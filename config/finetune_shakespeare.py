# GPT-2 XL on Shakespeare: 20 iterations, which needs a GPU with about 40 GB; with --init_from=gpt2 about 4 GB do
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare.py

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'           # the largest
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only what improves

wandb_project = 'shakespeare'

# 1 sequence * 32 micro-steps * 1024 tokens = 32,768 tokens an iteration; the training split has 301,966
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False

# GPT-2 on Shakespeare by LoRA: 294,912 of 124.7M parameters are trained, a checkpoint is 1.2 MB without its optimizer
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare_lora.py

out_dir = 'out-shakespeare-lora'
dataset = 'shakespeare'
init_from = 'gpt2'
eval_interval = 20
eval_iters = 40
always_save_checkpoint = False

wandb_project = 'shakespeare'
wandb_run_name = 'gpt2-lora'

lora_rank = 8
lora_alpha = 16.0
lora_dropout = 0.05
lora_targets = 'c_attn'

batch_size = 4
block_size = 512
gradient_accumulation_steps = 8
max_iters = 200

learning_rate = 3e-4            # a small part of a model bears more than all of it
lr_decay_iters = max_iters
min_lr = learning_rate / 10
warmup_iters = 20
weight_decay = 0.0

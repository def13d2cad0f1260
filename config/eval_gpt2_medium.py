# OpenAI's gpt2-medium on OpenWebText as it is: losses of 2.85 and 2.84 on the two splits, in nanoGPT's measurement
# $ python train.py config/eval_gpt2_medium.py

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500                # batches a split
batch_size = 8
wandb_log = False

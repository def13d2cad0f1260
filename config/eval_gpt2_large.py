# OpenAI's gpt2-large on OpenWebText as it is: losses of 2.66 and 2.67 on the two splits, in nanoGPT's measurement
# $ python train.py config/eval_gpt2_large.py

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500                # batches a split
batch_size = 8
wandb_log = False

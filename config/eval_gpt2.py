# OpenAI's gpt2 on OpenWebText as it is: losses of 3.11 and 3.12 on the two splits, in nanoGPT's measurement
# $ python train.py config/eval_gpt2.py

init_from = 'gpt2'
eval_only = True
eval_iters = 500                # batches a split
batch_size = 8
wandb_log = False

# OpenAI's gpt2-xl on OpenWebText as it is: losses of 2.56 and 2.54 on the two splits, in nanoGPT's measurement
# $ python train.py config/eval_gpt2_xl.py

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500                # batches a split
batch_size = 8
wandb_log = False

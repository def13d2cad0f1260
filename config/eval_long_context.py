# how a model does on longer contexts than it was trained on, where it has no position table (pos='rope' or 'alibi'):
# the loss over every token of both splits, in windows of block_size
# $ python train.py config/train_shakespeare_char_cpu_fast.py --n_head=8 --pos=alibi
# $ python train.py config/train_shakespeare_char_cpu_fast.py config/eval_long_context.py --block_size=512

init_from = 'resume'
eval_only = True
eval_iters = 0                  # all of it
batch_size = 8
block_size = 256                # four times as long as in training

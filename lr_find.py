""" Which learning rate? The range test: a few hundred steps of train.py, the rate rising, until the loss explodes.

$ python lr_find.py config/train_shakespeare_char_cpu.py
$ python lr_find.py config/finetune_shakespeare.py --init_from=gpt2 --num_steps=100 --last_lr=1e-2

It takes all of train.py's keys, and those below (Smith, https://arxiv.org/abs/1506.01186). A run in out_dir stays as it
is; lr_find.json and lr_find.png are written beside it.
"""
import json
import math
import os
import sys

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
with open(path, encoding='utf-8') as file:
    above_the_loop = file.read().split('# ---- loop')[0]   # of train.py: what makes model, optimizer and batches

# ---- configuration
num_steps = 200       # updates, each with a learning rate that is higher by the same factor
first_lr = 1e-6
last_lr = 1.0
smoothing = 0.9       # of the loss: how much of the average of the steps before stays in it
explosion = 2.0       # the test ends where the smoothed loss is so many times the lowest
config = {key: globals()[key] for key in ('num_steps', 'first_lr', 'last_lr', 'smoothing', 'explosion')}
exec(compile(above_the_loop, path, 'exec'), train := {**config, '__file__': __file__})

import torch
from tqdm import trange

from common import atomic_write, fail, gather, one_line_errors, print0
from optim import set_rate, update

# ---- functions

def draw(path):
    """ a PNG of the loss over the learning rate, if matplotlib is installed """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print0("no lr_find.png, it needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    axes.plot(rates, losses, 'C0', alpha=0.4, lw=1, label="each step")
    axes.plot(rates, smooth, 'C0', label="smoothed")
    axes.axvline(suggestion, color='C1', ls='--', label=f"suggestion, {suggestion:.1e}")
    top = max(smooth[0], min(smooth)) * 1.3   # what exploded needs no room
    axes.set(xscale='log', xlabel="learning rate", ylabel="loss (nats per token)", ylim=(min(losses) * 0.95, top),
             title=f"learning-rate range test, {train['dataset']}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=100)


# ---- test
num_steps, first_lr, last_lr, smoothing, explosion = (train[key] for key in config)   # the command line's
if not (num_steps >= 10 and 0 < first_lr < last_lr and 0 <= smoothing < 1 and explosion > 1):
    fail(f"--num_steps={num_steps} must be at least 10, --first_lr={first_lr} above 0 and below --last_lr={last_lr}, "
         f"--smoothing={smoothing} 0 or more and below 1, --explosion={explosion} above 1")
model, optimizer, scaler = (train[key] for key in ('raw_model', 'optimizer', 'scaler'))
rates, losses, smooth, average = [], [], [], 0.0
bar = trange(num_steps, disable=train['rank'] > 0 or None, leave=False)
for step in bar:
    lr = first_lr * (last_lr / first_lr) ** (step / (num_steps - 1))
    set_rate(optimizer, lr)
    loss = train['add_gradients'](step)
    update(model, optimizer, scaler, loss, train['grad_clip'])
    loss, stopped = (max(each) if i else sum(each) / len(each) for i, each in
                     enumerate(gather(loss.item(), train['received'])))
    average = smoothing * average + (1 - smoothing) * loss
    rates, losses, smooth = [*rates, lr], [*losses, loss], [*smooth, average / (1 - smoothing ** (step + 1))]
    if stopped or not math.isfinite(loss) or smooth[-1] > explosion * min(smooth):
        break
bar.close()

# ---- result
if stopped:
    sys.exit(128 + int(stopped))
lowest = smooth.index(min(smooth))
suggestion = rates[lowest] / 10   # ten times below where it falls no more: fast, and with a margin
if train['rank'] == 0:
    with one_line_errors():
        os.makedirs(out_dir := train['out_dir'], exist_ok=True)
        with atomic_write(os.path.join(out_dir, 'lr_find.json')) as file:
            file.write(json.dumps({'suggestion': suggestion, 'lowest': rates[lowest], 'lr': rates, 'loss': losses,
                                   'smoothed': smooth, 'config': train['config']}, indent=1).encode())
        draw(os.path.join(out_dir, 'lr_find.png'))
if train['world_size'] > 1:
    torch.distributed.destroy_process_group()
if lowest < 10:
    fail(f"the loss rises from step {lowest} on, at a learning rate of {rates[lowest]:.1e}; try a lower --first_lr")
print0(f"the loss is lowest, {smooth[lowest]:.4f}, at {rates[lowest]:.1e} and "
       + ("explodes" if len(rates) < num_steps else "has not exploded") + f" at {rates[-1]:.1e}\n"
       f"suggestion: --learning_rate={suggestion:.1e} --min_lr={suggestion / 10:.1e}")

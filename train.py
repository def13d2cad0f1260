""" Train a GPT, from scratch or from a checkpoint, in one process or in several.

$ python train.py config/train_shakespeare_char.py
$ python train.py config/train_shakespeare_char_cpu.py --batch_size=32 --learning_rate=5e-4
$ python train.py config/train_shakespeare_char.py --init_from=resume
$ python train.py config/train_shakespeare_char.py --init_from=resume --eval_only=True --eval_iters=0
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --init_from=auto
"""
import contextlib
import itertools
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time

from configurator import configure

# ---- configuration: GPT-2 (124M) on OpenWebText unless a config file or --key=value says otherwise
out_dir = 'out'
eval_interval = 2000                  # iterations between evaluations
log_interval = 1                      # iterations between log lines
eval_iters = 200                      # batches per split and evaluation, 0: every token of the split once
eval_only = False                     # evaluate once and stop, saving nothing
always_save_checkpoint = True         # at every evaluation; False: at those that improve
save_interval = 900.0                 # seconds between checkpoints, whatever the evaluations say, 0: off
init_from = 'scratch'                 # 'resume', 'auto' (resume if there is something), or weights only: 'ckpt:PATH',
                                      # 'gpt2' to 'gpt2-xl', another GPT-2 on the Hub or a folder with one
seed = 1337                           # of the weights, the batches and dropout
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard_log = False
# data
dataset = 'openwebtext'               # folder below data/
gradient_accumulation_steps = 5 * 8   # batches per iteration, over all processes
batch_size = 12                       # sequences per batch
block_size = 1024                     # tokens per sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0                         # 0 for pretraining, 0.1 and more for small data
bias = False                          # in linear and norm layers
vocab_size = 0                        # 0: the dataset's; GPT-2's is rounded up to 50304
pos = 'learned'                       # 'rope' (arXiv 2104.09864) or 'alibi' (arXiv 2108.12409)
rope_base = 10000.0
window = 0                            # attend to so many positions only, 0: to all
n_kv_head = 0                         # grouped-query attention (arXiv 2305.13245), 0: n_head
qk_norm = False                       # normalize queries and keys (arXiv 2010.04245)
# finetuning of what init_from has
lora_rank = 0                         # of what is trained beside the frozen weights (arXiv 2106.09685), 0: train all
lora_alpha = 16.0                     # its output counts alpha / rank
lora_dropout = 0.0
lora_targets = 'c_attn'               # the layers that get one: c_attn,c_proj,c_fc
unfreeze = ''                         # 'head:1000,3:1000,all': first the head, then the last 3 blocks too, then all
# optimizer
optimizer = 'adamw'                   # 'muon': for the matrices in the blocks, with AdamW for the rest
muon_lr = 0.02                        # its highest, in proportion to learning_rate
learning_rate = 6e-4                  # the highest
max_iters = 600000                    # updates in all
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8                       # larger, such as 1e-5, where a run diverges
grad_clip = 1.0                       # largest gradient norm, 0: no limit
# learning rate schedule
decay_lr = True                       # False: constant
schedule = 'cosine'                   # to min_lr; 'linear': constant, then linear to 0
cooldown = 0.4                        # the share of lr_decay_iters in which 'linear' falls
warmup_iters = 2000
lr_decay_iters = 600000               # about max_iters (https://arxiv.org/abs/2203.15556)
min_lr = 6e-5                         # about learning_rate / 10
# machine
backend = 'nccl'                      # of several processes on GPUs; on the CPU it is gloo
parallel = 'ddp'                      # 'fsdp': weights, gradients and moments are split among the processes too
grad_checkpoint = False               # compute activations twice instead of keeping them
device = 'auto'                       # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'                        # bfloat16, float16, float32
compile = True                        # torch.compile: minutes at the start, then faster iterations
config = configure(globals())

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

import checkpoint
import common
from common import device_name, duration, fail, gather, one_line_errors, print0, require, synchronize
from dataset import batch_seed, check_fits, open_dataset
from logger import Logger, draw_runs
from model import GPT, GPTConfig, lora_weights
from optim import frozen_at, load_optimizer, set_rate, start_adapter, train_only, unfreezing, update

# ---- set-up
require(config, 1, 'gradient_accumulation_steps', 'batch_size', 'block_size', 'eval_interval', 'log_interval')
require(config, 0, 'max_iters', 'eval_iters', 'warmup_iters', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip',
        'vocab_size', 'save_interval', 'lora_rank', 'muon_lr')
for key, known in dict(parallel=('ddp', 'fsdp'), optimizer=('adamw', 'muon'), schedule=('cosine', 'linear')).items():
    if config[key] not in known:
        fail(f"--{key}={config[key]} is neither {' nor '.join(known)}")
if not 0 < cooldown <= 1:
    fail(f"--cooldown={cooldown} must be above 0 and at most 1")
if decay_lr and warmup_iters >= lr_decay_iters:
    print0(f"warning: warmup_iters={warmup_iters} is not below lr_decay_iters={lr_decay_iters}, "
           "so the learning rate is at its lowest right after the warm-up")
device = common.resolve_device(device)
with one_line_errors():
    rank, world_size = common.start_processes(device, backend)


def can_share(steps):
    """ whether the processes have equal work: a number of batches each, or an equal part of a batch """
    return steps % world_size == 0 or world_size % steps == 0 and batch_size % (world_size // steps) == 0


if not can_share(gradient_accumulation_steps):
    below = [steps for steps in range(1, gradient_accumulation_steps) if can_share(steps)][-1:]
    above = next(filter(can_share, itertools.count(gradient_accumulation_steps)))
    fail(f"--gradient_accumulation_steps={gradient_accumulation_steps} of batch_size={batch_size} cannot be shared "
         f"equally by {world_size} processes, {' and '.join(map(str, [*below, above]))} can")
micro_steps = max(gradient_accumulation_steps // world_size, 1)   # of this process
parts = max(world_size // gradient_accumulation_steps, 1)         # of a batch, each for another process
device_type = torch.device(device).type
dtype = common.resolve_dtype(dtype, device_type)
context = common.autocast(device_type, dtype)
peak = common.peak_flops(device_name(device), dtype)   # FLOP/s or None
common.choose_products(device_type, block_size)
common.keep_freed_memory()
torch.manual_seed(seed % 2**63)                 # any int will do
generators = torch.default_generator if device_type == 'cpu' else torch.get_device_module(device_type)
reseed = generators.manual_seed                 # dropout's alone: torch.manual_seed visits every device, 90 us
signals = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:   # nohup wants it ignored
    signals.append(signal.SIGHUP)
received, received_at = 0, 0.0                  # the first signal that asked to stop, 0: none yet


def on_signal(number, frame):
    """ the first one ends the run after this step, a second one ends it at once

    Several processes may each get one from the scheduler and the same one from torchrun: within 2 seconds that is one.
    """
    global received, received_at
    if received and world_size > 1 and time.monotonic() - received_at < 2:
        return
    for each in signals if received or world_size == 1 else ():
        signal.signal(each, signal.SIG_DFL)
    if received:
        os.kill(os.getpid(), number)
    received, received_at = number, time.monotonic()
    line = f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once\n"
    with contextlib.suppress(OSError):          # the terminal has gone
        os.write(2, line.encode() * (rank == 0))   # not print: the signal may have come in the middle of one


for each in signals:
    signal.signal(each, on_signal)

# ---- data
meta, splits = open_dataset(dataset)


def to_device(rows):
    """ rows (B, T+1) of tokens as inputs and targets, (B, T) each; a token i that is no target comes as -1 - i """
    if device_type == 'cuda':
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return (rows ^ rows >> 63)[:, :-1], rows[:, 1:].clamp(min=-1)


# ---- model
start = checkpoint.starting_point(init_from, out_dir)   # {} for a new model
resumed = 'iter_num' in start
if start:
    block_size = checkpoint.check_start(start, config, {key: meta[key] for key in ('tokenizer', 'tokens', 'sha256')})
    model = checkpoint.build_model(start, dropout=dropout)
else:
    if not vocab_size:
        vocab_size = meta['vocab_size'] if meta['tokenizer']['name'] == 'char' else -(-meta['vocab_size'] // 64) * 64
    with one_line_errors():
        model = GPT(GPTConfig.of(config, vocab_size=vocab_size))
if lora_rank and not resumed:
    start |= start_adapter(model, start, config)
if block_size != model.config.block_size:
    model.crop_block_size(block_size)
adapter = {key: start[key] for key in ('lora', 'base') if key in start}   # {} where all weights are trained
if adapter and unfreeze:
    fail("LoRA freezes all the weights there were, --unfreeze names those to train; choose one")
if optimizer == 'muon':
    for name, given in {'LoRA': adapter, '--unfreeze': unfreeze, '--parallel=fsdp': parallel == 'fsdp',
                        'a --learning_rate of 0': not learning_rate, 'a --muon_lr of 0': not muon_lr}.items():
        if given:
            fail(f"--optimizer=muon does not go with {name}")
check_fits(splits, model.config.vocab_size, block_size)
if parallel == 'fsdp' and world_size > 1:
    from torch.distributed.fsdp import fully_shard
    mesh = torch.distributed.init_device_mesh(device_type, (world_size,))
    for part in (*model.transformer.h, model):  # a block's weights are whole only while it computes
        fully_shard(part, mesh=mesh)
model.to(device)
model.grad_checkpoint = grad_checkpoint
iter_num = start.get('iter_num', 0)             # updates done
eval_iter = start.get('eval_iter', -1)          # iter_num of the latest evaluation
skipped = start.get('skipped', 0)               # updates that were not applied
elapsed = start.get('elapsed', 0.0)             # seconds of training

# ---- optimizer
with one_line_errors():
    stages = unfreezing(unfreeze, model.config.n_layer)
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, eps=adam_eps,
                                           muon_lr=muon_lr * (optimizer == 'muon'))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)   # small gradients would be 0 in float16
if stages:
    print0(f"iter {iter_num}: training {train_only(model, frozen_at(stages, iter_num))}")
if resumed:
    load_optimizer(optimizer, start.get('optimizer', {}))
    scaler.load_state_dict(start.get('scaler') or scaler.state_dict())


def get_lr(it):
    """ linear warm-up to learning_rate, then half a cosine to min_lr at lr_decay_iters, or constant and linear to 0 """
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr if schedule == 'cosine' else 0.0
    if schedule == 'linear':
        fall = min(cooldown * lr_decay_iters, lr_decay_iters - warmup_iters)
        return learning_rate * min(1, (lr_decay_iters - it) / fall)
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def stop_signal():
    """ the signal that any process received, the same answer on all of them; 0 if none """
    return int(max(gather(received)[0]))


@torch.no_grad()
def evaluate(split):
    """ mean loss in nats per token and its standard error, over the same batches at every call; None when stopped

    Every process takes every world_size-th batch. All make the same number of steps, as FSDP needs.
    """
    data, losses, counts = splits[split], [], []
    length = eval_iters or data.sweep_length(batch_size, block_size)
    for k in trange(rank, rank + length, world_size, desc=split, leave=False, delay=2, disable=rank > 0 or None):
        if stop_signal():
            return None
        rows = (data.batch(batch_size, block_size, seed, f'eval {split}', k) if eval_iters else
                data.sweep_batch(batch_size, block_size, k % length))
        x, y = to_device(rows)
        with context:
            losses.append(eval_model(x, y, loss_only=True)[1].where((y != -1).any(), 0))   # a mask may leave no target
        counts.append((y != -1).sum())
    losses, counts = torch.stack(losses).tolist(), torch.stack(counts).tolist()
    losses, counts = (torch.tensor(gather(*each)).double().flatten()[:length] for each in (losses, counts))
    return ((losses * counts).sum() / counts.sum()).item(), (losses.std(correction=0) / length ** 0.5).item()


def run_state():
    """ what a checkpoint holds, besides the best validation loss """
    weights = lora_weights(raw_model) if adapter else raw_model.state_dict(keep_vars=True)
    return {'model': weights, **adapter, 'model_args': raw_model.config.model_args(),
            'iter_num': iter_num, 'eval_iter': eval_iter, 'skipped': int(skipped), 'elapsed': elapsed,
            'wandb_id': logger.wandb_id, **source, 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict()}


def forward_backward(model, iter_num, micro_step):
    """ add the gradient of one batch's share; returns that share of the loss, on the device """
    # batch and dropout are a function of the seed and the place in the run only, so it can stop, or trade its shares
    step = iter_num * gradient_accumulation_steps + (micro_step * world_size + rank) // parts
    rows = splits['train'].batch(batch_size, block_size, seed, 'train', step)
    x, y = to_device(mine := rows[rank % parts::parts])
    weight = parts * (mine[:, 1:] >= 0).sum().item() / (rows[:, 1:] >= 0).sum().item()   # 1 if no mask leaves less
    reseed(batch_seed(seed, f'dropout {rank % parts}', step))
    with context:
        loss = model(x, y, loss_only=True)[1] / (micro_steps / weight)
    scaler.scale(loss).backward()
    return loss.detach()


tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
part = f", of which LoRA's {sum(p.numel() for p in lora_weights(model).values()):,} are trained" if adapter else ''
print0(f"model: {model.get_num_params():,} parameters without positions{part}, on {device_name(device)} in {dtype}"
       + f", {world_size} processes" * (world_size > 1))
print0(f"data: {dataset}, {len(splits['train']):,} tokens to train on, {len(splits['val']):,} to validate, "
       f"{tokens_per_iter:,} an iteration")
raw_model = model   # without the wrappers that follow
if compile:
    print0("compiling the model (a minute or more, once) ...")
    model = common.try_compile(model, lambda compiled: forward_backward(compiled, 0, 0))
    optimizer.zero_grad(set_to_none=True)
eval_model = model   # without DDP's, which evaluation does not need
if parallel == 'ddp' and world_size > 1:
    if stages:
        train_only(raw_model, 0)                # DDP looks once for what will ever be trained
    model = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=bool(unfreeze))


def add_gradients(iter_num, averaging=True):
    """ those of an iteration's micro-steps, averaged over the processes; returns this process's loss, on the device """
    loss = 0.0
    for m in range(micro_steps):
        last = averaging and m == micro_steps - 1   # only its backward has to average
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif world_size > 1:
            raw_model.set_requires_gradient_sync(last)
        loss += forward_backward(model, iter_num, m)
    return loss


for _ in range(2 * isinstance(model, DistributedDataParallel)):
    forward_backward(model, 0, 0)   # settles the order in which gradients are added, for a resumed run the same one
optimizer.zero_grad(set_to_none=True)
if stages:
    train_only(raw_model, frozen_at(stages, iter_num))

# ---- loop
commit, here = '', os.path.dirname(__file__) or '.'
with contextlib.suppress(OSError, subprocess.TimeoutExpired):   # no git, no commit
    git = ['git', '-C', here, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
versions = {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': np.__version__}
source = {'config': config, 'command': shlex.join(sys.argv), 'versions': versions, 'commit': commit,
          'tokenizer': meta['tokenizer'], 'tokens': meta['tokens'], 'sha256': meta['sha256']}
with one_line_errors():
    if not eval_only and not resumed and rank == 0:
        checkpoint.move_aside(out_dir)
    logger = None if eval_only else Logger(out_dir, iter_num, config, start.get('wandb_id', ''), {
        **source, 'device': device_name(device), 'dtype': str(dtype), 'processes': world_size}, eval_iter == iter_num)
saver = checkpoint.Saver(out_dir, iter_num if resumed else -1, float(start.get('best_val_loss', math.inf)))
del start                                       # its tensors are in use or not needed
bad_steps, most_bad_steps = 0, 10               # updates skipped in a row, and how many end the run
eval_time, stopped = 0.0, 0                     # of the latest evaluation; the signal that ended the run
save_due, saved_at = False, time.monotonic()
first_iter = logged_iter = iter_num
logged_at = time.perf_counter()                 # the log line's time is measured from here

while True:
    # evaluate, and keep what is worth keeping
    evaluating = eval_only or iter_num != eval_iter and (iter_num % eval_interval == 0 or iter_num >= max_iters)
    if evaluating or save_due:
        synchronize(device)
        paused_at, improved = time.perf_counter(), False
        if evaluating:
            raw_model.eval()
            results = [evaluate('train'), evaluate('val')]
            raw_model.train()
            if None in results:
                stopped = stop_signal()
                break
            (train_loss, _), (val_loss, val_stderr) = results
            print0(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f} +- {val_stderr:.4f}")
            if eval_only:
                break
            logger.log({'iter': iter_num, 'train_loss': train_loss, 'val_loss': val_loss, 'val_stderr': val_stderr})
            eval_iter, eval_time = iter_num, time.perf_counter() - paused_at
            saver.wait()                        # then best_val_loss is that of the file
            improved = gather(val_loss < saver.best_val_loss)[0][0]
        if save_due or improved or always_save_checkpoint:
            saver.save(run_state(), val_loss if improved else None)
            save_due, saved_at = False, time.monotonic()
        logged_at += time.perf_counter() - paused_at   # neither evaluating nor saving is training time
    if iter_num >= max_iters:
        break

    # one update, from the gradients of all micro-steps
    if (frozen := frozen_at(stages, iter_num)) != raw_model.frozen:
        print0(f"iter {iter_num}: training {train_only(raw_model, frozen)}")
    lr = get_lr(iter_num)
    set_rate(optimizer, lr)
    loss = add_gradients(iter_num)
    norm, bad = update(raw_model, optimizer, scaler, loss, grad_clip)
    bad_steps, skipped = (bad_steps + 1) * bad, skipped + bad   # on the device, which need not be waited for
    # what all processes have to agree on
    stop_signals, due = gather(received, save_interval > 0 and time.monotonic() - saved_at >= save_interval)
    stopped, save_due = int(max(stop_signals)), due[0]
    iter_num += 1
    if iter_num == first_iter + 1:
        saver.reserve(run_state())              # now that the optimizer has its moments

    # log; the loss is the mean over the micro-steps and processes, before the update
    logging, looking = (iter_num - 1) % log_interval == 0, iter_num % most_bad_steps == 0
    if logging or looking and bad_steps.item():
        loss, norm = sum(gather(loss.item())[0]) / world_size, norm.item()
        synchronize(device)
        seconds = (time.perf_counter() - logged_at) / (iter_num - logged_iter)
        elapsed += time.perf_counter() - logged_at
        logged_iter, logged_at = iter_num, time.perf_counter()
        sequences = micro_steps * batch_size // parts   # of this process, on its device
        mfu = raw_model.estimate_mfu(sequences, seconds, peak_flops=peak) if peak else None
        eta = (max_iters - iter_num) * seconds + math.ceil((max_iters - iter_num) / eval_interval) * eval_time
        if bad_steps:
            print0(f"iter {iter_num - 1}: not finite, update skipped, {bad_steps:.0f} in a row")
        print0(f"iter {iter_num - 1}: loss {loss:.4f}, lr {lr:.1e}, norm {norm:.2f}, time {seconds * 1e3:.1f}ms, "
               f"{tokens_per_iter / seconds:,.0f} tok/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, eta {duration(eta)}")
        logger.log({'iter': iter_num - 1, 'loss': loss, 'lr': lr, 'grad_norm': norm, 'skipped': int(skipped),
                    'time': seconds, 'tokens_per_second': tokens_per_iter / seconds, 'mfu': mfu,
                    'memory': common.peak_memory(device), 'elapsed': elapsed})
    if (logging or looking) and bad_steps >= most_bad_steps:
        print0(f"stopped: {bad_steps:.0f} updates had a loss or gradient that was not finite, none was applied; try "
               "a lower --learning_rate, --adam_eps=1e-5 or --dtype=float32, or look at the data")
        break
    if stopped:
        break

# ---- end
if logger:
    saver.wait()
    if not gather(saver.iter_num == iter_num)[0][0]:
        saver.save(run_state())
        saver.wait()
    saved = gather(saver.iter_num == iter_num)[0][0]   # the other processes wait here until rank 0 has written
    logger.close()
    if not saved and bad_steps < most_bad_steps:
        fail(f"the state at iteration {iter_num} is lost, the checkpoint in {out_dir} is an earlier one")
    if saved:
        best = f"best validation loss {saver.best_val_loss:.4f} in {os.path.join(out_dir, checkpoint.BEST)}"
        print0(f"saved {os.path.join(out_dir, checkpoint.LATEST)} at iteration {saver.iter_num}; "
               f"{best if saver.best_val_loss < math.inf else 'nothing was evaluated'}\n"
               f"sample from it: python sample.py --out_dir={out_dir}")
    if rank == 0:
        draw_runs([out_dir], os.path.join(out_dir, 'loss.png'))
if world_size > 1:
    gather(0)                                   # leave together: torchrun stops the others when one has gone
    del model, eval_model, raw_model, optimizer   # they hold the process group, whose threads must end first
    torch.distributed.destroy_process_group()
if stopped or bad_steps >= most_bad_steps:
    sys.exit(3 if bad_steps >= most_bad_steps else 128 + stopped)

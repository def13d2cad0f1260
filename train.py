""" Train a GPT, from scratch or from a checkpoint.

$ python train.py config/train_shakespeare_char.py
$ python train.py config/train_shakespeare_char_cpu.py --batch_size=32 --learning_rate=5e-4
$ python train.py config/train_shakespeare_char.py --init_from=resume
$ python train.py config/train_shakespeare_char.py --init_from=resume --eval_only=True --eval_iters=0
"""
import math
import os
import sys
import time

from configurator import configure

# ---- configuration: GPT-2 (124M) on OpenWebText unless a config file or --key=value says otherwise
out_dir = 'out'
eval_interval = 2000                  # iterations between evaluations
log_interval = 1                      # iterations between log lines
eval_iters = 200                      # batches per split and evaluation, 0: every token of the split once
eval_only = False                     # evaluate once and stop, saving nothing
always_save_checkpoint = True         # at every evaluation; False: at improvements, interruptions and the end
init_from = 'scratch'                 # or 'resume'
seed = 1337                           # of the weights, the batches and dropout
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
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
# AdamW
learning_rate = 6e-4                  # the highest
max_iters = 600000                    # updates in all
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8                       # larger, such as 1e-5, where a run diverges
grad_clip = 1.0                       # largest gradient norm, 0: no limit
# learning rate schedule
decay_lr = True                       # False: constant
warmup_iters = 2000
lr_decay_iters = 600000               # about max_iters (https://arxiv.org/abs/2203.15556)
min_lr = 6e-5                         # about learning_rate / 10
# machine
backend = 'nccl'                      # of several processes
device = 'auto'                       # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'                        # bfloat16, float16, float32
compile = True                        # torch.compile: minutes at the start, then faster iterations
config = configure(globals())

import torch

import checkpoint
from common import (
    StopSignals,
    autocast,
    device_name,
    duration,
    fail,
    one_line_errors,
    peak_flops,
    print0,
    require,
    resolve_device,
    resolve_dtype,
    rng_state,
    set_rng_state,
    synchronize,
    try_compile,
)
from dataset import check_fits, open_dataset
from logger import Logger
from model import GPT, GPTConfig

# ---- set-up
require(config, 1, 'gradient_accumulation_steps', 'batch_size', 'block_size', 'eval_interval', 'log_interval')
require(config, 0, 'max_iters', 'eval_iters', 'warmup_iters', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip',
        'vocab_size')
if init_from not in ('scratch', 'resume'):
    fail(f"--init_from={init_from} is neither scratch nor resume")
if int(os.environ.get('WORLD_SIZE', 1)) > 1:
    fail("several processes are not supported yet, start one with python train.py")
if decay_lr and warmup_iters >= lr_decay_iters:
    print0(f"warning: warmup_iters={warmup_iters} is not below lr_decay_iters={lr_decay_iters}, "
           "so the learning rate falls to min_lr right after the warm-up")
device = resolve_device(device)
device_type = torch.device(device).type
dtype = resolve_dtype(dtype, device_type)
context = autocast(device_type, dtype)
peak = peak_flops(device_name(device), dtype)   # FLOP/s or None
if device_type == 'cuda':
    torch.set_float32_matmul_precision('high')  # TF32 for what is left in float32
torch.manual_seed(seed % 2**63)                 # any int will do
stop = StopSignals()

# ---- data
meta, splits = open_dataset(dataset)


def to_device(rows):
    """ rows (B, T+1) of tokens as inputs and targets, (B, T) each """
    if device_type == 'cuda':
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def train_batch(iter_num, micro_step):
    """ a pure function of the seed and its place in the run, so that a resumed run goes on exactly """
    step = iter_num * gradient_accumulation_steps + micro_step
    return to_device(splits['train'].batch(batch_size, block_size, seed, 'train', step))


# ---- model
resumed = checkpoint.load(checkpoint.find(out_dir)) if init_from == 'resume' else {}
if resumed:
    checkpoint.check_resume(resumed, config, {'tokenizer': meta['tokenizer'], 'sha256': meta.get('sha256')})
    if block_size < resumed['model_args']['block_size']:
        checkpoint.crop(resumed, block_size)
    model = checkpoint.build_model(resumed, dropout=dropout)
else:
    if not vocab_size:
        vocab_size = 50304 if meta['vocab_size'] == 50257 else meta['vocab_size']   # a multiple of 64 is faster
    with one_line_errors():
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
block_size = model.config.block_size
check_fits(splits, model.config.vocab_size, block_size)
model.to(device)
iter_num = resumed.get('iter_num', 0)           # updates done
eval_iter = resumed.get('eval_iter', -1)        # iter_num of the latest evaluation
saved_iter = iter_num if resumed else -1        # iter_num of ckpt.pt
best_val_loss = float(resumed.get('best_val_loss', math.inf))

# ---- optimizer
with one_line_errors():
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, eps=adam_eps)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)   # small gradients would be 0 in float16
if resumed:
    checkpoint.load_optimizer(optimizer, resumed.get('optimizer', {}))
    scaler.load_state_dict(resumed.get('scaler') or scaler.state_dict())
    set_rng_state(resumed.get('rng') or rng_state(device), device)


def get_lr(it):
    """ linear warm-up to learning_rate, then half a cosine down to min_lr at lr_decay_iters """
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


@torch.no_grad()
def evaluate(split):
    """ mean loss in nats per token and its standard error, over the same batches at every call """
    batches = (splits[split].batch(batch_size, block_size, seed, f'eval {split}', k) for k in range(eval_iters))
    losses, counts = [], []
    model.eval()
    for rows in batches if eval_iters else splits[split].sweep(batch_size, block_size):
        x, y = to_device(rows)
        with context:
            losses.append(model(x.clamp(min=0), y)[1])   # -1 fills up rows, no later input is seen by a real target
        counts.append((y != -1).sum())
    model.train()
    losses, counts = torch.stack(losses).cpu().double(), torch.stack(counts).cpu().double()
    return ((losses * counts).sum() / counts.sum()).item(), (losses.std(correction=0) / len(losses) ** 0.5).item()


def save(name, **more):
    """ write the weights and what explains them, and more, to out_dir/name; False if that was not possible """
    return checkpoint.save(os.path.join(out_dir, name), {
        'model': raw_model.state_dict(), 'model_args': checkpoint.model_args(raw_model.config), 'iter_num': iter_num,
        'best_val_loss': best_val_loss, 'config': config, 'eval_iter': eval_iter, 'tokenizer': meta['tokenizer'],
        'sha256': meta.get('sha256', {}), 'versions': checkpoint.versions(), **more})


def save_latest():
    return save(checkpoint.LATEST, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=rng_state(device),
                wandb_id=logger.wandb_id)


def forward_backward(model, x, y):
    """ add the gradient of one batch's share; returns that share of the loss, on the device """
    with context:
        loss = model(x, y)[1] / gradient_accumulation_steps
    scaler.scale(loss).backward()
    return loss.detach()


tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
print0(f"model: {model.get_num_params():,} parameters without positions, on {device_name(device)} in {dtype}")
print0(f"data: {dataset}, {len(splits['train']):,} tokens to train on, {len(splits['val']):,} to validate, "
       f"{tokens_per_iter:,} an iteration")
raw_model = model   # without the wrapper of torch.compile
if compile:
    print0("compiling the model (a minute or more, once) ...")
    model = try_compile(model, lambda compiled: forward_backward(compiled, *train_batch(0, 0)), device)
    optimizer.zero_grad(set_to_none=True)

# ---- loop
with one_line_errors():
    if not eval_only and not resumed:
        checkpoint.move_aside(out_dir)
    logger = None if eval_only else Logger(out_dir, iter_num, config, resumed.get('wandb_id', ''))
del resumed                                     # its tensors are in use or not needed
bad_steps, most_bad_steps = 0, 10               # updates skipped in a row, and how many end the run
eval_time = 0.0                                 # of the latest evaluation
logged_iter, logged_at = iter_num, time.perf_counter()   # the log line's time is measured from here

while not stop.received:
    # evaluate, and keep what is worth keeping
    if eval_only or iter_num != eval_iter and (iter_num % eval_interval == 0 or iter_num >= max_iters):
        synchronize(device)
        paused_at = time.perf_counter()
        (train_loss, _), (val_loss, val_stderr) = evaluate('train'), evaluate('val')
        print0(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f} +- {val_stderr:.4f}")
        if eval_only:
            break
        improved, eval_iter = val_loss < best_val_loss, iter_num
        logger.log({'iter': iter_num, 'train_loss': train_loss, 'val_loss': val_loss, 'val_stderr': val_stderr})
        if improved:
            before, best_val_loss = best_val_loss, val_loss
            if not save(checkpoint.BEST):
                best_val_loss = before          # of the file that is there
        if (improved or always_save_checkpoint) and save_latest():
            saved_iter = iter_num
        eval_time = time.perf_counter() - paused_at
        logged_at += eval_time                  # neither evaluating nor saving is training time
    if iter_num >= max_iters:
        break

    # one update, from the gradients of all micro-steps
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group['lr'] = lr
    loss = sum(forward_backward(model, *train_batch(iter_num, m)) for m in range(gradient_accumulation_steps))
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf).item()
    loss = loss.item()
    if math.isfinite(loss) and math.isfinite(norm):
        scaler.step(optimizer)
        bad_steps = 0
    else:
        bad_steps += 1
        print0(f"iter {iter_num}: loss {loss:.4f}, norm {norm:.2f}: update skipped, {bad_steps} in a row")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1

    # log; the loss is the mean over the micro-steps, before the update
    if (iter_num - 1) % log_interval == 0:
        synchronize(device)
        seconds = (time.perf_counter() - logged_at) / (iter_num - logged_iter)
        logged_iter, logged_at = iter_num, time.perf_counter()
        sequences = gradient_accumulation_steps * batch_size
        mfu = raw_model.estimate_mfu(sequences, seconds, peak_flops=peak) if peak else None
        eta = (max_iters - iter_num) * seconds + math.ceil((max_iters - iter_num) / eval_interval) * eval_time
        print0(f"iter {iter_num - 1}: loss {loss:.4f}, lr {lr:.1e}, norm {norm:.2f}, time {seconds * 1e3:.1f}ms, "
               f"{tokens_per_iter / seconds:,.0f} tok/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, eta {duration(eta)}")
        logger.log({'iter': iter_num - 1, 'loss': loss, 'lr': lr, 'grad_norm': norm, 'time': seconds,
                    'tokens_per_second': tokens_per_iter / seconds, 'mfu': mfu})
    if bad_steps == most_bad_steps:
        print0(f"stopped: {bad_steps} updates had a loss or gradient that was not finite, none was applied; try "
               "a lower --learning_rate, --adam_eps=1e-5 or --dtype=float32, or look at the data")
        break

# ---- end
if logger:
    saved = saved_iter == iter_num or save_latest()
    logger.close()
    if not saved:
        fail(f"the state at iteration {iter_num} is lost, the checkpoint in {out_dir} is an earlier one")
    print0(f"saved {os.path.join(out_dir, checkpoint.LATEST)} at iteration {iter_num}; "
           f"best validation loss {best_val_loss:.4f} in {os.path.join(out_dir, checkpoint.BEST)}\n"
           f"sample from it: python sample.py --out_dir={out_dir}")
if bad_steps == most_bad_steps:
    sys.exit(3)
if stop.received:
    sys.exit(128 + stop.received)

""" Print text from a trained model.

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --temperature=0.8 --top_k=200
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --num_samples=3 --max_new_tokens=100
"""
import sys

from configurator import configure

# ---- configuration
init_from = 'resume'      # a checkpoint in out_dir
out_dir = 'out'
ckpt = 'best'             # lowest validation loss, or 'last'
start = "\n"              # the prompt, or FILE: and the name of a text file; '' starts a new document
num_samples = 10
max_new_tokens = 500      # in each sample
temperature = 0.8         # below 1 more predictable, above 1 more varied, 0 always the likeliest token
top_k = 200               # draw from the k likeliest tokens only, 0: from all
top_p = 1.0               # from the likeliest that together have this probability
min_p = 0.0               # from those with at least this share of the likeliest's probability
repetition_penalty = 1.0  # above 1: less of what is there already
exact_context = False     # past block_size see the last block_size tokens, not the last half and more: much slower
seed = 1337               # of the first sample, each next one has the next
device = 'auto'           # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'            # bfloat16, float16, float32
compile = False           # torch.compile: pays for long samples only
config = configure(globals())

import torch

import checkpoint
from common import autocast, fail, one_line_errors, print0, require, resolve_device, resolve_dtype, try_compile
from dataset import tokenizer_of
from engine import Sampling, generate

# ---- set-up
if init_from != 'resume':
    fail(f"--init_from={init_from} is not resume")
require(config, 1, 'num_samples', 'max_new_tokens')
require(config, 0, 'temperature', 'top_k')
with one_line_errors():
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
device = resolve_device(device)
device_type = torch.device(device).type
context = autocast(device_type, resolve_dtype(dtype, device_type))
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(encoding='utf-8', errors='replace')   # models write characters that a console may not know

# ---- model
trained = checkpoint.load(checkpoint.find(out_dir, ckpt))
tokenizer = tokenizer_of(trained)
model = checkpoint.build_model(trained, dropout=0.0).to(device).eval()

# ---- prompt
if start.startswith('FILE:'):
    with one_line_errors(), open(start[5:], encoding='utf-8') as file:
        start = file.read()
with one_line_errors():
    ids = tokenizer.encode(start, special=True).tolist() or [tokenizer.start]
if len(ids) > model.config.block_size:
    print(f"note: of the prompt's {len(ids):,} tokens the model sees the last {model.config.block_size:,}",
          file=sys.stderr)

# ---- samples
with torch.no_grad(), context:
    if compile:
        model = try_compile(model, lambda compiled: generate(compiled, [ids], 2), dynamic=True)
    samples = generate(model, [ids], max_new_tokens, sampling, num_samples=num_samples, num_ids=tokenizer.vocab_size,
                       seeds=[seed + i for i in range(num_samples)], exact_context=exact_context)
for sample in samples:
    print0(tokenizer.decode(ids + sample))
    print0('-' * 15)

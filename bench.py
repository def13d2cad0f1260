""" Measure generation: tokens per second, time to the first one, and what the memory's bandwidth would allow.

$ python bench.py --mode=generate --dtype=float32
$ python bench.py --mode=generate --num_samples=10 --quantize=int8
$ python bench.py --mode=generate --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --num_samples=10
"""
import json
import statistics
import time

from configurator import configure

# ---- configuration
mode = 'generate'
init_from = ''           # '': random weights in the sizes below; resume, ckpt:PATH, gpt2, ... as for sample.py
out_dir = 'out'          # of init_from=resume
# a model, by default GPT-2 (124M)
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
bias = False
# what to generate
num_samples = 1
prompt_length = 1
max_new_tokens = 100
temperature = 0.0        # 0: the likeliest token
top_k = 0
# how to measure
repeats = 5              # medians of so many, after one to warm up
seed = 1337
device = 'auto'          # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'           # bfloat16, float16, float32
quantize = ''            # int8
compile = True           # on a GPU: a token is one CUDA graph
config = configure(globals())

import torch

import checkpoint
from common import (
    device_name,
    fail,
    one_line_errors,
    print0,
    require,
    resolve_device,
    resolve_dtype,
    synchronize,
    try_compile,
)
from engine import Sampling, generate, prepare, stream
from model import GPT, STATIC, CompiledStep, GPTConfig

# ---- measurements

def read_bandwidth():
    """ bytes per second that the device reads from memory: the sum of an array as large as the weights """
    begin = time.perf_counter()
    array.sum()
    synchronize(device)
    return array.nbytes / (time.perf_counter() - begin)


def generation():
    """ (seconds to the first token, seconds to the last) of num_samples texts """
    begin, first = time.perf_counter(), 0.0
    for _ in stream(model, [prompt], max_new_tokens, sampling, num_samples=num_samples, step=step):
        first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin


# ---- set-up
if mode != 'generate':
    fail(f"--mode={mode} is not generate")
require(config, 1, 'num_samples', 'prompt_length', 'max_new_tokens', 'repeats')
device = resolve_device(device)
torch_dtype = resolve_dtype(dtype, torch.device(device).type)
torch.manual_seed(seed)
step = None
with one_line_errors():
    sampling = Sampling(temperature, top_k)
    model = (checkpoint.build_model(checkpoint.weights_of(init_from, out_dir), dropout=0.0) if init_from else
             GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=bias))).to(device)
    parameters = model.get_num_params()
    model = prepare(model, torch_dtype, rows=num_samples, quantize=quantize)
prompt = torch.randint(model.config.vocab_size, (prompt_length,)).tolist()
if compile and device != 'cpu':
    compiled = try_compile(
        model, lambda new: generate(model, [prompt], 3, num_samples=num_samples, step=CompiledStep(new)), **STATIC)
    step = CompiledStep(compiled) if compiled is not model else None
weight_bytes = parameters * (1 if quantize else torch_dtype.itemsize)
array = torch.ones(max(weight_bytes, 2**28) // 4, device=device)
kind = quantize or str(torch_dtype).removeprefix('torch.')
print0(f"{parameters:,} parameters, {kind}, {weight_bytes / 1e6:,.0f} MB of weights on {device_name(device)}, "
       f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")

# ---- measure, turn by turn
bandwidths, firsts, rates = [], [], []
for repeat in range(repeats + 1):
    bandwidth = statistics.median(read_bandwidth() for _ in range(5))
    first, seconds = generation()
    rate = num_samples * max_new_tokens / seconds
    if repeat:
        bandwidths, firsts, rates = [*bandwidths, bandwidth], [*firsts, first], [*rates, rate]
        print0(f"{repeat}: {rate:,.1f} tok/s, first token after {first * 1e3:.1f}ms, "
               f"memory read at {bandwidth / 1e9:.1f} GB/s")

# ---- result
rate, first, bandwidth = map(statistics.median, (rates, firsts, bandwidths))
bound = num_samples * bandwidth / weight_bytes
print0(f"{num_samples} x {max_new_tokens} tokens: {rate:,.1f} tok/s ({min(rates):,.1f} to {max(rates):,.1f}), "
       f"first token after {first * 1e3:.1f}ms; reading the weights once for each token of a row would allow "
       f"{bound:,.1f}, {rate / bound:.0%} of that is reached")
print0(json.dumps({'mode': mode, 'device': device_name(device), 'dtype': kind, 'parameters': parameters,
                   'num_samples': num_samples, 'max_new_tokens': max_new_tokens, 'tokens_per_second': rate,
                   'tokens_per_second_all': rates, 'first_token': first, 'read_bandwidth': bandwidth,
                   'weight_bytes': weight_bytes, 'bandwidth_bound': bound, 'share_of_bound': rate / bound}))

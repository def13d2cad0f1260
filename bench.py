""" Measure training: time per iteration and where it goes, MFU, memory; or its parts, or generation.

$ python bench.py
$ python bench.py config/train_shakespeare_char.py
$ python bench.py --compare=compile,dtype=float32,batch_size=24
$ python bench.py --profile=True
$ python bench.py --mode=generate --num_samples=10 --quantize=int8
$ torchrun --standalone --nproc_per_node=2 bench.py --device=cpu --compile=False --batch_size=2 --block_size=128

It takes all of train.py's keys, and those below; what it times is train.py's own code. The last line is JSON.
"""
import json
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

from configurator import configure, find_beside

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
with open(path, encoding='utf-8') as file:
    keys, _, rest = file.read().partition('config = configure(globals())\n')
    above_the_loop = compile(rest.split('# ---- loop')[0], path, 'exec')
    exec(keys)   # their defaults

# ---- configuration
mode = 'train'           # forward (without gradients), data (batches), generate
real_data = True         # the dataset, where it is there; False: random tokens
gradient_accumulation_steps = int(os.environ.get('WORLD_SIZE', 1))   # a batch for each process
burn_in = 10             # iterations before what is timed
steps = 20               # iterations that are timed
profile = False          # a trace of 5 more for TensorBoard in ./bench_log, and the ten dearest operators
compare = ''             # variants, an iteration of each in turn: compile,dtype=float32,batch_size=24,...
measure_peak = False     # where the device's peak is not known, take that of a large product; always on a CPU
# of generate
num_samples = 1
prompt_length = 1
max_new_tokens = 100
temperature = 0.0        # 0: the likeliest token
top_k = 0
repeats = 5              # medians of so many, after one to warm up
quantize = ''            # int8
config = configure(globals())

import numpy as np
import torch

import checkpoint
import common
from common import device_name, fail, gather, one_line_errors, print0, synchronize
from engine import STATIC, CompiledStep, Sampling, generate, prepare, stream
from model import GPT, GPTConfig

# ---- training

def dataset_or_random():
    """ the dataset's name, or a folder with random tokens that lasts as long as this process """
    name = config['dataset']
    if real_data and find_beside(os.path.join('data', name, 'train.bin'), __file__):
        return name
    print0("random tokens" + f", because data/{name} is not there" * real_data)
    for split in ('train', 'val'):
        tokens = np.random.default_rng(0).integers(0, min(config['vocab_size'] or 50257, 50257), 2**21, np.uint16)
        tokens.tofile(os.path.join(random_folder, f'{split}.bin'))
    return random_folder


def set_up(**changes):
    """ what train.py makes above its loop """
    run = {**globals(), **config, **changes, 'config': {**config, **changes}}
    exec(above_the_loop, run)
    return SimpleNamespace(**run)


def batch(run, i):
    return run.to_device(run.splits['train'].batch(run.batch_size, run.block_size, run.seed, 'train', i))


def forward(run, i):
    with run.context:
        return run.model(*run.first_batch, loss_only=True)[1]


def forward_backward(run, i):
    run.scaler.scale(forward(run, i)).backward()
    run.optimizer.zero_grad(set_to_none=True)


def iteration(run, i, averaging=True):
    run.update(run.raw_model, run.optimizer, run.scaler, run.add_gradients(i, averaging), run.grad_clip)


def timed(work, *runs):
    """ for each of runs the seconds of each of its steps, by turns """
    times = [[] for _ in runs]
    for i in range(burn_in + steps):
        for run, seconds in zip(runs, times, strict=True):
            begin = time.perf_counter()
            work(run, i)
            synchronize(run.device)
            seconds.append(time.perf_counter() - begin)
    return [seconds[burn_in:] for seconds in times]


def product_peak(run):
    """ FLOP/s of a product of two square matrices, the best of ten """
    n, best = 2048 if run.device == 'cpu' else 8192, float('inf')
    one, two = (torch.randn(n, n, device=run.device).to(run.dtype) for _ in 'ab')
    for _ in range(10):
        begin = time.perf_counter()
        one @ two
        synchronize(run.device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def write_trace(run):
    from torch.profiler import profile, schedule, tensorboard_trace_handler
    plan, write = schedule(wait=5, warmup=5, active=5), tensorboard_trace_handler('./bench_log')
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        for i in range(15):
            iteration(run, i)
            profiler.step()
    print0(profiler.key_averages().table(sort_by=f'self_{run.device_type}_time_total', row_limit=10))


def bench_training():
    """ print what an iteration takes; returns the last line """
    run = set_up(dataset=dataset_or_random())
    run.first_batch, train = batch(run, 0), mode == 'train'
    with torch.set_grad_enabled(train):
        times, = timed({'train': iteration, 'forward': forward, 'data': batch}[mode], run)
        seconds, result = statistics.median(times), {
            'mode': mode, 'device': device_name(run.device), 'dtype': str(run.dtype).removeprefix('torch.'),
            'dataset': 'random' if os.path.isabs(run.dataset) else run.dataset, 'compile': run.compile,
            'batch_size': run.batch_size, 'block_size': run.block_size, 'processes': run.world_size, 'times': times}
        if mode == 'data':
            print0(f"{1 / seconds:,.0f} batches/s of {run.batch_size} x {run.block_size}, {seconds * 1e6:.0f} us each")
            return {**result, 'batches_per_second': 1 / seconds}
        works = {'data': batch, 'forward': forward, 'backward': forward_backward} if train else {}
        split = {name: run.micro_steps * statistics.median(timed(work, run)[0]) for name, work in works.items()}
        alone = timed(lambda *each: iteration(*each, averaging=False), run)[0] if train and run.world_size > 1 else []
    sequences = run.micro_steps * run.batch_size // run.parts if train else run.batch_size
    flops = run.raw_model.flops_per_token() * run.block_size * sequences // (1 if train else 3)
    measured = product_peak(run) if not run.peak and (measure_peak or run.device == 'cpu') else None
    memory, mfu = common.peak_memory(run.device) or 0, flops / seconds / run.peak if run.peak else None
    print0(f"time per iteration: {seconds * 1e3:.2f}ms, MFU: {f'{mfu:.2%}' if mfu else 'n/a'}")
    print0(f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}ms, {sequences * run.block_size / seconds:,.0f} tok/s "
           f"in each of {run.world_size} processes, at most {memory / 1e6:,.0f} MB in use")
    print0(f"{flops / 1e9:,.1f} GFLOP an iteration, {flops / seconds / 1e9:,.1f} GFLOP/s"
           + (f" of {run.peak / 1e12:,.0f} TFLOP/s" if run.peak else '')
           + (f", {flops / seconds / measured:.1%} of a large product's {measured / 1e9:,.1f}" if measured else ''))
    if train:
        split['backward'] -= split['forward']
        split['optimizer'] = max(0.0, seconds - sum(split.values()))
        print0(', '.join(f'{name} {part * 1e3:.2f}ms ({part / seconds:.0%})' for name, part in split.items()))
    if alone:
        result['scaling_efficiency'] = max(gather(statistics.median(alone))[0]) / max(gather(seconds)[0])
        print0(f"scaling efficiency {result['scaling_efficiency']:.1%}: the share without averaging the gradients")
    if profile and train:
        write_trace(run)
    return {**result, 'time_per_iteration': seconds, 'tokens_per_second': sequences * run.block_size / seconds,
            'mfu': mfu, 'flops': flops, 'peak_flops': run.peak, 'measured_peak': measured, 'peak_memory': memory,
            'split': split, 'parameters': run.raw_model.get_num_params()}


def bench_variants():
    """ print a table of what the variants in compare take; returns the last line """
    variants, dataset = {'as given': {}}, dataset_or_random()
    for word in compare.split(','):   # a value of the wrong type is a ValueError
        key, equals, text = (word if word != 'dtype' else 'dtype=float32').strip().partition('=')
        if not equals and type(config.get(key)) is not bool or key not in config:
            fail(f"--compare={compare}: '{word}' is no key of True and False, and no key=value")
        value = {'True': True, 'False': False}.get(text, text) if equals else not config[key]
        variants[word] = {key: type(config[key])(value)}
    runs = [set_up(dataset=dataset, **changes) for changes in variants.values()]
    times, rows = timed(iteration, *runs), []
    print0(f"{'variant':24} {'median':>10} {'from':>10} {'to':>10} {'tok/s':>12} {'speed':>7}")
    for name, run, seconds in zip(variants, runs, times, strict=True):
        rows.append({'variant': name, 'times': seconds, 'speed': run.tokens_per_iter / statistics.median(seconds)})
        print0(f"{name:24} " + ''.join(f'{each * 1e3:>8.2f}ms ' for each in (
            statistics.median(seconds), min(seconds), max(seconds)))
            + f"{rows[-1]['speed']:>12,.0f} {rows[-1]['speed'] / rows[0]['speed']:>7.3f}")
    return {'mode': 'compare', 'device': device_name(runs[0].device), 'variants': rows}


# ---- generation

def read_bandwidth(array):
    """ bytes per second that the device reads from memory """
    begin = time.perf_counter()
    array.sum()
    synchronize(str(array.device))
    return array.nbytes / (time.perf_counter() - begin)


def bench_generation():
    """ print tokens per second, and what reading the weights once for each would allow; returns the last line """
    device = common.resolve_device(config['device'])
    dtype = common.resolve_dtype(config['dtype'], torch.device(device).type)
    torch.manual_seed(config['seed'])
    sampling = Sampling(temperature, top_k)
    if config['init_from'] == 'scratch':
        model = GPT(GPTConfig.of(config, vocab_size=config['vocab_size'] or 50304))
    else:
        model = checkpoint.build_model(checkpoint.weights_of(config['init_from'], config['out_dir']), dropout=0.0)
    parameters, vocab_size, step = model.get_num_params(), model.config.vocab_size, None
    model = prepare(model.to(device), dtype, rows=num_samples, quantize=quantize)
    prompt = torch.randint(vocab_size, (prompt_length,)).tolist()
    if config['compile'] and device != 'cpu':
        compiled = common.try_compile(
            model, lambda new: generate(model, [prompt], 3, num_samples=num_samples, step=CompiledStep(new)), **STATIC)
        step = CompiledStep(compiled) if compiled is not model else None
    size = parameters * (1 if quantize else dtype.itemsize)
    array, found = torch.ones(max(size, 2**28) // 4, device=device), []
    for repeat in range(repeats + 1):
        bandwidth = statistics.median(read_bandwidth(array) for _ in range(5))
        begin = time.perf_counter()
        arrivals = [time.perf_counter() - begin for _ in stream(
            model, [prompt], max_new_tokens, sampling, num_samples=num_samples, step=step)]
        found.append((num_samples * max_new_tokens / arrivals[-1], arrivals[0], bandwidth))
        if repeat:
            print0(f"{repeat}: {found[-1][0]:,.1f} tok/s, first token after {arrivals[0] * 1e3:.1f}ms, "
                   f"memory read at {bandwidth / 1e9:.1f} GB/s")
    rates = [rate for rate, _, _ in found[1:]]
    rate, first, bandwidth = (statistics.median(each) for each in zip(*found[1:], strict=True))
    bound = num_samples * bandwidth / size
    print0(f"{num_samples} x {max_new_tokens} tokens: {rate:,.1f} tok/s ({min(rates):,.1f} to {max(rates):,.1f}), "
           f"first token after {first * 1e3:.1f}ms; reading the weights once for each token of a row would allow "
           f"{bound:,.1f}, {rate / bound:.0%} of that is reached")
    return {'mode': mode, 'device': device_name(device), 'dtype': quantize or str(dtype).removeprefix('torch.'),
            'parameters': parameters, 'num_samples': num_samples, 'max_new_tokens': max_new_tokens,
            'tokens_per_second': rate, 'tokens_per_second_all': rates, 'first_token': first,
            'read_bandwidth': bandwidth, 'weight_bytes': size, 'bandwidth_bound': bound, 'share_of_bound': rate / bound}


common.require(config, 1, 'num_samples', 'prompt_length', 'max_new_tokens', 'repeats', 'steps', 'burn_in')
if mode not in ('train', 'forward', 'data', 'generate'):
    fail(f"--mode={mode} is none of train, forward, data, generate")
if compare and (mode != 'train' or int(os.environ.get('WORLD_SIZE', 1)) > 1):
    fail("--compare is for --mode=train and one process")
with tempfile.TemporaryDirectory() as random_folder, one_line_errors():
    bench = bench_generation if mode == 'generate' else bench_variants if compare else bench_training
    print0(json.dumps(bench()))
if torch.distributed.is_initialized():   # its threads must end before Python does
    gather(0)
    torch.distributed.destroy_process_group()

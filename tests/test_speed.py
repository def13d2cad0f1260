""" Timings, each against a yardstick that takes turns with it: pytest -m benchmark -s """
import glob
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from torch.profiler import profile

import common
from checkpoint import Saver, save
from dataset import BPETokenizer, Split
from engine import Sampling, generate, prepare
from logger import Logger
from model import GPT, GPTConfig, add_lora

pytestmark = pytest.mark.benchmark


def median_time(function, repeats):
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize('batch_size, block_size, most', [(12, 1024, 120e-6), (64, 256, 200e-6)])
def test_a_batch_from_a_1_gb_file(here, batch_size, block_size, most):
    np.random.default_rng(0).integers(0, 50257, 500_000_000, dtype=np.uint16).tofile('train.bin')
    split = Split('train.bin', 'uint16')
    seconds = median_time(lambda i: split.batch(batch_size, block_size, 1337, 'train', i), 3000)
    print(f"\n{batch_size}x{block_size}: {seconds * 1e6:.0f} us")
    assert seconds <= most


class PlainBlock(nn.Module):
    """ the same block as short as PyTorch allows """

    def __init__(self, C, nh):
        super().__init__()
        self.nh, self.ln_1, self.ln_2 = nh, nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.nh, -1).transpose(1, 2) for t in self.qkv(self.ln_1(x)).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Plain(nn.Module):
    def __init__(self, V, T, L, nh, C):
        super().__init__()
        self.wte, self.wpe, self.ln_f = nn.Embedding(V, C), nn.Embedding(T, C), nn.LayerNorm(C, bias=False)
        self.blocks = nn.Sequential(*[PlainBlock(C, nh) for _ in range(L)])

    def forward(self, idx, targets):
        x = self.ln_f(self.blocks(self.wte(idx) + self.wpe.weight[:idx.shape[1]]))
        return F.cross_entropy((x @ self.wte.weight.T).flatten(0, 1), targets.flatten())


V, T, L, nh, C, B = 65, 64, 4, 4, 128, 12   # train_shakespeare_char_cpu


def bare_iteration(model, optimizer):
    """ one training iteration on a fixed batch and nothing else; returns a function that times it """
    rows = torch.randint(V, (B, T + 1))

    def run():
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        output = model(rows[:, :-1], rows[:, 1:])
        (output[1] if isinstance(output, tuple) else output).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start
    return run


def plain_iteration():
    plain = Plain(V, T, L, nh, C)
    return bare_iteration(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True))


def report(ours, theirs):
    """ the median over rounds of 50 iterations of the ratio of medians """
    ours, theirs = (np.array(times[-(len(times) // 50 * 50):]).reshape(-1, 50) for times in (ours, theirs))
    ratios = np.median(ours, 1) / np.median(theirs, 1)
    print(f"\nplain {np.median(theirs) * 1e3:.1f} ms, ours {np.median(ours) * 1e3:.1f} ms, ours / plain: "
          f"median of {len(ratios)} rounds {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")
    return np.median(ratios)


def test_the_model_against_plain_pytorch():
    """ forward, backward and update of both models, turn by turn """
    torch.set_num_threads(os.cpu_count())
    model = GPT(GPTConfig(T, V, L, nh, C, bias=False))
    run, bare = bare_iteration(model, model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), 'cpu')), plain_iteration()
    ours, theirs = zip(*[(run(), bare()) for _ in range(750)], strict=True)
    assert report(ours, theirs) <= 1.02


def test_an_iteration_against_plain_pytorch(here, script, monkeypatch):
    """ train.py, batches and log lines included, against the bare plain loop

    They take turns too: after each log record of ours one iteration of theirs runs and is taken out of our next time.
    """
    torch.set_num_threads(os.cpu_count())
    bare, ours, theirs, log = plain_iteration(), [], [0.0], Logger.log

    def take_turns(self, record):
        log(self, record)
        if 'time' in record:
            ours.append(record['time'] - theirs[-1])
            theirs.append(bare())
    monkeypatch.setattr(Logger, 'log', take_turns)
    script('train.py', os.path.join(ROOT, 'config', 'train_shakespeare_char_cpu.py'), '--eval_interval=10000',
           '--max_iters=750',
           '--eval_iters=1', '--log_interval=1')
    assert report(ours, theirs) <= 1.05


def test_products_of_gpt2_against_the_peak(here):
    """ of 4 x 256 tokens, forward and backward, in float32; and the same iteration with PyTorch's own choice """
    torch.set_num_threads(os.cpu_count())
    model, rows = GPT(GPTConfig(block_size=256, bias=False)), torch.randint(50257, (4, 257))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')
    one, shares, speeds, times = torch.randn(2048, 2048), [], [], {'ours': [], 'plain': []}

    def iteration(_):
        model(rows[:, :-1], rows[:, 1:], loss_only=True)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for i in range(8):
        torch.backends.mkldnn.matmul.fp32_precision = 'none'
        times['plain'].append(median_time(iteration, 1))
        common.choose_products('cpu', 256)
        times['ours'].append(median_time(iteration, 1))
        peak = 2 * 2048**3 / min(median_time(lambda _: one @ one, 1) for _ in range(10))
        with profile(with_flops=True) as profiler:
            iteration(i)
        product, = (each for each in profiler.key_averages() if each.key == 'aten::mm')
        speeds.append(product.flops / product.self_cpu_time_total * 1e6)
        shares.append(speeds[-1] / peak)
    ours, plain = (statistics.median(times[key][1:]) for key in ('ours', 'plain'))
    print(f"\nproducts {statistics.median(speeds[1:]) / 1e9:.0f} GFLOP/s, {statistics.median(shares[1:]):.1%} of the "
          f"peak ({min(shares[1:]):.1%} to {max(shares[1:]):.1%}); an iteration {ours:.2f} s ({min(times['ours']):.2f} "
          f"to {max(times['ours']):.2f}), with PyTorch's choice {plain:.2f} s, {ours / plain:.2f} of it")
    assert statistics.median(shares[1:]) >= 0.85


def test_evaluation_and_logging_in_a_whole_run(here, script, monkeypatch):
    """ what they take of train_shakespeare_char_cpu, without the bare forward passes of the same evaluations

    Those take turns with them: as many as an evaluation makes, after each, out of its time.
    """
    torch.set_num_threads(os.cpu_count())
    log, mode, begin, print0 = Logger.log, GPT.train, [0.0], common.print0
    spent, bare = {'evaluating': 0.0, 'logging': 0.0, 'printing': 0.0}, 0.0
    rows = torch.randint(V, (B, T + 1))

    def timed(key, function):
        def run(*arguments):
            start = time.perf_counter()
            function(*arguments)
            spent[key] += time.perf_counter() - start
        return run

    def train(self, training=True):
        nonlocal bare
        if not training:
            begin[0] = time.perf_counter()
        elif begin[0]:
            spent['evaluating'] += time.perf_counter() - begin[0]
            begin[0] = time.perf_counter()
            with torch.no_grad():
                for _ in range(2 * 20):
                    self(rows[:, :-1], rows[:, 1:], loss_only=True)
            bare += time.perf_counter() - begin[0]
            begin[0] = 0.0
        return mode(self, training)
    monkeypatch.setattr(GPT, 'train', train)
    monkeypatch.setattr(Logger, 'log', timed('logging', log))
    monkeypatch.setattr(common, 'print0', timed('printing', print0))
    start = time.perf_counter()
    script('train.py', os.path.join(ROOT, 'config', 'train_shakespeare_char_cpu.py'))
    total = time.perf_counter() - start - bare
    beyond = (sum(spent.values()) - bare) / total
    print(f"\n{total:.1f} s, of which " + ', '.join(f'{key} {each:.2f}' for key, each in spent.items())
          + f" s; {bare:.2f} s are the evaluations' FLOPs; {beyond:.2%} beyond them")
    assert beyond <= 0.02


def test_a_save_in_the_background_against_torch_save(here):
    """ GPT-2 (124M) with its optimizer, 1.5 GB: what the loop waits for, and what it would wait for torch.save """
    torch.set_num_threads(os.cpu_count())
    model = GPT(GPTConfig())
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = {'model': model.state_dict(keep_vars=True), 'model_args': model.config.model_args(),
             'optimizer': optimizer.state_dict(), 'iter_num': 0}
    saver, held, plain, whole = Saver('out'), [], [], []
    saver.reserve(state)   # as train.py does after its first iteration
    saver.wait()
    for _ in range(6):
        start = time.perf_counter()
        torch.save(state, 'plain.pt')
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        saver.save(state)
        held.append(time.perf_counter() - start)
        saver.wait()   # what follows is not to be disturbed by it
        whole.append(time.perf_counter() - start)
    ratio = statistics.median(held) / statistics.median(plain)
    print(f"\n{os.path.getsize('plain.pt') / 1e9:.2f} GB: torch.save {statistics.median(plain):.2f} s "
          f"({min(plain):.2f} to {max(plain):.2f}); the loop is held up {statistics.median(held):.3f} s "
          f"({min(held):.3f} to {max(held):.3f}), {ratio:.3f} of it; "
          f"on the disk after {statistics.median(whole):.2f} s")
    assert ratio <= 0.2


def test_generation_against_no_cache(here):
    """ 6 layers, 384 wide, context 256: 10 samples x 500 tokens, and 10 x 100 by the uncached loop of nanoGPT """
    torch.set_num_threads(os.cpu_count())
    model = GPT(GPTConfig(256, 65, 6, 6, 384, bias=False)).eval()
    prepared, sampling, ours, theirs = prepare(model, rows=10), Sampling(0.8, 200), [], []

    @torch.no_grad()
    def uncached(ids, count):
        for _ in range(count):
            logits = model(ids[:, -256:])[0][:, -1] / 0.8
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    for _ in range(3):
        start = time.perf_counter()
        generate(prepared, [[0]], 500, sampling, num_samples=10)
        ours.append(5000 / (time.perf_counter() - start))
        start = time.perf_counter()
        uncached(torch.zeros(10, 200, dtype=torch.int64), 100)   # the 200th to 300th token, about the middle
        theirs.append(1000 / (time.perf_counter() - start))
    print(f"\nours {statistics.median(ours):,.0f} tok/s ({min(ours):,.0f} to {max(ours):,.0f}), "
          f"uncached {statistics.median(theirs):,.0f}")
    assert statistics.median(ours) >= 1000


def turns(repeats, rows, count, *variants):
    """ tokens per second of each of some functions, which take turns; the first round is to warm up """
    rates = [[] for _ in variants]
    for _ in range(repeats + 1):
        for times, variant in zip(rates, variants, strict=True):
            start = time.perf_counter()
            variant()
            times.append(rows * count / (time.perf_counter() - start))
    return [times[1:] for times in rates]


@pytest.mark.parametrize('rows, count', [(1, 100), (10, 100)])
def test_generation_against_hugging_face(here, rows, count):
    """ GPT-2 (124M), random weights, float32, greedy; Hugging Face's generate with its cache takes turns """
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.set_num_threads(os.cpu_count())
    model, reference = GPT(GPTConfig(vocab_size=50257)).eval(), GPT2LMHeadModel(GPT2Config()).eval()
    model, x = prepare(model, rows=rows), torch.full((rows, 1), 50256)
    ours, theirs = turns(5, rows, count,
                         lambda: generate(model, x.tolist(), count, Sampling(temperature=0)),
                         lambda: reference.generate(x, min_new_tokens=count, max_new_tokens=count, do_sample=False,
                                                    pad_token_id=0, attention_mask=torch.ones_like(x)))
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"\n{rows} x {count}: ours {statistics.median(ours):.1f} tok/s ({min(ours):.1f} to {max(ours):.1f}), "
          f"Hugging Face {statistics.median(theirs):.1f} ({min(theirs):.1f} to {max(theirs):.1f}), ratio {ratio:.2f}")
    assert ratio >= 1.5


def test_int8_against_float32(here):
    """ GPT-2 (124M), random weights, 1 x 100 tokens, both laid out for speed """
    torch.set_num_threads(os.cpu_count())
    model = GPT(GPTConfig(vocab_size=50257)).eval()
    ours, plain = turns(5, 1, 100, *[
        partial(generate, prepare(model, quantize=quantize), [[50256]], 100, Sampling(temperature=0))
        for quantize in ('int8', '')])
    ratio = statistics.median(ours) / statistics.median(plain)
    print(f"\nint8 {statistics.median(ours):.1f} tok/s ({min(ours):.1f} to {max(ours):.1f}), "
          f"float32 {statistics.median(plain):.1f} ({min(plain):.1f} to {max(plain):.1f}), ratio {ratio:.2f}")
    assert ratio >= 1.3


def test_the_first_text_comes_soon(here):
    """ a model of config/train_shakespeare_char's size: from the start of sample.py to its first character """
    model = GPT(GPTConfig(256, 65, 6, 6, 384, bias=False))
    chars = {'name': 'char', 'chars': '\n' + ''.join(map(chr, range(33, 97)))}
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': chars})
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), '--device=cpu', '--num_samples=1', '--max_new_tokens=1']
    ours, importing = ([1 / rate for rate in rates] for rates in turns(
        5, 1, 1, lambda: subprocess.run(command, capture_output=True, check=True),
        lambda: subprocess.run([sys.executable, '-c', 'import torch'], check=True)))
    beyond = statistics.median(ours) - statistics.median(importing)
    print(f"\nsample.py {statistics.median(ours):.2f} s, import torch {statistics.median(importing):.2f}, "
          f"difference {beyond:.2f}")
    assert beyond <= 1.5


# ---- memory

def test_memory_of_a_training_step(here):
    """ GPT-2 (124M), 8 x 1024 tokens, float32, each in a process of its own: with all logits, and with some at once """
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" \
           "import torch, model\n" \
           "gpt = model.GPT(model.GPTConfig())\n" \
           "optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')\n" \
           "rows = torch.randint(50257, (8, 1025))\n" \
           "gpt(rows[:, :-1], rows[:, 1:], loss_only=sys.argv[2] == 'ours')[1].backward()\n" \
           "optimizer.step()\n" \
           "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    ours, plain = (1024 * int(subprocess.run([sys.executable, '-c', code, ROOT, which], capture_output=True, text=True,
                                             check=True).stdout) for which in ('ours', 'plain'))
    print(f"\nours {ours / 1e9:.2f} GB, plain {plain / 1e9:.2f} GB, ratio {ours / plain:.3f}")
    assert ours <= 0.6 * plain


# ---- finetuning

def test_loading_gpt2_against_reading_its_file(here):
    """ from_pretrained on 124M in safetensors, and read() of the same 498 MB, turn by turn, both in the page cache """
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.set_num_threads(os.cpu_count())
    GPT2LMHeadModel(GPT2Config()).save_pretrained('folder')
    reading, loading = [], []
    for _ in range(9):
        start = time.perf_counter()
        with open('folder/model.safetensors', 'rb') as file:
            content = file.read()
        reading.append(time.perf_counter() - start)
        del content
        start = time.perf_counter()
        model = GPT.from_pretrained('folder')
        loading.append(time.perf_counter() - start)
        del model
    ratio = statistics.median(loading) / statistics.median(reading)
    print(f"\nreading {statistics.median(reading):.2f} s ({min(reading):.2f} to {max(reading):.2f}), "
          f"loading {statistics.median(loading):.2f} s ({min(loading):.2f} to {max(loading):.2f}), ratio {ratio:.2f}")
    assert ratio <= 1.5


@pytest.mark.parametrize('size', [dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=128)])
def test_an_adapters_step_against_full_finetuning(size):
    """ GPT-2 (124M), rank 8 on c_attn, 2 x 128 tokens, forward, backward and update, turn by turn """
    torch.set_num_threads(os.cpu_count())
    rows = torch.randint(50257, (2, 129))

    def step(model, optimizer):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - start
    full, adapted = GPT(GPTConfig(**size)), GPT(GPTConfig(**size))
    add_lora(adapted, 8, 16.0, 0.0, 'c_attn')
    runs = [(model, model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), 'cpu')) for model in (adapted, full)]
    ours, theirs = zip(*[[step(*run) for run in runs] for _ in range(12)], strict=True)
    ratio = statistics.median(ours[2:]) / statistics.median(theirs[2:])
    print(f"\nLoRA {statistics.median(ours[2:]):.2f} s ({min(ours[2:]):.2f} to {max(ours[2:]):.2f}), all weights "
          f"{statistics.median(theirs[2:]):.2f} s ({min(theirs[2:]):.2f} to {max(theirs[2:]):.2f}), ratio {ratio:.2f}")
    assert ratio <= 1


# ---- data

def mixed_documents(size):
    """ Shakespeare and Python in documents of a few thousand characters, all different, size characters in all """
    shakespeare = open(os.path.join(ROOT, 'data', 'shakespeare_char', 'input.txt')).read()
    sources = sorted(glob.glob(os.path.join(sysconfig.get_paths()['stdlib'], '*.py')))
    code = ''.join(open(path, encoding='utf-8', errors='ignore').read() for path in sources)
    dice, made = random.Random(0), 0
    while made < size:
        text = dice.choice([shakespeare, code])
        begin = dice.randrange(len(text) - 5000)
        yield (document := f'{made} ' + text[begin:begin + dice.randrange(500, 5000)])
        made += len(document)


def run_prepare(name, *options):
    """ seconds and peak bytes of a prepare.py in a process of its own, which must end well """
    # by a small process between, because the peak of a new process begins with the memory of the one that forks
    measure = "import resource, subprocess, sys, time; start = time.perf_counter(); " \
              "subprocess.run([sys.executable, *sys.argv[1:]], check=True, capture_output=True); " \
              "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    command = [sys.executable, '-c', measure, os.path.join(ROOT, 'data', name, 'prepare.py'), *options]
    return tuple(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


@pytest.mark.parametrize('threads', [1, 2])
def test_200_mb_against_bare_tiktoken(here, threads):
    """ prepare.py, files and report included, against encode_ordinary_batch of a list, with as many threads """
    texts = list(mixed_documents(200_000_000))
    with open('a.jsonl', 'w') as file:
        file.writelines(json.dumps({'text': text}) + '\n' for text in texts)
    bpe, ours, bare, name = BPETokenizer('gpt2').bpe, [], [], f'speed-{os.getpid()}'
    for _ in range(3):
        start = time.perf_counter()
        bpe.encode_ordinary_batch(texts, num_threads=threads)
        bare.append(time.perf_counter() - start)
        ours.append(run_prepare('text', '--source=a.jsonl', f'--name={name}', f'--num_proc={threads}'))
    shutil.rmtree(os.path.join(ROOT, 'data', name))
    seconds, memory = statistics.median(seconds for seconds, _ in ours), max(memory for _, memory in ours)
    ratio = statistics.median(bare) / seconds
    print(f"\nprepare.py {seconds:.1f} s ({min(ours)[0]:.1f} to {max(ours)[0]:.1f}), {memory / 1e6:,.0f} MB; "
          f"bare tiktoken {statistics.median(bare):.1f} s ({min(bare):.1f} to {max(bare):.1f}); ratio {ratio:.2f}")
    assert ratio >= 0.9 and memory < 1e9


def test_memory_does_not_grow_with_the_corpus(here):
    peaks, name = [], f'speed-{os.getpid()}'
    for size in (50, 400):
        with open('a.jsonl', 'w') as file:
            file.writelines(json.dumps({'text': text}) + '\n' for text in mixed_documents(size * 1_000_000))
        peaks.append(run_prepare('text', '--source=a.jsonl', f'--name={name}')[1])
    shutil.rmtree(os.path.join(ROOT, 'data', name))
    print(f"\n50 MB: {peaks[0] / 1e6:.0f} MB, 400 MB: {peaks[1] / 1e6:.0f} MB at most")
    assert abs(peaks[1] / peaks[0] - 1) < 0.1


def through_arrow(path, threads):
    """ the way of nanoGPT: map the whole set to token lists in Arrow files, then copy them into a memory map """
    import datasets
    import tiktoken
    encoder = tiktoken.get_encoding('gpt2')

    def process(example):
        ids = encoder.encode_ordinary(example['text']) + [encoder.eot_token]
        return {'ids': ids, 'len': len(ids)}
    whole = datasets.load_dataset('parquet', data_files=path, split='train', cache_dir='cache')
    split = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, part in split.map(process, remove_columns=['text'], num_proc=threads).items():
        total = int(np.sum(part['len'][:], dtype=np.uint64))
        array = np.memmap(f'{name}.bin', dtype=np.uint16, mode='w+', shape=(total,))
        at, shards = 0, min(1024, len(part))
        for i in range(shards):
            ids = np.concatenate(part.shard(shards, i, contiguous=True).with_format('numpy')['ids'][:])
            array[at:at + len(ids)] = ids
            at += len(ids)
        array.flush()


def test_200000_documents_against_arrow(here, monkeypatch):
    """ the openwebtext path on a local Parquet file, and datasets.map with as many processes """
    import datasets
    datasets.disable_progress_bars()
    texts = [text for text in itertools.islice(mixed_documents(10**9), 200_000)]
    datasets.Dataset.from_dict({'text': texts}).to_parquet('web.parquet')
    shutil.copytree(os.path.join(ROOT, 'data'), 'data', ignore=shutil.ignore_patterns('*.bin', 'meta.*'))
    for name in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(name, '.')
    start = time.perf_counter()
    subprocess.run([sys.executable, 'data/openwebtext/prepare.py', '--source=./web.parquet'], check=True,
                   capture_output=True)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    through_arrow('web.parquet', os.cpu_count())
    theirs = time.perf_counter() - start
    print(f"\n{sum(map(len, texts)) / 1e6:.0f} MB: ours {ours:.1f} s, through Arrow {theirs:.1f} s, "
          f"{theirs / ours:.2f} times as long")
    assert theirs / ours >= 1.5   # the tokenizer alone takes four fifths of our time


# ---- evaluation

def test_choices_against_one_at_a_time(here, script):
    """ HellaSwag's format, GPT-2 (124M), random weights: batches with shared contexts, and each choice with its own """
    torch.set_num_threads(os.cpu_count())
    model = GPT(GPTConfig())
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'config': {},
                         'tokenizer': {'name': 'gpt2'}})
    run = script('eval_downstream.py', '--tasks=hellaswag', '--limit=1', '--dtype=float32', '--device=cpu')
    ours, items = run['load']('resume'), run['read_items']('hellaswag')[0]
    pairs = [(item['context'], choice) for item in items for choice in item['choices']]

    def one_at_a_time(which):
        found = []
        for pair in pairs:
            context, continuation = run['encode_pair'](ours, *pair)
            ids = torch.tensor([context + continuation])
            with torch.no_grad():
                logs = which(ids[:, :-1], ids[:, 1:])[0][0, -len(continuation):, :50257].log_softmax(-1)
            found.append(logs.gather(1, ids[0, -len(continuation):, None]).sum().item())
        return found
    times = {'ours': [], 'one at a time': [], 'one at a time, weights as laid out for ours': []}
    for _ in range(5):
        for (key, seconds), score in zip(times.items(), (
                lambda: [log for log, _ in run['loglikelihoods'](ours, pairs)], lambda: one_at_a_time(model),
                lambda: one_at_a_time(ours.model)), strict=True):
            start = time.perf_counter()
            found = score()
            seconds.append(time.perf_counter() - start)
            first = found if key == 'ours' else first   # noqa
            assert found == pytest.approx(first, abs=1e-3)
    medians = [statistics.median(each) for each in times.values()]
    print(f"\n{len(pairs)} choices: " + ', '.join(
        f"{key} {median:.2f} s ({min(each):.2f} to {max(each):.2f}, {median / medians[0]:.2f} times)"
        for (key, each), median in zip(times.items(), medians, strict=True)))
    assert medians[1] / medians[0] >= 3


LENGTHS = 16, 32, 64, 128, 256, 512


def trained(*arguments):
    """ (wall-clock seconds of the whole command, loss over all of val.bin, log records) of a run of train.py """
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *arguments, f'--out_dir={os.path.abspath("out")}']
    shutil.rmtree('out', ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    result = subprocess.run([*command, '--init_from=resume', '--eval_only=True', '--eval_iters=0', '--batch_size=64'],
                            check=True, capture_output=True, cwd=ROOT, text=True)
    with open('out/log.jsonl') as file:
        log = [json.loads(line) for line in file]
    return seconds, float(re.search('val loss ([0-9.]+)', result.stdout)[1]), log


def test_the_cpu_recipe_against_the_default(here):
    """ three seeds by turns: a quarter of the time for the loss, 1.910, and 1.62 in the same time """
    names, found = ('cpu', 'cpu_fast', 'cpu_fast, a quarter'), {}
    for seed in (1337, 1, 2):
        for name in names:
            path = f"config/train_shakespeare_char_{name.split(',')[0]}.py"
            quarter = ['--max_iters=190', '--lr_decay_iters=190'] if 'quarter' in name else []
            seconds, loss, _ = trained(path, f'--seed={seed}', *quarter)
            found.setdefault(name, []).append((seconds, loss))
            print(f"\n{name}, seed {seed}: {seconds:.1f} s, {loss:.4f}", end='', flush=True)
    seconds, losses = ({name: statistics.mean(run[i] for run in runs) for name, runs in found.items()} for i in (0, 1))
    print(f"\nmeans: {seconds}, {losses}")
    assert losses['cpu_fast, a quarter'] <= 1.910 and seconds['cpu_fast, a quarter'] <= seconds['cpu'] / 4
    assert losses['cpu_fast'] <= 1.62 and seconds['cpu_fast'] <= seconds['cpu']


def test_each_part_of_the_recipe(here):
    """ with and without, three seeds by turns, half the recipe's length; the rates of AdamW alone are its own """
    variants = {'the recipe': [], 'pos=learned': ['--pos=learned'], 'qk_norm=False': ['--qk_norm=False'],
                'n_kv_head=2': ['--n_kv_head=0'],
                'optimizer=adamw': ['--optimizer=adamw', '--learning_rate=4e-3', '--warmup_iters=50'],
                'schedule=cosine': ['--schedule=cosine', '--min_lr=6e-4']}
    found = {name: [] for name in variants}
    for seed in (1337, 1, 2):
        for name, arguments in variants.items():
            _, loss, log = trained('config/train_shakespeare_char_cpu_fast.py', f'--seed={seed}', '--max_iters=420',
                                   '--lr_decay_iters=420', '--eval_interval=420', *arguments)
            times = [record['time'] for record in log if 'time' in record]
            found[name].append((loss, statistics.median(times)))
            print(f"\n{name}, seed {seed}: {loss:.4f}, {found[name][-1][1] * 1e3:.1f} ms", end='', flush=True)
    losses = {name: statistics.mean(loss for loss, _ in runs) for name, runs in found.items()}
    times = {name: statistics.median(seconds for _, seconds in runs) for name, runs in found.items()}
    for name, runs in found.items():
        print(f"\n{name:20} {losses[name]:.4f} ({min(runs)[0]:.4f} to {max(runs)[0]:.4f}), {times[name] * 1e3:.1f} ms",
              end='')
    assert times['the recipe'] < times.pop('n_kv_head=2')   # which saves time, the others loss
    assert all(losses['the recipe'] <= losses[name] for name in times)


def test_the_loss_on_other_contexts_than_in_training(here):
    """ of half the CPU recipe with 8 heads and each kind of positions; draws the README's figure """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes, recipe, ends = figure.subplots(), 'config/train_shakespeare_char_cpu_fast.py', {}
    for pos, lengths in dict(learned=(16, 32, 64), rope=LENGTHS, alibi=LENGTHS).items():
        trained(recipe, f'--pos={pos}', '--n_head=8', '--max_iters=450', '--lr_decay_iters=450')
        losses = []
        for length in lengths:
            arguments = [recipe, 'config/eval_long_context.py', f'--block_size={length}',
                         f'--out_dir={os.path.abspath("out")}']
            result = subprocess.run([sys.executable, 'train.py', *arguments], check=True, capture_output=True, cwd=ROOT,
                                    text=True)
            losses.append(float(re.search('val loss ([0-9.]+)', result.stdout)[1]))
            print(f"\n{pos}, {length}: {losses[-1]:.4f}", end='', flush=True)
        axes.plot(lengths, losses, marker='o', label=pos)
        ends[pos] = dict(zip(lengths, losses, strict=True))
    axes.axvline(64, color='gray', ls=':', label="length in training")
    axes.set(xscale='log', xlabel="length of the context (characters)", ylabel="validation loss (nats per character)",
             xticks=LENGTHS, xticklabels=LENGTHS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(os.path.join(ROOT, 'config', 'eval_long_context.png'), dpi=100)
    assert ends['alibi'][512] < ends['alibi'][64] and ends['rope'][512] > ends['rope'][64] + 0.1


def test_muons_step_at_the_size_of_gpt2(here):
    """ against an iteration of 32,768 tokens: 8 times the forward and backward of 4 x 1024, and the step """
    torch.set_num_threads(os.cpu_count())
    common.choose_products('cpu', 1024)
    model, shares = GPT(GPTConfig()), []
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu', muon_lr=0.02)
    rows = torch.randint(50257, (4, 1025))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model(rows[:, :-1], rows[:, 1:], loss_only=True)[1].backward()
        middle = time.perf_counter()
        optimizer.step()
        step = time.perf_counter() - middle
        shares.append(step / (8 * (middle - start) + step))
        print(f"\n8 x {middle - start:.2f} s, step {step:.2f} s in {optimizer.dtype}: {shares[-1]:.1%}", end='')
    assert statistics.median(shares) <= 0.15

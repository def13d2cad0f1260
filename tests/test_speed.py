""" Timings, each against a yardstick that takes turns with it: pytest -m benchmark -s """
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

from checkpoint import Saver, save
from dataset import Split
from engine import Sampling, generate, prepare
from logger import Logger
from model import GPT, GPTConfig

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

""" Timings, each against a yardstick in the same run: pytest -m benchmark -s. Ratios are medians of alternating rounds. """
import json
import os
import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

from dataset import Split

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


def test_an_iteration_against_plain_pytorch(here, script):
    """ train.py on the small Shakespeare model against a bare loop over one fixed batch, in alternating rounds """
    torch.set_num_threads(os.cpu_count())
    V, T, L, nh, C, B, n = 65, 64, 4, 4, 128, 12, 100
    plain = Plain(V, T, L, nh, C)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(V, (B, T + 1))

    def bare(_):
        optimizer.zero_grad(set_to_none=True)
        plain(rows[:, :-1], rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    config = os.path.join(ROOT, 'config', 'train_shakespeare_char_cpu.py')
    ratios = []
    for _ in range(7):
        bare_seconds = median_time(bare, n)
        script('train.py', config, '--eval_interval=1000000', f'--max_iters={n}', '--eval_iters=1', '--log_interval=1')
        ours = [json.loads(line) for line in open('out-shakespeare-char/log.jsonl')]
        ratios.append(statistics.median(record['time'] for record in ours if 'time' in record) / bare_seconds)
    print(f"\nours / plain: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    assert statistics.median(ratios) <= 1.05

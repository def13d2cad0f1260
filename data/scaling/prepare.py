""" Our own scaling law, measured: trains small models on tiny Shakespeare and writes runs.csv, for scaling_laws.ipynb.

$ python data/shakespeare_char/prepare.py
$ python data/scaling/prepare.py

35 minutes on 2 cores. A run that is in runs.csv is not made again, so it can be stopped and goes on.
"""
import os
import sys

root = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
sys.path.insert(0, root)
from configurator import configure

# ---- configuration
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'runs.csv')
at_once = 2                # runs, each on one core
learning_rate = 0.5        # divided by n_embd: wider models want smaller steps
least_iters = 100          # fewer updates say nothing about a budget
most_tokens = 20_000_000   # 20 times the whole text
config = configure(globals())

import csv
import json
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from common import fail
from model import GPT, GPTConfig

SHAPES = [(2, 2, 20), (2, 2, 32), (3, 2, 40), (3, 2, 64), (4, 4, 80), (4, 4, 128), (5, 4, 160), (6, 4, 208)]
BUDGETS = [1e11, 3e11, 1e12, 3e12, 1e13, 3e13]   # FLOPs, 6 * parameters * tokens
FIELDS = ['n_layer', 'n_head', 'n_embd', 'parameters', 'iterations', 'tokens', 'flops', 'train_loss', 'val_loss',
          'seconds']
TOKENS_PER_ITER = 12 * 64                        # of config/train_shakespeare_char_cpu.py


def grid():
    """ (shape, parameters, iterations) of each run, the cheapest first """
    for budget in BUDGETS:
        for n_layer, n_head, n_embd in SHAPES:
            parameters = GPT(GPTConfig(64, 65, n_layer, n_head, n_embd, bias=False)).get_num_params()
            iterations = round(budget / (6 * parameters * TOKENS_PER_ITER))
            if least_iters <= iterations <= most_tokens / TOKENS_PER_ITER:
                yield (n_layer, n_head, n_embd), parameters, iterations


def train(shape, parameters, iterations):
    """ one run, its learning rate warmed up and decayed within it; the row of runs.csv """
    rate, warmup_iters = learning_rate / shape[2], min(100, iterations // 10)
    with tempfile.TemporaryDirectory() as out_dir:
        done = subprocess.run(
            [sys.executable, os.path.join(root, 'train.py'), os.path.join(root, 'config/train_shakespeare_char_cpu.py'),
             *(f'--{key}={value}' for key, value in zip(('n_layer', 'n_head', 'n_embd'), shape, strict=True)),
             f'--max_iters={iterations}', f'--lr_decay_iters={iterations}', f'--warmup_iters={warmup_iters}',
             f'--learning_rate={rate}', f'--min_lr={rate / 10}', f'--eval_interval={iterations}', '--eval_iters=100',
             f'--out_dir={out_dir}'], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
        if done.returncode:
            fail(f"a run of {shape} failed: {done.stderr.strip()[-500:]}")
        with open(os.path.join(out_dir, 'log.jsonl')) as file:
            records = [json.loads(line) for line in file]
    last = [record for record in records if 'val_loss' in record][-1]
    tokens, seconds = iterations * TOKENS_PER_ITER, [record for record in records if 'elapsed' in record][-1]['elapsed']
    return [*shape, parameters, iterations, tokens, 6 * parameters * tokens, f"{last['train_loss']:.4f}",
            f"{last['val_loss']:.4f}", f'{seconds:.1f}']


rows = []
if os.path.exists(path):
    with open(path, newline='') as file:
        rows = list(csv.reader(file))[1:]
made = {tuple(map(int, row[:5])) for row in rows}
missing = [run for run in grid() if (*run[0], *run[1:]) not in made]
with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(missing), unit='run', disable=None) as bar:
    for row in pool.map(lambda run: train(*run), missing):
        rows.append(row)
        with open(path, 'w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows([FIELDS, *rows])
        bar.update()

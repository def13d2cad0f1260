""" The fast recipes: each one trains, and learns within 30 steps; that they hold their numbers is in test_speed.py. """
import glob
import os

import numpy as np
import pytest
from conftest import ROOT, records

from dataset import CharTokenizer, write_dataset

RECIPES = sorted(glob.glob('config/*_fast.py', root_dir=ROOT))


def test_there_are_three():
    assert [os.path.basename(path) for path in RECIPES] == [
        'train_gpt2_fast.py', 'train_shakespeare_char_cpu_fast.py', 'train_shakespeare_char_fast.py']


@pytest.mark.parametrize('path', RECIPES)
def test_thirty_steps_go_down(here, script, path):
    """ on a text in which a character leaves three possible next ones, in a model that is small enough for seconds """
    rng = np.random.default_rng(0)
    tokens = np.empty(20000, np.uint16)
    tokens[0] = 1
    for i in range(1, len(tokens)):
        tokens[i] = (4 * tokens[i - 1] + rng.integers(3)) % 61
    write_dataset('data/next', CharTokenizer(''.join(map(chr, range(32, 96)))), {'train': tokens, 'val': tokens[:2000]})
    script('train.py', os.path.join(ROOT, path), '--dataset=next', '--out_dir=out', '--device=cpu', '--compile=False',
           '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=8',
           '--gradient_accumulation_steps=1', '--max_iters=30', '--lr_decay_iters=30', '--warmup_iters=0',
           '--eval_interval=30', '--eval_iters=4', '--log_interval=1', '--dropout=0', '--wandb_log=False')
    losses = [record['loss'] for record in records('loss')]
    first, _, last = (sum(losses[begin:begin + 10]) / 10 for begin in (0, 10, 20))
    assert len(losses) == 30 and losses[0] > 4 and last < first - 0.5

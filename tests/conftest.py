""" Shared by all tests: real scripts run in process, in an empty working directory with a tiny dataset. """
import os
import runpy
import signal
import sys

import numpy as np
import pytest
import torch

from dataset import CharTokenizer, write_dataset

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--dataset=tiny', '--out_dir=out', '--device=cpu', '--compile=False', '--n_layer=2', '--n_head=2',
        '--n_embd=16', '--block_size=8', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=2',
        '--eval_interval=100',
        '--max_iters=6', '--learning_rate=1e-2', '--warmup_iters=2', '--lr_decay_iters=100']


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch):
    """ one thread for exact sums; signal handlers as they were """
    torch.set_num_threads(1)
    for name in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """ an empty working directory """
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(here):
    """ a working directory with the dataset data/tiny: 2000 and 300 of the characters a to h and newline, at random """
    folder = here / 'data' / 'tiny'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    write_dataset(str(folder), CharTokenizer('\nabcdefgh'),
                  {'train': rng.integers(0, 9, 2000), 'val': rng.integers(0, 9, 300)})
    return here


@pytest.fixture
def script(monkeypatch):
    """ script('train.py', '--key=value', ...) runs it in this process and returns its globals """
    def run(name, *arguments):
        path = os.path.join(ROOT, name)
        monkeypatch.setattr(sys, 'argv', [path, *arguments])
        return runpy.run_path(path, run_name='__main__')
    return run


@pytest.fixture
def fails(script, capsys):
    """ fails('train.py', ...) runs a script that must end with one line of complaint; returns (exit code, line) """
    def run(name, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script(name, *arguments)
        code, err = stop.value.code, capsys.readouterr().err
        if isinstance(code, str):   # python prints it to stderr and exits with 1
            code, err = 1, err + code
        lines = [line for line in err.splitlines() if line.startswith(('error:', 'config error:'))]
        assert len(lines) == 1 and err.endswith(lines[0] + '\n' * err.endswith('\n')) and code
        return code, lines[0]
    return run

""" Shared by all tests: real scripts, in this process or in several, in an empty folder with a tiny dataset. """
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tqdm import tqdm

from checkpoint import load
from dataset import CharTokenizer, write_dataset

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--dataset=tiny', '--out_dir=out', '--device=cpu', '--compile=False', '--n_layer=2', '--n_head=2',
        '--n_embd=16', '--block_size=8', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=2',
        '--eval_interval=100',
        '--dtype=float32', '--max_iters=6', '--learning_rate=1e-2', '--warmup_iters=2', '--lr_decay_iters=100']


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch):
    """ one thread for exact sums; signal handlers as they were """
    torch.set_num_threads(1)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    torch.backends.mkldnn.matmul.fp32_precision = 'none'   # choose_products sets it for the process
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


# ---- processes of their own, started as torchrun starts them, from a server that has torch imported already

def _process(folder, environment, output, patch, arguments):
    os.chdir(folder)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())   # its own is a semaphore, which a killed process leaves behind
    exec(patch, {})
    sys.argv = [os.path.join(ROOT, arguments[0]), *arguments[1:]]
    runpy.run_path(sys.argv[0], run_name='__main__')


class Processes:
    """ world_size processes of one script; patch: code that each runs before """

    def __init__(self, world_size, *arguments, patch=''):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['conftest', 'checkpoint', 'logger', 'torch.distributed.fsdp'])
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.output = os.path.abspath(f'output-{port}.txt')
        self.all = []
        for rank in range(world_size):
            environment = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world_size, 'LOCAL_WORLD_SIZE': world_size,
                           'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            environment = {key: str(value) for key, value in environment.items()}
            self.all.append(context.Process(target=_process, args=(
                os.getcwd(), environment if world_size > 1 else {}, self.output, patch, arguments)))
            self.all[-1].start()

    def text(self):
        """ what all of them printed so far """
        return open(self.output).read() if os.path.exists(self.output) else ''

    def wait(self):
        """ the exit codes, by rank, a signal's number negative """
        for process in self.all:
            process.join(120)
        return [process.exitcode for process in self.all]

    def wait_for(self, words):
        """ until they have printed words """
        for _ in range(6000):
            if words in self.text():
                return
            assert any(process.is_alive() for process in self.all), self.text()
            time.sleep(0.01)
        raise AssertionError(f"never printed {words!r}: {self.text()}")

    def kill(self, number):
        """ send all of them the signal """
        for process in self.all:
            if process.is_alive():
                os.kill(process.pid, number)


@pytest.fixture
def processes(monkeypatch):
    """ processes(2, 'train.py', '--key=value', patch='...') starts them; all end with the test """
    started = []
    monkeypatch.setenv('OMP_NUM_THREADS', '1')   # sums in one order

    def run(*arguments, **options):
        started.append(Processes(*arguments, **options))
        return started[-1]
    yield run
    for each in started:
        each.kill(signal.SIGKILL)


# ---- what a run left behind

def records(kind, path='out/log.jsonl'):
    """ the records of a log.jsonl that have this key """
    return [record for record in map(json.loads, open(path)) if kind in record]


def tensors(path='out/ckpt.pt'):
    """ every weight, moment and step count of a checkpoint, by name """
    checkpoint = load(path)
    moments = {f'{i} {key}': value for i, state in checkpoint['optimizer']['state'].items()
               for key, value in state.items()}
    return {**checkpoint['model'], **moments}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

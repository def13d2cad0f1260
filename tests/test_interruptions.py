""" Signals, kills and full disks: the run that was interrupted ends exactly as the one that was not. """
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, equal, records, tensors
from test_processes import torchrun

from checkpoint import load

pytestmark = pytest.mark.slow
# a step takes 20 ms or more, so that there is time to interrupt it
SLOW = """
import dataset, time
batch = dataset.Split.batch
def slow(self, batch_size, block_size, seed, stream, step):
    time.sleep(DELAY)
    return batch(self, batch_size, block_size, seed, stream, step)
dataset.Split.batch = slow
"""
SLOW_DISK = """
import os
fsync = os.fsync
os.fsync = lambda number: (time.sleep(0.01), fsync(number))
"""
LONG = [*TINY, '--max_iters=100000', '--lr_decay_iters=50', '--dropout=0.1', '--learning_rate=1e-3']
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def same_run(one, two):
    """ every weight, moment, logged loss and evaluation """
    assert equal(tensors(f'{one}/ckpt.pt'), tensors(f'{two}/ckpt.pt'))
    for kind, keys in (('loss', ('iter', 'loss', 'lr', 'grad_norm', 'skipped')), ('val_loss', ('iter', 'val_loss'))):
        ours, theirs = ([[record[key] for key in keys] for record in records(kind, f'{name}/log.jsonl')]
                        for name in (one, two))
        assert ours == theirs
    assert load(f'{one}/ckpt.pt')['best_val_loss'] == load(f'{two}/ckpt.pt')['best_val_loss']


@pytest.mark.parametrize('number, code', SIGNALS)
def test_a_signal_finishes_the_step_and_saves(tiny, script, number, code):
    """ a real signal to a real process, whose run then continues as if nothing had happened """
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *LONG], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})   # exact, as here
    for line in process.stdout:
        if line.startswith('iter 20:'):
            process.send_signal(number)
            break
    out = process.stdout.read()
    assert process.wait() == code and 'finishing this step' in out and 'saved out/ckpt.pt' in out
    stopped = load('out/ckpt.pt')['iter_num']
    assert stopped > 20
    script('train.py', *LONG, '--init_from=resume', f'--max_iters={stopped + 5}')
    script('train.py', *LONG, '--out_dir=straight', f'--max_iters={stopped + 5}')
    same_run('out', 'straight')


@pytest.mark.parametrize('number, code', SIGNALS)
def test_a_signal_to_one_process_stops_both(tiny, processes, number, code):
    """ they agree on the step, save, and end with the same code """
    started = processes(2, 'train.py', *LONG)
    started.wait_for('iter 20:')
    os.kill(started.all[1].pid, number)
    assert started.wait() == [code, code], started.text()
    stopped = load('out/ckpt.pt')['iter_num']
    assert records('loss')[-1]['iter'] == stopped - 1 >= 20 and 'saved out/ckpt.pt' in started.text()


def test_a_signal_to_torchrun_saves(tiny):
    command = torchrun(os.path.join(ROOT, 'train.py'), *LONG)
    for line in command.stdout:
        if line.startswith('iter 20:'):
            command.send_signal(signal.SIGTERM)
            break
    text = command.stdout.read()
    assert command.wait() and 'saved out/ckpt.pt' in text and 'once more' in text, text
    assert load('out/ckpt.pt')['iter_num'] == records('loss')[-1]['iter'] + 1


def test_an_evaluation_is_left_at_a_signal(tiny, processes, script):
    """ one of ten thousand batches would take minutes; the run that is resumed makes it """
    started = processes(2, 'train.py', *LONG, '--eval_interval=3', '--eval_iters=10000')
    started.wait_for('data:')
    time.sleep(0.5)
    started.kill(signal.SIGTERM)
    assert started.wait() == [143, 143], started.text()
    assert load('out/ckpt.pt')['iter_num'] == 0 and not records('val_loss')
    script('train.py', *LONG, '--init_from=resume', '--max_iters=3')
    assert [record['iter'] for record in records('val_loss')] == [0, 3]


@pytest.mark.parametrize('world_size', [1, 2])
def test_a_second_signal_stops_at_once(tiny, processes, world_size):
    before = 2 * (world_size - 1)   # batches before the loop, which settle the order of DDP's sums
    delay = f'30 * (stream == "train" and len(calls.append(1) or calls) > {before})'
    started = processes(world_size, 'train.py', *LONG, patch='calls = []' + SLOW.replace('DELAY', delay))
    started.wait_for('step 0:')
    started.kill(signal.SIGTERM)
    started.wait_for('SIGTERM: finishing this step, then saving')
    time.sleep(0 if world_size == 1 else 4)   # the other one may have heard of it later
    start = time.perf_counter()
    started.kill(signal.SIGINT)
    assert started.wait() == [-signal.SIGINT] * world_size and time.perf_counter() - start < 5


def test_a_signal_that_torchrun_repeats_is_one(tiny, processes):
    """ a scheduler signals the whole group, and torchrun passes on what it got """
    started = processes(2, 'train.py', *LONG, patch=SLOW.replace('DELAY', '0.05'))
    started.wait_for('iter 3:')
    for _ in range(3):
        started.kill(signal.SIGTERM)
        time.sleep(0.02)
    assert started.wait() == [143, 143], started.text()
    assert load('out/ckpt.pt')['iter_num'] == records('loss')[-1]['iter'] + 1 >= 4


def test_nohup_is_respected(tiny, processes):
    started = processes(1, 'train.py', *LONG, '--max_iters=60', patch="import signal; "
                        "signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SLOW.replace('DELAY', '0.005'))
    started.wait_for('iter 3:')
    started.kill(signal.SIGHUP)
    assert started.wait() == [0] and load('out/ckpt.pt')['iter_num'] == 60


def interrupted_run(processes, world_size, rounds, seed):
    """ a run that is interrupted that often, at random moments; returns how the interruptions hit it """
    dice, hits = random.Random(seed), []
    numbers = [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM] * (rounds // 4)
    dice.shuffle(numbers)
    options = ['--dropout=0.2', '--eval_interval=7', f'--max_iters={14 * rounds}', '--lr_decay_iters=300']
    start = processes(world_size, 'train.py', *TINY, *options, '--out_dir=straight')
    assert start.wait() == [0] * world_size
    for number in numbers:
        started = processes(world_size, 'train.py', *TINY, *options, '--init_from=auto', '--save_interval=1e-6',
                            patch=SLOW.replace('DELAY', '0.01') + SLOW_DISK)
        started.wait_for('data:')
        time.sleep(dice.random() * 0.5)
        if number == signal.SIGKILL and dice.random() < 0.5:
            started.all[dice.randrange(world_size)].kill()   # one alone, the others notice
        else:
            started.kill(number)
        codes = started.wait()
        assert all(codes) or codes == [0] * world_size, started.text()
        hits.append((number.name, codes, os.path.exists('out/ckpt.pt.tmp')))
    last = processes(world_size, 'train.py', *TINY, *options, '--init_from=auto', '--save_interval=1e-6')
    assert last.wait() == [0] * world_size, last.text()
    same_run('out', 'straight')
    return hits


@pytest.mark.parametrize('world_size', [1, 2])
def test_any_interruptions_change_nothing(tiny, processes, world_size):
    interrupted_run(processes, world_size, 4, seed=world_size)


@pytest.mark.stress
@pytest.mark.parametrize('world_size', [1, 2])
def test_twenty_interruptions_change_nothing(tiny, processes, world_size):
    hits = interrupted_run(processes, world_size, 20, seed=10 + world_size)
    print('\n', *hits, sep='\n')
    assert sum(tmp for _, _, tmp in hits), "no kill hit a save"


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run(tiny, processes, script):
    """ from the second checkpoint on no file may grow beyond 20 kB, as on a full disk """
    patch = """
import checkpoint, resource
write = checkpoint.Saver._write
def full(self, state, best):
    if state['iter_num']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    write(self, state, best)
checkpoint.Saver._write = full
"""
    started = processes(1, 'train.py', *TINY, '--eval_interval=2', patch=patch)
    assert started.wait() == [1]
    text = started.text()
    assert 'warning: out/ckpt.pt was not saved' in text and len(records('loss')) == 6
    assert text.count('error: the state at iteration 6 is lost, the checkpoint in out is an earlier one') == 1
    assert load('out/ckpt.pt')['iter_num'] == 0 and not [name for name in os.listdir('out') if 'tmp' in name]
    script('train.py', *TINY, '--eval_interval=2', '--init_from=auto')
    script('train.py', *TINY, '--eval_interval=2', '--out_dir=straight')
    same_run('out', 'straight')

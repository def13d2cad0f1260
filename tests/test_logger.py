""" logger.py: log.jsonl over interruptions, TensorBoard, wandb without a network, the picture. """
import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import ROOT

from logger import Logger, draw_runs, read_log

OFF = {'wandb_log': False, 'tensorboard_log': False}


def test_a_resumed_log_repeats_nothing(here):
    log = Logger('out', 0, OFF)
    for i in range(5):
        if i % 2 == 0:
            log.log({'iter': i, 'val_loss': 2.0})
        log.log({'iter': i, 'loss': 1.0 * i})
    log.close()
    with open('out/log.jsonl', 'a') as file:
        file.write('{"iter": 5, "lo')   # cut off by a crash
    log = Logger('out', 2, OFF)   # two updates are done, and the evaluation after them is not repeated
    log.log({'iter': 2, 'loss': float('nan'), 'mfu': None})
    log.close()
    assert [(r['iter'], 'val_loss' in r) for r in read_log('out/log.jsonl')] == [
        (0, True), (0, False), (1, False), (2, True), (2, False)]
    assert json.loads(open('out/log.jsonl').readlines()[-1]) == {'iter': 2, 'loss': None, 'mfu': None}


def test_a_full_disk_does_not_stop_the_run(here, capsys):
    log = Logger('out', 0, OFF)
    log._file = open('/dev/full', 'w')   # every write fails as on a full disk
    log.log({'iter': 0, 'loss': 1.0})
    log.close()
    assert 'warning: a record is missing in log.jsonl' in capsys.readouterr().out


def test_a_spoiled_line_costs_itself_alone(here):
    log = Logger('out', 0, OFF)
    for i in range(5):
        log.log({'iter': i, 'loss': 1.0})
    log.close()
    lines = open('out/log.jsonl', 'rb').readlines()
    spoiled = [lines[0], b'{"it\xffer": 1}\n', lines[2], b'[1]\n', b'{"loss": 2}\n', lines[3]]
    open('out/log.jsonl', 'wb').writelines(spoiled)
    Logger('out', 9, OFF).close()
    assert [record['iter'] for record in read_log('out/log.jsonl')] == [0, 2, 3]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_repeated(here):
    """ interrupted before an evaluation, resumed, killed between the evaluation and the next save """
    for _ in range(2):
        log = Logger('out', 2, OFF, evaluated=False)
        log.log({'iter': 2, 'val_loss': 2.0})
        log.close()
    assert read_log('out/log.jsonl') == [{'iter': 2, 'val_loss': 2.0}]


def test_the_first_line_says_where_the_numbers_come_from(here):
    for iter_num, source in ((0, {'command': 'train.py'}), (2, {'command': 'train.py --init_from=resume'})):
        log = Logger('out', iter_num, OFF, source=source)
        log.log({'iter': iter_num, 'loss': 1.0})
        log.log({'iter': iter_num + 1, 'loss': 1.0})
        log.close()
    Logger('out', 1, OFF).close()   # what came after iteration 1 is dropped, the line about it too
    assert read_log('out/log.jsonl') == [{'iter': 0, 'command': 'train.py'}, {'iter': 0, 'loss': 1.0}]


def test_other_processes_write_nothing(here, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    log = Logger('out', 0, {**OFF, 'wandb_log': True, 'tensorboard_log': True}, 'id', {'command': 'x'})
    log.log({'iter': 0, 'loss': 1.0})
    log.close()
    assert os.listdir() == [] and log.wandb_id == 'id'


BOARD = {'wandb_log': False, 'tensorboard_log': True}


def curves(folder='out/tensorboard'):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(folder)
    board.Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()['scalars']}


def test_tensorboard_over_a_resume(here):
    """ the curves have each iteration once, also those that the interrupted run had logged and the next one repeats """
    for first, last, value in ((0, 4, 1.0), (2, 6, 2.0)):
        log = Logger('out', first, BOARD)
        for i in range(first, last):
            log.log({'iter': i, 'loss': value, 'mfu': None, 'lr': 0.5})
            if i % 2 and i < 5:
                log.log({'iter': i + 1, 'val_loss': value})
        log.close()
    steps = curves()
    assert steps['loss'] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert steps['val/loss'] == [(2, 1.0), (4, 2.0)] and set(steps) == {'loss', 'lr', 'val/loss'}


def test_without_tensorboard_there_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    log = Logger('out', 0, BOARD)
    log.log({'iter': 0, 'loss': 1.0})
    log.close()
    assert capsys.readouterr().out.count('warning: no TensorBoard') == 1 and len(read_log('out/log.jsonl')) == 1


# ---- the picture

def runs(*names):
    for number, name in enumerate(names):
        log = Logger(name, 0, OFF, source={'command': 'train.py'})
        for i in range(50):
            if i % 10 == 0:
                log.log({'iter': i, 'train_loss': 4 - i / 20, 'val_loss': 4.1 - i / 20 + number / 2})
            log.log({'iter': i, 'loss': 4 - i / 20 if i != 7 else float('nan'), 'lr': 1e-3 * min(i, 10)})
        log.close()


def test_the_picture_shows_all_runs(here, monkeypatch):
    from matplotlib.figure import Figure
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    runs('a', 'b')
    draw_runs(['a', 'b'], 'loss.png')
    assert open('loss.png', 'rb').read(8) == b'\x89PNG\r\n\x1a\n'
    losses, rates = drawn[0].axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        'a, training', 'a, validation', 'b, training', 'b, validation']
    assert [len(line.get_xdata()) for line in losses.lines] == [49, 5, 49, 5] and len(rates.lines) == 2
    assert list(losses.lines[3].get_ydata()) == [4.6 - i / 20 for i in range(0, 50, 10)]


def test_no_picture_does_no_harm(here, capsys, monkeypatch):
    draw_runs(['nowhere'], 'loss.png')
    assert 'warning: loss.png was not drawn' in capsys.readouterr().out
    runs('a')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    draw_runs(['a'], 'loss.png')
    assert capsys.readouterr().out == '' and not os.path.exists('loss.png')


WANDB = {'wandb_log': True, 'tensorboard_log': False,
         'wandb_project': 'p', 'wandb_run_name': 'n', 'out_dir': 'out', 'max_iters': 1}


@pytest.mark.slow
def test_wandb_without_login_runs_offline_and_keeps_its_id(here, capsys, monkeypatch):
    """ the real library, without a key: one warning, a local run, the same id when the run is resumed """
    for name in ('WANDB_API_KEY', 'WANDB_MODE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(here))
    monkeypatch.setenv('NETRC', str(here / 'netrc'))
    log = Logger('out', 0, WANDB)
    log.log({'iter': 0, 'val_loss': 1.0, 'mfu': 0.3})
    log.close()
    assert capsys.readouterr().out.count('warning: wandb runs offline') == 1
    assert log.wandb_id and any(log.wandb_id in name for name in os.listdir('out/wandb'))
    again = Logger('out', 1, WANDB, log.wandb_id)
    again.close()
    assert again.wandb_id == log.wandb_id and len(read_log('out/log.jsonl')) == 1


@pytest.mark.slow
def test_wandb_does_not_ask_on_a_terminal(here, monkeypatch):
    """ a pty, no key: one warning, no question that waits for an answer """
    code = "from logger import Logger; Logger('out', 0, dict(wandb_log=True, tensorboard_log=False, out_dir='out', " \
           "wandb_project='p', wandb_run_name='n')).close(); print('done')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith('WANDB')}
    ours, theirs = pty.openpty()
    environment.update(HOME=str(here), NETRC=str(here / 'netrc'), PYTHONPATH=ROOT)
    process = subprocess.Popen([sys.executable, '-c', code], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs,
                               text=True, env=environment)
    out = process.communicate(timeout=60)[0]
    assert 'wandb runs offline (not logged in)' in out and out.endswith('done\n')
    os.close(ours)
    os.close(theirs)


def test_wandb_that_is_missing_or_breaks_does_not_stop_anything(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    Logger('out', 0, WANDB).close()
    assert 'warning: no wandb' in capsys.readouterr().out

    class Run:
        id, seen = 'abc', []

        def log(self, record):
            self.seen.append(record)
            if len(self.seen) > 1:
                raise RuntimeError("connection lost")

        def finish(self):
            raise RuntimeError("upload failed")
    monkeypatch.setattr('logger._start_wandb', lambda config, wandb_id: Run())
    log = Logger('out', 0, WANDB)
    for i in range(4):
        log.log({'iter': i, 'train_loss': 1.0, 'val_loss': 2.0, 'lr': 0.1, 'mfu': 0.25})
    log.close()
    Logger('out', 4, WANDB).close()
    assert Run.seen[0] == {'iter': 0, 'train/loss': 1.0, 'val/loss': 2.0, 'lr': 0.1, 'mfu': 25.0}   # nanoGPT's names
    out = capsys.readouterr().out
    assert len(Run.seen) == 2 and out.count('connection lost') == 1 and 'upload failed' in out
    assert len(read_log('out/log.jsonl')) == 4

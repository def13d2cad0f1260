""" logger.py: log.jsonl over interruptions, wandb without a network. """
import json
import os
import sys

import pytest

from logger import Logger, read_log

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

""" Where a run's numbers go: always out_dir/log.jsonl, one JSON object a line, and wandb when asked. """
import contextlib
import json
import math
import os

from common import atomic_write, first_line, print0

WANDB_NAMES = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}   # as nanoGPT's dashboards know them


def read_log(path: str) -> list[dict]:
    """ the records of a log.jsonl; a last line that was cut off by a crash is left out """
    records = []
    with open(path, encoding='utf-8') as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


class Logger:
    """ log(record) appends one record; logging never stops a run """

    def __init__(self, out_dir: str, iter_num: int, config: dict, wandb_id: str = ''):
        """ out_dir: made if missing; iter_num: records from here on, left by a run that is resumed, are dropped """
        os.makedirs(out_dir, exist_ok=True)
        path = os.path.join(out_dir, 'log.jsonl')
        if os.path.exists(path):
            kept = [r for r in read_log(path) if r['iter'] < iter_num or r['iter'] == iter_num and 'val_loss' in r]
            with atomic_write(path) as file:
                file.writelines(json.dumps(record).encode() + b'\n' for record in kept)
        self._file = open(path, 'a', encoding='utf-8')
        self._run = _start_wandb(config, wandb_id) if config['wandb_log'] else None
        self.wandb_id = self._run.id if self._run else wandb_id

    def log(self, record: dict) -> None:
        """ record: plain numbers, with 'iter'; one that is not finite becomes null, which JSON has """
        record = {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}
        try:
            self._file.write(json.dumps(record) + '\n')
            self._file.flush()
        except OSError as error:
            print0(f"warning: a record is missing in log.jsonl ({error})")
        if self._run:
            try:
                named = {WANDB_NAMES.get(key, key): value for key, value in record.items() if value is not None}
                self._run.log({**named, **({'mfu': 100 * named['mfu']} if 'mfu' in named else {})})
            except Exception as error:   # whatever wandb raises
                print0(f"warning: wandb stopped logging ({error}); log.jsonl goes on")
                self._run = None

    def close(self) -> None:
        with contextlib.suppress(OSError):   # of records that could not be written before
            self._file.close()
        if self._run:
            try:
                self._run.finish()
            except Exception as error:   # such as an upload that failed
                print0(f"warning: wandb did not finish ({first_line(error)}); log.jsonl is complete")


def _start_wandb(config: dict, wandb_id: str):
    """ a wandb run, offline where no login or network is to be had, None where wandb cannot start at all """
    try:
        import wandb
        options = dict(project=config['wandb_project'], name=config['wandb_run_name'], config=config,
                       dir=config['out_dir'], id=wandb_id or None, resume='allow')
        try:
            return wandb.init(**options)
        except wandb.errors.Error as error:
            print0(f"warning: wandb runs offline ({first_line(error)}); upload later with: wandb sync")
            return wandb.init(**options, mode='offline')
    except Exception as error:   # not installed, or no place to write
        print0(f"warning: no wandb ({error}); log.jsonl has the same numbers")
        return None

""" Where a run's numbers go: always out_dir/log.jsonl, one JSON object a line; wandb and TensorBoard when asked.

The first line says where the numbers come from, the others belong to an iteration: to its training, with loss, or to
an evaluation before it, with val_loss. draw_runs makes a picture of one run or of several.
"""
import contextlib
import json
import math
import os

from common import atomic_write, first_line, is_rank_0, print0


def read_log(path: str) -> list[dict]:
    """ the records of a log.jsonl; a line that is none, such as a last one that a crash cut off, is left out """
    records = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get('iter'), int):
                    records.append(record)
    return records


class Logger:
    """ log(record) appends one record, on rank 0; logging never stops a run """

    def __init__(self, out_dir: str, iter_num: int, config: dict, wandb_id: str = '',
                 source: dict | None = None, evaluated: bool = True):
        """ out_dir: made if missing; iter_num: records from here on, left by a run that is resumed, are dropped

        source: where the numbers that follow come from, plain values; evaluated: iter_num's evaluation is not repeated.
        """
        self.wandb_id, self._file, self._dashboards = wandb_id, None, {}
        if not is_rank_0():
            return
        os.makedirs(out_dir, exist_ok=True)
        path, kept = os.path.join(out_dir, 'log.jsonl'), []
        if os.path.exists(path):
            again = {'loss'} if evaluated else {'loss', 'val_loss'}
            kept = [r for r in read_log(path) if r['iter'] < iter_num or r['iter'] == iter_num and not again & r.keys()]
            with atomic_write(path) as file:
                file.writelines(json.dumps(record).encode() + b'\n' for record in kept)
        self._file = open(path, 'a', encoding='utf-8')
        if source:
            self._write({'iter': iter_num, **source})
        if config['wandb_log'] and (run := _start_wandb(config, wandb_id)):
            self._dashboards['wandb'], self.wandb_id = run, run.id
        if config['tensorboard_log'] and (board := _start_tensorboard(out_dir, iter_num)):
            self._dashboards['TensorBoard'] = board
            for record in kept:
                if record['iter'] == iter_num and 'val_loss' in record:   # hidden together with what is dropped
                    board.log(_named(record))

    def log(self, record: dict) -> None:
        """ record: plain numbers, with 'iter'; one that is not finite becomes null, which JSON has """
        if not is_rank_0():
            return
        record = {key: value if value is None or math.isfinite(value) else None for key, value in record.items()}
        self._write(record)
        for name, board in list(self._dashboards.items()):
            try:
                board.log(_named(record))
            except Exception as error:   # whatever it raises
                print0(f"warning: {name} stopped logging ({error}); log.jsonl goes on")
                del self._dashboards[name]

    def _write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record) + '\n')
            self._file.flush()
        except OSError as error:
            print0(f"warning: a record is missing in log.jsonl ({error})")

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):   # of records that could not be written; of other ranks
            self._file.close()
        for name, board in self._dashboards.items():
            try:
                board.finish()
            except Exception as error:   # such as an upload that failed
                print0(f"warning: {name} did not finish ({first_line(error)}); log.jsonl is complete")


def _named(record: dict) -> dict:
    """ a record as nanoGPT's dashboards know it, MFU in percent """
    names = {'train_loss': 'train/loss', 'val_loss': 'val/loss'}
    return {names.get(k, k): 100 * value if k == 'mfu' else value for k, value in record.items() if value is not None}


def _start_wandb(config: dict, wandb_id: str):
    """ a wandb run, offline where no login or network is to be had, None where wandb cannot start at all """
    try:
        import wandb
        options = dict(project=config['wandb_project'], name=config['wandb_run_name'], config=config,
                       dir=config['out_dir'], id=wandb_id or None, resume='allow')
        try:
            if not (os.environ.get('WANDB_MODE') or wandb.login(prompt=False)):   # init would ask, and wait
                raise wandb.errors.UsageError("not logged in")
            return wandb.init(**options)
        except wandb.errors.Error as error:
            print0(f"warning: wandb runs offline ({first_line(error)}); upload later with: wandb sync")
            return wandb.init(**options, mode='offline')
    except Exception as error:   # not installed, or no place to write
        print0(f"warning: no wandb ({error}); log.jsonl has the same numbers")
        return None


class _TensorBoard:
    """ TensorBoard behind the two methods that a wandb run has """

    def __init__(self, folder: str, iter_num: int):
        from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(folder, purge_step=iter_num)   # hides what a run that is resumed logged later
        self.finish = self._writer.close

    def log(self, record: dict) -> None:
        for name, value in record.items():
            if name != 'iter':
                self._writer.add_scalar(name, value, record['iter'])


def _start_tensorboard(out_dir: str, iter_num: int) -> _TensorBoard | None:
    """ None, with one line, where it is not installed or cannot write """
    try:
        return _TensorBoard(os.path.join(out_dir, 'tensorboard'), iter_num)
    except Exception as error:
        print0(f"warning: no TensorBoard ({first_line(error)}), try pip install tensorboard; log.jsonl goes on")
        return None


def draw_runs(out_dirs: list[str], path: str) -> None:
    """ a PNG at path with the losses and learning rates of the runs in out_dirs, if matplotlib is installed """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    try:
        figure = Figure(figsize=(8, 6), layout='constrained')
        losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        for number, out_dir in enumerate(out_dirs):
            records, color = read_log(os.path.join(out_dir, 'log.jsonl')), f'C{number}'
            trained, evaluated = ([r for r in records if r.get(key) is not None] for key in ('loss', 'val_loss'))
            steps = [r['iter'] for r in trained]
            losses.plot(steps, [r['loss'] for r in trained], color, alpha=0.4, lw=1, label=f"{out_dir}, training")
            losses.plot([r['iter'] for r in evaluated], [r['val_loss'] for r in evaluated], color, marker='.',
                        label=f"{out_dir}, validation")
            rates.plot(steps, [r['lr'] for r in trained], color)
        losses.set_ylabel("loss (nats per token)")
        losses.legend()
        rates.set(xlabel="iteration", ylabel="learning rate")
        for axes in (losses, rates):
            axes.grid(alpha=0.3)
        with atomic_write(path) as file:
            figure.savefig(file, format='png', dpi=100)
    except (OSError, ValueError, KeyError) as error:
        print0(f"warning: {path} was not drawn ({first_line(error)})")

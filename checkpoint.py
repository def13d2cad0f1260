""" Checkpoints: written whole or not at all, verified before they are believed, plain types and tensors only.

out_dir/ckpt.pt is the latest state, ckpt_prev.pt the one before, ckpt_best.pt the weights with the lowest validation
loss. The keys are nanoGPT's (model, optimizer, model_args, iter_num, best_val_loss, config) and some more beside them.
"""
import contextlib
import errno
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from common import atomic_write, fail, first_line, gather, is_rank_0, one_line_errors, print0
from model import GPT, TOKENIZER, GPTConfig, add_lora, empty_model, fingerprint, lora_weights, merge_lora, read_json

LATEST, PREVIOUS, BEST = 'ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt'
PARTS = ('model', 'model_args')   # what makes a file a checkpoint


# ---- saving

def _map(function: Callable, state):
    """ nested dicts, lists and tuples with function applied to every tensor """
    if isinstance(state, dict):
        return {key: _map(function, value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_map(function, value) for value in state)
    return function(state) if isinstance(state, Tensor) else state


def _check_room(path: str, size: int) -> None:
    """ OSError unless size bytes fit beside path; the checkpoint before the latest gives way if that is enough """
    folder = os.path.dirname(os.path.abspath(path))
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{path}.tmp')   # of a process that was killed
    previous, free = os.path.join(folder, PREVIOUS), shutil.disk_usage(folder).free
    if free < size and os.path.exists(previous) and os.path.exists(os.path.join(folder, LATEST)):
        if free + os.path.getsize(previous) >= size:
            os.remove(previous)
            free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{size / 1e6:,.0f} MB to write and {free / 1e6:,.0f} MB free")


def save(path: str, state: dict, previous: str = '') -> bool:
    """ write state to path; False, with one line that says why and path as it was, if that cannot be done

    previous: a name for what stood there before. Values that are not finite are refused.
    """
    tensors = {}
    _map(lambda tensor: tensors.setdefault(tensor.data_ptr(), tensor), state)   # tied weights are stored once
    try:
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise OSError("a weight or optimizer moment is not finite")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        _check_room(path, sum(tensor.nbytes for tensor in tensors.values()))
        with atomic_write(path, previous) as file:
            torch.save(state, file)
    except (OSError, RuntimeError, MemoryError) as error:   # torch reports a failed write as either
        print0(f"warning: {path} was not saved ({first_line(error)}); what stood there before still does")
        return False
    return True


class Saver:
    """ copies a run's state to host memory and writes it in the background: training waits for the copy only

    Rank 0 copies and writes. The memory of the copies is kept, because fresh memory takes longer than copying.
    """

    def __init__(self, out_dir: str, iter_num: int = -1, best_val_loss: float = math.inf):
        self.out_dir = out_dir
        self.iter_num, self.best_val_loss = iter_num, best_val_loss   # of the files; known on rank 0, after wait()
        self._thread, self._jobs, self._buffers = ThreadPoolExecutor(1), [], {}

    def wait(self) -> None:
        """ until the latest save is on the disk or has failed; an exception that it did not expect is raised here """
        while self._jobs:
            self._jobs.pop(0).result()

    def _buffer(self, tensor: Tensor) -> Tensor:
        """ the memory for the copy of a tensor; tied weights are one tensor """
        key = id(tensor), tensor.shape, tensor.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if tensor.is_cuda:
                with contextlib.suppress(RuntimeError):   # only so much memory may be pinned, which is faster
                    self._buffers[key] = self._buffers[key].pin_memory()
        return self._buffers[key]

    def reserve(self, state: dict) -> None:
        """ make the memory for copies of state, in the background """
        if is_rank_0():
            self._jobs.append(self._thread.submit(_map, self._buffer, state))

    def save(self, state: dict, best_val_loss: float | None = None) -> None:
        """ write state to ckpt.pt and, where it is the best so far, its weights to ckpt_best.pt before

        All processes must call it, because sharded tensors are gathered from them.
        """
        self.wait()
        devices = set()

        def copy(tensor):
            devices.add(tensor.device.type)
            whole = tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor
            return self._buffer(tensor).copy_(whole, non_blocking=True) if is_rank_0() else None
        with torch.no_grad():
            snapshot = _map(copy, state)
        if devices - {'cpu'}:
            torch.accelerator.synchronize()   # the copies were only started
        if is_rank_0():
            self._jobs.append(self._thread.submit(self._write, snapshot, best_val_loss))

    def _write(self, state: dict, best_val_loss: float | None) -> None:
        latest, previous, best = (os.path.join(self.out_dir, name) for name in (LATEST, PREVIOUS, BEST))
        if best_val_loss is not None:
            weights = {key: value for key, value in state.items() if key not in ('optimizer', 'scaler')}
            if save(best, {**weights, 'best_val_loss': best_val_loss}):
                self.best_val_loss = best_val_loss
        if save(latest, {**state, 'best_val_loss': self.best_val_loss}, previous):
            self.iter_num = state['iter_num']


def move_aside(out_dir: str) -> None:
    """ move an earlier run's files to out_dir/old-N, so that a new run overwrites nothing """
    names = [name for name in (LATEST, PREVIOUS, BEST, 'log.jsonl', 'loss.png', 'tensorboard')
             if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return
    number = next(n for n in range(1, 10**6) if not os.path.exists(os.path.join(out_dir, f'old-{n}')))
    aside = os.path.join(out_dir, f'old-{number}')
    os.makedirs(aside)
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(aside, name))
    print0(f"{out_dir} held another run: moved {', '.join(names)} to {aside}")


# ---- loading

def find(out_dir: str, ckpt: str = 'last') -> str:
    """ path of the 'best' or the 'last' checkpoint in out_dir, the last where there is no best; SystemExit if none """
    if ckpt not in ('best', 'last'):
        fail(f"--ckpt={ckpt} is neither best nor last")
    for name in (BEST, LATEST, PREVIOUS)[ckpt == 'last':]:
        if os.path.exists(path := os.path.join(out_dir, name)):
            return path
    others = sorted(name for name in os.listdir() if os.path.exists(os.path.join(name, LATEST)))
    advice = f"--out_dir={others[0]} has one" if others else f"train one: python train.py CONFIG --out_dir={out_dir}"
    fail(f"no checkpoint in '{out_dir}'; {advice}")


def _read(path: str) -> dict:
    """ the checkpoint at path, its CRCs verified, nothing in it run; ValueError says what is wrong with it """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        checkpoint = {} if damaged else torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values; loading it could run code") from None
    except Exception as error:   # a flipped bit in the zip's own tables can surface as any exception
        if isinstance(error, OSError | MemoryError) and getattr(error, 'errno', 0) not in (None, errno.EINVAL):
            fail(f"{path} cannot be read ({first_line(error)})")   # not the file's fault: no reason to start over
        raise ValueError(f"{path} is damaged or not a checkpoint ({first_line(error)})") from None
    if damaged:
        raise ValueError(f"{path} is damaged at {damaged}")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), dict) for k in PARTS):
        raise ValueError(f"{path} is not a GPT checkpoint: it has no model and model_args")
    # torch.compile and DDP wrappers prefix the names, and before PyTorch 2.0 nanoGPT stored its causal masks too
    checkpoint['model'] = {name.removeprefix('module.').removeprefix('_orig_mod.'): tensor
                           for name, tensor in checkpoint['model'].items() if not name.endswith('.attn.bias')}
    return checkpoint


def load(path: str) -> dict:
    """ the checkpoint at path, on the CPU, its weights named as GPT's; SystemExit if it is damaged or not one """
    try:
        return _read(path)
    except ValueError as error:
        fail(f"{error}; it was not loaded, go back to another checkpoint")


def weights_of(source: str, out_dir: str = '', ckpt: str = 'best') -> dict:
    """ what a script starts from: 'resume' (out_dir's), 'ckpt:PATH', adapters folded in, or a GPT.from_pretrained """
    if source == 'resume' or source.startswith('ckpt:'):
        path = out_dir if source == 'resume' else source.removeprefix('ckpt:')
        trained = load(path := path if os.path.isfile(path) else find(path, ckpt))
        if 'lora' in trained:
            merge_lora(model := build_model(trained))
            trained.update(model=model.state_dict(), lora=None)
        return {**trained, 'path': path}
    with one_line_errors():
        model = GPT.from_pretrained(source)
        own = os.path.join(source, TOKENIZER)
        spec = read_json(own) if os.path.exists(own) else {'name': 'gpt2'} if model.config.vocab_size == 50257 else None
    return {'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': spec}


def starting_point(init_from: str, out_dir: str) -> dict:
    """ what a run begins with: {} (scratch), the latest whole state (resume), that if any (auto), or see weights_of

    A damaged file is skipped with one line, and SystemExit if there is nothing to resume from.
    """
    if init_from not in ('scratch', 'resume', 'auto'):
        trained = weights_of(init_from)
        return {key: trained[key] for key in (*PARTS, 'tokenizer', 'path') if key in trained}
    state, paths = {}, [os.path.join(out_dir, name) for name in (LATEST, PREVIOUS)]
    for path in filter(os.path.exists, paths if init_from in ('resume', 'auto') else ()):
        try:
            state = _read(path)
            break
        except ValueError as error:
            print0(f"warning: {error}")
    if init_from == 'resume' and not state:
        fail(f"{find(out_dir)} is of no use; --init_from=auto would start over and keep it aside")
    found = gather(state.get('iter_num', -1))[0]
    if min(found) < max(found):
        fail(f"the processes found checkpoints of iterations {found}; '{out_dir}' must be on a disk that they share")
    if state and path == paths[1]:
        print0(f"warning: going on from the checkpoint before, {path} at iteration {state.get('iter_num')}")
        if is_rank_0():   # all have read it; a later save must not put the damaged one in its place
            with contextlib.suppress(FileNotFoundError):
                os.replace(paths[0], f'{paths[0]}.damaged')
            os.replace(path, paths[0])
    return state


def _build_adapter(checkpoint: dict, changes: dict) -> GPT:
    """ of a checkpoint of LoRA: its base, from where that came from, with the low-rank parts """
    sources = checkpoint['base']['sources']   # its absolute path, if it has one, and what the user called it
    there = [each for each in sources if not os.path.isabs(path := each.removeprefix('ckpt:')) or os.path.exists(path)]
    if not there:
        fail(f"the base of this adapter is not there: {' or '.join(sources)}")
    base = weights_of(there[0])
    if fingerprint(base['model']) != checkpoint['base']['sha256']:
        fail(f"this adapter belongs to other weights than {there[0]} holds now; put those back there")
    model = build_model(base, **changes)
    model.crop_block_size(checkpoint['model_args']['block_size'])
    add_lora(model, **checkpoint['lora'])
    if checkpoint['model'].keys() != lora_weights(model).keys():
        raise ValueError("the low-rank parts are not those that its settings name")
    model.load_state_dict(checkpoint['model'], strict=False)
    return model


def build_model(checkpoint: dict, block_size: int = 0, **changes) -> GPT:
    """ the model of a loaded checkpoint, which gives its tensors away; changes override fields such as dropout

    block_size: if not 0, the longest context, longer than in training only where no position table limits it.
    """
    if block_size:
        model = build_model(checkpoint, **changes)
        with one_line_errors():
            model.crop_block_size(block_size)
        return model
    try:
        if checkpoint.get('lora'):
            return _build_adapter(checkpoint, changes)
        config = GPTConfig(**{**checkpoint['model_args'], **changes})
        model = empty_model(config)
        model.load_state_dict(checkpoint['model'], assign=True)
    except Exception as error:   # an unknown field, an impossible value, other tensors, ...
        fail(f"the checkpoint's model is not one of ours: {' '.join(str(error).split())[:300]}")
    model.tie_weights()   # which were assigned one by one
    return model


def check_start(checkpoint: dict, config: dict, data: dict) -> int:
    """ print what a run sets differently, return its block_size; SystemExit where tokenizer, tokens or sha256 differ

    data has the dataset's. A context grows where there is no position table, but not in the middle of a training.
    """
    was = {'lora_rank': 0} if 'iter_num' in checkpoint else {}   # weights alone may get an adapter
    args = {**vars(GPTConfig()), **checkpoint['model_args']}
    grows = args['pos'] != 'learned' and (config['eval_only'] or 'iter_num' not in checkpoint)
    was |= {**checkpoint.get('config', {}), **args}
    for key in sorted(was.keys() & config.keys() - {'init_from', 'out_dir', 'eval_only'}):
        now, old = config[key], was[key]
        if now == old or key == 'vocab_size' and not now:
            continue
        fixed = key in args and key != 'dropout' or key.startswith('lora_')
        fixed &= key != 'block_size' or now > old and not grows
        print0(f"checkpoint: {key} " + (f"stays {old!r}, not {now!r}" if fixed else f"was {old!r}, is {now!r}"))
    for key, now in data.items():
        if (old := checkpoint.get(key)) and now and now != old:
            fail(f"the checkpoint's {key} was {old}, this dataset's is {now}; a model keeps its tokenizer, "
                 "a resumed run its data too (--init_from=ckpt:PATH starts anew on other data)")
    return config['block_size'] if grows else min(config['block_size'], args['block_size'])

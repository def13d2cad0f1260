""" checkpoint.py: atomic, verified, harmless, exchangeable with nanoGPT. """
import copy
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT

from checkpoint import Saver, build_model, find, load, move_aside, save, starting_point
from model import GPT, GPTConfig
from optim import load_optimizer

SMALL = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)


def trained(steps=3, **changes):
    """ a model and its optimizer after a few steps """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(steps):
        x = torch.randint(20, (2, model.config.block_size))
        optimizer.zero_grad()
        model(x, x)[1].backward()
        optimizer.step()
    return model, optimizer


def state_of(model, optimizer, **more):
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model.config.model_args(),
            'iter_num': 3, 'best_val_loss': 2.5, 'config': {'dataset': 'x'}, **more}


def refusal(call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert '\n' not in str(stop.value.code)
    return str(stop.value.code)


def test_round_trip(here):
    model, optimizer = trained()
    assert save('out/ckpt.pt', state_of(model, optimizer)) and os.listdir('out') == ['ckpt.pt']
    loaded = load('out/ckpt.pt')
    assert loaded['iter_num'] == 3 and loaded['best_val_loss'] == 2.5
    again = build_model(loaded)
    assert again.transformer.wte.weight is again.lm_head.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    x = torch.randint(20, (2, 8))
    assert torch.equal(again.eval()(x)[0], model.eval()(x)[0])


def test_building_a_model_draws_no_random_numbers(here):
    model, optimizer = trained()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    build_model(state_of(model, optimizer))
    assert torch.equal(torch.get_rng_state(), state)


def test_options_at_their_default_are_left_out_for_nanogpt():
    assert list(GPTConfig(**SMALL).model_args()) == ['block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd',
                                                    'dropout', 'bias']
    assert GPTConfig(**SMALL, gelu='tanh').model_args()['gelu'] == 'tanh'


@dataclass
class NanoGPTConfig:
    """ the fields that nanoGPT's GPTConfig accepts """
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


def test_what_nanogpt_reads_is_there(here):
    """ its sample.py passes model_args on and loads the weights; its train.py reads the rest as well """
    model, optimizer = trained()
    save('ckpt.pt', state_of(model, optimizer, tokenizer={'name': 'char', 'chars': 'ab'}))
    theirs = torch.load('ckpt.pt', map_location='cpu', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(theirs)
    NanoGPTConfig(**theirs['model_args'])
    assert [len(group['params']) for group in theirs['optimizer']['param_groups']] == [6, 10]   # decayed, then not


def test_nanogpts_checkpoints_load(here):
    """ from a compiled model, with the causal mask of old versions and a loss that is a tensor """
    model, optimizer = trained()
    state = state_of(model, optimizer, best_val_loss=torch.tensor(2.5))
    state['model'] = {f'_orig_mod.{name}': tensor for name, tensor in state['model'].items()}
    state['model']['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)
    torch.save(state, 'ckpt.pt')
    x = torch.randint(20, (2, 8))
    assert torch.equal(build_model(load('ckpt.pt'))(x)[0], model(x)[0])


def test_best_and_last(here):
    model, optimizer = trained()
    assert refusal(find, 'out') == "error: no checkpoint in 'out'; train one: python train.py CONFIG --out_dir=out"
    save('out/ckpt.pt', state_of(model, optimizer))
    assert '--out_dir=out has one' in refusal(find, 'elsewhere')
    # nanoGPT's folders have no best
    assert find('out', 'best') == find('out', 'last') == os.path.join('out', 'ckpt.pt')
    save('out/ckpt_best.pt', state_of(model, optimizer))
    assert find('out', 'best') == os.path.join('out', 'ckpt_best.pt') and find('out') == os.path.join('out', 'ckpt.pt')
    assert 'neither best nor last' in refusal(find, 'out', 'latest')


def test_an_earlier_run_is_moved_aside(here, capsys):
    move_aside('out')
    for number in (1, 2):
        os.makedirs('out', exist_ok=True)
        for name in ('ckpt.pt', 'log.jsonl'):
            open(f'out/{name}', 'w').write(str(number))
        move_aside('out')
        assert sorted(os.listdir(f'out/old-{number}')) == ['ckpt.pt', 'log.jsonl']
        assert open(f'out/old-{number}/ckpt.pt').read() == str(number)
    assert sorted(os.listdir('out')) == ['old-1', 'old-2'] and capsys.readouterr().out.count('\n') == 2


# ---- faults

class _Hostile:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def test_a_hostile_checkpoint_runs_nothing(here):
    model, optimizer = trained()
    torch.save(state_of(model, optimizer, config=_Hostile()), 'ckpt.pt')
    assert 'could run code' in refusal(load, 'ckpt.pt')
    open('raw.pt', 'wb').write(pickle.dumps(_Hostile()))
    assert 'damaged or not a checkpoint' in refusal(load, 'raw.pt')
    assert not os.path.exists('hacked')


def test_a_flipped_bit_and_a_cut_file_are_noticed(here):
    save('ckpt.pt', state_of(*trained()))
    whole = open('ckpt.pt', 'rb').read()
    weight = load('ckpt.pt')['model']['lm_head.weight'].numpy().tobytes()
    rng = random.Random(0)
    for _ in range(10):
        at = whole.index(weight) + rng.randrange(len(weight))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        open('bad.pt', 'wb').write(damaged)
        assert 'bad.pt is damaged' in refusal(load, 'bad.pt')
        open('bad.pt', 'wb').write(whole[:rng.randrange(len(whole))])
        assert 'bad.pt is damaged' in refusal(load, 'bad.pt')


@pytest.mark.parametrize('content', [
    {}, {'model': {}}, {'model': {'a': 1}, 'model_args': 3}, {'model': 1, 'model_args': {}}, [1], torch.ones(3)])
def test_other_torch_files_are_no_checkpoints(here, content):
    torch.save(content, 'x.pt')
    assert 'x.pt is not a GPT checkpoint' in refusal(load, 'x.pt')


def test_models_that_are_not_ours_are_refused():
    state = state_of(*trained())
    for wrong in ({'n_layer': 2}, {'n_embd': 15}, {'rotary': True}, {'vocab_size': 21}):
        changed = {**state, 'model_args': {**state['model_args'], **wrong}}
        assert "model is not one of ours" in refusal(build_model, changed)


def test_what_is_not_finite_is_never_saved(here, capsys):
    model, optimizer = trained()
    assert save('ckpt.pt', state_of(model, optimizer))
    before = open('ckpt.pt', 'rb').read()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float('nan')
    assert not save('ckpt.pt', state_of(model, optimizer))
    assert 'a weight or optimizer moment is not finite' in capsys.readouterr().out
    assert open('ckpt.pt', 'rb').read() == before and os.listdir() == ['ckpt.pt']


def test_too_little_space_is_noticed_first(here, capsys, monkeypatch):
    model, optimizer = trained()
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    assert not save('ckpt.pt', state_of(model, optimizer)) and os.listdir() == []
    assert 'MB free' in capsys.readouterr().out


def test_a_write_that_fails_half_way_keeps_the_old_file(here, capsys):
    """ the operating system refuses to let a file grow beyond 20 kB, as a full disk would """
    model, optimizer = trained()
    save('ckpt.pt', state_of(model, optimizer))
    before, limits = open('ckpt.pt', 'rb').read(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert not save('ckpt.pt', state_of(model, optimizer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert open('ckpt.pt', 'rb').read() == before and os.listdir() == ['ckpt.pt']
    assert 'was not saved' in capsys.readouterr().out


def test_a_flip_anywhere_is_harmless_or_noticed(here):
    """ 1 bit in any place of the file, the zip's own tables included: one line, or all that was saved """
    saved = state_of(*trained())
    save('ckpt.pt', saved)
    whole, noticed = open('ckpt.pt', 'rb').read(), 0
    rng = random.Random(1)
    places = [rng.randrange(len(whole)) for _ in range(150)]
    for at in places + [-1 - rng.randrange(3000) for _ in range(150)]:   # the tables are at the end
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        open('bad.pt', 'wb').write(damaged)
        try:
            loaded = load('bad.pt')
        except SystemExit as stop:
            noticed += 1
            assert 'bad.pt' in stop.code and '\n' not in stop.code
        else:
            assert all(torch.equal(loaded['model'][name], tensor) for name, tensor in saved['model'].items())
            assert str(loaded['optimizer']) == str(saved['optimizer'])
            assert all(loaded[key] == saved[key] for key in ('iter_num', 'best_val_loss', 'config', 'model_args'))
    assert noticed > 150


def test_moments_that_are_not_finite_are_never_saved(here, capsys):
    model, optimizer = trained()
    optimizer.state[model.lm_head.weight]['exp_avg_sq'][0, 0] = float('inf')
    assert not save('ckpt.pt', state_of(model, optimizer)) and os.listdir() == []


def test_an_older_checkpoint_gives_way_to_a_newer_one(here, capsys, monkeypatch):
    """ with room for two files only, and with what a kill left behind """
    state = state_of(*trained())
    for _ in range(2):
        assert save('ckpt.pt', state, 'ckpt_prev.pt')
    open('ckpt.pt.tmp', 'wb').write(b'x' * 10)
    size = os.path.getsize('ckpt.pt')
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {
        'free': 2.5 * size - sum(os.path.getsize(name) for name in os.listdir())}))
    assert save('ckpt.pt', {**state, 'iter_num': 4}, 'ckpt_prev.pt')
    assert load('ckpt.pt')['iter_num'] == 4 and load('ckpt_prev.pt')['iter_num'] == 3
    assert sorted(os.listdir()) == ['ckpt.pt', 'ckpt_prev.pt'] and capsys.readouterr().out == ''


def test_the_only_good_checkpoint_never_gives_way(here, capsys, monkeypatch):
    """ not where removing it would not be enough, and not where there is no later one """
    state = state_of(*trained())
    save('ckpt_prev.pt', state)
    size = sum(tensor.nbytes for tensor in [*state['model'].values(), *(
        value for moments in state['optimizer']['state'].values() for value in moments.values())])
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': size // 2}))
    assert not save('ckpt.pt', state, 'ckpt_prev.pt') and os.listdir() == ['ckpt_prev.pt']
    open('ckpt.pt', 'w').close()
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': -2 * size}))
    assert not save('ckpt.pt', state, 'ckpt_prev.pt') and os.path.exists('ckpt_prev.pt')


def test_what_cannot_be_read_now_is_not_called_damaged(here, monkeypatch):
    """ else an unattended run would start over because a disk had a bad moment """
    os.makedirs('out')
    save('out/ckpt.pt', state_of(*trained()))
    for error in (PermissionError(13, 'Permission denied'), OSError(5, 'Input/output error'), MemoryError()):
        def raises(path, error=error):
            raise error
        monkeypatch.setattr(zipfile, 'ZipFile', raises)
        assert 'ckpt.pt cannot be read' in refusal(starting_point, 'auto', 'out')


def test_the_one_before_is_kept(here):
    state = state_of(*trained())
    for number in range(3):
        save('ckpt.pt', {**state, 'iter_num': number}, 'ckpt_prev.pt')
    assert [load(name)['iter_num'] for name in ('ckpt.pt', 'ckpt_prev.pt')] == [2, 1]


# ---- in the background

@pytest.fixture
def slow_disk(monkeypatch):
    """ torch.save waits until the event is set """
    event, write = threading.Event(), torch.save

    def wait(*arguments):
        assert event.wait(10)
        write(*arguments)
    monkeypatch.setattr(torch, 'save', wait)
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_written(here, slow_disk):
    """ and the file has the state of the moment of saving, tied weights once """
    model, optimizer = trained()
    before, moment = copy.deepcopy(model.state_dict()), optimizer.state[model.lm_head.weight]['exp_avg'].clone()
    saver = Saver('out')
    saver.save({**state_of(model, optimizer), 'model': model.state_dict(keep_vars=True)}, best_val_loss=1.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not os.path.exists('out/ckpt.pt') and saver.iter_num == -1
    slow_disk.set()
    saver.wait()
    assert (saver.iter_num, saver.best_val_loss) == (3, 1.5)
    saved, best = load('out/ckpt.pt'), load('out/ckpt_best.pt')
    assert all(torch.equal(saved['model'][name], tensor) for name, tensor in before.items())
    assert any(torch.equal(state['exp_avg'], moment) for state in saved['optimizer']['state'].values()
               if state['exp_avg'].shape == moment.shape)
    assert 'optimizer' not in best and best['best_val_loss'] == saved['best_val_loss'] == 1.5
    tensors = [*saved['model'].values(), *(v for s in saved['optimizer']['state'].values() for v in s.values())]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) - 1


def test_memory_is_reserved_without_waiting_for_the_disk(here, slow_disk):
    model, optimizer = trained()
    saver = Saver('out')
    saver.save({**state_of(model, optimizer), 'optimizer': {}})
    saver.reserve(state_of(model, optimizer))
    slow_disk.set()
    saver.wait()
    reserved = set(saver._buffers)
    saver.save({'optimizer': optimizer.state_dict()})
    assert set(saver._buffers) == reserved and len(reserved) > 30


def test_memory_of_the_copies_is_used_again(here):
    model, optimizer = trained()
    saver, seen = Saver('out'), []
    for _ in range(3):
        saver.save(state_of(model, optimizer))
        seen.append({tensor.data_ptr() for tensor in saver._buffers.values()})
        saver.wait()
    assert len(seen[0]) > 10 and len(seen[1] & seen[2]) > 10


def test_what_the_writer_meets_is_not_lost(here, capsys, monkeypatch):
    """ a full disk is one line, and the numbers stay those of the files; what nobody expected is raised """
    model, optimizer = trained()
    saver = Saver('out', iter_num=1, best_val_loss=2.0)
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 10}))
    saver.save(state_of(model, optimizer), best_val_loss=1.5)
    saver.wait()
    assert (saver.iter_num, saver.best_val_loss) == (1, 2.0) and capsys.readouterr().out.count('was not saved') == 2
    monkeypatch.setattr('shutil.disk_usage', lambda _: 1 / 0)
    saver.save(state_of(model, optimizer))
    with pytest.raises(ZeroDivisionError):
        saver.wait()


@pytest.mark.slow
def test_the_end_of_a_script_waits_for_the_writer(here):
    code = "import checkpoint, time, torch; write = torch.save\n" \
           "torch.save = lambda *a: (time.sleep(1), write(*a))\n" \
           "checkpoint.Saver('.').save({'model': {'w': torch.ones(9)}, 'model_args': {}, 'iter_num': 7}); raise OSError"
    subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': ROOT}, stderr=subprocess.DEVNULL)
    assert load('ckpt.pt')['iter_num'] == 7


@pytest.mark.slow
def test_kill_during_save_leaves_a_whole_checkpoint(here):
    """ SIGKILL at random moments of a process that does nothing but save, until two of them have hit a save """
    code = "import checkpoint, torch; state = {'model': {'w': torch.ones(2_000_000)}, 'model_args': {}, 'n': 0}\n" \
           "while True:\n    state['n'] += 1\n    checkpoint.save('ckpt.pt', state)"
    caught = rounds = 0
    while caught < 2:
        rounds += 1
        process = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': ROOT})
        while not os.path.exists('ckpt.pt'):
            time.sleep(0.01)
        time.sleep(random.Random(rounds).random() * 0.2)
        process.kill()
        process.wait()
        caught += os.path.exists('ckpt.pt.tmp')   # what it was writing; the next save overwrites it
        assert load('ckpt.pt')['n'] >= 1 and rounds < 30
        os.remove('ckpt.pt')


# ---- resuming

def test_crop_keeps_the_moments_in_step():
    model, optimizer = trained()
    state = state_of(model, optimizer)
    table, moments = model.transformer.wpe.weight, optimizer.state[model.transformer.wpe.weight]
    short = build_model(state)
    short.crop_block_size(4)
    assert torch.equal(short.transformer.wpe.weight, table[:4])
    fresh = short.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    load_optimizer(fresh, state['optimizer'])
    for key in ('exp_avg', 'exp_avg_sq'):
        assert torch.equal(fresh.state[short.transformer.wpe.weight][key], moments[key][:4])
    x = torch.randint(20, (2, 4))
    short(x, x)[1].backward()
    fresh.step()


def test_moments_are_loaded_and_settings_are_not():
    model, optimizer = trained()
    fresh = model.configure_optimizers(0.3, 5e-3, (0.8, 0.9), 'cpu', eps=1e-5)
    load_optimizer(fresh, optimizer.state_dict())
    decayed, free = fresh.param_groups
    assert (decayed['weight_decay'], free['weight_decay']) == (0.3, 0.0)
    assert (decayed['lr'], decayed['betas'], decayed['eps'], decayed['fused']) == (5e-3, (0.8, 0.9), 1e-5, True)
    for p in model.parameters():
        assert torch.equal(fresh.state[p]['exp_avg'], optimizer.state[p]['exp_avg'])

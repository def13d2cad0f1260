""" train.py, the real script: what it learns, says, saves, continues and refuses. """
import hashlib
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, equal, records, tensors

import model as model_module
from checkpoint import load


def test_a_run_from_start_to_sample(tiny, script, capsys):
    script('train.py', *TINY, '--log_interval=2')
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith('step ')]
    iters = [line for line in lines if line.startswith('iter ')]
    assert [line.split(':')[0] for line in steps] == ['step 0', 'step 6']
    assert [line.split(':')[0] for line in iters] == ['iter 0', 'iter 2', 'iter 4']
    parts = [part.split()[0] for part in iters[1].split(': ')[1].split(', ')]
    assert parts[:4] == ['loss', 'lr', 'norm', 'time'] and iters[1].count('tok/s') == 1
    assert 'mfu n/a' in iters[1] and 'eta ' in iters[1]   # no peak is known for a CPU
    assert lines[-1] == 'sample from it: python sample.py --out_dir=out'
    assert sorted(os.listdir('out')) == ['ckpt.pt', 'ckpt_best.pt', 'ckpt_prev.pt', 'log.jsonl', 'loss.png']
    script('sample.py', '--out_dir=out', '--device=cpu', '--num_samples=2', '--max_new_tokens=5')
    text = capsys.readouterr().out
    assert text.count('---------------\n') == 2 and set(text) <= set('\nabcdefgh-')


def test_max_iters_is_the_number_of_updates(tiny, script):
    script('train.py', *TINY)
    assert load('out/ckpt.pt')['iter_num'] == 6 and tensors()['0 step'] == 6
    assert [record['iter'] for record in records('loss')] == [0, 1, 2, 3, 4, 5]


def test_it_learns_a_pattern(tiny, script):
    pattern = np.tile(np.arange(8, dtype='uint16'), 200)
    for name in ('train', 'val'):
        pattern.tofile(f'data/tiny/{name}.bin')
    os.remove('data/tiny/meta.json')
    script('train.py', *TINY, '--max_iters=100', '--learning_rate=2e-2')
    assert records('val_loss')[-1]['val_loss'] < 0.1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_resume_is_exact(tiny, script, dtype):
    """ N steps straight equal N/2 and N/2, in every weight and moment, with dropout on """
    options = ['--dropout=0.3', f'--dtype={dtype}']
    script('train.py', *TINY, *options, '--out_dir=straight')
    script('train.py', *TINY, *options, '--max_iters=3')
    assert not equal(tensors(), tensors('straight/ckpt.pt'))
    script('train.py', *TINY, *options, '--init_from=resume')
    assert equal(tensors(), tensors('straight/ckpt.pt'))
    assert load('out/ckpt.pt')['scaler'] == load('straight/ckpt.pt')['scaler']
    for one, two in zip(records('loss'), records('loss', 'straight/log.jsonl'), strict=True):
        assert all(one[key] == two[key] for key in ('iter', 'loss', 'grad_norm', 'lr'))


def test_the_dtype_reaches_the_products(tiny, script):
    for dtype in ('float32', 'bfloat16', 'float16'):
        script('train.py', *TINY, '--max_iters=1', f'--dtype={dtype}', f'--out_dir={dtype}')
    losses = [records('loss', f'{dtype}/log.jsonl')[0]['loss'] for dtype in ('float32', 'bfloat16', 'float16')]
    assert len(set(losses)) == 3 and losses[1:] == pytest.approx([losses[0]] * 2, abs=0.02)
    assert load('float16/ckpt.pt')['scaler']['scale'] > 1 and load('float32/ckpt.pt')['scaler'] == {}


def test_training_is_not_evaluated_on_its_own_batches(tiny, script, monkeypatch):
    import dataset
    seen, batch = [], dataset.Split.batch

    def spy(self, batch_size, block_size, seed, stream, step):
        seen.append((stream, step))
        return batch(self, batch_size, block_size, seed, stream, step)
    monkeypatch.setattr(dataset.Split, 'batch', spy)
    script('train.py', *TINY, '--max_iters=1')
    assert set(seen) == {(stream, k) for stream in ('train', 'eval train', 'eval val') for k in (0, 1)}


def test_gpt2s_vocabulary_is_rounded_up(tiny, script):
    for name in ('meta.json', 'meta.pkl'):
        os.remove(f'data/tiny/{name}')
    script('train.py', *TINY, '--max_iters=0')
    assert load('out/ckpt.pt')['model_args']['vocab_size'] == 50304


def test_dropout_can_change_on_resume(tiny, script):
    script('train.py', *TINY, '--max_iters=1')
    script('train.py', *TINY, '--max_iters=2', '--init_from=resume', '--dropout=0.5')
    assert load('out/ckpt.pt')['model_args']['dropout'] == 0.5


def test_an_evaluation_that_was_not_saved_is_made_and_logged_once(tiny, script):
    """ the checkpoint of an interruption before the evaluation, and a log that has it from a run that was killed """
    script('train.py', *TINY, '--max_iters=4')
    saved = load('out/ckpt.pt')
    torch.save({**saved, 'eval_iter': 0}, 'out/ckpt.pt')
    script('train.py', *TINY, '--max_iters=4', '--init_from=resume')
    assert [record['iter'] for record in records('val_loss')] == [0, 4]


def test_dropout_differs_from_step_to_step(tiny, script, monkeypatch):
    """ the same batch and the same weights again and again, and no two losses are equal """
    import dataset
    batch = dataset.Split.batch
    monkeypatch.setattr(dataset.Split, 'batch', lambda self, b, t, seed, stream, step: batch(self, b, t, 0, '', 0))
    options = ['--learning_rate=0', '--min_lr=0', '--weight_decay=0', '--gradient_accumulation_steps=1']
    script('train.py', *TINY, *options, '--dropout=0.5')
    assert len({record['loss'] for record in records('loss')}) == 6
    script('train.py', *TINY, *options)
    assert len({record['loss'] for record in records('loss')}) == 1


def test_evaluation_does_not_change_training(tiny, script):
    script('train.py', *TINY, '--dropout=0.3', '--out_dir=a')
    script('train.py', *TINY, '--dropout=0.3', '--out_dir=b', '--eval_interval=1', '--eval_iters=5')
    assert equal(tensors('a/ckpt.pt'), tensors('b/ckpt.pt'))


def test_an_evaluation_sees_the_same_batches_every_time(tiny, script):
    script('train.py', *TINY, '--learning_rate=0', '--min_lr=0', '--weight_decay=0', '--eval_interval=2')
    assert len({(r['train_loss'], r['val_loss']) for r in records('val_loss')}) == 1 and len(records('val_loss')) == 4


def test_accumulated_micro_steps_are_one_large_batch(tiny, script, monkeypatch):
    """ gradient and reported loss are means over the micro-steps: 2 x 4 sequences against one batch of 8 """
    result = script('train.py', *TINY, '--max_iters=1', '--learning_rate=0', '--grad_clip=0')
    rows = torch.cat([result['splits']['train'].batch(4, 8, 1337, 'train', step) for step in (0, 1)])
    torch.manual_seed(1337)
    model = model_module.GPT(model_module.GPTConfig(8, 9, 2, 2, 16, bias=False))
    loss = model(rows[:, :-1], rows[:, 1:])[1]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    record = records('loss')[0]
    assert record['loss'] == pytest.approx(loss.item(), abs=1e-6)
    assert record['grad_norm'] == pytest.approx(norm.item(), rel=1e-5)


def test_the_loop_is_the_textbook_one(tiny, script):
    """ four updates against the loop written out: schedule, micro-steps in order, clipping, AdamW's settings """
    split = script('train.py', *TINY, '--max_iters=4', '--grad_clip=0.3', '--adam_eps=1e-3', '--weight_decay=0.5',
                   '--beta1=0.8', '--beta2=0.9')['splits']['train']
    torch.manual_seed(1337)
    model = model_module.GPT(model_module.GPTConfig(8, 9, 2, 2, 16, bias=False))
    groups = [{'params': [p for p in model.parameters() if p.dim() == 2], 'weight_decay': 0.5},
              {'params': [p for p in model.parameters() if p.dim() == 1], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3)
    for i in range(4):
        cosine = 0.5 * (1 + math.cos(math.pi * (i - 2) / 98))
        lr = 1e-2 * (i + 1) / 3 if i < 2 else 6e-5 + cosine * (1e-2 - 6e-5)
        for step in (2 * i, 2 * i + 1):
            rows = split.batch(4, 8, 1337, 'train', step)
            (model(rows[:, :-1], rows[:, 1:])[1] / 2).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in load('out/ckpt.pt')['model'].items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-6), name


def test_the_time_of_an_iteration_leaves_evaluation_out(tiny, script, monkeypatch):
    import dataset
    batch = dataset.Split.batch

    def slow(self, batch_size, block_size, seed, stream, step):
        time.sleep(0.1 if stream.startswith('eval') else 0)
        return batch(self, batch_size, block_size, seed, stream, step)
    monkeypatch.setattr(dataset.Split, 'batch', slow)
    script('train.py', *TINY, '--eval_interval=1')   # each evaluation sleeps 0.4 s
    assert sorted(record['time'] for record in records('loss'))[3] < 0.2


def test_the_schedule(tiny, script):
    get_lr = script('train.py', *TINY, '--max_iters=0', '--learning_rate=1', '--min_lr=0.1', '--warmup_iters=9',
                    '--lr_decay_iters=109')['get_lr']
    assert [get_lr(0), get_lr(8)] == pytest.approx([0.1, 0.9])        # lr * (it + 1) / (warmup_iters + 1)
    assert get_lr(9) == 1 and get_lr(59) == pytest.approx(0.55)        # top, and half-way down
    assert [get_lr(109), get_lr(110), get_lr(10**9)] == [0.1, 0.1, 0.1]
    get_lr = script('train.py', *TINY, '--max_iters=0', '--min_lr=0.1', '--warmup_iters=5',
                    '--lr_decay_iters=5')['get_lr']
    assert get_lr(5) == 0.1
    assert script('train.py', *TINY, '--max_iters=0', '--decay_lr=False')['get_lr'](0) == 1e-2


def test_a_warm_up_that_never_ends_is_pointed_out(tiny, script, capsys):
    script('train.py', *TINY, '--max_iters=0', '--warmup_iters=200')
    assert 'warning: warmup_iters=200 is not below lr_decay_iters=100' in capsys.readouterr().out


@pytest.mark.parametrize('seconds', [0, 0.2])
def test_the_best_is_kept_when_the_latest_gets_worse(tiny, script, monkeypatch, seconds):
    """ also on a disk so slow that the next evaluation is done before the best is written """
    import checkpoint
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda *arguments: (time.sleep(seconds), save(*arguments))[1])
    script('train.py', *TINY, '--learning_rate=0.5', '--min_lr=0.5', '--max_iters=8', '--eval_interval=2')
    losses = {r['iter']: r['val_loss'] for r in records('val_loss')}
    best = min(losses, key=losses.get)
    assert best != 8, "the run was meant to get worse"
    saved, latest = load('out/ckpt_best.pt'), load('out/ckpt.pt')
    assert (saved['iter_num'], saved['best_val_loss']) == (best, losses[best]) and 'optimizer' not in saved
    assert (latest['iter_num'], latest['best_val_loss']) == (8, losses[best])


def test_a_best_that_could_not_be_saved_is_not_the_best(tiny, script, monkeypatch):
    import checkpoint
    save, failed = checkpoint.save, []

    def fails_once(path, *state):
        if path.endswith('best.pt') and not failed:
            failed.append(1)
            return False
        return save(path, *state)
    monkeypatch.setattr(checkpoint, 'save', fails_once)
    script('train.py', *TINY, '--learning_rate=0.5', '--min_lr=0.5', '--max_iters=8', '--eval_interval=2')
    losses = {r['iter']: r['val_loss'] for r in records('val_loss')}
    assert load('out/ckpt_best.pt')['best_val_loss'] == min(loss for i, loss in losses.items() if i) > losses[0]


def test_always_save_checkpoint(tiny, script, monkeypatch):
    import checkpoint
    written, save = [], checkpoint.save

    def record(path, state, *previous):
        written.append((path, state['iter_num']))
        return save(path, state, *previous)
    monkeypatch.setattr(checkpoint, 'save', record)
    options = [*TINY, '--learning_rate=0', '--min_lr=0', '--weight_decay=0', '--eval_interval=3']   # improves at 0 only
    script('train.py', *options)
    assert [n for path, n in written if path == os.path.join('out', 'ckpt.pt')] == [0, 3, 6]
    written.clear()
    script('train.py', *options, '--always_save_checkpoint=False')
    assert [n for path, n in written if path == os.path.join('out', 'ckpt.pt')] == [0, 6]


def test_the_whole_split_can_be_evaluated(tiny, script, capsys):
    script('train.py', *TINY, '--max_iters=2')
    capsys.readouterr()
    result = script('train.py', *TINY, '--init_from=resume', '--eval_only=True', '--eval_iters=0')
    model, tokens = result['raw_model'], torch.from_numpy(result['splits']['val'].array().astype(np.int64))
    total = 0
    for i in range(0, len(tokens) - 1, 8):   # one window after the other, the last one shorter
        x, y = tokens[i:i + 8][:len(tokens) - 1 - i], tokens[i + 1:i + 9]
        total += model(x[None], y[None])[1].item() * len(y)
    printed = float(capsys.readouterr().out.split('val loss ')[1].split()[0])
    assert printed == pytest.approx(total / (len(tokens) - 1), abs=1e-4)


@pytest.mark.parametrize('init_from', ['scratch', 'resume'])
def test_eval_only_stops_and_saves_nothing(tiny, script, capsys, init_from):
    script('train.py', *TINY, '--max_iters=3')
    before = {name: open(f'out/{name}', 'rb').read() for name in os.listdir('out')}
    capsys.readouterr()
    script('train.py', *TINY, '--eval_only=True', f'--init_from={init_from}')
    out = capsys.readouterr().out
    assert out.count('step ') == 1 and 'iter ' not in out
    assert {name: open(f'out/{name}', 'rb').read() for name in os.listdir('out')} == before


def test_a_used_out_dir_is_not_overwritten(tiny, script, capsys):
    script('train.py', *TINY, '--max_iters=1')
    script('train.py', *TINY, '--max_iters=2')
    assert ('out held another run: moved ckpt.pt, ckpt_prev.pt, ckpt_best.pt, log.jsonl, loss.png to out/old-1'
            in capsys.readouterr().out)
    assert load('out/old-1/ckpt.pt')['iter_num'] == 1 and load('out/ckpt.pt')['iter_num'] == 2
    assert [record['iter'] for record in records('loss')] == [0, 1]


def test_resume_says_what_differs_and_refuses_other_tokens(tiny, script, fails, capsys):
    script('train.py', *TINY, '--max_iters=2')
    capsys.readouterr()
    script('train.py', *TINY, '--init_from=resume', '--max_iters=3', '--learning_rate=5e-3', '--n_layer=4')
    out = capsys.readouterr().out
    assert 'checkpoint: learning_rate was 0.01, is 0.005' in out and 'checkpoint: max_iters was 2, is 3' in out
    assert 'checkpoint: n_layer stays 2, not 4' in out and 'batch_size' not in out
    assert load('out/ckpt.pt')['model_args']['n_layer'] == 2   # the checkpoint's shape counts, as in nanoGPT
    tokens = np.fromfile('data/tiny/train.bin', dtype='uint16')[:-1]
    tokens.tofile('data/tiny/train.bin')
    from dataset import CharTokenizer, write_dataset
    write_dataset('data/tiny', CharTokenizer('\nabcdefgh'), {'train': tokens, 'val': tokens})
    assert "the checkpoint's tokens was" in fails('train.py', *TINY, '--init_from=resume')[1]
    write_dataset('data/tiny', CharTokenizer('\nhgfedcba'), {'train': tokens, 'val': tokens})
    assert "the checkpoint's tokenizer was" in fails('train.py', *TINY, '--init_from=resume')[1]


def test_resume_with_nothing_left_changes_nothing(tiny, script):
    script('train.py', *TINY)
    before = open('out/ckpt.pt', 'rb').read()
    script('train.py', *TINY, '--init_from=resume')
    assert open('out/ckpt.pt', 'rb').read() == before and not os.path.exists('out/old-1')


def test_resume_with_a_shorter_context(tiny, script):
    script('train.py', *TINY, '--max_iters=2')
    script('train.py', *TINY, '--init_from=resume', '--block_size=4', '--max_iters=3')
    assert load('out/ckpt.pt')['model']['transformer.wpe.weight'].shape == (4, 16)


def test_a_nanogpt_checkpoint_resumes(tiny, script):
    """ without the keys that are ours, with an optimizer that was not fused and a loss that is a tensor """
    script('train.py', *TINY, '--max_iters=3')
    ours = torch.load('out/ckpt.pt', weights_only=True)
    theirs = {key: ours[key] for key in ('model', 'optimizer', 'model_args', 'iter_num', 'config')}
    for group in theirs['optimizer']['param_groups']:
        group['fused'] = None
    torch.save({**theirs, 'best_val_loss': torch.tensor(9.0)}, 'out/ckpt.pt')
    script('train.py', *TINY, '--init_from=resume')
    assert load('out/ckpt.pt')['iter_num'] == 6 and records('val_loss')[-1]['val_loss'] < 9


# ---- faults

def test_ten_bad_updates_stop_the_run_and_spoil_nothing(tiny, script, capsys, monkeypatch):
    """ the loss is NaN from the fourth forward of training on """
    forward, calls = model_module.GPT.forward, []

    def poisoned(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        calls.extend([1] * self.training)
        return logits, loss * (math.nan if len(calls) > 3 and self.training else 1)
    monkeypatch.setattr(model_module.GPT, 'forward', poisoned)
    options = [*TINY, '--gradient_accumulation_steps=1', '--dropout=0.0']
    with pytest.raises(SystemExit) as stop:
        script('train.py', *options, '--max_iters=50')
    out = capsys.readouterr().out
    assert stop.value.code == 3 and 'iter 3: loss nan' in out and '10 in a row' in out and '--learning_rate' in out
    assert load('out/ckpt.pt')['iter_num'] == 13 and records('loss')[3]['loss'] is None   # NaN is no JSON
    monkeypatch.undo()
    os.chdir(tiny)
    script('train.py', *options, '--max_iters=3', '--out_dir=clean')
    skipped, clean = tensors(), tensors('clean/ckpt.pt')
    assert all(torch.equal(skipped[name], clean[name]) for name in clean)   # the ten changed nothing


def test_bad_updates_between_log_lines_stop_the_run_too(tiny, script, capsys, monkeypatch):
    """ it is looked at every ten iterations, whatever is logged """
    forward = model_module.GPT.forward

    def poisoned(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        return logits, loss * (math.nan if self.training else 1)
    monkeypatch.setattr(model_module.GPT, 'forward', poisoned)
    with pytest.raises(SystemExit) as stop:
        script('train.py', *TINY, '--max_iters=500', '--log_interval=400')
    out = capsys.readouterr().out
    assert stop.value.code == 3 and 'iter 9: not finite, update skipped, 10 in a row' in out
    assert load('out/ckpt.pt')['iter_num'] == 10 and load('out/ckpt.pt')['skipped'] == 10


def test_nothing_is_read_from_the_device_between_log_lines(tiny, script, monkeypatch):
    """ which on a GPU would wait for it; the loop asks for loss and norm where it logs, and for evaluations """
    callers, item = [], torch.Tensor.item

    def watched(tensor):
        frame = sys._getframe(1)
        callers.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        return item(tensor)
    monkeypatch.setattr(torch.Tensor, 'item', watched)
    script('train.py', *TINY, '--max_iters=9', '--log_interval=8')   # logs at 0 and 8
    assert callers.count(('train.py', '<module>')) == 4 and ('optim.py', 'update') not in callers
    assert {name for name, _ in callers} <= {'train.py', 'dataset.py'}


def test_one_bad_update_is_skipped_and_training_goes_on(tiny, script, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(*arguments):
        calls.append(1)
        return clip(*arguments) * (math.inf if len(calls) == 2 else 1)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', poisoned)
    script('train.py', *TINY)
    assert load('out/ckpt.pt')['iter_num'] == 6 and tensors()['0 step'] == 5


def test_bad_updates_that_are_not_in_a_row_do_not_stop_the_run(tiny, script, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(*arguments):
        calls.append(1)
        return clip(*arguments) * (math.inf if len(calls) % 2 else 1)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', poisoned)
    script('train.py', *TINY, '--max_iters=24')
    assert load('out/ckpt.pt')['iter_num'] == 24 and tensors()['0 step'] == 12


def test_a_full_disk_does_not_stop_training_but_shows_at_the_end(tiny, fails, script, capsys, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1000}))
    code, line = fails('train.py', *TINY)
    assert code == 1 and 'the state at iteration 6 is lost' in line and len(records('loss')) == 6


@pytest.mark.parametrize('options, words', [
    (['--dataset=nope'], "dataset 'nope' has no train.bin"), (['--init_from=resume'], "no checkpoint in 'out'"),
    (['--init_from=gpt5'], '--init_from=gpt5'), (['--batch_size=0'], '--batch_size=0 must be at least 1'),
    (['--gradient_accumulation_steps=-1'], '--gradient_accumulation_steps=-1'),
    (['--n_head=3'], 'n_embd=16 must be a multiple of n_head=3'),
    (['--dropout=1'], 'dropout=1.0'), (['--block_size=300'], '300 tokens, block_size=300 needs at least 301'),
    (['--vocab_size=5'], 'token id 8 does not fit vocab_size=5'), (['--device=warp'], '--device=warp'),
    (['--dtype=half'], '--dtype=half'), (['--learning_rate=-1'], '--learning_rate=-1.0 must be at least 0'),
    (['--log_interval=0'], '--log_interval=0'),
    (['--out_dir=data/tiny/train.bin'], "'data/tiny/train.bin'"),
    (['--eval_iters=-1'], '--eval_iters=-1'), (['--beta2=1.5'], 'beta'), (['--grad_clip=-1'], '--grad_clip=-1.0')])
def test_wrong_settings_end_in_one_line_and_touch_nothing(tiny, fails, options, words):
    assert words in fails('train.py', *TINY, *options)[1]
    assert os.listdir() == ['data']


def test_weights_alone_are_not_resumed(tiny, script, fails):
    script('train.py', *TINY, '--max_iters=1')
    os.replace('out/ckpt_best.pt', 'out/ckpt.pt')
    assert "no optimizer state that fits" in fails('train.py', *TINY, '--init_from=resume')[1]


def damage(path):
    content = bytearray(open(path, 'rb').read())
    content[len(content) // 2] ^= 1
    open(path, 'wb').write(content)


def test_a_damaged_latest_falls_back_to_the_one_before(tiny, script, fails, capsys):
    script('train.py', *TINY, '--eval_interval=2', '--out_dir=straight')
    script('train.py', *TINY, '--eval_interval=2', '--max_iters=4')
    damage('out/ckpt.pt')
    capsys.readouterr()
    script('train.py', *TINY, '--eval_interval=2', '--init_from=resume')
    out = capsys.readouterr().out
    assert 'warning: out/ckpt.pt is damaged at ' in out
    assert 'warning: going on from the checkpoint before, out/ckpt_prev.pt at iteration 2\n' in out
    assert equal(tensors(), tensors('straight/ckpt.pt'))
    assert [record['iter'] for record in records('loss')] == [0, 1, 2, 3, 4, 5]
    assert load('out/ckpt_prev.pt')['iter_num'] == 4 and os.path.exists('out/ckpt.pt.damaged')
    damage('out/ckpt.pt')
    damage('out/ckpt_prev.pt')
    assert 'out/ckpt.pt is of no use' in fails('train.py', *TINY, '--init_from=resume')[1]
    script('train.py', *TINY, '--init_from=auto', '--max_iters=1')   # starts over, and keeps what there was
    assert os.path.exists('out/old-1/ckpt_prev.pt') and load('out/ckpt.pt')['iter_num'] == 1


def test_a_kill_between_two_renames_loses_nothing(tiny, script):
    """ for a moment there is no ckpt.pt, only the one before """
    script('train.py', *TINY, '--eval_interval=2', '--max_iters=4')
    os.remove('out/ckpt.pt')
    script('train.py', *TINY, '--init_from=auto', '--max_iters=3')
    assert load('out/ckpt.pt')['iter_num'] == 3
    os.remove('out/ckpt.pt')
    os.remove('out/ckpt_best.pt')
    script('sample.py', '--out_dir=out', '--device=cpu', '--num_samples=1', '--max_new_tokens=1')


def test_auto_starts_and_then_resumes(tiny, script, capsys):
    script('train.py', *TINY, '--out_dir=straight')
    script('train.py', *TINY, '--init_from=auto', '--max_iters=3')
    script('train.py', *TINY, '--init_from=auto')
    assert equal(tensors(), tensors('straight/ckpt.pt')) and not os.path.exists('out/old-1')


@pytest.mark.parametrize('path', ['ckpt:out', 'ckpt:out/ckpt_best.pt'])
def test_weights_alone_start_a_fresh_run_on_other_data(tiny, script, fails, path):
    script('train.py', *TINY, '--max_iters=4', '--learning_rate=1e-3')
    os.rename('data/tiny', 'data/other')
    tokens = np.fromfile('data/other/train.bin', dtype='uint16')
    from dataset import CharTokenizer, write_dataset
    write_dataset('data/other', CharTokenizer('\nabcdefgh'), {'train': tokens[::-1], 'val': tokens[:300]})
    result = script('train.py', *TINY, '--dataset=other', f'--init_from={path}', '--out_dir=next', '--max_iters=0',
                    '--n_layer=4', '--dropout=0.5')
    weights = load('out/ckpt_best.pt')['model']
    assert all(torch.equal(value, weights[name]) for name, value in load('next/ckpt.pt')['model'].items())
    assert load('next/ckpt.pt')['model_args']['dropout'] == 0.5 and result['iter_num'] == 0
    script('train.py', *TINY, '--dataset=other', f'--init_from={path}', '--out_dir=next', '--max_iters=2')
    assert tensors('next/ckpt.pt')['0 step'] == 2 and [r['iter'] for r in records('loss', 'next/log.jsonl')] == [0, 1]
    write_dataset('data/other', CharTokenizer('\nhgfedcba'), {'train': tokens, 'val': tokens})
    line = fails('train.py', *TINY, '--dataset=other', f'--init_from={path}')[1]
    assert "tokenizer was" in line and 'abcdefgh' in line and 'hgfedcba' in line   # both values
    assert 'nowhere' in fails('train.py', *TINY, '--dataset=other', '--init_from=ckpt:nowhere')[1]


def test_checkpoints_between_evaluations(tiny, script, monkeypatch):
    import checkpoint
    written, write = [], checkpoint.Saver._write
    monkeypatch.setattr(checkpoint.Saver, '_write',
                        lambda self, state, best: (written.append(state['iter_num']), write(self, state, best)))
    script('train.py', *TINY, '--save_interval=1e-6')
    assert written == [0, 1, 2, 3, 4, 5, 6]   # 6 once, although it is evaluated too
    written.clear()
    script('train.py', *TINY, '--save_interval=0')
    assert written == [0, 6]


def test_provenance(tiny, script):
    """ the first line of log.jsonl and the checkpoint say where the numbers come from, and resuming adds its own """
    script('train.py', *TINY, '--max_iters=2')
    script('train.py', *TINY, '--max_iters=3', '--init_from=resume')
    first, second = [json.loads(line) for line in open('out/log.jsonl') if '"command"' in line]
    assert json.loads(open('out/log.jsonl').readline()) == first and (first['iter'], second['iter']) == (0, 2)
    assert '--max_iters=2' in first['command'] and '--init_from=resume' in second['command']
    assert first['config']['max_iters'] == 2 and first['versions']['torch'] == torch.__version__
    assert first['sha256']['train'] == hashlib.sha256(open('data/tiny/train.bin', 'rb').read()).hexdigest()
    head = subprocess.run(['git', '-C', ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    assert first['commit'].removesuffix('-dirty') == head   # '' where this is no git repository
    assert (first['device'], first['dtype'], first['processes']) == ('cpu', 'torch.float32', 1)
    saved = load('out/ckpt.pt')
    assert all(saved[key] == second[key] for key in ('config', 'command', 'versions', 'commit', 'tokenizer', 'sha256'))


def test_mfu_and_eta(tiny, script, capsys, monkeypatch):
    """ on a device whose peak is known: MFU follows from the time that is logged, eta from what is left """
    import common
    monkeypatch.setattr(common, 'peak_flops', lambda name, dtype: 1e9)
    model = script('train.py', *TINY, '--max_iters=3')['raw_model']
    for record in records('loss'):
        flops = model.flops_per_token() * 2 * 4 * 8   # 2 micro-steps of 4 x 8 tokens
        assert record['mfu'] == pytest.approx(flops / record['time'] / 1e9)
        assert record['tokens_per_second'] == pytest.approx(64 / record['time'])
    assert f"mfu {records('loss')[0]['mfu']:.1%}, eta " in capsys.readouterr().out
    monkeypatch.setattr(common, 'duration', lambda seconds: f'{seconds:.6f}')
    script('train.py', *TINY, '--max_iters=1000', '--out_dir=eta', '--log_interval=100', '--eval_interval=100000',
           '--eval_iters=1', '--batch_size=1')
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('iter 900:'))
    left = 99 * next(r['time'] for r in records('loss', 'eta/log.jsonl') if r['iter'] == 900)
    evaluation = float(line.split('eta ')[1]) - left   # one more, at the end
    assert 0 < evaluation < 0.5


def test_the_wandb_run_goes_on(tiny, script, monkeypatch):
    import logger
    seen = []
    monkeypatch.setattr(logger, '_start_wandb', lambda config, wandb_id: seen.append(wandb_id) or type('Run', (), {
        'id': wandb_id or 'first', 'log': lambda self, record: None, 'finish': lambda self: None})())
    for options in (['--max_iters=2'], ['--init_from=resume', '--max_iters=4'], ['--init_from=auto'], []):
        script('train.py', *TINY, '--wandb_log=True', *options)
    assert seen == ['', 'first', 'first', ''] and load('out/ckpt.pt')['wandb_id'] == 'first'


def test_a_record_has_every_number(tiny, script):
    script('train.py', *TINY)
    assert set(records('loss')[0]) == {'iter', 'loss', 'lr', 'grad_norm', 'skipped', 'time', 'tokens_per_second', 'mfu',
                                       'memory', 'elapsed'}
    assert records('loss')[-1]['memory'] > 10e6 and records('loss')[-1]['elapsed'] > records('loss')[0]['elapsed'] > 0


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tiny):
    """ python train.py | head -1, and a log_interval that writes much more than that """
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--max_iters=30'], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert 'Error' not in process.stderr.read()
    process.wait()
    assert load('out/ckpt.pt')['iter_num'] == 30


@pytest.mark.slow
def test_compiled_training(tiny, script, capsys):
    """ the same losses as eager, weights under their plain names """
    script('train.py', *TINY, '--n_layer=1', '--max_iters=2', '--out_dir=eager')
    script('train.py', *TINY, '--n_layer=1', '--max_iters=2', '--compile=True')
    assert 'warning' not in capsys.readouterr().out
    for one, two in zip(records('loss'), records('loss', 'eager/log.jsonl'), strict=True):
        assert one['loss'] == pytest.approx(two['loss'], abs=1e-5)
    assert load('out/ckpt.pt')['model'].keys() == load('eager/ckpt.pt')['model'].keys()

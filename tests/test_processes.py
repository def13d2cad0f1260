""" Several processes: the same batches, gradients and results as one, whatever their number; FSDP like DDP. """
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, equal, records, tensors

from checkpoint import load

pytestmark = pytest.mark.slow
LOG_BATCHES = """
import dataset, json, os
batch = dataset.Split.batch
def spy(self, batch_size, block_size, seed, stream, step):
    rows = batch(self, batch_size, block_size, seed, stream, step)
    if stream == 'train':
        class Rows(type(rows)):
            def __getitem__(self, index):
                part = super().__getitem__(index)
                if isinstance(index, slice):
                    with open(f"batches-{os.environ.get('WORLD_SIZE', 1)}-{os.environ.get('RANK', 0)}", 'a') as file:
                        file.write(json.dumps(part.tolist()) + '\\n')
                return part.as_subclass(torch.Tensor)
        import torch
        rows = rows.as_subclass(Rows)
    return rows
dataset.Split.batch = spy
"""


def run(processes, world_size, *options, patch='', code=0):
    started = processes(world_size, 'train.py', *TINY, *options, patch=patch)
    codes = started.wait()
    assert codes == [code] * world_size, started.text()
    return started.text()


def close(one, two, atol=1e-6):
    assert one.keys() == two.keys()
    return max((one[key].float() - two[key].float()).abs().max().item() for key in one) <= atol


@pytest.mark.parametrize('batches', [['--gradient_accumulation_steps=12', '--batch_size=2'],
                                     ['--gradient_accumulation_steps=1', '--batch_size=12']])
def test_the_global_batch_is_the_same_for_any_number_of_processes(tiny, processes, batches):
    """ whole batches are dealt out, or where there are too few, the rows of one """
    seen, losses = {}, {}
    for world_size in (1, 2, 3, 4, 6):
        run(processes, world_size, *batches, '--max_iters=2', f'--out_dir={world_size}', patch=LOG_BATCHES)
        warm_up = 2 * (world_size > 1)   # batches to begin with, which settle DDP's order of adding
        logs = [open(f'batches-{world_size}-{rank}').readlines()[warm_up:] for rank in range(world_size)]
        rows = [[row for line in lines for row in json.loads(line)] for lines in logs]
        assert [len(part) for part in rows] == [2 * 24 // world_size if 'steps=12' in batches[0] else
                                                2 * 12 // world_size] * world_size   # equal work
        half = len(rows[0]) // 2   # a process sees its rows of the first iteration, then those of the second
        seen[world_size] = [sorted(row for part in rows for row in part[i * half:(i + 1) * half]) for i in (0, 1)]
        losses[world_size] = [record['loss'] for record in records('loss', f'{world_size}/log.jsonl')]
    assert all(each == seen[1] for each in seen.values()) and seen[1][0] != seen[1][1]
    assert all(each == pytest.approx(losses[1], abs=1e-6) for each in losses.values())


def test_two_processes_are_one_with_twice_the_accumulation(tiny, processes, script):
    """ every weight after 20 steps, with dropout on, and evaluations to the bit as long as the weights are equal """
    options = ['--max_iters=20', '--dropout=0.2', '--eval_interval=10', '--eval_iters=3', '--learning_rate=1e-3']
    script('train.py', *TINY, *options, '--out_dir=one')
    run(processes, 2, *options)
    assert close(load('out/ckpt.pt')['model'], load('one/ckpt.pt')['model'])
    ours, theirs = (records('val_loss', f'{name}/log.jsonl') for name in ('out', 'one'))
    assert [record['iter'] for record in ours] == [0, 10, 20]
    assert {**ours[0], 'iter': 0} == theirs[0]
    for one, two in zip(records('loss'), records('loss', 'one/log.jsonl'), strict=True):
        assert one['loss'] == pytest.approx(two['loss'], abs=1e-6)
        assert one['grad_norm'] == pytest.approx(two['grad_norm'], rel=1e-4)


def test_the_parts_of_a_batch_have_their_own_dropout(tiny, processes):
    """ two processes that share a batch would otherwise drop the same entries of different rows """
    patch = "import dataset, os\nseed = dataset.batch_seed\n" \
            "dataset.batch_seed = lambda *place: (open(f\"seeds-{os.environ['RANK']}\", 'a').write(f'{place}\\n'), " \
            "seed(*place))[1]"
    run(processes, 2, '--gradient_accumulation_steps=1', '--max_iters=3', patch=patch)
    ours, theirs = ({line for line in open(f'seeds-{rank}') if 'dropout' in line} for rank in (0, 1))
    assert len(ours) == len(theirs) == 3 and not ours & theirs


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_four_processes_resume_to_the_bit(tiny, processes, parallel):
    """ more than two numbers have an order in which they are added, and DDP changes its order after an iteration """
    options = ['--gradient_accumulation_steps=4', '--dropout=0.2', f'--parallel={parallel}']
    run(processes, 4, *options, '--out_dir=straight')
    run(processes, 4, *options, '--max_iters=3')
    run(processes, 4, *options, '--init_from=resume')
    assert equal(tensors(), tensors('straight/ckpt.pt'))
    assert not any(tensor.requires_grad for tensor in tensors().values())


def test_only_rank_0_prints_and_writes(tiny, processes, script, capsys):
    script('train.py', *TINY)
    printed = [line.split(':')[0] for line in capsys.readouterr().out.splitlines()]
    os.rename('out', 'one')
    text = run(processes, 2)
    assert [line.split(':')[0] for line in text.splitlines() if not line.startswith('command line')] == printed
    assert len(records('loss')) == 6 and sorted(os.listdir('out')) == sorted(os.listdir('one'))


def test_the_whole_split_is_evaluated_by_all(tiny, processes, script, capsys):
    """ 300 tokens in rows of 8 and batches of 4 are 10 batches for 3 processes: one of them has more than its share """
    script('train.py', *TINY, '--max_iters=2', '--gradient_accumulation_steps=3')
    capsys.readouterr()
    options = ['--init_from=resume', '--eval_only=True', '--eval_iters=0', '--gradient_accumulation_steps=3']
    script('train.py', *TINY, *options)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('step 2'))
    assert line in run(processes, 3, *options).splitlines()


def test_gradients_are_synchronised_on_the_last_micro_step_only(tiny, processes):
    patch = """
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as hooks, torch, os
wrapped = torch.nn.parallel.DistributedDataParallel
class Counted(wrapped):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        def count(state, bucket):
            open(f"reduced-{os.environ['RANK']}", 'a').write('x')
            return hooks.allreduce_hook(None, bucket)
        self.register_comm_hook(None, count)
torch.nn.parallel.DistributedDataParallel = Counted
"""
    run(processes, 2, '--gradient_accumulation_steps=8', '--max_iters=3', patch=patch)
    # one bucket, three iterations, and two passes to begin with
    assert open('reduced-0').read() == open('reduced-1').read() == 'xxxxx'


@pytest.mark.parametrize('options', [[], ['--grad_checkpoint=True', '--dropout=0.3']])
def test_fsdp_is_ddp(tiny, processes, script, options):
    """ the same losses to 1e-5, a checkpoint of the same form, and each goes on where the other one stopped """
    options = [*options, '--eval_interval=3', '--learning_rate=1e-3']
    run(processes, 2, *options, '--out_dir=ddp')
    run(processes, 2, *options, '--parallel=fsdp')
    for one, two in zip(records('loss'), records('loss', 'ddp/log.jsonl'), strict=True):
        assert one['loss'] == pytest.approx(two['loss'], abs=1e-5)
        assert one['grad_norm'] == pytest.approx(two['grad_norm'], rel=1e-4)
    for one, two in zip(records('val_loss'), records('val_loss', 'ddp/log.jsonl'), strict=True):
        assert one['val_loss'] == pytest.approx(two['val_loss'], abs=1e-5)
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        ours, theirs = load(f'out/{name}'), load(f'ddp/{name}')
        assert ours.keys() == theirs.keys() and ours['model_args'] == theirs['model_args']
        assert os.path.getsize(f'out/{name}') == pytest.approx(os.path.getsize(f'ddp/{name}'), rel=0.02)   # tied once
    assert close(tensors(), tensors('ddp/ckpt.pt'), atol=1e-5)
    more = [*options, '--max_iters=9', '--init_from=resume']
    run(processes, 2, *more, '--parallel=fsdp', '--out_dir=ddp')
    script('train.py', *TINY, *more)
    assert close(tensors(), tensors('ddp/ckpt.pt'), atol=1e-5)


def test_fsdp_resumes_to_the_bit_with_a_shorter_context_too(tiny, processes):
    options = ['--parallel=fsdp', '--dropout=0.2']
    run(processes, 2, *options, '--out_dir=straight')
    run(processes, 2, *options, '--max_iters=3')
    run(processes, 2, *options, '--init_from=resume')
    assert equal(tensors(), tensors('straight/ckpt.pt'))
    run(processes, 2, *options, '--init_from=resume', '--max_iters=8', '--block_size=4')
    assert load('out/ckpt.pt')['model']['transformer.wpe.weight'].shape == (4, 16)


def test_half_precision_in_two_processes(tiny, processes):
    for parallel in ('ddp', 'fsdp'):
        run(processes, 2, f'--parallel={parallel}', '--dtype=float16', f'--out_dir={parallel}')
    ddp, fsdp = load('ddp/ckpt.pt'), load('fsdp/ckpt.pt')
    assert ddp['scaler'] == fsdp['scaler'] and ddp['scaler']['scale'] > 1
    for one, two in zip(records('loss', 'ddp/log.jsonl'), records('loss', 'fsdp/log.jsonl'), strict=True):
        assert one['loss'] == pytest.approx(two['loss'], abs=1e-2)


# ---- faults

BAD_LOSS = """
import model, os
forward, calls = model.GPT.forward, []
def poisoned(self, idx, targets=None, **options):
    logits, loss = forward(self, idx, targets, **options)
    calls.extend([1] * self.training)
    bad = os.environ['RANK'] == '1' and self.training and len(calls) in BAD
    return logits, loss + (float('nan') * BACKWARD if bad else 0)
model.GPT.forward = poisoned
"""


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
@pytest.mark.parametrize('backward', ['1', '(loss * 0).detach()'])   # spoils the gradients too, or the loss alone
def test_a_nan_on_one_process_skips_the_update_on_all(tiny, processes, parallel, backward):
    """ the third iteration is bad on rank 1: no weight changes in it, on either process; DDP begins with two more """
    options = [f'--parallel={parallel}', '--max_iters=5']
    patch = BAD_LOSS.replace('BAD', '(5,)' if parallel == 'ddp' else '(3,)').replace('BACKWARD', backward)
    text = run(processes, 2, *options, patch=patch)
    assert text.count('update skipped, 1 in a row') == 1 and 'iter 2: loss nan' in text
    assert [r['skipped'] for r in records('loss')] == [0, 0, 1, 1, 1] and records('loss')[2]['loss'] is None
    saved = load('out/ckpt.pt')
    assert saved['skipped'] == 1 and tensors()['0 step'] == 4
    assert all(value.isfinite().all() for value in tensors().values())


def test_ten_bad_updates_stop_all_processes(tiny, processes):
    patch = BAD_LOSS.replace('BAD', 'range(6, 99)').replace('BACKWARD', '1')
    text = run(processes, 2, '--max_iters=50', patch=patch, code=3)
    assert '10 in a row' in text and text.count('stopped: 10 updates') == 1 and load('out/ckpt.pt')['iter_num'] == 13


def test_steps_that_cannot_be_shared_name_those_that_can(tiny, processes):
    for world_size, options, nearest in ((3, ['--gradient_accumulation_steps=40'], '39 and 42 can'),
                                         (2, ['--gradient_accumulation_steps=1', '--batch_size=5'], 'processes, 2 can'),
                                         (4, ['--gradient_accumulation_steps=5'], '4 and 8 can')):
        text = run(processes, world_size, *options, code=1)
        assert text.count('error:') == 1 and f'equally by {world_size} processes' in text and nearest in text
        assert os.listdir('.') and not os.path.exists('out')


def test_a_mistake_is_one_line_in_two_processes_too(tiny, processes):
    open('file', 'w').close()
    for option in ('--dataset=nope', '--n_head=3', '--parallel=none', '--out_dir=file', '--init_from=resume',
                   '--backend=', '--device=cuda'):
        started = processes(2, 'train.py', *TINY, option)
        codes, text = started.wait(), started.text()
        assert codes == [1, 1] or option == '--backend=', text
        assert text.count('error:') <= 1 and 'Traceback' not in text, text


def test_processes_that_see_other_checkpoints_do_not_start(tiny, processes, script):
    """ as on two machines with a disk each: only the first has a checkpoint """
    script('train.py', *TINY)
    patch = "import os\nif os.environ['RANK'] == '1': os.rename, os.makedirs('elsewhere'), os.symlink('../data', " \
            "'elsewhere/data'), os.chdir('elsewhere')"
    text = run(processes, 2, '--init_from=auto', patch=patch, code=1)
    assert 'iterations [6.0, -1.0]' in text and 'must be on a disk that they share' in text


# ---- torchrun itself

def torchrun(*arguments, **options):
    command = [os.path.join(os.path.dirname(sys.executable), 'torchrun'), '--standalone', '--nproc_per_node=2']
    return subprocess.Popen([*command, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, **options)


def test_the_readmes_command(here):
    """ on a laptop: three iterations of the small configuration in two processes """
    command = torchrun(os.path.join(ROOT, 'train.py'), 'config/train_shakespeare_char_cpu.py', '--max_iters=3',
                       '--out_dir=out', '--eval_iters=2')
    text = command.communicate()[0]
    assert command.returncode == 0 and '2 processes' in text and load('out/ckpt.pt')['iter_num'] == 3, text


def test_an_unchanged_command_survives_a_crash(tiny, script):
    """ torchrun --max-restarts with --init_from=auto: one process dies at iteration 3, the run ends as if none had """
    options = [*TINY, '--eval_interval=1', '--dropout=0.2', '--init_from=auto']
    (tiny / 'crashing.py').write_text(f"""
import os, runpy, sys
sys.path.insert(0, {ROOT!r})
import dataset
batch = dataset.Split.batch
def crash(self, batch_size, block_size, seed, stream, step):
    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1' and (stream, step) == ('train', 7):
        os._exit(9)
    return batch(self, batch_size, block_size, seed, stream, step)
dataset.Split.batch = crash
sys.argv[0] = {os.path.join(ROOT, 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    command = torchrun('--max-restarts=2', 'crashing.py', *options)
    text = command.communicate()[0]
    assert command.returncode == 0 and load('out/ckpt.pt')['iter_num'] == 6, text
    assert [record['iter'] for record in records('loss')] == [0, 1, 2, 3, 4, 5]
    assert len(records('command')) == 2   # it did crash, and went on
    script('train.py', *options, '--out_dir=one')
    assert close(load('out/ckpt.pt')['model'], load('one/ckpt.pt')['model'])

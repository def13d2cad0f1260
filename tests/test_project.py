""" The promises about the project itself: budgets, configs, README, style. """
import ast
import glob
import os
import re
import shlex
import sys

import pytest
from conftest import ROOT

BUDGETS = {
    'model.py': 655, 'train.py': 440, 'sample.py': 180, 'bench.py': 250, 'configurator.py': 110, 'common.py': 220,
    'checkpoint.py': 295, 'logger.py': 160, 'dataset.py': 450, 'eval_downstream.py': 350, 'lr_find.py': 120,
    'export.py': 160,
    'engine.py': 340, 'optim.py': 240, 'config/*.py': 45, 'data/*/prepare.py': 100,
}
FOLDERS = ('*.py', 'config/*.py', 'data/*/*.py', 'tests/*.py')
SOURCES = [path for pattern in FOLDERS for path in glob.glob(pattern, root_dir=ROOT)]

# values of nanoGPT's seven config files
NANOGPT_CONFIGS = {
    'train_shakespeare_char': dict(
        out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False, wandb_log=False,
        wandb_project='shakespeare-char', wandb_run_name='mini-gpt', dataset='shakespeare_char',
        gradient_accumulation_steps=1,
        batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, learning_rate=1e-3, max_iters=5000,
        lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100),
    'train_gpt2': dict(
        wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12, block_size=1024,
        gradient_accumulation_steps=40,
        max_iters=600000, lr_decay_iters=600000, eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=0.1),
    'finetune_shakespeare': dict(
        out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_log=False, wandb_project='shakespeare',
        dataset='shakespeare',
        init_from='gpt2-xl', always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32, max_iters=20,
        learning_rate=3e-5, decay_lr=False),
    **{f'eval_{name}': dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False, init_from=name)
       for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')},
}


@pytest.fixture
def configured(monkeypatch):
    """ the configuration of a script under these arguments: the script, run as far as its call of configure """
    def run(script, *arguments, own=None):
        if script == 'lr_find.py':   # train.py's, and its own
            source = open(os.path.join(ROOT, script), encoding='utf-8').read()
            block = source.partition('# ---- configuration')[2].partition('config = ')[0]
            exec(block, own := {})
            script = 'train.py'
        path = os.path.join(ROOT, script)
        monkeypatch.setattr(sys, 'argv', [path, *arguments])
        lines = open(path, encoding='utf-8').read().splitlines()
        end = next(i for i, line in enumerate(lines) if line.startswith('config = configure('))
        namespace = {'__file__': path, '__name__': '__main__', **(own or {})}
        exec(compile('\n'.join(lines[:end + 1]), path, 'exec'), namespace)
        return namespace['config']
    return run


@pytest.mark.parametrize('name', NANOGPT_CONFIGS)
def test_nanogpts_config_files_load(here, configured, name):
    values = {**NANOGPT_CONFIGS[name], **({'wandb_run_name': "'ft-' + str(time.time())"} if 'finetune' in name else {})}
    source = [f"{key} = {value if 'time' in str(value) else repr(value)}\n" for key, value in values.items()]
    (here / f'{name}.py').write_text('import time\n' + ''.join(source))
    config = configured('train.py', f'{name}.py')
    assert all(config[key] == value for key, value in NANOGPT_CONFIGS[name].items())


@pytest.mark.parametrize('name', ['train_shakespeare_char', 'train_gpt2'])
def test_our_config_files_have_nanogpts_values(here, configured, name):
    """ and at every other key the defaults """
    config, defaults = configured('train.py', f'config/{name}.py'), configured('train.py')
    assert config == {**defaults, **NANOGPT_CONFIGS[name]}


def test_the_cpu_config(here, configured):
    config, large = (configured('train.py', f'config/train_shakespeare_char{name}.py') for name in ('_cpu', ''))
    smaller = dict(device='cpu', dtype='float32', compile=False, eval_iters=20, block_size=64, batch_size=12,
                   n_layer=4, n_head=4,
                   n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0, wandb_run_name='mini-gpt-cpu')
    assert config == {**large, **smaller}


def test_defaults_are_nanogpts(configured):
    config = configured('train.py')
    nanogpt = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch',
        wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext',
        gradient_accumulation_steps=40, batch_size=12,
        block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4,
        max_iters=600000, weight_decay=0.1,
        beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
        backend='nccl',
        compile=True, device='auto', dtype='auto')
    assert {key: config[key] for key in nanogpt} == nanogpt and config['seed'] == 1337
    config = configured('sample.py')
    nanogpt = dict(init_from='resume', out_dir='out', start='\n', num_samples=10, max_new_tokens=500, temperature=0.8,
                   top_k=200, seed=1337,
                   compile=False, device='auto', dtype='auto')
    assert {key: config[key] for key in nanogpt} == nanogpt


@pytest.mark.parametrize('path', sorted(glob.glob('config/*.py', root_dir=ROOT)))
def test_every_config_file_parses(here, configured, path):
    configured('train.py', path)


def readme_commands():
    text = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
    blocks = re.findall(r'^(?:    .*\n)+', text, re.M) + re.findall(r'```.*?\n(.*?)```', text, re.S)
    lines = [line.strip().removeprefix('$ ') for block in blocks for line in block.splitlines()]
    lines += re.findall(r'`(python data/[^`]*)`', text)   # in tables
    lines = [re.sub(r'^torchrun( --\S+)* (?=\S+\.py)', 'python ', line) for line in lines]
    return [line for line in lines if re.match(r'python \S+\.py|make ', line)]


def test_the_readme_has_commands():
    assert len(readme_commands()) >= 10


@pytest.mark.parametrize('command', readme_commands())
def test_readme_commands_parse(here, configured, command):
    program, *arguments = shlex.split(command)
    if program == 'make':
        targets = re.findall(r'^(\w+):', open(os.path.join(ROOT, 'Makefile')).read(), re.M)
        assert set(arguments) <= set(targets)
    elif arguments[0] == 'dataset.py':
        assert arguments[1] == 'compare' and len(arguments) == 3   # it has no configuration
    elif '--help' in arguments or 'leraning_rate' in command:   # shown for its error
        with pytest.raises(SystemExit):
            configured(*arguments)
    else:
        configured(*arguments)


def test_files_named_in_the_readme_exist():
    text = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
    names = set(re.findall(r'`([\w/.-]+\.(?:py|md|txt|toml))`', text)) - {'prepare.py'}   # there are several
    assert len(names) > 10 and [name for name in names if not os.path.exists(os.path.join(ROOT, name))] == []


@pytest.mark.parametrize('pattern', BUDGETS)
def test_line_budgets(pattern):
    for path in glob.glob(os.path.join(ROOT, pattern)):
        assert len(open(path, encoding='utf-8').readlines()) <= BUDGETS[pattern], path


def test_no_file_is_outside_the_budgets():
    assert {name for name in SOURCES if '/' not in name} <= set(BUDGETS)


@pytest.mark.parametrize('path', SOURCES)
def test_style(path):
    """ ASCII outside tests, 120 columns, no function over 60 lines, no notes to oneself """
    source = open(os.path.join(ROOT, path), encoding='utf-8').read()
    assert path.startswith('tests') or source.isascii()
    assert max(map(len, source.splitlines())) <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    assert not re.search('TO' + 'DO|FIX' + 'ME', source)

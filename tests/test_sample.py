""" sample.py, the real script, on a small trained run. """
import os

import pytest
import torch
from conftest import TINY

from checkpoint import build_model, load

SHORT = ['--out_dir=out', '--device=cpu', '--num_samples=2', '--max_new_tokens=6']


@pytest.fixture
def trained(tiny, script, capsys):
    """ a working directory with a run in out and nothing of its data """
    script('train.py', *TINY, '--max_iters=2')
    (tiny / 'data').rename(tiny / 'moved')
    capsys.readouterr()
    return tiny


def texts(capsys):
    return capsys.readouterr().out.split('\n---------------\n')[:-1]


def test_samples_need_no_data_and_follow_the_seed(trained, script, capsys):
    script('sample.py', *SHORT, '--start=abc')
    first = texts(capsys)
    assert len(first) == 2 and all(text.startswith('abc') and len(text) == 9 for text in first) and first[0] != first[1]
    script('sample.py', *SHORT, '--start=abc')
    assert texts(capsys) == first
    script('sample.py', *SHORT, '--start=abc', '--seed=1')
    assert texts(capsys) != first


def test_greedy_text_is_that_of_the_model(trained, script, capsys):
    script('sample.py', *SHORT, '--start=abc', '--temperature=0')
    model, x = build_model(load('out/ckpt_best.pt')).eval(), torch.tensor([[1, 2, 3]])
    for _ in range(6):
        x = torch.cat((x, model(x[:, -8:])[0][:, -1:].argmax(-1)), 1)
    assert texts(capsys) == [''.join('\nabcdefgh'[i] for i in x[0])] * 2


@pytest.mark.parametrize('options, length', [
    (['--start='], 7), (['--top_k=0'], 7), (['--top_k=5000'], 7), (['--temperature=0'], 7),
    (['--temperature=2', '--top_k=1'], 7),
    (['--start=FILE:prompt.txt'], 13), (['--dtype=bfloat16'], 7), (['--ckpt=last'], 7)])
def test_options(trained, script, capsys, options, length):
    open('prompt.txt', 'w').write('abc\ndefg')
    script('sample.py', *SHORT, *options)
    assert [len(text) for text in texts(capsys)] in ([length] * 2, [length + 1] * 2)   # a newline more or less


def test_a_long_prompt_is_cropped_with_a_note(trained, script, capsys):
    script('sample.py', *SHORT, '--start=' + 'abcdefgh' * 3)
    out, err = capsys.readouterr()
    assert out.startswith('abcdefgh' * 3) and "of the prompt's 24 tokens the model sees the last 8" in err


@pytest.mark.parametrize('options, words', [
    (['--start=aZ42'], "not in the vocabulary: '2' '4' 'Z'; it has '\\nabcdefgh'"),
    (['--start=FILE:none.txt'], 'none.txt'),
    (['--start=FILE:binary'], "can't decode byte 0xff"),
    (['--temperature=-1'], '--temperature=-1.0'), (['--top_k=-3'], '--top_k=-3'),
    (['--num_samples=0'], '--num_samples=0'), (['--max_new_tokens=0'], '--max_new_tokens=0'),
    (['--ckpt=old'], '--ckpt=old'),
    (['--out_dir=gone'], "no checkpoint in 'gone'; --out_dir=out has one"), (['--init_from=gpt9'], '--init_from=gpt9'),
    (['--temprature=1'], "did you mean 'temperature'?")])
def test_wrong_input(trained, fails, options, words):
    open('binary', 'wb').write(b'\xff\xfe')
    assert words in fails('sample.py', *SHORT, *options)[1]


def test_nanogpts_own_checkpoint(tiny, script, fails, capsys):
    """ its tokenizer is that of data/<dataset>; without the folder there is none that fits """
    script('train.py', *TINY, '--max_iters=1')
    ours = torch.load('out/ckpt.pt', weights_only=True)
    os.makedirs('theirs')
    torch.save({key: ours[key] for key in ('model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config')},
               'theirs/ckpt.pt')
    os.remove('data/tiny/meta.json')   # leaves meta.pkl
    capsys.readouterr()
    script('sample.py', *SHORT, '--out_dir=theirs', '--start=abc')
    assert len(texts(capsys)) == 2
    os.remove('data/tiny/meta.pkl')
    assert 'the model knows 9 ids' in fails('sample.py', *SHORT, '--out_dir=theirs')[1]


@pytest.mark.parametrize('start', ['Hello World', '', '<|endoftext|>'])
def test_gpt2_tokens_never_come_from_the_padding(here, script, capsys, start):
    """ ids 50257 to 50303 of a padded vocabulary decode to nothing and must not be drawn, however likely they are """
    from checkpoint import save
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50304, 1, 1, 8))
    with torch.no_grad():
        model.lm_head.weight[50257:] *= 1000
    save('out/ckpt.pt',
         {'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': {'name': 'gpt2'}})
    script('sample.py', *SHORT, f'--start={start}', '--top_k=0')
    samples = texts(capsys)
    assert len(samples) == 2 and all(text.startswith(start or '<|endoftext|>') for text in samples)


@pytest.mark.slow
def test_compiled_sampling(trained, script, capsys):
    script('sample.py', *SHORT, '--start=abc', '--temperature=0')
    eager = texts(capsys)
    script('sample.py', *SHORT, '--start=abc', '--temperature=0', '--compile=True')
    out = capsys.readouterr().out
    assert 'warning' not in out and out.split('\n---------------\n')[:-1] == eager

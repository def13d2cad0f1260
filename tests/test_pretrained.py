""" GPT-2's weights from folders and from a Hub (a server on this machine); transformers is the oracle. """
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from dataset import BPETokenizer, write_dataset
from model import GPT, SIZES, fingerprint

SHAPES = [dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=97),
          dict(n_layer=3, n_head=4, n_embd=64, n_positions=64, vocab_size=131, activation_function='gelu'),
          dict(n_layer=1, n_head=3, n_embd=48, n_positions=16, vocab_size=50257, layer_norm_epsilon=1e-3,
               tie_word_embeddings=False, activation_function='gelu_pytorch_tanh')]


def reference(**config):
    """ a GPT2LMHeadModel in which every number counts: none of its biases and norms is 0 or 1 """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def same_logits(theirs, ours):
    idx = torch.randint(theirs.config.vocab_size, (3, theirs.config.n_positions))
    with torch.no_grad():
        return (theirs(idx).logits - ours.eval()(idx, idx)[0]).abs().max().item()


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('files', ['whole', 'sharded', 'prefix', 'bin'])
def test_logits_are_those_of_transformers(here, shape, files):
    theirs = reference(**shape)
    theirs.save_pretrained('folder', max_shard_size='40KB' if files == 'sharded' else '1GB')
    if files == 'sharded':
        assert len([name for name in os.listdir('folder') if name.endswith('.safetensors')]) > 2
    weights = dict(theirs.state_dict()) if files in ('prefix', 'bin') else {}
    if files == 'prefix':   # without it, as OpenAI's first conversion was, and with the masks that it had
        weights = {name.removeprefix('transformer.'): tensor.contiguous() for name, tensor in weights.items()
                   if name != 'lm_head.weight' or not theirs.config.tie_word_embeddings}
        weights['h.0.attn.bias'], weights['h.0.attn.masked_bias'] = torch.ones(1, 1, 4, 4), torch.tensor(-1e4)
        save_file(weights, 'folder/model.safetensors')
    if files == 'bin':
        os.remove('folder/model.safetensors')
        torch.save(weights, 'folder/pytorch_model.bin')
    ours = GPT.from_pretrained('folder')
    assert same_logits(theirs, ours) <= 2e-5
    assert all(p.dtype == torch.float32 and p.is_contiguous() and p.requires_grad for p in ours.parameters())
    assert (ours.transformer.wte.weight is ours.lm_head.weight) == theirs.config.tie_word_embeddings


def test_half_precision_files_become_float32(here):
    theirs = reference(**SHAPES[0]).bfloat16()
    theirs.save_pretrained('folder')
    assert same_logits(theirs.float(), GPT.from_pretrained('folder')) <= 2e-5


def test_dropout_can_be_overridden_and_nothing_else(here):
    reference(**SHAPES[0]).save_pretrained('folder')
    assert GPT.from_pretrained('folder', {'dropout': 0.25}).config.dropout == 0.25
    assert GPT.from_pretrained('folder', override_args=dict(dropout=0.0)).training
    with pytest.raises(ValueError, match='not bias'):
        GPT.from_pretrained('folder', {'bias': False})


def change(**keys):
    with open('folder/config.json') as file:
        config = json.load(file)
    with open('folder/config.json', 'w') as file:
        json.dump({**config, **keys}, file)


@pytest.mark.parametrize('keys', [
    {'model_type': 'llama'}, {'activation_function': 'relu'}, {'n_inner': 100}, {'scale_attn_weights': False},
    {'scale_attn_by_inverse_layer_idx': True}, {'add_cross_attention': True}])
def test_what_this_model_does_not_have_is_refused_by_name(here, keys):
    reference(**SHAPES[0]).save_pretrained('folder')
    change(**keys)
    (key, value), = keys.items()
    with pytest.raises(ValueError, match=f"no GPT-2 as it is here: {key}={value!r}"):
        GPT.from_pretrained('folder')


@pytest.mark.parametrize('key, value', [
    ('n_embd', '768'), ('n_embd', None), ('n_layer', [2]), ('n_head', 2.0), ('activation_function', ['gelu']),
    ('layer_norm_epsilon', '1e-5'), ('layer_norm_epsilon', -1), ('layer_norm_epsilon', float('nan')),
    ('tie_word_embeddings', 'no'), ('tie_word_embeddings', None), ('n_positions', 0)])
def test_wrong_types_are_refused_in_one_line(here, fails, key, value):
    reference(**SHAPES[0]).save_pretrained('folder')
    change(**{key: value})
    fails('sample.py', '--init_from=folder', '--device=cpu')


def test_whole_numbers_are_no_weights(here, fails):
    theirs = reference(**SHAPES[0])
    theirs.save_pretrained('folder')
    os.remove('folder/model.safetensors')
    torch.save({name: tensor.int() for name, tensor in theirs.state_dict().items()}, 'folder/pytorch_model.bin')
    assert 'torch.int32' in fails('sample.py', '--init_from=folder', '--device=cpu')[1]


def damage(kind):
    if kind == 'no config':
        os.remove('folder/config.json')
    elif kind == 'no weights':
        os.remove('folder/model.safetensors')
    elif kind == 'bad config':
        open('folder/config.json', 'w').write('{')
    elif kind == 'list for config':
        open('folder/config.json', 'w').write('[1]')
    elif kind == 'half a file':
        os.truncate('folder/model.safetensors', 5000)
    elif kind == 'no file':
        os.truncate('folder/model.safetensors', 0)
    elif kind == 'other sizes':
        change(n_layer=3)
    elif kind == 'heads':
        change(n_head=5)
    elif kind == 'code':
        os.remove('folder/model.safetensors')
        torch.save({'transformer.wte.weight': GPT}, 'folder/pytorch_model.bin')
    elif kind == 'classifier':
        GPT2ForSequenceClassification(GPT2Config(**SHAPES[0])).save_pretrained('folder')
    elif kind == 'missing shard':
        shutil.rmtree('folder')
        reference(**SHAPES[0]).save_pretrained('folder', max_shard_size='40KB')
        os.remove(next(f'folder/{name}' for name in sorted(os.listdir('folder')) if name.startswith('model-')))
    elif kind == 'shard elsewhere':
        os.rename('folder/model.safetensors', 'model.safetensors')
        open('folder/model.safetensors.index.json', 'w').write('{"weight_map": {"x": "../model.safetensors"}}')
    elif kind == 'bad tokenizer':
        open('folder/nanogpt_tokenizer.json', 'w').write('{"name": "char", "chars": [1]}')
    elif kind == 'bad index':
        os.rename('folder/model.safetensors', 'folder/x')
        open('folder/model.safetensors.index.json', 'w').write('nothing')


@pytest.mark.parametrize('kind, words', [
    ('no config', 'no config.json'), ('no weights', 'neither model.safetensors nor'), ('bad config', 'is damaged'),
    ('list for config', 'is damaged'),
    ('half a file', 'is damaged'), ('no file', 'is damaged'), ('other sizes', 'h.2.ln_1.weight'),
    ('heads', 'n_embd=32 must be a multiple'), ('code', 'is damaged'), ('classifier', 'score.weight'),
    ('missing shard', 'lacks a file'), ('shard elsewhere', 'lacks a file'),
    ('bad tokenizer', "no tokenizer 'char'"), ('bad index', 'is damaged')])
def test_damaged_folders_are_refused_in_one_line(here, fails, kind, words):
    reference(**SHAPES[0]).save_pretrained('folder')
    damage(kind)
    if kind != 'bad tokenizer':
        with pytest.raises(ValueError, match=words):
            GPT.from_pretrained('folder')
    assert words in fails('sample.py', '--init_from=folder', '--device=cpu')[1]


def test_memory_of_loading(here):
    """ a model of 190 MB in a process of its own: the weights once, and not much more """
    GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=640, n_head=4, n_positions=64, vocab_size=30000)).save_pretrained('f')
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" \
           "import torch, safetensors, model\n" \
           "def most(): return int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])\n" \
           "before = most(); m = model.GPT.from_pretrained('f'); after = most()\n" \
           "print((after - before) * 1024 / (4 * sum(p.numel() for p in m.parameters())))"
    run = subprocess.run([sys.executable, '-c', code, ROOT], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.3


# ---- the Hub

class Hub(http.server.SimpleHTTPRequestHandler):
    """ /owner/model/resolve/main/file, with the headers that huggingface_hub wants """

    def translate_path(self, path):
        return os.path.join(self.directory, *path.split('?')[0].split('/')[2:3], path.rsplit('/', 1)[1])

    def end_headers(self):
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('ETag', f'"{abs(hash(self.path))}"')
        super().end_headers()

    def send_error(self, code, message=None, explain=None):
        self.send_response(code)
        self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(here):
    """ environment variables for a process that then finds here/hub/<model> at its Hub """
    handler = functools.partial(Hub, directory=str(here / 'hub'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(here / 'cache'),
               'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '127.0.0.1'}
        server.shutdown()


def loaded(name, environment):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from model import *\n" \
           "print(fingerprint(GPT.from_pretrained(sys.argv[2]).state_dict()))"
    return subprocess.run([sys.executable, '-c', code, ROOT, name], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize('size', ['1GB', '40KB'])
def test_by_name_from_the_hub_and_then_from_its_cache(here, hub, size):
    reference(**SHAPES[0]).save_pretrained('hub/gpt2', max_shard_size=size)
    expected = fingerprint(GPT.from_pretrained('hub/gpt2').state_dict())
    for name in ('gpt2', 'openai-community/gpt2'):
        run = loaded(name, hub)
        assert run.stdout.strip() == expected, run.stderr
    shutil.rmtree('hub')
    assert loaded('gpt2', {**hub, 'HF_HUB_OFFLINE': '1'}).stdout.strip() == expected


@pytest.mark.slow
def test_no_network_is_one_line_that_says_what_to_do(here, hub):
    run = subprocess.run([sys.executable, os.path.join(ROOT, 'sample.py'), '--init_from=gpt2-xl', '--device=cpu'],
                         env={**hub, 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
    error = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and 'Traceback' not in run.stderr
    assert error.startswith("error: 'gpt2-xl' cannot be had") and 'give a folder instead' in error


@pytest.mark.parametrize('name', ['gpt3', 'none/such/thing', './nothing', '/nothing'])
def test_a_name_that_cannot_be_is_not_asked_for(here, name):
    begin = time.monotonic()
    with pytest.raises(ValueError, match='is none of scratch, resume, auto, ckpt:PATH, gpt2, '):
        GPT.from_pretrained(name)
    assert time.monotonic() - begin < 1 and len(SIZES) == 4


# ---- in the scripts

@pytest.fixture
def folder(here):
    """ a small GPT-2 with GPT-2's vocabulary, and tokens """
    reference(n_layer=2, n_head=2, n_embd=16, n_positions=32).save_pretrained('folder')
    os.makedirs('data/tiny')
    tokens = torch.randint(300, (2300,)).numpy()
    write_dataset('data/tiny', BPETokenizer('gpt2'), {'train': tokens[:2000], 'val': tokens[2000:]})
    return 'folder'


def test_training_begins_with_these_weights(folder, script, capsys):
    state = script('train.py', *TINY, '--init_from=folder', '--max_iters=0', '--block_size=32')
    assert fingerprint(state['raw_model'].state_dict()) == fingerprint(GPT.from_pretrained(folder).state_dict())
    out = capsys.readouterr().out
    assert 'bias stays True' in out and 'n_embd' not in out
    assert script('train.py', *TINY, '--init_from=folder')['raw_model'].config.block_size == 8   # cropped
    assert 'loss' in open('out/log.jsonl').read()


def test_evaluation_only(folder, script, capsys):
    """ as the config files eval_gpt2*.py do """
    script('train.py', *TINY, os.path.join(ROOT, 'config/eval_gpt2.py'), '--init_from=folder', '--eval_iters=2')
    assert 'step 0: train loss' in capsys.readouterr().out and not os.path.exists('out')


def test_sampling_and_measuring(folder, script, capsys):
    script('sample.py', '--init_from=folder', '--device=cpu', '--num_samples=1', '--max_new_tokens=3', '--start=Hello')
    assert capsys.readouterr().out.startswith('Hello')
    script('bench.py', '--mode=generate', '--init_from=folder', '--device=cpu', '--max_new_tokens=3', '--repeats=1',
           '--dtype=float32')
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['parameters'] == \
        GPT.from_pretrained(folder).get_num_params()


def test_untied_heads_train_apart(here, script):
    """ and a checkpoint remembers it """
    reference(**{**SHAPES[2], 'n_head': 2}).save_pretrained('folder')
    os.makedirs('data/tiny')
    write_dataset('data/tiny', BPETokenizer('gpt2'), {'train': torch.randint(300, (900,)).numpy(),
                                                      'val': torch.randint(300, (90,)).numpy()})
    script('train.py', *TINY, '--init_from=folder', '--max_iters=2')
    model = script('train.py', *TINY, '--init_from=resume', '--max_iters=3')['raw_model']
    assert model.config.norm_eps == 1e-3 and not model.config.tie and model.config.gelu == 'tanh'
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.flops_per_token() < 6 * model.get_num_params() + 12 * 48 * 8


def test_a_weight_file_is_not_changed_by_training(folder, script):
    before = {name: tensor.clone() for name, tensor in load_file('folder/model.safetensors').items()}
    script('train.py', *TINY, '--init_from=folder')
    after = load_file('folder/model.safetensors')
    assert all(torch.equal(before[name], after[name]) for name in before)

""" A checkpoint for other programs: a GPT-2 in Hugging Face's format, a ckpt.pt of nanoGPT, or an adapter of PEFT.

$ python export.py --out_dir=out-shakespeare --path=my-gpt2
$ python export.py --out_dir=out-shakespeare --path=plain/ckpt.pt --to=nanogpt
$ python export.py --out_dir=out-shakespeare-lora --path=my-adapter --to=peft

All scripts read the first with --init_from=my-gpt2, and transformers with GPT2LMHeadModel.from_pretrained('my-gpt2').
"""
import hashlib
import json
import os
import shutil
import tempfile

from configurator import configure

# ---- configuration
init_from = 'resume'    # a checkpoint in out_dir; ckpt:PATH; gpt2 to gpt2-xl, another GPT-2 on the Hub, or a folder
out_dir = 'out'
ckpt = 'best'           # lowest validation loss, or 'last'
to = 'huggingface'      # a folder; 'nanogpt': a file; 'peft': a folder with what LoRA trained, for its exported base
path = ''               # of the folder or file to write, which must be new
config = configure(globals())

import torch
from safetensors.torch import save_file

import checkpoint
from common import fail, first_line, print0
from dataset import BPE_FILES, tokenizer_of
from model import CONV1D, NANOGPT, SIZES, TOKENIZER, GPTConfig

# ---- functions

def write(name, content):
    """ a JSON or .safetensors file in the folder """
    if name.endswith('.safetensors'):
        contiguous = {key: tensor.contiguous() for key, tensor in content.items()}
        return save_file(contiguous, os.path.join(folder, name), {'format': 'pt'})   # transformers asks for 'format'
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=2)


def refuse_others(gpt, *known):
    """ end if the model's config has an option of ours, besides those known, that the format does not """
    others = [f'{key}={value}' for key, value in gpt.model_args().items() if key not in (*NANOGPT, *known)]
    if others:
        fail(f"{'nanoGPT' if to == 'nanogpt' else 'GPT-2 in transformers'} has no model with {', '.join(others)}")


def huggingface():
    """ GPT-2's names are ours; linear layers are stored the other way round, and all have a bias """
    model = checkpoint.build_model(trained)
    gpt, weights, size = model.config, {}, model.config.vocab_size
    tokenizer = tokenizer_of(trained) if trained.get('tokenizer') or 'path' in trained else None
    if tokenizer:
        size = tokenizer.vocab_size   # without the rows that only make the matrix a handy size
        write(TOKENIZER, tokenizer.spec)
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.t() if name.endswith(CONV1D) else tensor
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            weights[name] = tensor[:size]
        elif not gpt.bias and name != 'transformer.wpe.weight':
            weights[name.replace('.weight', '.bias')] = torch.zeros(len(tensor))
    if gpt.tie:
        del weights['lm_head.weight']
    write('model.safetensors', weights)
    eot = tokenizer.eot if tokenizer else None
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    write('config.json', {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'dtype': 'float32', 'vocab_size': size,
        'n_positions': gpt.block_size, 'n_layer': gpt.n_layer, 'n_head': gpt.n_head, 'n_embd': gpt.n_embd,
        'activation_function': {'tanh': 'gelu_new', 'none': 'gelu'}[gpt.gelu], 'layer_norm_epsilon': gpt.norm_eps,
        'tie_word_embeddings': gpt.tie, 'attn_pdrop': gpt.dropout, 'embd_pdrop': gpt.dropout,
        'resid_pdrop': gpt.dropout, **ends})
    write('generation_config.json', ends)
    if tokenizer and tokenizer.name == 'gpt2':
        for (url, *_), name in zip(BPE_FILES['gpt2'], ('merges.txt', 'vocab.json'), strict=True):
            cached = os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], hashlib.sha1(url.encode()).hexdigest())
            shutil.copyfile(cached, os.path.join(folder, name))
        write('tokenizer_config.json', {
            'tokenizer_class': 'GPT2Tokenizer', 'model_max_length': gpt.block_size,
            **dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>')})
    else:
        print0("note: only GPT-2's tokenizer is exported for transformers; this model has "
               + (tokenizer.name if tokenizer else "one that it does not say"))


def peft():
    """ the low-rank parts under PEFT's names """
    adapter = checkpoint.load(trained['path'])
    lora, base = adapter['lora'], adapter['base']['sources'][-1]
    write('adapter_model.safetensors', {
        f"base_model.model.{name.replace('.lora_A', '.lora_A.weight').replace('.lora_B', '.lora_B.weight')}": tensor
        for name, tensor in adapter['model'].items()})
    write('adapter_config.json', {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': lora['rank'], 'lora_alpha': lora['alpha'],
        'lora_dropout': lora['dropout'], 'target_modules': [name.strip() for name in lora['targets'].split(',')],
        'fan_in_fan_out': True, 'bias': 'none', 'inference_mode': True,
        'base_model_name_or_path': f'openai-community/{base}' if base in SIZES else base})
    print0(f"its base, for PEFT: python export.py --init_from={base} --path=FOLDER")


def nanogpt():
    """ nanoGPT's keys alone; its optimizer too, so that it resumes, unless that is an adapter's or Muon's """
    refuse_others(gpt := GPTConfig(**trained['model_args']), 'gelu')
    if gpt.gelu == 'tanh':
        print0("note: nanoGPT computes GPT-2's GELU by erf; that moves the logits by about 0.001")
    state = {key: trained[key] for key in ('model', 'iter_num', 'best_val_loss', 'config') if key in trained}
    optimizer = trained.get('optimizer', {})
    if 'lora' not in trained and len(optimizer.get('param_groups', ())) == 2:   # not Muon's three
        state['optimizer'] = optimizer
    else:
        print0("note: there is no optimizer in it, so nanoGPT samples from it, and does not resume")
    if not checkpoint.save(path, {**state, 'model_args': {key: getattr(gpt, key) for key in NANOGPT}}):
        fail(f"{path} was not written")


# ---- write it
if to not in ('huggingface', 'nanogpt', 'peft'):
    fail(f"--to={to} is none of huggingface, nanogpt, peft")
if not path or os.path.exists(path):
    fail(f"--path={path} exists; choose another" if path else "say where to: --path=FOLDER (or FILE, for --to=nanogpt)")
path = os.path.normpath(path)
trained = checkpoint.weights_of(init_from, out_dir, ckpt)
if to == 'peft' and 'lora' not in trained:
    fail(f"{trained.get('path', init_from)} is no adapter, it has no part that LoRA trained")
if to == 'nanogpt':
    nanogpt()
else:
    refuse_others(GPTConfig(**trained['model_args']), 'gelu', 'norm_eps', 'tie')
    try:
        os.makedirs(parent := os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
            huggingface() if to == 'huggingface' else peft()
            for name in os.listdir(folder):
                with open(os.path.join(folder, name), 'rb') as file:
                    os.fsync(file.fileno())
            os.chmod(folder, 0o755)
            os.replace(folder, path)
    except Exception as error:   # a full disk is an error of safetensors' own
        fail(f"{path} was not written ({first_line(error)})")
print0(f"wrote {path}")

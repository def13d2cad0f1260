""" Print text from a trained model.

$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --temperature=0.8 --top_k=200
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --num_samples=1 --stop="\\n\\n"
$ python sample.py --out_dir=out-shakespeare-char --prompts=prompts.txt --num_samples=3 --out=results.json
"""
import itertools
import json
import signal
import sys
import time

from configurator import configure

# ---- configuration
init_from = 'resume'      # a checkpoint in out_dir; ckpt:PATH; gpt2 to gpt2-xl, another GPT-2 on the Hub, or a folder
out_dir = 'out'
ckpt = 'best'             # lowest validation loss, or 'last'
# what to continue
start = "\n"              # the prompt, or FILE: and the name of a text file; '' starts a new document
prompts = ''              # instead of start: a file with a prompt on each line, or a .json file with a list of them
interactive = False       # instead of both: ask for one prompt after the other, continue each once
num_samples = 10          # of each prompt
max_new_tokens = 500      # in each sample
stop = ''                 # text that ends a sample and is left out; \n is a new line; ["a", "b"]: any of them
stop_at_eot = True        # end where the model ends the document, if its tokenizer has a token for that
out = ''                  # a JSON file for the samples, which are not printed then
# how to draw
temperature = 0.8         # below 1 more predictable, above 1 more varied, 0 always the likeliest token
top_k = 200               # draw from the k likeliest tokens only, 0: from all
top_p = 1.0               # from the likeliest that together have this probability
min_p = 0.0               # from those with at least this share of the likeliest's probability
repetition_penalty = 1.0  # above 1: less of what is there already
block_size = 0            # longest context, 0: as trained; rope and alibi can do with more
exact_context = False     # past block_size see the last block_size tokens, not the last half and more: much slower
seed = 1337               # of a prompt's first sample, each next one has the next
# how to compute
device = 'auto'           # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'            # bfloat16, float16, float32
quantize = ''             # int8: weights of 8 bits, by torchao
compile = False           # on CUDA: torch.compile, one graph a token, pays for long samples
config = configure(globals())

import torch
from tqdm import tqdm

import checkpoint
from common import atomic_write, fail, one_line_errors, print0, require, resolve_device, resolve_dtype, try_compile
from dataset import Ending, sha256_of, tokenizer_of
from engine import STATIC, CompiledStep, Sampling, generate, prepare, stream

# ---- functions

def read_prompts(path):
    """ the list in a .json file, or the lines of another file that are not empty """
    try:
        with open(path, encoding='utf-8-sig') as file:
            found = json.load(file) if path.endswith('.json') else [line for line in file.read().split('\n') if line]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not found or not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError(f"{path} has no prompts; it wants one on each line, or .json and a list of strings")
    return found


def ids_of(prompt):
    return tokenizer.encode(prompt, special=True).tolist() or [tokenizer.start]


def sample(starts, seeds):
    """ continue each of starts once a seed; a text that is alone on a terminal is printed as it comes """
    total, texts, done, shown, first, saved = len(starts) * len(seeds), {}, {}, 0, 0.0, time.monotonic()
    live = interactive or total == 1 and sys.stdout.isatty() and not out
    bar = tqdm(total=total * max_new_tokens, unit='tok', disable=live or None, leave=False)
    begin = time.perf_counter()
    if live and not interactive:
        print0(tokenizer.decode(starts[0]), end='')
    try:
        for row, token, last in stream(model, starts, max_new_tokens, sampling, num_samples=len(seeds),
                                       seeds=seeds * len(starts), num_ids=tokenizer.vocab_size, step=step,
                                       is_over=ending.is_over, exact_context=exact_context, most_rows=rows):
            first = first or time.perf_counter() - begin
            ids = texts.setdefault(row, [])
            ids.append(token)
            bar.update(1 + last * (max_new_tokens - len(ids)))
            if last:
                done[row] = ids
            if live:
                text = ending.text(ids, last)
                print0(text[shown:], end='')
                shown = len(text)
                if last:
                    print0('' if interactive else '\n' + '-' * 15)
            while not live and not out and shown in done:   # in order
                with tqdm.external_write_mode():
                    print0(tokenizer.decode(starts[shown // len(seeds)]) + ending.text(done[shown]) + '\n' + '-' * 15)
                shown += 1
            if out and last and time.monotonic() > saved + 5:
                write(seeds, done)
                saved = time.monotonic()
    finally:
        if out:
            write(seeds, done)
        bar.close()
        number, seconds = sum(map(len, texts.values())), time.perf_counter() - begin
        print(f"{number:,} tokens in {seconds:.2f} s, {number / seconds:,.0f} tok/s, the first after {first:.2f} s",
              file=sys.stderr)


def write(seeds, done):
    """ what is finished of each prompt, into out """
    results = [{'prompt': prompt, 'samples': []} for prompt in prompts]
    for row, ids in sorted(done.items()):
        finish = 'stop' if ending.is_over(ids) else 'length'
        results[row // len(seeds)]['samples'].append({'seed': seeds[row % len(seeds)], 'text': ending.text(ids),
                                                      'num_tokens': len(ids), 'finish': finish})
    state = {'complete': len(done) == total, 'model': identity, 'options': config, 'results': results}
    with one_line_errors(), atomic_write(out) as file:
        file.write(json.dumps(state, ensure_ascii=False, indent=1).encode(errors='replace'))


def converse():
    """ continue one line of the input after the other; Ctrl-C ends a text, and where there is none the conversation """
    for number in itertools.count(seed):
        line = input('> ' if sys.stdin.isatty() else '')
        try:
            sample([ids_of(line)], [number])
        except (ValueError, KeyboardInterrupt) as reason:
            print(reason, file=sys.stderr)


# ---- set-up
if interactive and (prompts or out):
    fail("--interactive=True asks for its prompts and prints, --prompts and --out do not go with it")
require(config, 1, 'num_samples', 'max_new_tokens')
require(config, 0, 'temperature', 'top_k', 'block_size')
with one_line_errors():
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8-sig') as file:
            start = file.read()
    prompts = [''] if interactive else read_prompts(prompts) if prompts else [start]
device = resolve_device(device)
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(encoding='utf-8', errors='replace')   # models write characters that a console may not know

# ---- prompts
trained = checkpoint.weights_of(init_from, out_dir, ckpt)
tokenizer = tokenizer_of(trained)
ending = Ending(tokenizer, stop, stop_at_eot)
with one_line_errors():
    starts = [ids_of(prompt) for prompt in prompts]
longest, total = max(map(len, starts)), 1 if interactive else len(prompts) * num_samples
# ---- model
model = checkpoint.build_model(trained, block_size, dropout=0.0).to(device)
if longest > (limit := model.config.block_size):
    print(f"note: of the prompt's {longest:,} tokens the model sees the last {limit:,}", file=sys.stderr)
rows = min(total, model.texts_in_memory(longest + max_new_tokens))
step, torch_dtype = None, resolve_dtype(dtype, torch.device(device).type)
with one_line_errors():
    model = prepare(model, torch_dtype, rows=rows, quantize=quantize)
if compile and device != 'cpu':   # there oneDNN's layout of the weights is faster
    compiled = try_compile(
        model, lambda new: generate(model, starts[:1], 3, num_samples=rows, step=CompiledStep(new)), **STATIC)
    step = CompiledStep(compiled) if compiled is not model else None

# ---- samples
if out:
    path = trained.get('path', '')
    identity = {'checkpoint': path or init_from, 'sha256': sha256_of(path) if path else '',
                'iter_num': trained.get('iter_num'), 'model_args': trained['model_args']}
    write([seed], {})   # better now than at the end, if that is not possible
for name in {'SIGTERM', 'SIGHUP'} & {*dir(signal)}:   # what is finished is written
    signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
try:
    with one_line_errors():
        converse() if interactive else sample(starts, [seed + i for i in range(num_samples)])
except (EOFError, KeyboardInterrupt) as end:
    sys.exit(130 if isinstance(end, KeyboardInterrupt) else 0)

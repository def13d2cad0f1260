""" Evaluate beyond the validation loss: perplexity, tasks with choices, generated text; several models side by side.

$ python eval_downstream.py --out_dir=out-shakespeare-char --tasks=perplexity --data=shakespeare_char
$ python eval_downstream.py --init_from=gpt2 --tasks=sentiment,hellaswag,lambada,piqa,arc --num_fewshot=2
$ python eval_downstream.py --models=gpt2,out-sql --tasks=sql
$ python eval_downstream.py --init_from=gpt2 --tasks=mine.jsonl --template="Question: {context}\\nAnswer:"
$ torchrun --standalone --nproc_per_node=8 eval_downstream.py --init_from=gpt2-xl --tasks=lm_eval:hellaswag

A task is a name of data/eval, a .jsonl file with rows of {context, choices, answer}, {text} (its last word) or {prompt,
references}, or lm_eval:NAME. Results go to out_dir/eval.json; a second call continues what was interrupted.
"""
import hashlib
import json
import os
import platform
import random
import shlex
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace

from configurator import configure

# ---- configuration
init_from = 'resume'    # a checkpoint in out_dir; ckpt:PATH; gpt2 to gpt2-xl, another GPT-2 on the Hub, or a folder
out_dir = 'out'
ckpt = 'best'           # lowest validation loss, or 'last'
models = ''             # instead of init_from, several: gpt2,out-sql,ckpt:PATH, the later ones compared to the first
tasks = 'sentiment,hellaswag,lambada,piqa,arc'   # and perplexity, sql, a .jsonl file, lm_eval:NAME, lm_eval:FOLDER/NAME
from_hub = False        # the whole public set instead of our small samples
num_fewshot = 0         # solved examples before each question
limit = 0               # the first so many items or windows, 0: all
template = '{context}'  # of a .jsonl file's question; \n is a new line
# perplexity
data = ''               # a dataset below data/, or a text file
split = 'val'
stride = 0              # tokens between windows of block_size; less than that sees more of the past; 0: block_size
block_size = 0          # longest context, 0: as trained; rope and alibi can do with more
# generated text
max_new_tokens = 100
# how to compute
batch_size = 16         # contexts at once
seed = 1337             # of the few-shot examples
device = 'auto'         # cuda, mps, cpu, cuda:1, ...
dtype = 'auto'          # bfloat16, float16, float32
config = configure(globals())

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
import common
from common import atomic_write, fail, one_line_errors, print0
from dataset import Ending, check_fits, open_dataset, sha256_of, tokenizer_of
from engine import Sampling, generate, prepare
from model import fingerprint, read_json

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'eval'))
from tasks import as_text, kind_of, line_of, read_items, read_text, score_text, sum_windows, summary, windows_of

LOGITS = 2**26   # at once, 256 MB in float32

# ---- likelihood

def load(source):
    """ a model and what is needed to use it """
    source = f'ckpt:{source}' if os.path.isdir(source) and not os.path.exists(f'{source}/config.json') else source
    trained = checkpoint.weights_of(source, out_dir, ckpt)
    tokenizer, sha256 = tokenizer_of(trained), fingerprint(trained['model'])
    model = prepare(checkpoint.build_model(trained, block_size, dropout=0.0).to(device), numbers, rows=4 * batch_size)
    return SimpleNamespace(name=out_dir if source == 'resume' else source.removeprefix('ckpt:'), model=model,
                           path=trained.get('path', source), sha256=sha256, truncated=set(), tokenizer=tokenizer,
                           V=tokenizer.vocab_size, block_size=model.config.block_size)


def encode_pair(run, context, continuation):
    """ ids of both, cut where the tokens of the whole text are; spaces at the border belong to the continuation """
    border = len(context.rstrip())
    context, continuation = context[:border], context[border:] + continuation
    whole, ids = (run.tokenizer.encode(text).tolist() for text in (context + continuation, context))
    size = min(len(ids), len(whole) - 1)   # where the border is inside a token, that one is the continuation
    return (whole[:size] if size < len(ids) else ids, whole[size:]) if size else ([run.tokenizer.start], whole)


def crop(run, context, continuation):
    """ what of the context fits before a continuation, whose last token is not an input """
    if len(continuation) > run.block_size:
        raise ValueError(f"a continuation of {len(continuation)} tokens is longer than block_size={run.block_size}")
    room = run.block_size + 1 - len(continuation)
    if len(context) > room:
        run.truncated.add(tuple(context))
    return tuple(context[-room:]) if room else (), tuple(continuation)


def batches(run, groups):
    """ groups [(context, [continuations])] of like lengths, as many as fit into block_size, memory and batch_size """
    batch = []
    for group in sorted(groups, key=lambda group: len(group[0])):
        both = [*batch, group]
        prefix, tail = max(len(c) - 1 for c, _ in both), max(len(each) for _, all in both for each in all)
        rows = sum(len(all) for _, all in both)
        if batch and (len(both) > batch_size or prefix + tail > run.block_size
                      or rows * tail * run.model.config.vocab_size > LOGITS):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def log_probabilities(logits, ids, V):
    """ (B, T) of ids (B, T) under logits (B, T, V or more), some rows at a time: much fresh memory is slow """
    parts = zip(logits.flatten(0, 1)[:, :V].split(32), ids.flatten().split(32), strict=True)
    logs = torch.cat([part.gather(1, wanted[:, None])[:, 0].float() - part.float().logsumexp(1)
                      for part, wanted in parts])
    if not logs.isfinite().all():
        raise ValueError("the model's logits are not finite, its weights are damaged")
    return logs.view(ids.shape)


@torch.no_grad()
def score_batch(run, batch):
    """ {(context, continuation): (log-likelihood in nats, whether it is what greedy decoding gives)} """
    prefixes = [context[:-1] for context, _ in batch]
    rows = [(i, context[-1:] + tail, tail) for i, (context, tails) in enumerate(batch) for tail in tails]
    prefix, length = max(map(len, prefixes)), max(len(tail) for *_, tail in rows)
    padding = torch.tensor([prefix - len(each) for each in prefixes], device=device)
    cache = run.model.new_cache(padding, prefix + length)
    if prefix:   # what the choices of a question share is computed once
        run.model(torch.tensor([[0] * (prefix - len(each)) + list(each) for each in prefixes], device=device),
                  cache=cache)
    owner = torch.tensor([i for i, *_ in rows], device=device)
    cache.layers = [[each[owner] for each in layer] for layer in cache.layers]
    cache.padding = None if cache.padding is None else padding[owner]
    inputs, targets = (torch.tensor([list(ids[:length]) + [0] * (length - len(ids)) for ids in column], device=device)
                       for column in zip(*[(ids[:len(tail)], tail) for _, ids, tail in rows], strict=True))
    logits = run.model(inputs, targets, cache=cache)[0]                                                 # (B, T, V)
    real = torch.arange(length, device=device) < torch.tensor([[len(tail)] for *_, tail in rows], device=device)
    sums = (log_probabilities(logits, targets, run.V) * real).cpu().double().sum(1).tolist()   # MPS has no float64
    greedy = ((logits[..., :run.V].argmax(-1) == targets) | ~real).all(1).tolist()
    return {(batch[i][0], tail): found for (i, _, tail), *found in zip(rows, sums, greedy, strict=True)}


def loglikelihoods(run, pairs):
    """ for each (context, continuation), ids or text: (log-likelihood in nats, whether greedy decoding gives it) """
    pairs = [crop(run, *(pair if not isinstance(pair[1], str) else encode_pair(run, *pair))) for pair in pairs]
    groups, found = {}, {}
    for context, continuation in pairs:
        groups.setdefault(context, {})[continuation] = None
    for batch in batches(run, [(context, list(tails)) for context, tails in groups.items()]):
        found |= score_batch(run, batch)
    return [found[pair] for pair in pairs]


# ---- perplexity

def read_tokens(run):
    """ (ids, bytes of the text they stand for, sha256) of a dataset's split or a text file """
    if not data:
        fail("--tasks=perplexity wants --data=, a dataset below data/ or a text file")
    if os.path.isfile(data):
        text = read_text(data)
        return run.tokenizer.encode(text).astype(np.int64), len(text.encode()), sha256_of(data)
    meta, splits = open_dataset(data)
    if meta['tokenizer'] != run.tokenizer.spec or split not in splits:
        fail(f"{data} has {' and '.join(splits)} in the tokens of {meta['tokenizer']['name']}, not {split} in those of "
             f"{run.tokenizer.name} that {run.name} was trained on" + ", other characters" * (run.V < 256))
    if splits[split].mask:
        print0(f"note: {data} has tokens that are not learned; here they count like the others")
    check_fits(splits, run.V, 1)
    ids = splits[split].array().astype(np.int64)
    return ids, len(run.tokenizer.decode(ids.tolist()).encode()), meta['sha256'].get(split, '')


@torch.no_grad()
def score_windows(run, windows, which):
    """ for each (ids, number): {'nll': sum over the last number of targets, in nats, 'tokens': number} """
    rows, at_once = [], max(1, LOGITS // (run.block_size * run.model.config.vocab_size))
    for begin in range(0, len(which), at_once):
        part = [windows[i] for i in which[begin:begin + at_once]]
        ids = pad_sequence([torch.from_numpy(window) for window, _ in part], batch_first=True).to(device)
        logs = log_probabilities(run.model(ids[:, :-1], ids[:, 1:])[0], ids[:, 1:], run.V).cpu().double()
        rows += [{'nll': -each[:len(window) - 1][-number:].sum().item(), 'tokens': number}
                 for each, (window, number) in zip(logs, part, strict=True)]
    return rows


# ---- tasks

def question(items, i):
    """ the context of an item, after num_fewshot others with their answers """
    dice = random.Random(f'{seed} {i}')
    others = dice.sample([j for j in range(len(items)) if j != i], min(num_fewshot, len(items) - 1))
    answers = [items[j]['context'] + (items[j]['choices'][items[j]['answer']] if 'choices' in items[j] else
                                      items[j]['target']) for j in others]
    return '\n\n'.join([*answers, items[i]['context']])


def score_choices(run, items, which):
    pairs = [(question(items, i), choice) for i in which for choice in items[i]['choices']]
    found, rows = iter(loglikelihoods(run, pairs)), []
    for i in which:
        logs, answer = [next(found)[0] for _ in items[i]['choices']], items[i]['answer']
        by_length = [log / len(choice.strip().encode()) for log, choice in zip(logs, items[i]['choices'], strict=True)]
        rows.append({'answer': answer, 'loglikelihoods': logs, 'accuracy': int(np.argmax(logs) == answer),
                     'accuracy_norm': int(np.argmax(by_length) == answer)})
    return rows


def score_targets(run, items, which):
    found = loglikelihoods(run, [(question(items, i), items[i]['target']) for i in which])
    return [{'accuracy': int(greedy), 'nll': -log} for log, greedy in found]


def continue_greedily(run, prompts, most, stop=''):
    """ the greedy continuation of each prompt, up to most tokens, a stop or the end of the document """
    ending = Ending(run.tokenizer, stop)
    prompts = [run.tokenizer.encode(prompt, special=True).tolist() or [run.tokenizer.start] for prompt in prompts]
    run.truncated |= {tuple(prompt) for prompt in prompts if len(prompt) > run.block_size}
    texts = generate(run.model, prompts, most, Sampling(0.0), num_ids=run.V, is_over=ending.is_over)
    return [ending.text(ids) for ids in texts]


def score_texts(run, items, which):
    texts = continue_greedily(run, [items[i]['prompt'] for i in which], max_new_tokens)
    return [score_text(text.strip(), items[i], run.folder) for text, i in zip(texts, which, strict=True)]


SCORE = {'choices': score_choices, 'target': score_targets, 'references': score_texts, 'windows': score_windows}


# ---- one model, one task

def save():
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(state, indent=1).encode())


def gather_rows(rows):
    """ the union of what the processes found """
    if world_size > 1:
        dist.all_gather_object(found := [None] * world_size, rows)
    return {i: row for each in found for i, row in each.items()} if world_size > 1 else rows


def evaluate(run, task):
    """ the entry of eval.json for a task: what was evaluated, a row for each item, metrics """
    kind, items, sha256 = 'lm_eval', [], ''
    if task.startswith('lm_eval:'):
        from harness import run_harness
    elif task == 'perplexity':
        ids, size, sha256 = read_tokens(run)
        kind, items = 'windows', windows_of(ids, run.block_size, stride)
        if len(ids) < 2:
            fail(f"{data}: {len(ids)} tokens, perplexity needs 2")
    else:
        items, sha256, run.folder = read_items(task, template, from_hub)
        kind = kind_of(items[0])
    settings = ('num_fewshot', 'template', 'from_hub', 'data', 'stride', *['block_size'] * (block_size > 0), 'split',
                'max_new_tokens', 'limit', 'seed')
    entry = {'task': task, 'model': run.name, 'path': run.path, 'model_sha256': run.sha256, 'data_sha256': sha256,
             'dtype': str(numbers).removeprefix('torch.'), **{key: config[key] for key in settings}}
    key = hashlib.sha256(json.dumps({**entry, 'model': '', 'path': ''}).encode()).hexdigest()[:16]
    entry = state['results'].setdefault(key, {**entry, 'rows': {}})
    rows, number = {int(i): row for i, row in entry['rows'].items()}, min(limit or len(items), len(items))
    lengths = [len(item['context']) if kind in ('choices', 'target') else 0 for item in items]
    left = sorted(set(range(number)) - rows.keys(), key=lambda i: (lengths[i], i))   # like lengths together
    entry['rows'] = rows
    if rows and left:
        print0(f"{task}: {len(rows)} of {number} were there already")
    saved, run.truncated, chunk = time.monotonic(), set(), 4 * batch_size * world_size
    bar = tqdm(total=len(left), desc=task, unit='item', disable=rank > 0 or None, leave=False)
    for begin in range(0, len(left), chunk):
        mine = left[begin:begin + chunk][rank::world_size]
        rows |= gather_rows(dict(zip(mine, SCORE[kind](run, items, mine) if mine else [], strict=True)))
        bar.update(len(left[begin:begin + chunk]))
        entry['rows'] = {i: rows[i] for i in sorted(rows)}
        if time.monotonic() > saved + 10:
            save()
            saved = time.monotonic()
    bar.close()
    if kind == 'lm_eval':
        entry['metrics'] = entry.get('metrics') or run_harness(
            task, run.tokenizer, run.block_size, partial(loglikelihoods, run), partial(continue_greedily, run),
            num_fewshot=num_fewshot or None, limit=limit or None)
    else:
        of = list(entry['rows'].values())
        entry['metrics'] = sum_windows(of, size / (len(ids) - 1)) if kind == 'windows' else summary(of)
        entry['truncated'] = entry.get('truncated', 0) + int(sum(common.gather(len(run.truncated))[0]))
    return entry


# ---- set-up
common.require(config, 0, 'num_fewshot', 'limit', 'stride', 'block_size')
common.require(config, 1, 'batch_size', 'max_new_tokens')
device = common.resolve_device(device)
numbers = common.resolve_dtype(dtype, torch.device(device).type)
path, names = os.path.join(out_dir, 'eval.json'), list(dict.fromkeys(
    name.strip() for name in tasks.split(',') if name.strip()))
if not names:
    fail("--tasks= names none")
with one_line_errors():
    rank, world_size = common.start_processes(device, 'nccl')
    before = read_json(path) if os.path.exists(path) else {}
    if not isinstance(before.get('results', {}), dict):
        fail(f"{path} is damaged; move it away")
    state = {'command': shlex.join(sys.argv), 'device': common.device_name(device),
             'versions': {'python': platform.python_version(), 'torch': torch.__version__},
             'results': before.get('results', {})}
    save()   # better now than at the end, if that is not possible
for each in {'SIGINT', 'SIGTERM', 'SIGHUP'} & {*dir(signal)}:   # what is done is written
    signal.signal(getattr(signal, each), lambda number, _: sys.exit(128 + number))

# ---- evaluation
columns, found = [], {name: [] for name in names}
for source in [each.strip() for each in models.split(',') if each.strip()] or [init_from]:
    run = load(source)
    columns.append(run.name)
    for name in names:
        try:
            with one_line_errors():
                found[name].append(entry := evaluate(run, name))
        finally:
            save()
        print0(f"{run.name}, {name}: {as_text(entry['metrics'])}")
        for answer, of in entry['metrics'].get('classes', {}).items():
            print0(f"  answer {answer}: {of['items']} items, accuracy {of['accuracy']:.4f}")
        if entry.get('truncated'):
            print0(f"  {entry['truncated']} contexts were longer than block_size={run.block_size}, their end was used")
    del run
state['table'] = ['| task | metric | ' + ' | '.join(columns) + ' |', '|---|---|' + '---|' * len(columns),
                  *map(line_of, found.values())]
save()
print0('\n' + '\n'.join(state['table']) + f'\n\nall of it: {path}')
if world_size > 1:
    common.gather(0)
    dist.destroy_process_group()

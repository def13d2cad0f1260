""" Tasks of eval_downstream.py: rows from our samples, other files or the Hub, and what generated texts are worth. """
import hashlib
import json
import math
import os
import re
import sqlite3
from collections import Counter

import numpy as np

from common import fail
from configurator import find_beside

HOME = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'model.py')
SQL_STEPS = 10_000_000   # of SQLite's machine, after which a query is given up

# ---- rows
def clean(text):
    """ WikiHow's marks out of HellaSwag's text, as the harness does """
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def hellaswag(row):
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {'context': context, 'choices': [' ' + clean(each) for each in row['endings']], 'answer': int(row['label'])}


def last_word(row):
    context, word = row['text'].rstrip().rsplit(' ', 1)
    return {'context': context, 'target': ' ' + word}


READ = {   # rows as the public sets have them; each one's set on the Hub
    'sentiment': (lambda row: {'context': f"Review: {row['sentence'].strip()}\nSentiment:", 'answer': row['label'],
                               'choices': [' negative', ' positive']}, ('stanfordnlp/sst2', None, 'validation')),
    'hellaswag': (hellaswag, ('Rowan/hellaswag', None, 'validation')),
    'lambada': (last_word, ('EleutherAI/lambada_openai', None, 'test')),
    'piqa': (lambda row: {'context': f"Question: {row['goal']}\nAnswer:", 'answer': row['label'],
                          'choices': [f" {row['sol1']}", f" {row['sol2']}"]}, ('baber/piqa', None, 'validation')),
    'arc': (lambda row: {'context': f"Question: {row['question']}\nAnswer:",
                         'choices': [f' {each}' for each in row['choices']['text']],
                         'answer': row['choices']['label'].index(row['answerKey'])},
            ('allenai/ai2_arc', 'ARC-Easy', 'test')),
}


def own(row, template):
    """ a row of a file that is no public set: choices, a text for its last word, or a prompt with references """
    if 'text' in row:
        return last_word(row)
    if 'prompt' in row:
        references = row['references'] if 'references' in row else row['reference']
        return {**row, 'references': [references] if isinstance(references, str) else references}
    context = template.replace('\\n', '\n').replace('{context}', row['context'])
    if not isinstance(row['choices'], list):
        raise ValueError("wants a list of choices")
    return {'context': context, 'answer': row['answer'],
            'choices': [each if each[:1].isspace() else f' {each}' for each in row['choices']]}


def check(item):
    texts = [item[key] for key in ('context', 'target', 'prompt', 'database') if key in item]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError("wants texts")
    if 'choices' in item:
        choices, answer = item['choices'], item['answer']
        if len(choices) < 2 or not all(each.strip() for each in choices):
            raise ValueError("wants at least two choices, none of them empty")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(f"answer {answer!r} is none of 0 to {len(choices) - 1}")
    if 'references' in item and not (item['references'] and all(isinstance(each, str) for each in item['references'])):
        raise ValueError("wants references, a text or a list of them")
    return item


def read_items(task: str, template: str = '{context}', from_hub: bool = False) -> tuple[list[dict], str, str]:
    """ (items, sha256 of their rows, folder of the file) of a task; SystemExit with the line that is wrong

    Items have a context with choices and an answer (its index) or a target, or a prompt with references.
    """
    read, source = READ.get(task, (lambda row: own(row, template), None))
    path = task if task.endswith('.jsonl') else find_beside(os.path.join('data', 'eval', f'{task}.jsonl'), HOME)
    if from_hub and source:
        found, name = _need('datasets').load_dataset(*source[:2], split=source[2]), source[0]
        rows = [json.dumps(row) for row in found]
    elif not path or not os.path.exists(path):
        fail(f"no task '{task}'; there are perplexity, {', '.join(READ)}, sql, a .jsonl file and lm_eval:NAME")
    else:
        name = path
        with open(path, encoding='utf-8-sig', errors='replace') as file:
            rows = file.read().split('\n')
    items = []
    for number, row in enumerate(rows, 1):
        try:
            if row.strip():
                items.append(check(read(json.loads(row))))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            fail(f"{name}, line {number}: " + (f"no {error}" if isinstance(error, KeyError) else f"{error}"))
    if len({kind_of(item) for item in items}) != 1:
        fail(f"{name}: " + ("rows of different kinds" if items else "no rows"))
    return items, hashlib.sha256('\n'.join(rows).encode()).hexdigest(), os.path.dirname(path or '')


def kind_of(item):
    return next(kind for kind in ('choices', 'target', 'references') if kind in item)


# ---- texts

def read_text(path: str) -> str:
    """ of a file; ValueError if it is no UTF-8 """
    with open(path, 'rb') as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _need(name):
    """ an optional package, or one line on how to get it """
    try:
        return __import__(name)
    except ImportError:
        fail(f"this needs {name}: pip install {name}")


def run_sql(query: str, script: str) -> list[tuple] | None:
    """ the rows that a query gives in a new database made by script, None if it fails; it can only read """
    connection = sqlite3.connect(':memory:')
    try:
        connection.executescript(script)
    except sqlite3.Error as error:
        raise ValueError(f"the database cannot be made: {error}") from None
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    if hasattr(connection, 'setlimit'):   # Python 3.11
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10**6)
    connection.set_progress_handler(lambda: 1, SQL_STEPS)   # 1 stops it
    try:
        return connection.execute(query).fetchmany(10_000)
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, MemoryError):
        return None
    finally:
        connection.close()


def same_rows(query: str, reference: str, script: str) -> bool:
    """ whether two queries give the same rows, in the same order if the reference asks for one """
    found, wanted = run_sql(query, script), run_sql(reference, script)
    if 'order by' not in reference.lower():
        found, wanted = (rows and sorted(rows, key=repr) for rows in (found, wanted))
    return found is not None and found == wanted


def score_text(text: str, item: dict, folder: str) -> dict:
    """ what one generated text is worth, the best of its references where there are several """
    scorer = _need('rouge_score') and __import__('rouge_score.rouge_scorer').rouge_scorer.RougeScorer(
        ['rouge1', 'rouge2', 'rougeL'])
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    scores = [scorer.score(reference, text) for reference in item['references']]
    row = {'text': text, 'references': item['references'],
           'exact_match': int(text.strip() in map(str.strip, item['references'])),
           **{key: max(score[key].fmeasure for score in scores) for key in ('rouge1', 'rouge2', 'rougeL')},
           'repetition': 1 - len(set(grams)) / len(grams) if grams else 0.0}   # 4-grams that were there before
    if 'database' in item:
        script = read_text(os.path.join(folder, item['database']))
        row['execution'] = int(any(same_rows(text, reference, script) for reference in item['references']))
    return row


# ---- all rows of a task

def mean(values: list[float]) -> tuple[float, float]:
    """ (mean, its standard error) """
    average = sum(values) / len(values)
    variance = sum((value - average) ** 2 for value in values) / max(len(values) - 1, 1)
    return average, math.sqrt(variance / len(values))


def summary(rows: list[dict]) -> dict:
    """ the metrics of a task, each mean with its standard error, accuracies for each class too """
    found = {}
    for key in ('accuracy', 'accuracy_norm', 'nll', 'exact_match', 'execution', 'rouge1', 'rouge2', 'rougeL',
                'repetition'):
        if key in rows[0]:
            found[key], found[f'{key}_stderr'] = mean([row[key] for row in rows])
    if 'answer' in rows[0]:
        found['classes'] = {answer: {'items': len(of), 'accuracy': mean([row['accuracy'] for row in of])[0]}
                            for answer in sorted({row['answer'] for row in rows})
                            if (of := [row for row in rows if row['answer'] == answer])}
    if 'text' in rows[0]:
        texts, most = [row['text'] for row in rows], max(len(row['references']) for row in rows)
        columns = [[row['references'][i] if i < len(row['references']) else None for row in rows] for i in range(most)]
        found['bleu'] = _need('sacrebleu').corpus_bleu(texts, columns).score
        for n in (1, 2):   # different n-grams of all texts
            grams = Counter(gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False))
            found[f'distinct_{n}'] = len(grams) / max(sum(grams.values()), 1)
    return found


# ---- windows of a text

def windows_of(ids: np.ndarray, block_size: int, stride: int) -> list[tuple[np.ndarray, int]]:
    """ [(inputs and the token after, how many of its last targets are new)]: each token but the first counts once """
    step, found, seen = min(stride or block_size, block_size), [], 0
    for begin in range(0, len(ids) - 1, step):
        end = min(begin + block_size, len(ids) - 1)
        if end > seen:
            found.append((ids[begin:end + 1], end - seen))
        seen = end
    return found


def sum_windows(rows: list[dict], bytes_per_token: float) -> dict:
    """ the metrics of a text; the windows are the units of the standard error, not the tokens """
    nll, tokens = (np.array([row[key] for row in rows]) for key in ('nll', 'tokens'))
    loss = nll.sum() / tokens.sum()
    stderr = math.sqrt(((nll - loss * tokens) ** 2).sum() * len(rows) / max(len(rows) - 1, 1)) / tokens.sum()
    return {'loss': loss, 'loss_stderr': stderr, 'perplexity': math.exp(min(loss, 700)),
            'bits_per_byte': loss / math.log(2) / bytes_per_token}


# ---- output

MAIN = ('loss', 'execution', 'accuracy', 'rougeL', 'acc')   # what a task is compared by


def as_text(metrics: dict) -> str:
    """ 'accuracy 0.5000 +- 0.0730, ...' """
    values = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return ', '.join(f'{key} {value:.4f}' + f" +- {values.get(f'{key}_stderr', 0):.4f}" * (f'{key}_stderr' in values)
                     for key, value in values.items() if not key.endswith('_stderr'))



def value_of(row: dict) -> float:
    """ what a row contributes to the task's main metric """
    return row['nll'] if 'tokens' in row else next(row[key] for key in MAIN if key in row)


def units(entry: dict) -> list:
    """ what has to be the same for rows to be compared: which items, and of windows how many tokens of what text """
    return [(i, row.get('tokens')) for i, row in sorted(entry['rows'].items())]


def sign_test(differences: list[float], times: int = 10_000) -> float:
    """ how often random signs give a mean as far from 0: the paired randomization test, two-sided """
    differences, dice = np.array(differences), np.random.default_rng(0)
    sums = np.concatenate([(dice.integers(0, 2, (100, len(differences)), dtype=np.int8) * 2 - 1) @ differences
                           for _ in range(times // 100)])
    return (1 + (abs(sums) >= abs(differences.sum()) - 1e-12).sum()) / (1 + times)


def line_of(entries: list[dict]) -> str:
    """ a line of the table: a task's main metric for each model, the difference from the first and its p value """
    first, cells = entries[0], []
    metric = next((key for key in MAIN if key in first['metrics']), next(iter(first['metrics'])))
    for i, entry in enumerate(entries):
        value, stderr = entry['metrics'][metric], entry['metrics'].get(f'{metric}_stderr')
        cells.append(f'{value:.4f}' + f' +- {stderr:.4f}' * isinstance(stderr, float))
        if i and entry['rows'] and units(entry) == units(first):
            differences = [value_of(row) - value_of(first['rows'][j]) for j, row in entry['rows'].items()]
            p = entry['p'] = sign_test(differences)
            cells[-1] += f" ({value - first['metrics'][metric]:+.4f}, p {p:.2g})"
    return f"| {first['task']} | {metric} | " + ' | '.join(cells) + ' |'

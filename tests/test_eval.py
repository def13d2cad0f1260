""" eval_downstream.py: perplexity, choices, last words, texts, lm-evaluation-harness and transformers as oracles. """
import json
import math
import os
import random
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT
from transformers import GPT2LMHeadModel

from checkpoint import save
from dataset import BPETokenizer, CharTokenizer, write_dataset
from model import GPT, GPTConfig

sys.path.append(os.path.join(ROOT, 'data', 'eval'))
import tasks

SAMPLES = ('sentiment', 'hellaswag', 'lambada', 'piqa', 'arc')
RUN = ['--device=cpu', '--dtype=float32', '--out_dir=out']


@pytest.fixture
def gpt2(here):
    """ out/ckpt.pt: a random model with GPT-2's tokenizer, padded as usual, sharp enough to prefer some text """
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, 50304, 2, 4, 64))
    for p in model.parameters():
        p.data *= 3
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'config': {},
                         'tokenizer': {'name': 'gpt2'}, 'iter_num': 1, 'best_val_loss': 1.0})
    return model.eval()


def results(path='out/eval.json'):
    return {entry['task']: entry for entry in json.load(open(path))['results'].values()}


def same(one, two):
    """ of results, but for the last digits: prepare() picks the layout of weights that was faster """
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return one == (pytest.approx(two, rel=1e-5, abs=1e-4) if isinstance(two, float | list) else two)


def write_rows(path, rows):
    with open(path, 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


# ---- against transformers and the harness

@pytest.mark.parametrize('stride', [0, 32, 50])
def test_perplexity_is_that_of_transformers(gpt2, script, stride):
    """ on the same windows: the first one whole, of each later one what is new """
    script('export.py', '--out_dir=out', '--path=folder')
    theirs = GPT2LMHeadModel.from_pretrained('folder').eval()
    text = open(os.path.join(ROOT, 'data', 'eval', 'lambada.jsonl')).read()[:6000]
    open('text.txt', 'w').write(text)
    script('eval_downstream.py', *RUN, '--tasks=perplexity', '--data=text.txt', f'--stride={stride}')
    metrics, ids = results()['perplexity']['metrics'], torch.from_numpy(
        BPETokenizer('gpt2').encode(text).astype('int64'))
    total, counted, T = 0.0, 0, 128
    for begin in range(0, len(ids) - 1, stride or T):
        window = ids[begin:begin + T + 1]
        with torch.no_grad():
            logs = theirs(window[None, :-1]).logits[0].log_softmax(-1).gather(1, window[1:, None])[:, 0]
        new = begin + len(window) - 1 - counted
        total, counted = total - logs[-new:].sum().item(), counted + new
        if counted == len(ids) - 1:
            break
    assert counted == len(ids) - 1
    assert abs(metrics['loss'] - total / counted) <= 1e-5
    assert metrics['perplexity'] == pytest.approx(math.exp(total / counted), rel=1e-4)
    assert metrics['bits_per_byte'] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert 0 < metrics['loss_stderr'] < 0.5


@pytest.fixture
def hf(gpt2, script):
    """ the harness's own model class on the exported folder """
    from lm_eval.models.huggingface import HFLM
    script('export.py', '--out_dir=out', '--path=folder')
    return HFLM(pretrained='folder', device='cpu', dtype='float32', batch_size=8, max_length=128)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.mark.slow
def test_every_likelihood_is_that_of_the_harness(hf, gpt2, script):
    """ each choice and last word of our samples, those that are longer than block_size cropped as there """
    script('eval_downstream.py', *RUN, f'--tasks={",".join(SAMPLES)}')
    found = results()
    for task in SAMPLES:
        items, rows = tasks.read_items(task)[0], found[task]['rows']
        assert len(items) >= (40 if task == 'sentiment' else 30) and len(rows) == len(items)
        pairs = [(item['context'], each) for item in items for each in item.get('choices', [item.get('target')])]
        theirs = iter(hf.loglikelihood(requests('loglikelihood', *pairs), disable_tqdm=True))
        for i, item in enumerate(items):
            row = rows[str(i)]
            if 'choices' in item:
                logs = [next(theirs)[0] for _ in item['choices']]
                assert row['loglikelihoods'] == pytest.approx(logs, abs=1e-4)
                assert row['accuracy'] == (max(logs) == logs[item['answer']])
            else:
                log, greedy = next(theirs)
                assert -row['nll'] == pytest.approx(log, abs=1e-4) and row['accuracy'] == greedy
    assert found['lambada'].get('truncated', 0) == 0


@pytest.mark.slow
def test_the_harness_runs_our_models(hf, gpt2, script, capsys):
    """ a task of its own description: the accuracy of our sentiment task; and its three kinds of requests as HFLM """
    import lm_eval
    os.makedirs('mine')
    shutil.copy(os.path.join(ROOT, 'data', 'eval', 'sentiment.jsonl'), 'mine')
    open('mine/mood.yaml', 'w').write(
        'task: mood\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine/sentiment.jsonl}}\ntest_split: test\n'
        'output_type: multiple_choice\ndoc_to_text: "Review: {{sentence}}\\nSentiment:"\ndoc_to_target: label\n'
        'doc_to_choice: [negative, positive]\n'
        'metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n')
    script('eval_downstream.py', *RUN, '--tasks=sentiment,lm_eval:mine/mood')
    found = results()
    assert found['lm_eval:mine/mood']['metrics']['acc'] == found['sentiment']['metrics']['accuracy']
    for name in 'ab':   # two tasks under one tag
        description = open('mine/mood.yaml').read().replace('task: mood', f'task: {name}\ntag: moods')
        open(f'mine/{name}.yaml', 'w').write(description)
    script('eval_downstream.py', *RUN, '--tasks=lm_eval:mine/moods', '--limit=4')
    assert {'a acc', 'b acc', 'a acc_stderr'} <= results()['lm_eval:mine/moods']['metrics'].keys()
    theirs = lm_eval.simple_evaluate(model=hf, tasks=['mood'],
                                     task_manager=lm_eval.tasks.TaskManager(include_path='mine'))
    assert theirs['results']['mood']['acc,none'] == found['sentiment']['metrics']['accuracy']
    assert '| lm_eval:mine/mood | acc |' in capsys.readouterr().out


@pytest.mark.slow
def test_rolling_and_generated_requests(hf, gpt2, script):
    run = script('eval_downstream.py', *RUN, '--tasks=sentiment', '--limit=1')
    from harness import HarnessModel
    ours = HarnessModel(run['tokenizer_of']({'tokenizer': {'name': 'gpt2'}, 'model_args': {'vocab_size': 50257}}), 128,
                        lambda pairs: run['loglikelihoods'](model, pairs),
                        lambda *each: run['continue_greedily'](model, *each))
    model = run['load']('resume')
    texts = [open(os.path.join(ROOT, 'data', 'eval', 'arc.jsonl')).read()[:n] for n in (1, 90, 2500)]
    rolling = requests('loglikelihood_rolling', *((text,) for text in texts))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling, disable_tqdm=True),
                                                                abs=1e-3)
    asked = requests('generate_until', *((text[:40], {'until': [stop], 'max_gen_toks': 12, 'do_sample': False})
                                         for text, stop in zip(texts[1:], ['e', '\n'], strict=True)))
    assert ours.generate_until(asked) == hf.generate_until(asked, disable_tqdm=True)


# ---- models of known ability

@pytest.mark.slow
def test_who_knows_the_answers_scores_all(here, script):
    """ a model of characters that has learned nothing but the answers, in all three places of the list """
    chars = 'abcdefghijklmnop =\nxyz'
    rows = [{'context': f'{letter}=', 'choices': ['x', 'y', 'z'], 'answer': i % 3}
            for i, letter in enumerate(chars[:16])]
    write_rows('known.jsonl', rows)
    lines = [f"{row['context']} {row['choices'][row['answer']]}\n" for row in rows] * 40
    random.Random(0).shuffle(lines)
    text = ''.join(lines)
    write_dataset('data/known', CharTokenizer(chars), dict.fromkeys(
        ('train', 'val'), CharTokenizer(chars).encode(text)))
    script('train.py', '--dataset=known', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=1',
           '--n_head=2', '--n_embd=32', '--block_size=20', '--gradient_accumulation_steps=1', '--batch_size=16',
           '--max_iters=300', '--learning_rate=1e-2', '--decay_lr=False', '--warmup_iters=10', '--eval_interval=300',
           '--eval_iters=2', '--log_interval=100')
    script('eval_downstream.py', *RUN, '--tasks=known.jsonl')
    metrics = results()['known.jsonl']['metrics']
    assert metrics['accuracy'] == metrics['accuracy_norm'] == 1 and metrics['accuracy_stderr'] == 0
    assert [of['items'] for of in metrics['classes'].values()] == [6, 5, 5]
    assert all(of['accuracy'] == 1 for of in metrics['classes'].values())


def test_a_uniform_model_scores_chance(here, script):
    """ every token has probability 1 / V: the first choice wins of equally long ones, the right one in 1 of 4 """
    model = GPT(GPTConfig(32, 50257, 1, 1, 8))
    torch.nn.init.zeros_(model.lm_head.weight)
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'config': {},
                         'tokenizer': {'name': 'gpt2'}})
    rows = [{'context': 'count', 'choices': [' one', ' two', ' six', ' ten'], 'answer': i % 4} for i in range(40)]
    write_rows('even.jsonl', rows)
    open('text.txt', 'w').write("one two six ten " * 20)
    script('eval_downstream.py', *RUN, '--tasks=even.jsonl,perplexity', '--data=text.txt')
    metrics = results()['even.jsonl']['metrics']
    assert abs(metrics['accuracy'] - 0.25) < 2 * metrics['accuracy_stderr'] and metrics['accuracy'] == 0.25
    assert metrics['accuracy_stderr'] == pytest.approx(math.sqrt(0.25 * 0.75 / 39))
    assert results()['even.jsonl']['rows']['0']['loglikelihoods'] == pytest.approx([-math.log(50257)] * 4)
    assert results()['perplexity']['metrics']['perplexity'] == pytest.approx(50257, rel=1e-5)


# ---- by hand

def test_texts_by_hand():
    """ 'a b c d' against 'a b d': 3 of 4 and 3 of 3 words, F1 6/7; 1 of 3 and 2 pairs, 2/5; longest 'a b d', 6/7 """
    row = tasks.score_text('a b c d', {'references': ['a b d']}, '')
    assert (row['exact_match'], row['rouge1'], row['rouge2'], row['rougeL']) == (
        0, pytest.approx(6 / 7), pytest.approx(2 / 5), pytest.approx(6 / 7))
    best = tasks.score_text('a b c d', {'references': ['x', 'a b c d']}, '')
    assert best['exact_match'] == best['rouge1'] == 1 and best['repetition'] == 0
    again = tasks.score_text('a b c d a b c d a', {'references': ['x']}, '')
    assert again['repetition'] == pytest.approx(2 / 6)   # of 6 4-grams two were there before
    found = tasks.summary([row, best, again])
    assert found['exact_match'] == pytest.approx(1 / 3)
    assert found['exact_match_stderr'] == pytest.approx(math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2 / 3))
    assert found['distinct_1'] == pytest.approx(4 / 17) and found['distinct_2'] == pytest.approx(4 / 14)
    assert tasks.summary([best])['bleu'] == pytest.approx(100)


def test_the_sign_test():
    """ three differences of one sign: of the 8 ways to choose signs two are as far from 0 """
    assert tasks.sign_test([1.0, 1.0, 1.0]) == pytest.approx(0.25, abs=0.02)
    assert tasks.sign_test([0.0] * 5) == 1 and tasks.sign_test([1.0] * 20) < 1e-3


SHOP = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"


@pytest.mark.parametrize('query, reference, same', [
    ("SELECT a FROM t WHERE b = 'x'", "select a from t where a <> 2", True),
    ('SELECT a FROM t ORDER BY a DESC', 'SELECT a FROM t', True),             # no order was asked for
    ('SELECT a FROM t ORDER BY a DESC', 'SELECT a FROM t ORDER BY a', False),
    ('SELECT COUNT(*) FROM t', 'SELECT SUM(a) / 2 FROM t', True), ('SELECT b FROM t', 'SELECT a FROM t', False),
    ('SELEKT a', 'SELECT a FROM t', False), ('', 'SELECT a FROM t', False),
    ('SELECT a FROM t; DROP TABLE t', 'SELECT a FROM t', False)])
def test_sql_is_compared_by_its_rows(query, reference, same):
    assert tasks.same_rows(query, reference, SHOP) is same


@pytest.mark.parametrize('query', [
    "ATTACH DATABASE 'stolen.db' AS s", 'DELETE FROM t', "INSERT INTO t VALUES (9, 'z')", 'PRAGMA table_info(t)',
    'CREATE TABLE u (a)', "VACUUM INTO 'copy.db'", "SELECT load_extension('x')",
    'WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n'])
def test_generated_sql_reads_and_nothing_else(here, monkeypatch, query):
    """ the last one would never end """
    monkeypatch.setattr(tasks, 'SQL_STEPS', 10_000)
    assert tasks.run_sql(query, SHOP) is None and os.listdir('.') == []


def test_sql_texts(gpt2, script, monkeypatch):
    """ a model that writes the references has all executed right, and our references run """
    items = tasks.read_items('sql')[0]
    texts = {item['prompt']: item['references'][0] for item in items}
    tokenizer = BPETokenizer('gpt2')
    monkeypatch.setattr('engine.generate', lambda model, prompts, *args, **options: [
        tokenizer.encode(texts[tokenizer.decode(prompt)]).tolist() for prompt in prompts])
    script('eval_downstream.py', *RUN, '--tasks=sql')
    metrics = results()['sql']['metrics']
    assert metrics['execution'] == metrics['exact_match'] == metrics['rougeL'] == 1
    assert metrics['bleu'] == pytest.approx(100) and len(items) >= 40
    assert 'DROP' not in str(results()['sql']['rows'])


# ---- few-shot, templates, several models and processes

def test_few_shot_and_template(gpt2, script, monkeypatch):
    """ other items with their answers stand before the question, never the question's own """
    seen = []
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, 'encode', lambda self, text, special=False: (
        seen.append(text), encode(self, text, special))[1])
    rows = [{'context': f'q{i}', 'choices': [f'n{i}', f'y{i}'], 'answer': 1} for i in range(5)]
    write_rows('own.jsonl', rows)
    script('eval_downstream.py', *RUN, '--tasks=own.jsonl', '--num_fewshot=2', r'--template=Q: {context}\nA:')
    wholes = [text for text in seen if text.endswith(' y3')]
    assert len(wholes) == 1 and wholes[0].count('\n\n') == 2 and wholes[0].endswith('\n\nQ: q3\nA: y3')
    shots = wholes[0].split('\n\n')[:-1]
    assert all(shot in [f'Q: q{i}\nA: y{i}' for i in (0, 1, 2, 4)] for shot in shots) and len(set(shots)) == 2


def test_two_models_in_one_table(gpt2, script, capsys):
    """ the second is the first with the answers turned round in no item: nothing differs; a third one differs """
    other = GPT(GPTConfig(128, 50257, 1, 2, 32))
    for name, model in (('same', gpt2), ('other', other)):
        save(f'{name}/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'config': {},
                                 'tokenizer': {'name': 'gpt2'}})
    open('text.txt', 'w').write(open(os.path.join(ROOT, 'README.md')).read()[:3000])
    script('eval_downstream.py', *RUN, '--models=out,same,other', '--tasks=sentiment,perplexity', '--data=text.txt')
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert lines[0] == '| task | metric | out | same | other |' and len(lines) == 4
    assert '(+0.0000, p 1)' in lines[2] and lines[3].startswith('| perplexity | loss | ')
    state = json.load(open('out/eval.json'))
    assert state['table'] == lines
    losses = [entry['metrics']['loss'] for entry in state['results'].values() if entry['task'] == 'perplexity']
    assert len(losses) == 2   # equal weights are one model
    assert f"({losses[1] - losses[0]:+.4f}, p 0" in lines[3]


def test_an_interrupted_evaluation_continues(gpt2, script, monkeypatch, capsys):
    """ what was scored stays and is not scored again; the result is that of a run in one piece """
    script('eval_downstream.py', *RUN, '--tasks=arc', '--batch_size=2')
    whole = results()['arc']
    os.remove('out/eval.json')
    calls, new_cache = [], GPT.new_cache

    def counting(self, *arguments):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return new_cache(self, *arguments)
    monkeypatch.setattr(GPT, 'new_cache', counting)
    with pytest.raises(SystemExit) as stop:
        script('eval_downstream.py', *RUN, '--tasks=arc', '--batch_size=2')
    assert stop.value.code == 130 and 0 < (there := len(results()['arc']['rows'])) < len(whole['rows'])
    capsys.readouterr()
    script('eval_downstream.py', *RUN, '--tasks=arc', '--batch_size=2')
    assert f'arc: {there} of {len(whole["rows"])} were there already' in capsys.readouterr().out
    assert same(results()['arc'], whole)
    before = len(calls)
    script('eval_downstream.py', *RUN, '--tasks=arc', '--batch_size=2')
    assert len(calls) == before and same(results()['arc'], whole)
    script('eval_downstream.py', *RUN, '--tasks=arc', '--batch_size=2', '--num_fewshot=1')   # that is another question
    assert len(calls) > before and len(json.load(open('out/eval.json'))['results']) == 2


@pytest.mark.slow
def test_two_processes_find_the_same(gpt2, script, processes):
    script('eval_downstream.py', *RUN, '--tasks=arc,perplexity', f'--data={ROOT}/LICENSE')
    alone = results()
    run = processes(2, 'eval_downstream.py', *RUN[:2], '--models=out', '--out_dir=both', '--tasks=arc,perplexity',
                    f'--data={ROOT}/LICENSE')
    assert run.wait() == [0, 0], run.text()
    both = results('both/eval.json')
    for task, entry in alone.items():
        assert same(both[task]['rows'], entry['rows']) and same(both[task]['metrics'], entry['metrics'])


def test_an_adapter_and_a_folder(gpt2, here, script):
    """ weights of LoRA are evaluated folded in; a folder of transformers as it is, with the same result """
    script('export.py', '--out_dir=out', '--path=folder')
    script('eval_downstream.py', *RUN, '--tasks=piqa')
    script('eval_downstream.py', *RUN[:2], '--out_dir=other', '--init_from=folder', '--tasks=piqa')
    assert same(results()['piqa']['rows'], results('other/eval.json')['piqa']['rows'])


def test_a_stored_model_beside_a_new_one(gpt2, script, capsys):
    """ rows out of eval.json are compared like fresh ones """
    save('new/ckpt.pt', {'model': GPT(GPTConfig(128, 50257, 1, 2, 32)).state_dict(), 'config': {},
                         'model_args': GPTConfig(128, 50257, 1, 2, 32).model_args(), 'tokenizer': {'name': 'gpt2'}})
    script('eval_downstream.py', *RUN, '--tasks=arc')
    capsys.readouterr()
    script('eval_downstream.py', *RUN, '--models=out,new', '--tasks=arc,arc')
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| arc')]
    assert len(lines) == 1 and lines[0].count('+-') == 2 and ', p ' in lines[0]


@pytest.mark.parametrize('task, context, choices, answer', [
    ('sentiment', 'Review: {sentence}\nSentiment:', [' negative', ' positive'], 'label'),
    ('piqa', 'Question: {goal}\nAnswer:', [' {sol1}', ' {sol2}'], 'label'),
    ('hellaswag', '{activity_label}: {ctx_a} {Ctx_b}', [' {0}', ' {1}', ' {2}', ' {3}'], 'label'),
    ('arc', 'Question: {question}\nAnswer:', [' {0}', ' {1}', ' {2}', ' {3}'], 'answerKey')])
def test_rows_become_questions(task, context, choices, answer):
    """ in the words of the harness, for each row of our samples """
    rows = map(json.loads, open(os.path.join(ROOT, 'data', 'eval', f'{task}.jsonl')))
    for row, item in zip(rows, tasks.read_items(task)[0], strict=True):
        several = row.get('endings') or row.get('choices', {}).get('text', [])
        if 'ctx_b' in row:
            row['Ctx_b'] = row['ctx_b'].capitalize()
        assert item['context'] == context.format(**row)
        assert item['choices'] == [each.format(*several, **row) for each in choices]
        assert item['answer'] == ('ABCD'.index(row[answer]) if answer == 'answerKey' else int(row[answer]))


def test_normalised_by_length_and_edited_rows(here, script):
    """ under a uniform model the shortest choice is likeliest, and per byte the one with the longest tokens """
    model = GPT(GPTConfig(32, 50257, 1, 1, 8))
    torch.nn.init.zeros_(model.lm_head.weight)
    save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': model.config.model_args(), 'config': {},
                         'tokenizer': {'name': 'gpt2'}})
    row = {'context': 'a', 'choices': ['x', 'something else entirely'], 'answer': 0}   # 1 token, and 3 of 23 bytes
    write_rows('own.jsonl', [row])
    script('eval_downstream.py', *RUN, '--tasks=own.jsonl')
    first = results()['own.jsonl']['metrics']
    assert (first['accuracy'], first['accuracy_norm']) == (1, 0)
    write_rows('own.jsonl', [{**row, 'answer': 1}])   # the same name, other rows
    script('eval_downstream.py', *RUN, '--tasks=own.jsonl')
    found = [entry['metrics'] for entry in json.load(open('out/eval.json'))['results'].values()]
    assert [(each['accuracy'], each['accuracy_norm']) for each in found] == [(1, 0), (0, 1)]


def test_windows_by_hand():
    """ sums 2 and 6 of 2 tokens each: mean 2, residuals -2 and 2, sqrt(8 * 2 / 1) / 4 = 1; 4 bytes a token """
    found = tasks.sum_windows([{'nll': 2.0, 'tokens': 2}, {'nll': 6.0, 'tokens': 2}], 4.0)
    assert (found['loss'], found['loss_stderr']) == (2, 1)
    assert found['bits_per_byte'] == pytest.approx(2 / math.log(2) / 4)


def test_no_shot_is_the_question_itself(gpt2, script):
    run = script('eval_downstream.py', *RUN, '--tasks=arc', '--limit=1', '--num_fewshot=2')
    items = [{'context': f'q{i}', 'choices': ['n', f' y{i}'], 'answer': 1} for i in range(4)]
    asked = [run['question'](items, i) for i in range(4)]
    assert all(f'q{i} y{i}' not in text and text.endswith(f'\n\nq{i}') for i, text in enumerate(asked))
    assert len({text.split('q')[1] for text in asked}) > 1   # not the same ones for all


def test_padding_is_not_asked_for(gpt2, script):
    """ a short greedy continuation stays greedy beside a long one; a border inside a token leaves that token """
    run = script('eval_downstream.py', *RUN, '--tasks=arc', '--limit=1')
    ours, context = run['load']('resume'), [464, 3290]
    greedy = gpt2(torch.tensor([context]))[0][0, -1, :50257].argmax().item()
    found = run['loglikelihoods'](ours, [(context, [greedy]), (context, [1, 2, 3, 4])])
    assert [each for _, each in found] == [True, False]
    context, continuation = run['encode_pair'](ours, 'inter', 'national')
    assert continuation and BPETokenizer('gpt2').decode([*context, *continuation]).endswith('international')


# ---- wrong input

def test_damaged_weights_score_nothing(gpt2, fails):
    gpt2.transformer.h[0].mlp.c_fc.weight.data[0] = math.inf
    torch.save({'model': gpt2.state_dict(), 'model_args': gpt2.config.model_args(), 'config': {},
                'tokenizer': {'name': 'gpt2'}}, 'out/ckpt.pt')
    assert 'not finite' in fails('eval_downstream.py', *RUN, '--tasks=arc')[1]


def test_a_long_context_is_cropped_and_counted(gpt2, script, capsys):
    write_rows('long.jsonl', [{'context': 'word ' * 300, 'choices': ['a', 'b'], 'answer': 0},
                              {'context': 'word', 'choices': ['a', 'b'], 'answer': 0}])
    script('eval_downstream.py', *RUN, '--tasks=long.jsonl')
    assert '1 contexts were longer than block_size=128, their end was used' in capsys.readouterr().out


@pytest.mark.parametrize('row, words', [
    ('{"context": "a", "choices": ["b", "c"], "answer"', 'bad.jsonl, line 2: Expecting'),
    ('{"context": "a", "choices": ["b", "c"], "answer": 2}', 'line 2: answer 2 is none of 0 to 1'),
    ('{"context": "a", "choices": ["b", "c"], "answer": "1"}', "line 2: answer '1' is none"),
    ('{"context": "a", "choices": ["b", "c"], "answer": -1}', 'line 2: answer -1'),
    ('{"context": "a", "choices": [], "answer": 0}', 'line 2: wants at least two choices'),
    ('{"context": "a", "choices": ["b", " "], "answer": 0}', 'none of them empty'),
    ('{"context": "a", "answer": 0}', "line 2: no 'choices'"), ('[1, 2]', 'line 2: '), ('7', 'line 2: '),
    ('{"context": "a", "choices": "yes", "answer": 0}', 'wants a list of choices'),
    ('{"context": "a", "choices": ["b", "c"], "answer": true}', 'answer True'),
    ('{"prompt": 5, "reference": "b"}', 'wants texts'),
    ('{"prompt": "a", "references": []}', 'line 2: wants references'), ('{"text": "one"}', 'line 2: '),
    ('{"text": "one two"}', 'rows of different kinds')])
def test_damaged_rows_are_named(gpt2, fails, row, words):
    open('bad.jsonl', 'w').write('{"context": "a", "choices": ["b", "c"], "answer": 0}\n' + row + '\n')
    assert words in fails('eval_downstream.py', *RUN, '--tasks=bad.jsonl')[1]
    assert open('bad.jsonl').read().endswith(row + '\n')


@pytest.mark.parametrize('options, words', [
    (['--tasks=nothing'], "no task 'nothing'; there are perplexity, sentiment"), (['--tasks=gone.jsonl'], "gone.jsonl"),
    (['--tasks=perplexity'], '--data='), (['--tasks=perplexity', '--data=empty.jsonl'], '0 tokens, perplexity needs 2'),
    (['--tasks=perplexity', '--data=gone'], "dataset 'gone'"),
    (['--tasks=perplexity', '--data=tiny'], 'not val in those of gpt2 that out was trained on'),
    (['--tasks=perplexity', '--data=bytes.txt'], 'bytes.txt is not UTF-8 text'), (['--tasks='], '--tasks= names none'),
    (['--out_dir=empty.jsonl/out', '--init_from=ckpt:out'], 'empty.jsonl'),
    (['--init_from=ckpt:gone'], "no checkpoint in 'gone'"), (['--models=out,gone'], 'gone'),
    (['--batch_size=0'], '--batch_size=0'),
    (['--stride=-1'], '--stride=-1'), (['--num_fewshots=1'], 'num_fewshot'), (['--tasks=empty.jsonl'], 'no rows'),
    (['--tasks=long.jsonl'], 'longer than block_size=128'), (['--tasks=lm_eval:nothing'], "no task 'nothing'")])
def test_wrong_input(gpt2, tiny, fails, options, words):
    open('empty.jsonl', 'w').close()
    open('bytes.txt', 'wb').write(b'caf\xe9')
    write_rows('long.jsonl', [{'context': 'a', 'choices': ['b ' * 200, 'c'], 'answer': 0}])
    assert words in fails('eval_downstream.py', *RUN, *options)[1]


def test_a_damaged_result_file_stays(gpt2, fails):
    open('out/eval.json', 'w').write('{"results"')
    assert 'out/eval.json is damaged' in fails('eval_downstream.py', *RUN, '--tasks=arc')[1]
    assert open('out/eval.json').read() == '{"results"'


@pytest.mark.parametrize('name, option', [('lm_eval', '--tasks=lm_eval:piqa'), ('rouge_score', '--tasks=sql')])
def test_what_is_not_installed_is_named(gpt2, fails, monkeypatch, name, option):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'harness', raising=False)
    assert f'pip install {name}' in fails('eval_downstream.py', *RUN, option, '--limit=2', '--max_new_tokens=3')[1]

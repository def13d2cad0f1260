""" Questions and the SQL that answers them, in GPT-2's tokens; a model is to learn the SQL only (train.mask.bin).

$ python data/sql/prepare.py
$ python data/sql/prepare.py --source=spider.json
"""
import json
import os
import random
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(folder, '..', '..'), os.path.join(folder, '..')]
from configurator import configure

# ---- configuration
source = ''             # JSON (a list) or JSONL, each with question and sql; '': pairs made by the grammar below
num_pairs = 5000        # to make, all different
seed = 1337             # of what is made
tokenizer = 'gpt2'      # or cl100k_base, o200k_base
val_fraction = 0.1      # of the pairs
on_bad = 'stop'         # at a pair that cannot be used, or 'skip' it
dry_run = False         # look at the pairs and write nothing
config = configure(globals())

import corpus
from common import fail, one_line_errors
from dataset import make_tokenizer

TABLES = {   # columns of numbers with a range, columns of words with values
    'customers': ({'age': (18, 80), 'visits': (0, 40)}, {'city': ['Oslo', 'Lyon', 'Graz'], 'status': ['new', 'gold']}),
    'products': ({'price': (1, 900), 'stock': (0, 500)}, {'category': ['books', 'tools', 'toys', 'food']}),
    'employees': ({'salary': (1000, 9000), 'age': (20, 65)}, {'role': ['engineer', 'clerk', 'manager']}),
}
JOINS = {'employees': 'department', 'products': 'supplier'}   # there are departments, and employees.department_id
COMPARISONS = {'>': 'above', '<': 'below', '>=': 'of at least', '<=': 'of at most', '=': 'of exactly'}
AGGREGATES = {'AVG': 'average', 'SUM': 'total', 'MAX': 'highest', 'MIN': 'lowest'}


def condition(dice, table):
    """ (words, SQL) of one or two conditions on a row """
    numbers, words = TABLES[table]
    number, sign, column = dice.choice(list(numbers)), dice.choice(list(COMPARISONS)), dice.choice(list(words))
    value, word, joined = dice.randint(*numbers[number]), dice.choice(words[column]), dice.choice(['', 'and', 'or'])
    said, sql = f"{number} {COMPARISONS[sign]} {value}", f"{table}.{number} {sign} {value}"
    return (f"{said} {joined} {column} {word}", f"{sql} {joined.upper()} {table}.{column} = '{word}'") if joined else (
        said, sql)


def make_pair(dice):
    """ one question and its SQL: a filter, a count, an aggregate, groups, an order, or a join """
    table = dice.choice(list(TABLES))
    numbers, words = TABLES[table]
    number, column = dice.choice(list(numbers)), dice.choice(list(words))
    function, limit, (said, where) = dice.choice(list(AGGREGATES)), dice.randint(2, 20), condition(dice, table)
    pairs = [
        (f"Which {table} have {said}?", f"SELECT name FROM {table} WHERE {where};"),
        (f"How many {table} have {said}?", f"SELECT COUNT(*) FROM {table} WHERE {where};"),
        (f"What is the {AGGREGATES[function]} {number} of {table} with {said}?",
         f"SELECT {function}({number}) FROM {table} WHERE {where};"),
        (f"What is the {AGGREGATES[function]} {number} of {table} with {said} for each {column}?",
         f"SELECT {column}, {function}({number}) FROM {table} WHERE {where} GROUP BY {column};"),
        (f"For which {column} are there more than {limit} {table} with {said}?",
         f"SELECT {column} FROM {table} WHERE {where} GROUP BY {column} HAVING COUNT(*) > {limit};"),
        (f"Which {limit} {table} with {said} have the highest {number}?",
         f"SELECT name FROM {table} WHERE {where} ORDER BY {number} DESC LIMIT {limit};")]
    if table in JOINS:
        one = JOINS[table]
        pairs.append((f"Show the names of {table} with {said} and the name of their {one}.",
                      f"SELECT {table}.name, {one}s.name FROM {table} JOIN {one}s ON {table}.{one}_id = {one}s.id "
                      f"WHERE {where};"))
    return dice.choice(pairs)


def parts_of(row):
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ('question', 'sql')):
        raise ValueError("wants a question and its sql")
    return [(f"# Question: {row['question']}\n# SQL:\n", False), (row['sql'], True)]


def documents(report, source):
    if not source:
        dice, made = random.Random(seed), {}
        while len(made) < num_pairs:
            made.setdefault(*make_pair(dice))
        return (corpus.Piece(parts_of({'question': question, 'sql': sql})) for question, sql in made.items())
    if not source.endswith('.json'):
        return corpus.read_jsonl(source, report, on_bad=on_bad, parts=parts_of)
    try:
        with open(source, 'rb') as file:
            return corpus.read_rows(list(json.load(file)), source, report, on_bad, parts_of)
    except (ValueError, TypeError, RecursionError) as error:
        fail(f"{source}: {error}")


if not 1 <= num_pairs <= 100_000:
    fail(f"--num_pairs={num_pairs} must be 1 to 100000")
with one_line_errors():
    pieces = documents(report := corpus.Report(), os.path.expanduser(source))
    corpus.write_corpus(folder, make_tokenizer({'name': tokenizer}), pieces, report, val_fraction=val_fraction,
                        dry_run=dry_run)

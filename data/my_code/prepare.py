""" The source code below a folder, in GPT-2's tokens: every file is a document, on one side of the split only.

$ python data/my_code/prepare.py
$ python data/my_code/prepare.py --source=~/projects --ext=.py,.js --tokenizer=cl100k_base
"""
import os
import sys
import sysconfig

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(folder, '..', '..'), os.path.join(folder, '..')]
from configurator import configure

# ---- configuration
source = sysconfig.get_paths()['stdlib']   # the Python standard library
ext = '.py'                                # several with commas between
exclude = 'build,dist,node_modules,site-packages,venv,env,target,out,__pycache__,*.egg-info,*.min.js'
tokenizer = 'gpt2'                         # or cl100k_base, o200k_base
val_fraction = 0.1                         # of the files
near_duplicates = False                    # count those that are nearly the same, by datasketch; slow
num_proc = 0                               # threads, 0: one for each processor
limit = 0                                  # files, 0: all
dry_run = False                            # look at the files and write nothing
config = configure(globals())

from fnmatch import fnmatch

import corpus
from common import one_line_errors
from dataset import make_tokenizer

patterns = [pattern.strip() for pattern in exclude.split(',')]
with one_line_errors():
    paths = corpus.find_files(os.path.expanduser(source), ext,
                              skip=lambda name: any(fnmatch(name, pattern) for pattern in patterns))
    pieces = corpus.read_documents(paths, report := corpus.Report())
    corpus.write_corpus(folder, make_tokenizer({'name': tokenizer}), pieces, report, val_fraction=val_fraction,
                        num_proc=num_proc, total=corpus.size_of(paths), limit=limit, near=near_duplicates,
                        dry_run=dry_run)

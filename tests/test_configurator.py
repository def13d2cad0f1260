""" configurator.py: types, files, errors, --help, and nanoGPT's idiom. """
import os
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from configurator import configure, find_beside

DEFAULTS = dict(learning_rate=6e-4, max_iters=600, compile=True, out_dir='out', start='\n', _private=1, thing=[1])


@pytest.fixture
def configured(here, monkeypatch):
    """ configured('--key=value', ...) -> the globals of a script at here/script.py after configure() """
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['script.py', *arguments])
        script_globals = {**DEFAULTS, '__file__': str(here / 'script.py')}
        config = configure(script_globals)
        assert config == {key: script_globals[key] for key in config}
        assert set(config) == {'learning_rate', 'max_iters', 'compile', 'out_dir', 'start'}
        return script_globals
    return run


@pytest.fixture
def refused(configured, capsys):
    """ refused('--key=value', ...) -> the line that ends the script with exit code 2 """
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            configured(*arguments)
        output = capsys.readouterr()
        assert stop.value.code == 2 and output.out == '' and output.err.count('\n') == 1
        assert output.err.startswith('config error: ')
        return output.err
    return run


@pytest.mark.parametrize('argument, key, value', [
    ('--learning_rate=1', 'learning_rate', 1.0), ('--learning_rate=1e-3', 'learning_rate', 1e-3),
    ('--max_iters=1e3', 'max_iters', 1000), ('--max_iters=7', 'max_iters', 7), ('--max_iters=2.0', 'max_iters', 2),
    ('--compile=false', 'compile', False), ('--compile=True', 'compile', True), ('--compile=true', 'compile', True),
    ('--start=a=b', 'start', 'a=b'), ('--start=42', 'start', '42'), ('--start=[1]', 'start', '[1]'),
    ('--start=', 'start', ''), ('--start=None', 'start', 'None'), ("--start='x'", 'start', "'x'"),
])
def test_values_take_the_type_of_the_default(configured, argument, key, value):
    got = configured(argument)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('arguments, words', [
    (['--leraning_rate=1'], ["'leraning_rate'", "'1'", 'command line', "did you mean 'learning_rate'?"]),
    (['--max_iters=1.5'], ["'max_iters'", '1.5', 'int', 'command line']),
    (['--max_iters=ten'], ["'max_iters'", "'ten'", 'int']),
    (['--compile=1'], ["'compile'", "'1'", 'bool']),
    (['--learning_rate=nan'], ["'learning_rate'", 'nan', 'float']),
    (['--learning_rate=None'], ["'learning_rate'", "'None'", "0 or '' is off"]),
    (['--max_iters', '32'], ['--max_iters=32']),
    (['--compile'], ['--compile=']),
    (['-max_iters=3'], ['--max_iters=3']),
    (['max_iters=3'], ["'max_iters=3'", '--key=value']),
    (['config/none.py'], ["'config/none.py'"]),
    (['--_private=2'], ["'_private'"]),
    (['--thing=2'], ["'thing'"]),
    (['--=2'], ["''"]),
    ([''], ["no config file ''"]),
])
def test_a_mistake_is_one_line_and_exit_2(refused, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line


def test_only_rank_0_speaks(configured, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    configured('--max_iters=3')
    with pytest.raises(SystemExit):
        configured('--nope=3')
    assert capsys.readouterr() == ('', '')


def test_later_arguments_win_and_the_origin_is_printed(configured, here, capsys):
    (here / 'a.py').write_text("max_iters = 5\nout_dir = 'a'\n")
    (here / 'b.py').write_text("max_iters = max_iters * 2\n")   # computes from what came before
    script_globals = configured('--learning_rate=1', 'a.py', 'b.py', '--out_dir=c')
    assert (script_globals['max_iters'], script_globals['out_dir']) == (10, 'c')
    assert capsys.readouterr().err.splitlines() == ["command line: learning_rate=1.0, out_dir='c'",
                                                    'b.py: max_iters=10']


def test_a_file_may_import_define_and_comment_in_any_language(configured, here):
    source = "# 学习率, größer\nimport time\nfrom math import sqrt\n_helper = 2\n" \
             "def double(x):\n    return 2 * x\nout_dir = 'ft-' + str(time.time())\n" \
             "learning_rate = sqrt(4)\nmax_iters = double(_helper)\n"
    for mark in ('', '\ufeff'):
        (here / 'c.py').write_text(mark + source, encoding='utf-8')
        script_globals = configured('c.py')
        assert script_globals['max_iters'] == 4 and script_globals['out_dir'].startswith('ft-')
        assert 'double' not in script_globals and 'time' not in script_globals


@pytest.mark.parametrize('source, words', [
    ("leraning_rate = 1\n", ["'leraning_rate'", 'c.py', "did you mean 'learning_rate'?"]),
    ("max_iters = True\n", ["'max_iters'", 'True', 'int', 'c.py']),
    ("max_iters = None\n", ["'max_iters'", 'None', "0 or '' is off"]),
    ("learning_rate = 'fast'\n", ["'learning_rate'", "'fast'", 'float']),
    ("start = 42\n", ["'start'", '42', 'str']),
    ("thing = 3\n", ["'thing'"]),
])
def test_a_mistake_in_a_file_names_the_file(refused, here, source, words):
    (here / 'c.py').write_text(source)
    line = refused('c.py')
    assert all(word in line for word in words), line


def test_a_file_that_is_no_text(refused, here):
    (here / 'c.py').write_bytes(b"out_dir = '\xff'\n")
    assert 'not UTF-8' in refused('c.py')
    (here / 'folder').mkdir()
    assert "no config file 'folder'" in refused('folder')


def test_an_exception_in_a_file_keeps_its_traceback(configured, here):
    (here / 'c.py').write_text("max_iters = 1\nlearning_rate = 1 / 0\n")
    with pytest.raises(ZeroDivisionError) as error:
        configured('c.py')
    assert error.traceback[-1].path.name == 'c.py' and error.traceback[-1].lineno == 1   # counted from 0


def test_files_are_found_in_the_working_directory_then_beside_the_script(here):
    os.makedirs('home/config')
    script = str(here / 'home' / 'train.py')
    assert find_beside('config/x.py', script) is None
    (here / 'home' / 'config' / 'x.py').touch()
    assert find_beside('config/x.py', script) == str(here / 'home' / 'config' / 'x.py')
    os.makedirs('config')
    (here / 'config' / 'x.py').touch()
    assert find_beside('config/x.py', script) == 'config/x.py'


def test_nanogpts_idiom_still_works(here, monkeypatch):
    """ a user's own script that executes the file instead of importing it """
    (here / 'configurator.py').write_text(open(os.path.join(ROOT, 'configurator.py')).read())
    (here / 'own.py').write_text(
        "size = 3\nname = 'x'\n"
        "config_keys = [k for k, v in globals().items() if not k.startswith('_') and "
        "isinstance(v, (int, float, bool, str))]\n"
        "exec(open('configurator.py').read()) # overrides from command line or config file\n"
        "config = {k: globals()[k] for k in config_keys}\nprint(size, config)\n")
    done = subprocess.run([sys.executable, 'own.py', '--size=4'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "4 {'size': 4, 'name': 'x'}\n")
    done = subprocess.run([sys.executable, 'own.py', '--sise=4'], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'size'?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('argument, code', [('--help', 0), ('--leraning_rate=1', 2)])
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_help_and_errors_answer_at_once_from_anywhere(here, script, argument, code):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), argument], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == code
    assert statistics.median(seconds) < 0.3
    if argument == '--help':
        assert done.stdout.startswith(('Train a GPT', 'Print text')) and "out_dir = 'out'" in done.stdout
        assert done.stdout.rstrip().splitlines()[-1].startswith(('compile = ', )) and 'import torch' not in done.stdout

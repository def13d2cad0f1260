""" A script's configuration: its public globals, overridden by Python files and --key=value, left to right.

    from configurator import configure
    learning_rate = 6e-4            # the default, its type and its documentation, in one line
    config = configure(globals())   # sets the globals, returns {'learning_rate': ...}
"""
import ast
import difflib
import math
import os
import sys
from pathlib import Path
from types import ModuleType


def _say(line):
    if os.environ.get('RANK', '0') == '0':   # one voice among the processes of torchrun
        print(line, file=sys.stderr)


def _fail(message):
    _say(f"config error: {message}")
    raise SystemExit(2)


def _parse(text, wanted):
    """ text of the command line as a value near the wanted type, or as it is: _parse('1e3', int) -> 1000.0 """
    if wanted is bool:
        return {'true': True, 'True': True, 'false': False, 'False': False}.get(text, text)
    for number in () if wanted is str else (wanted, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _set(key, value, source, config, origin):
    """ config[key] = value in the type that is there, where nothing is lost by it: 1 as 1.0, 1e3 as 1000 """
    if key not in config:
        near = difflib.get_close_matches(key, config, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "--help lists the keys"
        _fail(f"unknown key '{key}' = {value!r} ({source}), {hint}")
    wanted = type(config[key])
    if (type(value), wanted) == (int, float) or wanted is int and type(value) is float and value.is_integer():
        value = wanted(value)
    if type(value) is not wanted or wanted is float and not math.isfinite(value):
        off = "; 0 or '' is off" * (str(value) == 'None')
        _fail(f"'{key}' wants {wanted.__name__}, got {value!r} ({source}){off}")
    config[key], origin[key] = value, source


def find_beside(path: str, script: str) -> str | None:
    """ path if it exists from the working directory, else below the folder of script if it exists there, else None """
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), path)
    return next((p for p in (path, beside) if os.path.exists(p)), None)


def _run_file(path, script_globals, config, origin):
    """ execute a config file in a copy of the globals and take over what it set """
    found = find_beside(path, script_globals.get('__file__', path))
    if not found or not os.path.isfile(found):
        _fail(f"no config file '{path}' here or beside the script; options are written --key=value")
    try:
        source = Path(found).read_text(encoding='utf-8-sig')   # -sig: some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        _fail(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}")
    before = {**script_globals, **config}
    exec(compile(source, found, 'exec'), after := {**before, '__file__': os.path.abspath(found)})
    for name, value in after.items():
        changed = not name.startswith('_') and (name not in before or value is not before[name])
        if changed and (name in config or not (callable(value) or isinstance(value, ModuleType))):
            _set(name, value, path, config, origin)


def _help(script):
    """ the docstring of a script, then its configuration block as written in the source, from '# ---' to the call """
    lines = (source := Path(script).read_text(encoding='utf-8')).splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('# --')), 0)
    last = next((i for i, line in enumerate(lines) if line.startswith(('config = ', 'exec('))), first)
    return f"{(ast.get_docstring(ast.parse(source)) or '').strip()}\n\n" + '\n'.join(lines[first:last]).rstrip()


def configure(script_globals: dict) -> dict:
    """ override the public int, float, bool and str globals of a script as sys.argv says; returns them as a dict

    --help prints and exits 0, a user's mistake is one line and exit 2, an exception in a file keeps its traceback.
    """
    config = {key: value for key, value in script_globals.items()
              if not key.startswith('_') and type(value) in (int, float, bool, str)}
    arguments, origin = sys.argv[1:], {}
    if '--help' in arguments or '-h' in arguments:
        print(_help(script_globals['__file__']))
        raise SystemExit(0)
    for i, argument in enumerate(arguments):
        key, equals, text = argument.lstrip('-').partition('=')
        if not argument.startswith('-'):
            _run_file(argument, script_globals, config, origin)
        elif equals and argument.startswith('--'):
            _set(key, _parse(text, type(config.get(key, ''))), 'command line', config, origin)
        else:
            _fail(f"cannot read '{argument}', write --{key}={text or (arguments[i + 1:] or ['VALUE'])[0]}")
    for source in dict.fromkeys(origin.values()):
        _say(f"{source}: " + ', '.join(f'{key}={config[key]!r}' for key in origin if origin[key] == source))
    script_globals.update(config)
    return config


if __name__ != 'configurator':   # exec(open('configurator.py').read()), as nanoGPT's scripts say it
    configure(globals())

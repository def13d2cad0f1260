""" common.py: devices, dtypes, peak FLOPS, atomic files, random state, compilation. """
import contextlib
import io
import itertools
import os
import platform
import stat
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
from common import (
    atomic_write,
    duration,
    gather,
    peak_flops,
    peak_memory,
    print0,
    resolve_device,
    resolve_dtype,
    try_compile,
)


@pytest.mark.parametrize('cuda, mps, expected', [(True, True, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')])
def test_device_auto(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)   # which proves that the device works
    assert resolve_device('auto') == expected


@pytest.mark.parametrize('device', ['nonsense', 'cpu:x', pytest.param('cuda', marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is CUDA here"))])
def test_a_device_that_is_not_there(device):
    with pytest.raises(SystemExit, match=f'error: --device={device} cannot be used here.*--device=auto'):
        resolve_device(device)


@pytest.mark.parametrize('device, native_bf16, expected', [
    ('cuda', True, torch.bfloat16), ('cuda', False, torch.float16), ('cpu', False, torch.float32),
    ('cpu', True, torch.bfloat16),
    ('mps', False, torch.float32)])
def test_dtype_auto(monkeypatch, device, native_bf16, expected):
    """ a T4 emulates bfloat16: so is_bf16_supported() is True there unless including_emulation=False """
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: native_bf16 or including_emulation)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: native_bf16)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    assert resolve_dtype('auto', device) is expected
    assert resolve_dtype('float16', device) is torch.float16
    with pytest.raises(SystemExit, match='--dtype=fp16 is none of auto, float32, bfloat16, float16'):
        resolve_dtype('fp16', device)


@pytest.mark.parametrize('cpu, block_size, expected', [
    ('vendor_id : AuthenticAMD  flags : avx2 avx512f', 128, 'bf16'),
    ('vendor_id : AuthenticAMD  flags : avx2 avx512f', 127, 'none'),
    ('vendor_id : AuthenticAMD  flags : avx2', 128, 'none'),
    ('vendor_id : AuthenticAMD  flags : avx512f amx_bf16', 128, 'none'),   # this one would compute in bfloat16
    ('vendor_id : GenuineIntel  flags : avx512f', 128, 'none')])
def test_which_products(monkeypatch, cpu, block_size, expected):
    monkeypatch.setattr('builtins.open', lambda path: io.StringIO(cpu))
    common.choose_products('cpu', block_size)
    assert torch.backends.mkldnn.matmul.fp32_precision == expected


def test_products_stay_float32():
    """ whatever this CPU is: (1 + 2**-12)**2 is 1 in bfloat16 and in TF32, and 1 + 2**-11 + 2**-24 in float32 """
    common.choose_products('cpu', 1024)
    for rows, inner, columns in itertools.product((1, 12, 256, 1024), (64, 768), (65, 2048)):
        one, two = torch.full((rows, inner), 1 + 2**-12), torch.full((inner, columns), 1 + 2**-12)
        assert ((one @ two / inner - 1) / (2**-11 + 2**-24) - 1).abs().max() < 1e-2


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="glibc's allocator")
@pytest.mark.parametrize('line', ['', 'common.keep_freed_memory()'])
def test_freed_memory_is_kept(line):
    """ megabytes that the process still has of 20 tensors of 16 MB, which usually go back to the system """
    code = (f'import torch, common\n{line}\nmemory = lambda: int(open("/proc/self/statm").read().split()[1])\n'
            'torch.ones(2**20)\nbefore = memory()\ntensors = [torch.ones(2**22) for _ in range(20)]\ndel tensors\n'
            'print((memory() - before) * 4096 / 2**20)')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (float(run.stdout) > 300) == bool(line) and (float(run.stdout) < 40) != bool(line)


def test_an_allocator_that_has_no_such_settings(monkeypatch):
    monkeypatch.setattr('ctypes.CDLL', lambda name: object())
    common.keep_freed_memory()


@pytest.mark.parametrize('name, bf16, fp16', [
    ('NVIDIA A100-SXM4-80GB', 312, 312), ('NVIDIA H100 80GB HBM3', 989, 989), ('NVIDIA H100 PCIe', 756, 756),
    ('NVIDIA H100 NVL', 835, 835), ('NVIDIA H200', 989, 989), ('NVIDIA H200 NVL', 835, 835),
    ('NVIDIA B200', 2250, 2250),
    ('NVIDIA GB200', 2500, 2500), ('NVIDIA L4', 121, 121), ('NVIDIA L40S', 362, 362), ('NVIDIA A10', 125, 125),
    ('NVIDIA GeForce RTX 4090', 165.2, 165.2), ('NVIDIA GeForce RTX 3090', 71, 71), ('Tesla T4', None, 65),
    ('Tesla V100-SXM2-16GB', None, 125), ('Tesla V100-PCIE-32GB', None, 112), ('Tesla V100S-PCIE-32GB', None, 130),
    # near misses must not be given another card's figure
    ('NVIDIA A10G', None, None), ('NVIDIA L40', None, None), ('NVIDIA GH200 480GB', None, None), ('cpu', None, None),
    ('NVIDIA GeForce RTX 4090 D', None, None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None, None),
    ('NVIDIA GeForce RTX 3090 Ti', None, None), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None, None)])
def test_peak_flops(name, bf16, fp16):
    for dtype, tera in ((torch.bfloat16, bf16), (torch.float16, fp16), (torch.float32, None)):
        assert peak_flops(name, dtype) == (tera and tera * 1e12)


def test_atomic_write_is_all_or_nothing(here):
    with atomic_write('file') as file:
        file.write(b'old')
        assert not os.path.exists('file')
    assert os.listdir() == ['file']
    for error in (KeyboardInterrupt, OSError):
        with contextlib.suppress(error), atomic_write('file') as file:
            file.write(b'new')
            raise error
        assert open('file', 'rb').read() == b'old' and os.listdir() == ['file']


def test_atomic_write_reaches_the_disk_before_the_name(here, monkeypatch):
    """ content, then name, then the folder that has the name: in any other order a power cut could lose both """
    steps, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, 'replace', lambda *names: (steps.append('replace'), replace(*names)))
    monkeypatch.setattr(os, 'fsync', lambda number: (
        steps.append('folder' if stat.S_ISDIR(os.fstat(number).st_mode) else os.fstat(number).st_size), fsync(number)))
    with atomic_write('file') as file:
        file.write(b'four')
    assert steps == [4, 'replace', 'folder']


def test_atomic_write_keeps_what_stood_there(here):
    for content in (b'1', b'2', b'3'):
        with atomic_write('file', 'before') as file:
            file.write(content)
    assert open('file').read() == '3' and open('before').read() == '2' and len(os.listdir()) == 2


def test_atomic_write_goes_through_a_link(here):
    os.makedirs('large_disk')
    os.symlink('large_disk/file', 'file')
    with atomic_write('file') as file:
        file.write(b'x')
    assert os.path.islink('file') and open('large_disk/file').read() == 'x'


def test_atomic_write_replaces_files_only(here):
    """ a pipe, a device or a folder under that name stays what it is """
    os.mkfifo('pipe')
    os.makedirs('folder')
    for name in ('pipe', 'folder', os.devnull):
        with pytest.raises(OSError, match='is not a file'), atomic_write(name):
            pass
    assert stat.S_ISFIFO(os.stat('pipe').st_mode) and sorted(os.listdir()) == ['folder', 'pipe']


def test_gather_in_one_process():
    assert gather(1, 2.5) == [[1], [2.5]]


def test_a_gpu_for_each_process(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    monkeypatch.setenv('LOCAL_RANK', '3')
    chosen = []
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert resolve_device('cuda') == 'cuda:3' and chosen == ['cuda:3']
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(SystemExit):
        resolve_device('cuda')
    monkeypatch.setenv('LOCAL_RANK', '0')   # which speaks for its machine
    with pytest.raises(SystemExit, match='4 processes on a machine with 2 GPUs'):
        resolve_device('cuda')


def test_peak_memory_is_that_of_the_process():
    """ which may have been higher before; Linux says it in another place too """
    block = torch.ones(50_000_000)   # 200 MB
    assert peak_memory('cpu') > block.nbytes
    if os.path.exists('/proc/self/status'):
        said = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
        assert peak_memory('cpu') == pytest.approx(1024 * int(said.split()[1]), rel=0.05)


def test_duration():
    assert [duration(s) for s in (0.4, 59.4, 200, 7260)] == ['0s', '59s', '3m20s', '2h01m']


def test_only_rank_0_prints(capsys, monkeypatch):
    print0('one')
    monkeypatch.setenv('RANK', '1')
    print0('two')
    assert capsys.readouterr().out == 'one\n'


def test_compilation_falls_back_to_eager_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    model = torch.nn.Linear(2, 2)

    def run(compiled):
        raise RuntimeError("no compiler found\nat length")
    assert try_compile(model, run) is model
    assert capsys.readouterr().out == "warning: torch.compile does not work here (no compiler found), running eager\n"


@pytest.mark.slow
def test_compilation_without_a_compiler(here):
    """ a real failure: the C++ compiler that torch.compile would call does not exist """
    code = "import torch, common; m = torch.nn.Linear(2, 2); " \
           "print(common.try_compile(m, lambda c: c(torch.ones(1, 2))) is m)"
    environment = {**os.environ, 'CXX': '/nonexistent/c++', 'TORCHINDUCTOR_CACHE_DIR': str(here), 'PYTHONPATH': ROOT}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith('warning: torch.compile does not work here')
    assert done.stdout.endswith('running eager\nTrue\n')


@pytest.mark.slow
def test_importing_does_nothing():
    """ no output, no random numbers drawn, no CUDA, no heavy optional library """
    code = "import sys, torch; s = torch.get_rng_state(); " \
           "import model, common, dataset, checkpoint, logger, configurator; " \
           "assert torch.equal(s, torch.get_rng_state()) and not torch.cuda.is_initialized(); " \
           "assert not {'wandb', 'tiktoken', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')

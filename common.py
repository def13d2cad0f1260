""" Run-time set-up that scripts share: device, dtype, autocast, processes, atomic files, peak FLOPS. """
import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO

import torch
import torch.distributed as dist

# dense tensor-core peak in TFLOP/s, NVIDIA's data sheets; the first entry found as whole words in a name counts
PEAK_BF16 = {'GB200': 2500, 'B200': 2250, 'H200 NVL': 835, 'H200': 989, 'H100 NVL': 835, 'H100 PCIe': 756, 'H100': 989,
             'A100': 312, 'L40S': 362, 'L4': 121, 'A10': 125, 'RTX 4090': 165.2, 'RTX 3090': 71}
PEAK_FP16 = {**PEAK_BF16, 'V100S': 130, 'V100-PCIE': 112, 'V100': 125, 'T4': 65}   # the last four have no bfloat16
WHOLE = r'(?!.*\b(MIG|Laptop|Max-Q|Ti|D)\b)'   # these have the family's name and another peak
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ---- output

def is_rank_0() -> bool:
    """ whether this is the process, of those that torchrun started, that prints and writes """
    return os.environ.get('RANK', '0') == '0'


def print0(*values, end: str = '\n') -> None:
    """ print on rank 0 only, without waiting for the buffer to fill; a reader that has gone does not end the run """
    if is_rank_0():
        try:
            print(*values, end=end, flush=True)
        except OSError:   # a closed pipe or terminal
            sys.stdout = open(os.devnull, 'w')


def fail(message: str) -> None:
    """ end the script on a user's mistake: one line on stderr, once per machine, and exit code 1 """
    sys.stdout.flush()
    raise SystemExit(f"error: {message}" if os.environ.get('LOCAL_RANK', '0') == '0' else 1)


def require(config: dict, least: int, *keys: str) -> None:
    """ SystemExit if one of these settings is smaller than it may be """
    for key in (key for key in keys if config[key] < least):
        fail(f"--{key}={config[key]} must be at least {least}")


def first_line(error: Exception) -> str:
    """ what an exception says, in one line; its type where it says nothing """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """ a ValueError about the user's numbers, or an OSError about the user's files, ends the script in one line """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(first_line(error))


def duration(seconds: float) -> str:
    """ 200 -> '3m20s', 7260 -> '2h01m' """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


# ---- device and numbers

def resolve_device(device: str) -> str:
    """ 'auto' is cuda, then mps, then cpu; 'cuda' is a GPU for each process; SystemExit if the device does not work """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if device == 'cuda' and here > 1:
        if here > torch.cuda.device_count():
            fail(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; start one for each GPU")
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        torch.zeros(1, device=device)
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:   # an AssertionError where torch was built without CUDA
        fail(f"--device={device} cannot be used here ({first_line(error)}); try --device=auto")
    return device


def resolve_dtype(dtype: str, device_type: str) -> torch.dtype:
    """ 'auto' is bfloat16 where the hardware has it, else float16 on CUDA, else float32; SystemExit if unknown """
    if dtype == 'auto':   # emulated bfloat16, as on T4 and most CPUs, is slow
        # the private names are the only ones that PyTorch 2.10 to 2.13 all have
        has_bfloat16 = (torch.cuda.is_bf16_supported(including_emulation=False) if device_type == 'cuda' else
                        device_type == 'cpu' and (torch.cpu._is_avx512_bf16_supported()
                                                  or torch.cpu._is_amx_tile_supported()))
        dtype = 'bfloat16' if has_bfloat16 else 'float16' if device_type == 'cuda' else 'float32'
    if dtype not in DTYPES:
        fail(f"--dtype={dtype} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_products(device_type: str, block_size: int) -> None:
    """ TF32 for float32 matrices on CUDA; on AMD's CPUs with AVX-512 oneDNN, twice as fast as MKL in float32

    PyTorch offers it under 'bf16', which only CPUs with AMX take literally. Attention over a short context loses more.
    """
    if device_type == 'cuda':
        torch.set_float32_matmul_precision('high')
    elif device_type == 'cpu' and block_size >= 128 and os.path.exists(path := '/proc/cpuinfo'):
        with open(path) as file:
            cpu = file.read()
        if 'AuthenticAMD' in cpu and 'avx512f' in cpu and 'amx' not in cpu:
            torch.backends.mkldnn.matmul.fp32_precision = 'bf16'


def keep_freed_memory() -> None:
    """ let glibc keep what tensors below 32 MB leave behind: fresh pages for each cost a fifth of a small iteration """
    with contextlib.suppress(AttributeError, OSError, TypeError):   # another allocator
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)       # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD


def autocast(device_type: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """ matrix products in dtype, sensitive operations in float32; nothing to do for float32 """
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


def synchronize(device: str) -> None:
    """ wait for the device, so that a clock read next measures work that is done """
    if device != 'cpu':
        torch.accelerator.synchronize()


def device_name(device: str) -> str:
    """ what the hardware calls itself, 'cpu' for a CPU """
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """ dense peak in FLOP/s of the named device for products in dtype; None where it is not known for sure """
    table = {torch.bfloat16: PEAK_BF16, torch.float16: PEAK_FP16}.get(dtype, {})
    return next((peak * 1e12 for family, peak in table.items() if re.match(rf'{WHOLE}.*\b{family}\b', name)), None)


def peak_memory(device: str) -> int | None:
    """ most bytes in use so far, on the GPU or else by this process; None where the system does not tell """
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):   # Windows has none
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def try_compile(model: torch.nn.Module, run: Callable, **options) -> torch.nn.Module:
    """ torch.compile(model), proven by run(compiled), or the model itself and one warning line where that fails """
    compiled = torch.compile(model, **options)
    try:
        run(compiled)   # compilation happens at the first call
        return compiled
    except Exception as error:   # no C++ compiler, no Triton, an unsupported platform, ...
        print0(f"warning: torch.compile does not work here ({first_line(error)}), running eager")
        return model


# ---- processes

def start_processes(device: str, backend: str) -> tuple[int, int]:
    """ (rank, world_size), joined with what torchrun started; GPU tensors travel by backend, the CPU's by gloo """
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size == 1:
        return 0, 1
    if device == 'mps':
        fail("several processes need GPUs with CUDA or --device=cpu, mps is for one process")
    store, rank, _ = next(dist.rendezvous('env://'))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':   # torchrun keeps a crashed try's addresses (pytorch 135712)
        store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    backend = f'cpu:gloo,cuda:{backend}' if device.startswith('cuda') else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return gather(rank) and rank, world_size   # gather: nobody leaves, with its message, while others still connect


def gather(*numbers: float) -> list[list[float]]:
    """ for each argument the list of what every process passed, by rank; all must call it and all get the same """
    if not dist.is_initialized():
        return [[number] for number in numbers]
    rows = torch.zeros(dist.get_world_size(), len(numbers), dtype=torch.float64)
    rows[dist.get_rank()] = torch.tensor(numbers, dtype=torch.float64)
    try:
        dist.all_reduce(rows)
    except RuntimeError as error:   # the other one has said why, if it could
        raise SystemExit(f"process {dist.get_rank()} ends, it lost another one ({first_line(error)})") from None
    return rows.T.tolist()


# ---- files

@contextlib.contextmanager
def atomic_write(path: str, previous: str = '') -> Iterator[IO[bytes]]:
    """ a file that stands under path, whole, when the block ends, or path stays; previous keeps what stood there """
    if os.path.exists(path := os.path.realpath(path)) and not os.path.isfile(path):   # through a link, not over it
        raise OSError(f"{path} is not a file")
    try:
        with open(temporary := f'{path}.tmp', 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous:
            with contextlib.suppress(OSError):   # nothing was there, or path is a link to another disk
                os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if os.name == 'posix':   # the new name itself must reach the disk too
        os.fsync(folder := os.open(os.path.dirname(path), os.O_RDONLY))
        os.close(folder)

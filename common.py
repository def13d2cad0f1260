""" Run-time set-up that scripts share: device, dtype, autocast, random state, signals, atomic files, peak FLOPS. """
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import IO

import torch

# dense tensor-core peak in TFLOP/s, NVIDIA's data sheets without the factor of two for sparsity. The first entry found
# as whole words in the device's name counts, so the variants of a family stand before the family.
PEAK_BF16 = {
    'GB200': 2500, 'B200': 2250, 'H200 NVL': 835, 'H200': 989, 'H100 NVL': 835, 'H100 PCIe': 756, 'H100': 989,
    'A100': 312, 'L40S': 362, 'L4': 121, 'A10': 125, 'RTX 4090': 165.2, 'RTX 3090': 71,
}
PEAK_FP16 = {**PEAK_BF16, 'V100S': 130, 'V100-PCIE': 112, 'V100': 125, 'T4': 65}   # the last four have no bfloat16
NOT_THE_WHOLE_CARD = r'\b(MIG|Laptop|Max-Q|Ti|D)\b'   # same family name, another peak

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ---- output

def print0(*values) -> None:
    """ print on rank 0 only, without waiting for the buffer to fill; a reader that has gone does not end the run """
    if os.environ.get('RANK', '0') == '0':
        try:
            print(*values, flush=True)
        except OSError:   # a closed pipe or terminal
            sys.stdout = open(os.devnull, 'w')


def fail(message: str) -> None:
    """ end the script on a user's mistake: one line on stderr, exit code 1 """
    sys.stdout.flush()
    raise SystemExit(f"error: {message}")


def require(config: dict, least: int, *keys: str) -> None:
    """ SystemExit if one of these settings is smaller than it may be """
    for key in keys:
        if config[key] < least:
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
    """ 'auto' is cuda, then mps, then cpu; any other name is returned as it is, or SystemExit if it does not work """
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:   # an AssertionError where torch was built without CUDA
        fail(f"--device={device} cannot be used here ({first_line(error)}); try --device=auto")
    return device


def has_bfloat16(device_type: str) -> bool:
    """ whether the hardware multiplies bfloat16 matrices itself; emulation, as on T4 and most CPUs, is slow """
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private, but the only names that PyTorch 2.10 to 2.13 all have
    return device_type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_dtype(dtype: str, device_type: str) -> torch.dtype:
    """ 'auto' is bfloat16 where the hardware has it, else float16 on CUDA, else float32; SystemExit if unknown """
    if dtype == 'auto':
        dtype = 'bfloat16' if has_bfloat16(device_type) else 'float16' if device_type == 'cuda' else 'float32'
    if dtype not in DTYPES:
        fail(f"--dtype={dtype} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def autocast(device_type: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """ matrix products in dtype, sensitive operations in float32; nothing to do for float32 """
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


def synchronize(device: str) -> None:
    """ wait for the device, so that a clock read next measures work that is done """
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()


def device_name(device: str) -> str:
    """ what the hardware calls itself, 'cpu' for a CPU """
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """ dense peak in FLOP/s of the named device for products in dtype; None where it is not known for sure """
    table = {torch.bfloat16: PEAK_BF16, torch.float16: PEAK_FP16}.get(dtype, {})
    if re.search(NOT_THE_WHOLE_CARD, name):
        return None
    return next((peak * 1e12 for family, peak in table.items() if re.search(rf'\b{family}\b', name)), None)


def rng_state(device: str) -> dict:
    """ the generators that dropout draws from, as plain tensors """
    state = {'cpu': torch.get_rng_state()}
    if device.startswith('cuda'):
        state['cuda'] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: str) -> None:
    """ continue with the random numbers after rng_state(); a device that has no saved state keeps its own """
    torch.set_rng_state(state['cpu'])
    if device.startswith('cuda') and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'], device)


def try_compile(model: torch.nn.Module, run: Callable, device: str, **options) -> torch.nn.Module:
    """ torch.compile(model), proven by run(compiled), or the model itself and one warning line where that fails """
    state, compiled = rng_state(device), torch.compile(model, **options)
    try:
        run(compiled)   # compilation happens at the first call
        return compiled
    except Exception as error:   # no C++ compiler, no Triton, an unsupported platform, ...
        print0(f"warning: torch.compile does not work here ({first_line(error)}), running eager")
        return model
    finally:
        set_rng_state(state, device)


# ---- faults

class StopSignals:
    """ SIGINT, SIGTERM and SIGHUP ask to stop: .received is the first one's number, a second one kills at once """

    def __init__(self) -> None:
        self.received = 0
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, 'SIGHUP', None)   # Windows has none, and nohup wants it ignored
        if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:
            self._numbers.append(hang_up)
        for number in self._numbers:
            signal.signal(number, self._receive)

    def _receive(self, number, frame) -> None:
        self.received = number
        for each in self._numbers:
            signal.signal(each, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        line = f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """ a binary file to write; its content stands under path, whole, when the block ends, or path stays as it was """
    path = os.path.realpath(path)   # through a link, not over it
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if os.name == 'posix':   # the new name itself must reach the disk too
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

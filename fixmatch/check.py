"""What a machine has and can do, for `fixmatch check`: each section is a function of a configuration that finds it out.

A section returns what it found as plain values for JSON, and the same in one line for people.
"""

import dataclasses
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import paddle
import psutil

from fixmatch.config import Config
from fixmatch.inputs import build_loader, read_inputs
from fixmatch.models.layers import set_cpu_kernels
from fixmatch.monitor import Monitor
from fixmatch.runfolder import provenance
from fixmatch.runtime import peak_memory, physical_cores, processor, select_device
from fixmatch.selfcheck import SelfCheck
from fixmatch.trainer import Trainer
from fixmatch.version import versions

STEPS = 3  # that are timed, after one in which kernels are compiled and chosen
_WRITTEN = 64  # MB, to time the disk
_GB, _MB = 2**30, 2**20
Found = tuple[dict, str]


def sections(config: Config) -> Iterator[tuple[str, dict, str]]:
    """(name, facts, line) of every section, one after the other as they are found.

    A section that cannot be found out has the facts {"error": why}. Raises ValueError where runtime.device is not here.
    """
    device = select_device(config.runtime.device, config.runtime.deterministic)
    for name, find in (("versions", _versions), ("device", _device), ("memory", _memory), ("kernels", _kernels),
                       ("threads", _threads), ("disk", _disk), ("self-check", _self_check), ("steps", _steps)):
        try:
            yield name, *find(config, device)
        except Exception as error:  # whatever it is, it belongs into the report, and so does what follows
            why = " ".join(f"{type(error).__name__}: {error}".split())
            yield name, {"error": why}, f"failed: {why}"


def _versions(config: Config, device: str) -> Found:
    about = provenance()
    found = {"fixmatch": about["versions"]["fixmatch"], "commit": about["commit"], "paddle build": about["build"],
             "platform": about["platform"], "interpreter": sys.executable, **versions()}
    return found, ", ".join(f"{name} {value}" for name, value in found.items() if value)


def _device(config: Config, device: str) -> Found:
    if not device.startswith("gpu"):
        return {"device": device, "processor": processor()}, f"{device}: {processor()} ({platform.machine()})"
    gpu, count = paddle.device.cuda.get_device_properties(device), paddle.device.cuda.device_count()
    found = {"device": device, "processor": gpu.name, "count": count, "compute_capability": f"{gpu.major}.{gpu.minor}",
             "cudnn": paddle.version.cudnn()}
    return found, (f"{device} of {count}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, cuDNN "
                   f"{paddle.version.cudnn()}")


def _memory(config: Config, device: str) -> Found:
    host = psutil.virtual_memory()
    found = {"total_gb": round(host.total / _GB, 1), "available_gb": round(host.available / _GB, 1)}
    line = f"{found['total_gb']} GB, {found['available_gb']} GB of it available"
    if device.startswith("gpu"):
        found["gpu_total_gb"] = round(paddle.device.cuda.get_device_properties(device).total_memory / _GB, 1)
        line += f"; {found['gpu_total_gb']} GB on the GPU"
    return found, line


def _kernels(config: Config, device: str) -> Found:
    """Sets them too, as a run would."""
    if device != "cpu":
        return {"kernels": "Paddle's own"}, f"Paddle's own, since the device is {device}"
    reason = set_cpu_kernels(config.runtime.cpu_kernels)
    return {"kernels": reason}, reason


def _threads(config: Config, device: str) -> Found:
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "physical_cores": physical_cores(),
             "logical_cores": os.cpu_count(), "data_threads": config.runtime.data_threads,
             "MKL_DEBUG_CPU_TYPE": os.environ.get("MKL_DEBUG_CPU_TYPE")}
    return found, ", ".join(f"{name.replace('_cores', ' cores').replace('data_', 'data ')} {value}"
                            for name, value in found.items() if value)


def _disk(config: Config, device: str) -> Found:
    """Of the folder in which the run folder lies or would be made; what is written there is removed again."""
    folder = pathlib.Path(config.run.dir).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    block = np.random.default_rng(0).bytes(_MB)  # which no file system can compress
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_WRITTEN):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    found = {"folder": str(folder), "free_gb": round(shutil.disk_usage(folder).free / _GB, 1),
             "write_mb_per_second": round(_WRITTEN / seconds)}
    return found, f"{folder}: {found['free_gb']} GB free, writes {found['write_mb_per_second']} MB/s"


def _self_check(config: Config, device: str) -> Found:
    check = SelfCheck(config)
    try:
        found = check.result()
    finally:
        check.close()
    remembered = " (remembered)" if found.get("cached") else ""
    return found, f"{found['verdict']}{remembered}"


def _steps(config: Config, device: str) -> Found:
    """Trains the first steps of the run on its own data, and keeps nothing of it."""
    total = 1 + STEPS
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=total, eval_every=total),
                                ssl=dataclasses.replace(config.ssl, supervised_steps=0))  # those take less time
    inputs = read_inputs(short, resume=False, rank=0, world_size=1)
    loader = build_loader(short, inputs.source, inputs.split)
    trainer = Trainer(short, inputs.source, loader, Monitor(None, short), None, inputs.manifest)
    ends: list[float] = []

    def note() -> None:
        if device != "cpu":
            paddle.device.synchronize()
        ends.append(time.perf_counter())

    trainer.on_step = note
    if not trainer.fit():
        raise KeyboardInterrupt
    seconds = statistics.median(np.diff(ends))
    images, all_images = short.images(0, 1), config.images(0, config.train.total_steps)
    peak = peak_memory() if device == "cpu" else paddle.device.cuda.max_memory_allocated()
    hours = seconds * all_images / images / 3600
    found = {"steps": STEPS, "images_per_second": round(images / seconds, 1), "seconds_per_step": round(seconds, 4),
             "peak_memory_mb": round(peak / _MB), "total_steps": config.train.total_steps,
             "estimated_hours": round(hours, 3)}
    return found, (f"{STEPS} of {config.run.name}: {images / seconds:,.0f} images/s, peak memory {peak / _MB:,.0f} MB; "
                   f"estimate for its {config.train.total_steps:,} steps: {hours:,.{2 if hours < 10 else 0}f} hours, "
                   "evaluations not counted")

"""Speed, as ratios against named rivals that are measured in the same run.

    tools/bench.py data|step|self-check|all [--json FILE]

data: weak and strong views a second on one core, beside a per-image Pillow pipeline.
step: images a second of the whole FixMatch step, data included, beside stock Paddle and Torch.
self-check: seconds of the parity check before training, first run and remembered.

Rivals take turns, round after round, so that a change of the machine's speed meets all of them; medians count.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from fixmatch import process
from fixmatch.cli import Parser

SIZE = 32  # pixels
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NETWORKS = {"wideresnet": {"depth": 28, "width": 2}, "resnext": {"depth": 28, "width": 4, "cardinality": 4}}


def main(argv: list[str]) -> int:
    parser = Parser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "step", "self-check", "all"))
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seconds", type=float, default=20.0, help="of data (default: 20)")
    parser.add_argument("--arch", choices=tuple(NETWORKS), nargs="+", default=list(NETWORKS), help="of step")
    parser.add_argument("--threads", type=int, nargs="+", help="math threads of step (default: the physical cores)")
    parser.add_argument("--batch-size", type=int, default=8, help="B of step; mu is 7 (default: 8, 120 images)")
    parser.add_argument("--rounds", type=int, default=7, help="of step, one step a rival each (default: 7)")
    parser.add_argument("--depth", type=int, help="of step's networks (default: the published one)")
    parser.add_argument("--rivals", choices=RIVALS, nargs="+", default=list(RIVALS), help="of step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the name of a rival: this process runs its steps
    args = parser.parse_args(argv)
    if args.worker:
        return _work(args.worker, _config(args.arch[0], args.depth), args.batch_size)
    found = {"machine": _machine()}
    if args.what in ("data", "all"):
        found["data"] = bench_data(args.seconds)
    if args.what in ("step", "all"):
        found["step"] = bench_step(args)
    if args.what in ("self-check", "all"):
        found["self_check"] = bench_self_check()
    if args.json:
        from fixmatch.files import write_atomic

        write_atomic(args.json, json.dumps(found, indent=1) + "\n")
    return 0


def _machine() -> str:
    from fixmatch.runtime import physical_cores, processor

    machine = f"{processor()}, {physical_cores()} cores"
    print(machine)
    return machine


# The data engine


def bench_data(seconds: float) -> dict:
    """Measures for about `seconds`, five rounds at least; medians of rounds in which the two take turns.

    Returns:
        pairs_per_second_per_core: weak+strong uint8 pairs, plans drawn anew for each batch, one thread.
        pillow_pairs_per_second_per_core: normalized float32 pairs of a per-image pipeline, one thread.
        ratio_to_pillow: median of the rounds' ratios.
        threads: pairs a second by number of threads that share a batch of 3,584.
        first_batch_seconds: in a new process with nothing compiled before.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    images = _smooth_images(rng, 4096)
    batch = 448  # unlabeled images a step: mu = 7, B = 64
    _pairs(images, rng, batch)  # compile
    rounds, threads = [], {1: [], 2: [], 4: []}
    deadline = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < deadline:
        rounds.append((_rate(lambda: _pairs(images, rng, batch), batch, repeat=30),
                       _rate(lambda: _pillow_pairs(images[:200]), 200, repeat=1)))
        for n, rates in threads.items():
            rates.append(_threaded_rate(images, rng, 8 * batch, n))
    found = {
        "pairs_per_second_per_core": round(statistics.median(ours for ours, _ in rounds)),
        "pillow_pairs_per_second_per_core": round(statistics.median(pillow for _, pillow in rounds)),
        "ratio_to_pillow": round(statistics.median(ours / pillow for ours, pillow in rounds), 1),
        "threads": {n: round(statistics.median(rates)) for n, rates in threads.items()},
        "first_batch_seconds": round(_first_batch_seconds(), 2),
    }
    print(f"data: {found['pairs_per_second_per_core']:,} weak+strong pairs/s on one core, Pillow pipeline "
          f"{found['pillow_pairs_per_second_per_core']:,}: {found['ratio_to_pillow']} times; by threads "
          f"{found['threads']}; first batch with a cold cache {found['first_batch_seconds']} s")
    return found


def _rate(work, pairs: int, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return repeat * pairs / (time.perf_counter() - start)


def _smooth_images(rng, count: int):
    """uint8 [count, SIZE, SIZE, 3], smooth as photographs are, with full-range histograms."""
    import numpy as np

    y, x = np.mgrid[:SIZE, :SIZE]
    phase = rng.random((count, 1, 1, 3)) * 6
    waves = np.sin(x[:, :, None] / 5 + phase) * np.cos(y[:, :, None] / 7 - phase)
    return np.clip(127 + 90 * waves + rng.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)


def _pairs(images, rng, count: int):
    from fixmatch.data.augment import views

    return views.weak_and_strong(images, rng.integers(len(images), size=count), views.draw(rng, count, SIZE))


def _threaded_rate(images, rng, count: int, threads: int) -> float:
    import numpy as np

    from fixmatch.data.augment import views

    def share(pool):
        index, plan = rng.integers(len(images), size=count), views.draw(rng, count, SIZE)
        bounds = np.linspace(0, count, threads + 1).astype(int)
        list(pool.map(lambda part: views.weak_and_strong(images, index[part], plan.take(part)),
                      [slice(a, b) for a, b in itertools.pairwise(bounds)]))

    with ThreadPoolExecutor(threads) as pool:
        return _rate(lambda: share(pool), count, repeat=6)


def _first_batch_seconds() -> float:
    code = ("import time, numpy as np\nfrom fixmatch.data.augment import views\nrng = np.random.default_rng(0)\n"
            "images = np.zeros((8, 32, 32, 3), np.uint8)\nstart = time.perf_counter()\n"
            "views.weak_and_strong(images, np.arange(8), views.draw(rng, 8, 32))\nprint(time.perf_counter() - start)")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**process.environment(), "NUMBA_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment,  # noqa: S603
                              capture_output=True, text=True, check=True)
    return float(done.stdout)


# The rival: the per-image pipeline as it is usually written, Pillow operations drawn by `random`, ToTensor, Normalize.


def _pillow_operations():
    from PIL import Image, ImageEnhance, ImageOps

    def enhance(kind):
        return lambda img, v: kind(img).enhance(v * 0.09 + 0.05)

    def signed(v):
        return -v if random.random() < 0.5 else v

    def affine(matrix):
        return lambda img, v: img.transform(img.size, Image.Transform.AFFINE, matrix(signed(v * 0.03)))

    return (
        lambda img, v: ImageOps.autocontrast(img),
        enhance(ImageEnhance.Brightness),
        enhance(ImageEnhance.Color),
        enhance(ImageEnhance.Contrast),
        lambda img, v: ImageOps.equalize(img),
        lambda img, v: img,
        lambda img, v: ImageOps.posterize(img, int(v * 0.4) + 4),
        lambda img, v: img.rotate(signed(3 * v)),
        enhance(ImageEnhance.Sharpness),
        affine(lambda v: (1, v, 0, 0, 1, 0)),
        affine(lambda v: (1, 0, 0, v, 1, 0)),
        lambda img, v: ImageOps.solarize(img, 256 - int(v * 25.6)),
        affine(lambda v: (1, 0, int(v * SIZE), 0, 1, 0)),
        affine(lambda v: (1, 0, 0, 0, 1, int(v * SIZE))),
    )


def _pillow_weak(image):
    import numpy as np
    from PIL import Image

    img = Image.fromarray(image)
    if random.random() < 0.5:
        img = img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    img = Image.fromarray(np.pad(np.asarray(img), ((4, 4), (4, 4), (0, 0)), mode="reflect"))
    left, top = random.randint(0, 8), random.randint(0, 8)
    return img.crop((left, top, left + SIZE, top + SIZE))


def _pillow_strong(image, operations):
    from PIL import ImageDraw

    img = _pillow_weak(image)
    for operation in random.choices(operations, k=2):
        v = random.randint(1, 9)
        if random.random() < 0.5:
            img = operation(img, v)
    x0, y0 = (int(max(0, random.uniform(0, SIZE) - 8)) for _ in range(2))
    img = img.copy()
    ImageDraw.Draw(img).rectangle((x0, y0, min(SIZE, x0 + 16), min(SIZE, y0 + 16)), (127, 127, 127))
    return img


def _pillow_pairs(images):
    import numpy as np

    operations = _pillow_operations()
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))

    def tensor(img):
        return (np.asarray(img).transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std

    pairs = [(tensor(_pillow_weak(image)), tensor(_pillow_strong(image, operations))) for image in images]
    return np.stack([weak for weak, _ in pairs]), np.stack([strong for _, strong in pairs])


# The training step. Every rival is a process of its own: math libraries read their settings when they load.

OURS = "ours"
RIVALS = (OURS, "paddle tuned", "paddle default", "torch", "torch channels_last", "torch compile")


def bench_step(args) -> dict:
    """Images a second of the FixMatch step (B labeled, mu = 7, loader included) by network, threads and rival.

    Returns the figures of the first network and number of threads at the top, all of them under "table".
    """
    from fixmatch.runtime import physical_cores

    table = [_race(args, arch, n) for arch in args.arch for n in args.threads or [physical_cores()]]
    first = table[0]["rivals"]
    ours = first[OURS]["images_per_second"]
    return {"images_per_second": ours, "overhead_percent": first[OURS]["overhead_percent"],
            **{f"ratio_to_{name.replace(' ', '_')}": round(ours / first[name]["images_per_second"], 2)
               for name in RIVALS[1:] if name in first}, "table": table}


def _race(args, arch: str, threads: int) -> dict:
    names = [OURS, *(name for name in args.rivals if name != OURS)]
    workers, racing = {}, {}
    try:
        for name in names:  # one after the other, since their first steps take two cores each
            workers[name] = _Worker(name, arch, args.depth, threads, args.batch_size)
            if workers[name].ready():
                racing[name] = workers[name]
        seconds = {name: [] for name in racing}
        for _ in range(args.rounds):
            for name, worker in racing.items():
                seconds[name].append(worker.step()["seconds"])
        facts = {name: worker.finish() for name, worker in racing.items()}
    finally:
        for worker in workers.values():
            worker.close()
    images = args.batch_size * 15
    found = {}
    for name, times in seconds.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds[OURS], times, strict=True))
        found[name] = {"images_per_second": round(images / statistics.median(times), 1),
                       "ours_over_it": round(ratio, 2), **facts[name]}
    print(f"\n{_config(arch, args.depth).model}\n{threads} thread{'s' * (threads > 1)}, {images} images a step, "
          f"{args.rounds} rounds")
    print(f"{'':<22}{'images/s':>10}{'ours / it':>12}{'peak memory':>14}{'overhead':>10}")
    for name, row in found.items():
        overhead = f"{row['overhead_percent']:.1f} %" if "overhead_percent" in row else ""
        print(f"{name:<22}{row['images_per_second']:>10}{row['ours_over_it']:>12}{row['peak_mb']:>11} MB{overhead:>10}")
    for name in names:
        if name not in found:
            print(f"{name:<22}does not run here: {workers[name].said}")
    return {"arch": arch, "threads": threads, "batch_size": args.batch_size, "rivals": found}


class _Worker:
    """A rival in its own process, which does one step for each line that it is sent."""

    def __init__(self, name: str, arch: str, depth: int | None, threads: int, batch_size: int):
        unset = ("MKL_DEBUG_CPU_TYPE", "OMP_NUM_THREADS")
        environment = {k: v for k, v in process.environment().items() if k not in unset}
        if name == "paddle default":
            environment |= {"OMP_NUM_THREADS": "1", "MKL_DEBUG_CPU_TYPE": ""}  # what Paddle does by itself
        else:
            environment |= {"OMP_NUM_THREADS": str(threads)}
        self.said = ""
        command = [sys.executable, "-W", "ignore", "-m", "parity.bench", "step", "--worker", name, "--arch", arch,
                   "--batch-size", str(batch_size), *(["--depth", str(depth)] if depth else [])]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE,  # noqa: S603
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self) -> bool:
        """Whether it has made its first steps."""
        answer = self._read()
        if answer is None:
            said = self.process.stderr.read().strip().splitlines()
            self.said = said[-1] if said else f"exit code {self.process.wait()}"
        return answer is not None

    def step(self) -> dict:
        return self._ask("step")

    def finish(self) -> dict:
        return self._ask("finish")

    def _ask(self, word: str) -> dict:
        print(word, file=self.process.stdin, flush=True)
        answer = self._read()
        if answer is None:
            raise RuntimeError(f"a rival ended: {self.process.stderr.read()}")
        return answer

    def _read(self) -> dict | None:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _work(name: str, config, batch_size: int) -> int:
    from fixmatch.runtime import peak_memory

    step, facts = (_torch_step if name.startswith("torch") else _paddle_step)(name, config, batch_size)
    for _ in range(3):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "finish":
            print(json.dumps({"peak_mb": peak_memory() // 2**20, **facts()}), flush=True)
            break
        started = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    return 0


def _config(arch: str, depth: int | None):
    from fixmatch.config import Config, ModelConfig

    return Config(model=ModelConfig(arch, **NETWORKS[arch] | ({"depth": depth} if depth else {})))


def _batches(batch_size: int):
    """The trainer's own loader on made-up images: every rival gets its data from it."""
    import numpy as np

    from fixmatch.data.dataset import Dataset
    from fixmatch.data.loader import Loader
    from fixmatch.data.split import draw_split

    rng = np.random.default_rng(0)
    data = Dataset(_smooth_images(rng, 2000), np.arange(2000) % 10)
    split = draw_split(data.labels, 10, 40, 0)
    return Loader(data, split, batch_size, 7, 0, flip=True).batches(0, 10**6)


def _paddle_step(name: str, config, batch_size: int):
    from fixmatch import step as algorithm
    from fixmatch.models.layers import set_cpu_kernels
    from fixmatch.monitor import Monitor

    set_cpu_kernels("on" if name == OURS else "off")
    batches = _batches(batch_size)
    state = algorithm.build_state(config, 10, MEAN, STD)
    folder = pathlib.Path(tempfile.mkdtemp())
    monitor = Monitor(folder, config)
    spent = {"step": 0.0, "rest": 0.0}
    for owner, method in ((state.optimizer, "step"), (state.optimizer, "clear_grad"), (state.ema, "update")):
        setattr(owner, method, _timed(getattr(owner, method), spent))
    record, take, count = _timed(monitor.record, spent), _timed(lambda: next(batches), spent), itertools.count(1)

    def step():
        started = time.perf_counter()
        batch = take()
        losses = algorithm.train_step(state, batch, config.ssl)
        number = next(count)
        if number > 1:  # the first also opens files and compiles
            record(number, losses, batch, 0.03, 0.0)
        else:
            spent["rest"] = 0.0
            return
        spent["step"] += time.perf_counter() - started

    def facts():
        shutil.rmtree(folder)
        return {"overhead_percent": round(100 * spent["rest"] / spent["step"], 2)}

    return step, facts


def _timed(function, spent: dict):
    def timed(*args):
        started = time.perf_counter()
        result = function(*args)
        spent["rest"] += time.perf_counter() - started
        return result
    return timed


def _torch_step(name: str, config, batch_size: int):
    import torch

    from parity import mirror
    from parity.mirror import step as algorithm

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    batches = _batches(batch_size)
    state = algorithm.build_state(config, 10, MEAN, STD)
    if name == "torch channels_last":
        state.model.to(memory_format=torch.channels_last)
        normalize = state.normalize
        state.normalize = lambda images: normalize(images).contiguous(memory_format=torch.channels_last)
    elif name == "torch compile":
        mirror.load_compiler()
        state.model.compile()
    return lambda: algorithm.train_step(state, next(batches), config.ssl).loss.item(), dict


# The self-check


def bench_self_check() -> dict:
    """Seconds that a WRN-28-2 run waits for its self-check: the first time, and when the verdict is remembered."""
    from fixmatch.config import Config
    from fixmatch.selfcheck import SelfCheck

    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            cold, cached = (_self_check_seconds(SelfCheck, Config()) for _ in range(2))
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
    print(f"self-check of a WRN-28-2: {cold:.1f} s, remembered {cached:.3f} s")
    return {"cold_seconds": round(cold, 2), "cached_seconds": round(cached, 4)}


def _self_check_seconds(check, config) -> float:
    started = time.perf_counter()
    running = check(config)
    try:
        found = running.result()
    finally:
        running.close()
    if not found["passed"]:
        raise SystemExit(found["verdict"])
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

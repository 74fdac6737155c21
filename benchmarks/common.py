"""What the benchmarks share: contestants in processes of their own, held-out evaluation by one code, and the tables.

A contestant is a process. Its peak memory is measured from outside; it leaves the seconds and the work of each
optimiser step in a file. Nothing here imports rlhfkit or trl at the top: the rival may run under another Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
# What our runs do on CPUs (rlhfkit/runtime/allocator.py): glibc keeps freed memory. It helps the rival, too.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(64 * 2**20)}


@dataclass
class Result:
    """What one contestant did."""

    name: str
    settings: str
    seconds: list[float]  # of each optimiser step
    work: list[int]  # of each
    peak_memory_gib: float  # of its whole process, loading and saving included
    wall_seconds: float
    before: float  # the held-out figure
    after: float

    def rate(self, warm_up: int) -> float:
        """Work per second, the first steps left out."""
        return sum(self.work[warm_up:]) / sum(self.seconds[warm_up:])

    def seconds_per_step(self, warm_up: int) -> float:
        steady = self.seconds[warm_up:]
        return sum(steady) / len(steady)


# -- contestants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One stage against one rival.

    ``rivals`` and ``ours`` name the contestants, and what is not their default: keyword arguments of the rival's
    configuration (``rows`` being its micro-batch and ``env`` its environment), and flags of our command.
    """

    script: str
    stage: str
    package: tuple[str, str]  # the rival's, and the version that was measured
    rivals: Mapping[str, dict[str, Any]]
    ours: Mapping[str, list[str]]
    unit: str  # of work
    figure: str  # the held-out one
    prepare: Callable[[argparse.Namespace], dict[str, Any]]  # writes the rows; returns facts about them
    train_rival: Callable[[str, Job], dict[str, Any]]  # in its own process; returns seconds and work of each step
    held_out: Callable[[Job], float]  # in its own process


def compete(bench: Benchmark, parser: argparse.ArgumentParser) -> None:
    """Run every contestant, evaluate what each has trained, and report."""
    args = parser.parse_args()
    if args.contestant:
        job: Job = json.loads(args.job.read_text())
        evaluates = args.contestant == "evaluate"
        found = {"value": bench.held_out(job)} if evaluates else bench.train_rival(args.contestant, job)
        Path(job["result"]).write_text(json.dumps(found))
        return
    names = args.only or [*bench.rivals, *bench.ours]
    if unknown := set(names) - {*bench.rivals, *bench.ours}:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: there are {', '.join([*bench.rivals, *bench.ours])}")
    facts: dict[str, Any] = {}
    if set(names) & set(bench.rivals):
        facts[bench.package[0]] = refuse_if_absent(args.rival_python, *bench.package)
    args.out.mkdir(parents=True, exist_ok=True)
    facts["machine"] = machine()
    print(facts["machine"])
    facts |= bench.prepare(args)
    start = facts.pop("start", args.model)
    before = evaluate(bench, args, start, "before")
    results = []
    for name in names:
        out = args.out / name
        shutil.rmtree(out, ignore_errors=True)
        if name in bench.ours:
            command = [
                sys.executable, "-m", "rlhfkit", bench.stage, "--model", str(start),
                "--data", str(args.out / "train.jsonl"), "--out", str(out), "--batch-size", str(args.batch_size),
                "--max-length", str(args.max_length), "--lr", str(args.lr), "--scheduler", "linear",
                "--warmup-ratio", "0", "--seed", str(args.seed), "--save-every", "0", "--trackers", "none",
                *bench.ours[name],
            ]  # fmt: skip
            wall, peak = run_measured(command, args.out / f"{name}.log")
            seconds, work = steps_of_run(out), facts["work"]
            model, settings = out / "final", " ".join(bench.ours[name])
        else:
            done = own_process(args, bench, name, start, bench.rivals[name].get("env", {}))
            seconds, work, wall, peak, model = done["seconds"], done["work"], done["wall"], done["peak"], out
            settings = ", ".join(f"{k}={v}" for k, v in bench.rivals[name].items() if k != "env")
            settings += ", freed memory kept" if "env" in bench.rivals[name] else ""
        results.append(Result(name, settings, seconds, work, peak, wall, before, evaluate(bench, args, model, name)))
        print(f"{name}: {results[-1].rate(args.warm_up):.3g} {bench.unit} / s, {peak:.2f} GiB", flush=True)
        shutil.rmtree(out)
    report(results, args, bench, facts)


def evaluate(bench: Benchmark, args: argparse.Namespace, model: str | Path, name: str) -> float:
    value = float(own_process(args, bench, "evaluate", model)["value"])
    print(f"{name}: {bench.figure} {value:.4f}", flush=True)
    return value


def own_process(
    args: argparse.Namespace, bench: Benchmark, name: str, model: str | Path, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a benchmark's script for one contestant; returns what it found, and what it took."""
    result, path = args.out / f"{name}.json", args.out / f"{name}.job.json"
    job = {"model": str(model), "rows": str(args.out), "out": str(args.out / name), "result": str(result)}
    path.write_text(json.dumps(job | {k: getattr(args, k) for k in ("batch_size", "max_length", "lr", "seed")}))
    python = sys.executable if name == "evaluate" else args.rival_python  # one and the same code evaluates
    given = ["--model", str(model), "--data", "-", "--contestant", name, "--job", str(path)]
    wall, peak = run_measured([python, bench.script, *given], args.out / f"{name}.log", env)
    return {"wall": wall, "peak": peak, **json.loads(result.read_text())}


def run_measured(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Run a command to its end; returns its seconds and its peak memory in GiB.

    Raises:
        SystemExit: it failed; the end of its log is shown.
    """
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}; the end of {log}:\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit / 2**30


def steps_of_run(out: Path) -> list[float]:
    """Seconds of each step of one of our runs, as it recorded them."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "event" not in line]


def step_clock() -> Any:
    """A transformers callback that notes the seconds from the end of one optimiser step to the end of the next."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    return StepClock()


def refuse_if_absent(python: str, package: str, wanted: str) -> str:
    """The version of a rival's package under another Python.

    Raises:
        SystemExit: it is not there.
    """
    code = f"import importlib.metadata as m; print(m.version('{package}'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"{python} has no {package}: pip install {package}=={wanted}, in an environment of its own if it disturbs, "
            "and name that environment's Python with --rival-python"
        )
    if (found := done.stdout.strip()) != wanted:
        print(f"note: {package} {found} stands in for {wanted}", file=sys.stderr)
    return found


# -- rows --------------------------------------------------------------------------------------------------------------


def draw(groups: Sequence[Sequence[Any]], count: int, seed: int) -> list[Any]:
    """``count`` rows, the same number of each group, shuffled."""
    shuffled = [random.Random(seed).sample(list(group), len(group)) for group in groups]
    turns = [row for turn in zip(*shuffled, strict=False) for row in turn][:count]
    if len(turns) < count:
        raise SystemExit(f"the data give {len(turns)} rows that fit, {count} are wanted")
    random.Random(seed + 1).shuffle(turns)
    return turns


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# -- the command line --------------------------------------------------------------------------------------------------


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, options with their defaults."""


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", action="append", required=True, help="rows; repeat it for each file")
    parser.add_argument("--out", type=Path, default=Path(defaults["out"]), help="folder for runs, logs and result.json")
    parser.add_argument("--rows", type=int, default=defaults["rows"], help="training rows: one epoch is trained")
    parser.add_argument("--eval-rows", type=int, default=defaults["eval_rows"], help="held-out rows")
    parser.add_argument("--batch-size", type=int, default=defaults["batch_size"], help="rows per optimiser step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=defaults["lr"])
    parser.add_argument("--warm-up", type=int, default=1, help="first steps that are not timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rival-python", default=sys.executable, help="Python that has the rival installed")
    parser.add_argument("--only", action="append", default=[], help="these contestants alone; repeatable")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # inside a contestant's own process
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    cpu, flags = platform.processor(), ""
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(": ", 1)[1] for line in info.splitlines() if line.startswith("model name"))
        flags = next(line for line in info.splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        pass
    packages = {}
    for name in ("torch", "transformers", "accelerate", "rlhfkit"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": [f for f in ("amx_bf16", "avx512_bf16") if f in flags.split()],
        "gflops": matmul_gflops(),
        "packages": packages,
    }


def matmul_gflops(size: int = 2048) -> dict[str, float]:
    """Speed of a square matrix product in both number formats: what no contestant can beat."""
    import torch

    found = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        a @ b
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - started)
        found[name] = round(2 * size**3 / min(seconds) / 1e9)
    return found


# -- the tables --------------------------------------------------------------------------------------------------------


def report(results: list[Result], args: argparse.Namespace, bench: Benchmark, facts: Mapping[str, Any]) -> None:
    """Print the tables, and write them and all figures to ``--out``."""
    warm_up, unit, figure = args.warm_up, bench.unit, bench.figure
    lines = [
        f"| contestant | settings | s / step | {unit} / s | peak memory (GiB) | {figure} before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.settings} | {r.seconds_per_step(warm_up):.1f} | {r.rate(warm_up):.3g} | "
        f"{r.peak_memory_gib:.2f} | {r.before:.4f} | {r.after:.4f} |"
        for r in results
    ]
    ours = [r for r in results if r.name in bench.ours]
    rivals = [r for r in results if r.name in bench.rivals]
    if ours and rivals:
        lines += ["", f"| {unit} / s, and memory, against | " + " | ".join(r.name for r in ours) + " |"]
        lines += ["|---|" + "---|" * len(ours)]
        for rival in rivals:
            cells = [
                f"{r.rate(warm_up) / rival.rate(warm_up):.2f} times, {r.peak_memory_gib / rival.peak_memory_gib:.2f}"
                for r in ours
            ]
            lines.append(f"| {rival.name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    print(table)
    (args.out / "result.md").write_text(table + "\n", encoding="utf-8")
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("contestant", "job")}
    found = {"options": given, **facts, "results": [asdict(r) for r in results]}
    (args.out / "result.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""What each recipe of ds_configs/ takes on this machine: memory, time by part, the largest model that fits.

    dsllama offload --config c.yaml      each in a process of its own, on one rank -> a table, a chart, a JSON file

`needs` is the closed form of what a run takes; the table has it beside what was measured.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dsllama import console
from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import DEFAULT_VOCABULARY, Derived, derive
from dsllama.errors import Problem, UserError
from dsllama.machine import available_memory, peak_memory_gib
from dsllama.sizes import readable_bytes

Json = dict[str, Any]
RECIPES = Path(__file__).resolve().parent.parent / "ds_configs"
PARTS = ("compute", "copies", "cpu_adam", "nvme")
# Shapes to look through for the largest that fits, smallest first: GPT-2's and GPT-3's, the textbook's, Llama's.
_SHAPES = {
    "125M": (12, 768, 12), "350M": (24, 1024, 16), "760M": (24, 1536, 16), "1.3B": (24, 2048, 32),
    "2.7B": (32, 2560, 32), "7B": (32, 4096, 32), "13B": (40, 5120, 40), "33B": (60, 6656, 52), "65B": (80, 8192, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """Bytes that a rank takes: on its device, of its host's memory, and below nvme_path."""

    device: float
    host: float
    nvme: float


def needs(config: TrainingConfig, derived: Derived, ds_config: Json) -> Needs:
    """What a rank of a run takes beside its programs, in closed form: states, buffers, activations."""
    zero, parameters, share = ds_config["zero_optimization"], derived.parameters, 1 / derived.world_size
    stage, low = zero["stage"], 4 if config.precision == "fp32" else 2
    states, weights = (zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param"))
    found = {"none": _activations(config, derived, low), "cpu": 0.0, "nvme": 0.0}
    found[weights] += low * parameters * (share if stage == 3 else 1)
    # fp32 masters and two moments.
    found[states] += 12 * parameters * share
    found["nvme"] += 4 * parameters * share if states == "nvme" else 0  # and gradients, on their way to them
    largest = max(derived.vocab_size, derived.ffn_hidden) * config.n_embd
    bucket = zero["reduce_bucket_size"]
    if stage < 3:
        found["none"] += 4 * parameters * (share if stage == 2 else 1)  # fp32 sums of gradients
        found["none"] += low * (parameters if stage < 2 else 2 * bucket)
        if states != "none":
            found["cpu"] += 6 * parameters * share  # gradients for the optimizer, and the masters cast down again
    else:
        gradients = "none" if states == "none" else "cpu"
        group = min(zero.get("sub_group_size", 1e9), parameters) * share
        # Their fp32 sums; and what the optimizer is handed, of all or of the sub-group that has been swapped in.
        found[gradients] += 4 * parameters * share
        found[gradients] += 4 * (group if states == "nvme" else parameters * share)
        live = min(
            zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7), parameters
        )
        found["none"] += low * live + 4 * (bucket + largest)  # it sums gradients over the ranks in fp32
        if states == "nvme":
            found["cpu"] += 4 * zero["offload_optimizer"].get("buffer_count", 4) * max(group, largest * share)
        if weights == "nvme":
            section = zero["offload_param"]
            found["cpu"] += low * section.get("buffer_count", 5) * section["buffer_size"] + low * group
    return Needs(*found.values())


def lacking(config: TrainingConfig, derived: Derived, ds_config: Json, ranks_here: int) -> list[Problem]:
    """Whether this host has not the memory that a run takes of it (on a CPU all): the kernel would end it without a
    word."""
    from dsllama.training.engine import accelerator

    each, there = needs(config, derived, ds_config), available_memory()
    need = ranks_here * (each.host + (each.device if accelerator() == "cpu" else 0))
    if need <= there:
        return []
    rule = f"takes {readable_bytes(need)} of this host's memory, and {readable_bytes(there)} is available"
    remedy = "offload to a local NVMe disk (ds_configs/zero3_nvme.json), take a smaller one, or more hosts"
    return [Problem("the model", rule, remedy)]


def _activations(config: TrainingConfig, derived: Derived, low: int) -> float:
    """Bytes kept for the backward pass of a micro-batch: in a block two norms' inputs and outputs, q, k, v, attention's
    output twice, four of the feed-forward's width; logits, their fp32 copy, and its logarithm of softmax."""
    width, tokens = config.n_embd, config.batch_size * config.max_seq_len
    kv_width = (config.n_kv_heads or config.n_heads) * derived.head_size
    block = low * (7 * width + 2 * kv_width + 4 * derived.ffn_hidden)
    blocks = config.n_layers * low * width + block if config.activation_checkpointing else config.n_layers * block
    head = 2 * low * width + derived.vocab_size * (8 if low == 4 else low + 8)
    return float(tokens * (blocks + head))


# ---------------------------------------------------------------- the sweep


def sweep(
    config: TrainingConfig, recipes: Path = RECIPES, updates: int = 2, device_memory: float | None = None,
    out: Path = Path("offload"),
) -> int:  # fmt: skip
    """Measure every overlay of a folder; returns the exit code. device_memory: bytes that the device may take, and what
    "fits" means for it (default: all it has). Raises UserError."""
    problems = []
    files = [file for file in recipes.glob("*.json") if file.is_file()] if recipes.is_dir() else []
    if not files:
        rule = "has no overlay (*.json)" if recipes.is_dir() else "is no folder"
        problems.append(Problem("--recipes", rule, "give a folder such as ds_configs/", str(recipes)))
    if updates < 1:
        problems.append(Problem("--updates", "must be at least 1", "2 tell what an update takes", updates))
    if device_memory is not None and device_memory <= 0:
        problems.append(Problem("--device_memory", "must be more than 0", "leave it out for all", device_memory))
    if problems:
        raise UserError(problems)
    files.sort(key=lambda file: (b"offload_" in file.read_bytes(), file.name))
    from dsllama.training.engine import accelerator

    out.mkdir(parents=True, exist_ok=True)
    told: list[Json] = []
    for file in files:
        print(f"measuring    {file.stem}", file=sys.stderr, flush=True)
        settings = {**config.to_dict(), **dict.fromkeys(("zero_stage", "offload_optimizer", "offload_params"))}
        settings["deepspeed_overlay"] = str(file)
        try:  # what is wrong is known before a process is started
            other = TrainingConfig(**settings)
            deepspeed_config(other, derive(other, 1, other.vocab_size or DEFAULT_VOCABULARY), accelerator())
            answer = _apart(settings, updates, device_memory)
        except UserError as error:
            answer = {"error": _in_a_line(error)}
        told.append({"recipe": file.stem, **answer})
    (out / "offload.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    measured = [each for each in told if "error" not in each]
    print("\n".join(_report(told) if measured else [f"{each['recipe']}: {each['error']}" for each in told]))
    if measured:
        _draw(measured, out / "offload.png")
        print(f"\n{out / 'offload.png'} and {out / 'offload.json'} have it too")
    return 0 if measured else 1


def _apart(settings: Json, updates: int, device_memory: float | None) -> Json:
    """`measure` in a process of its own: {"error": why} where it came to nothing."""
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "asked.json", Path(place) / "answer.json"
        asked.write_text(json.dumps([settings, updates, device_memory]), encoding="utf-8")
        ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        command = [sys.executable, "-m", "dsllama.offload", str(asked), str(answer)]
        ended = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, stdout=sys.stderr, text=True, check=False
        )
        if answer.exists():
            found: Json = json.loads(answer.read_text(encoding="utf-8"))
            return found
    if ended.returncode < 0:
        return {"error": f"ended by signal {-ended.returncode}: the host's memory is short, most likely"}
    last = [line for line in ended.stderr.splitlines() if line.strip()][-1:]
    return {"error": (last or ["nothing was said"])[0].strip()[:300]}


def _report(told: list[Json]) -> list[str]:
    """The table, with what it needs to be read."""
    on_cpu = any(each.get("device") == "cpu" for each in told)
    head = ["process", "tensors", "formula"] if on_cpu else ["GPU", "formula", "host", "formula"]
    rows = [
        ["recipe", *head, "NVMe an update", "tokens/s", "update", *(part.replace("_", " ") for part in PARTS), "fits"]
    ]
    for each in told:
        if "error" in each:
            continue
        need, got = each["needs"], each["memory"]
        memory = [got["host"], _together(got), _together(need)] if on_cpu else [
            got["device"], need["device"], got["host"], need["host"],
        ]  # fmt: skip
        parts = [f"{100 * each['parts'][part] / each['seconds']:.0f} %" for part in PARTS]
        moved = readable_bytes(each["nvme_bytes"]) if each["nvme_bytes"] else "-"
        rows.append([
            each["recipe"], *map(readable_bytes, memory), moved, f"{each['tokens_per_second']:,.0f}",
            f"{each['seconds']:.3g} s", *parts, each["fits"],
        ])  # fmt: skip
    lines = list(console.table(rows))
    lines += [f"{each['recipe']}: {each['error']}" for each in told if "error" in each]
    lines += ["", "fits: the largest textbook-shaped model by the formula, with this batch, and what ends it"]
    if on_cpu:
        lines += [
            "memory: on a CPU the device's is the process's own, so GPU and host are one figure: the process's peak,",
            "  without its programs, and the tensors in it (the rest: scratch space, and free pieces between tensors)",
            "copies: on a CPU those between tensors, conversions among them",
        ]
    return lines


def _draw(told: list[Json], file: Path) -> None:
    """Bars by recipe: seconds of an update by part, and memory beside its formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 0.5 * len(told)), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    names, left = [each["recipe"] for each in told], [0.0] * len(told)
    for part in PARTS:
        seconds = [each["parts"][part] for each in told]
        time_axes.barh(names, seconds, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    on_cpu = told[0]["device"] == "cpu"
    for number, (what, get) in enumerate(
        {"measured": lambda each: each["memory"], "formula": lambda each: each["needs"]}.items()
    ):
        places = [position + 0.2 - 0.4 * number for position in range(len(told))]
        device = [0.0 if on_cpu else get(each)["device"] / 1e9 for each in told]
        host = [_together(get(each)) / 1e9 if on_cpu else get(each)["host"] / 1e9 for each in told]
        shade: Json = {"height": 0.4, "alpha": 1 - 0.5 * number}
        if not on_cpu:
            memory_axes.barh(places, device, color="C0", label=f"GPU, {what}", **shade)
        whose = "tensors" if on_cpu else "host"
        memory_axes.barh(places, host, left=device, color="C1", label=f"{whose}, {what}", **shade)
    time_axes.set_xlabel("seconds of an update")
    memory_axes.set_xlabel("GB")
    time_axes.invert_yaxis()
    for axes in (time_axes, memory_axes):
        axes.legend()
    figure.savefig(file)


def _together(memory: Json) -> float:
    """On a CPU, of what was measured or by formula."""
    return float(memory["tensors"] if "tensors" in memory else memory["device"] + memory["host"])


# ---------------------------------------------------------------- one recipe, in a process of its own


def measure(config: TrainingConfig, updates: int, device_memory: float | None) -> Json:
    """Train a few updates of random tokens on one rank, and say what they took. Raises UserError.

    An update is measured with two micro-steps at most: the others do what the first does.
    """
    import psutil
    import torch

    from dsllama.model import LLaMaTransformer
    from dsllama.training import engine as deepspeed_engine
    from dsllama.training import swap
    from dsllama.training.run import vocabulary_so_far

    vocab_size, _ = vocabulary_so_far(config)
    micro_steps = derive(config, 1, vocab_size).gradient_accumulation_steps
    made = min(micro_steps, 2)
    config = config.model_copy(
        update={"tokens_per_update": made * config.batch_size * config.max_seq_len, "vocab_size": vocab_size}
    )
    derived = derive(config, 1, vocab_size)
    ds_config = deepspeed_config(config, derived, deepspeed_engine.accelerator())
    problems = deepspeed_engine.unsupported_here(config, ds_config) + swap.problems(ds_config, derived.parameters, 1.0)
    problems += lacking(config, derived, ds_config, 1)
    if problems:
        raise UserError(problems)
    world = deepspeed_engine.start(0, 1)
    on_gpu = world.device.type == "cuda"
    if on_gpu and device_memory:
        fraction = min(device_memory / torch.cuda.get_device_properties(world.device).total_memory, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, world.device)
    programs = psutil.Process().memory_info().rss
    clock = _Clock(world.device)
    with swap.own_folder(swap.place_of(ds_config), world) as folder, clock.adam():
        engine, scheduler = deepspeed_engine.build(
            lambda: LLaMaTransformer(config, None, world.device), swap.placed(ds_config, folder)
        )
        shape = (config.batch_size, config.max_seq_len + 1)
        tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(world.device)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        took: list[dict[str, float]] = []
        for number in range(1, updates + 2):
            scheduler.step(number)
            began = clock.now()
            first: dict[str, float] = {}

            def after_the_first(began: Any = began, first: dict[str, float] = first) -> None:
                first.update(clock.since(began))

            deepspeed_engine.update(engine, lambda: batch, made, after_the_first)
            whole = clock.since(began)
            # The others of a real update do what the first does.
            took.append({part: whole[part] + (micro_steps - made) * first[part] for part in whole})
        took = took[1:]  # the first has what is done once
        memory = {
            "device": torch.cuda.max_memory_reserved(world.device) if on_gpu else 0,
            "host": peak_memory_gib(torch.device("cpu")) * 2**30 - programs,
        }
        copies, memory["tensors"] = clock.profiled(lambda: deepspeed_engine.update(engine, lambda: batch, made))
    average = {part: sum(each[part] for each in took) / len(took) for part in took[0]}
    seconds = average["seconds"]
    copied = min(copies * seconds, seconds - average["cpu_adam"] - average["nvme"])
    parts = {"copies": copied, "cpu_adam": average["cpu_adam"], "nvme": average["nvme"]}
    return {
        "device": world.device.type,
        "parameters": derived.parameters,
        "micro_steps": micro_steps,
        "seconds": seconds,
        "tokens_per_second": micro_steps * config.batch_size * config.max_seq_len / seconds,
        "parts": {"compute": seconds - sum(parts.values()), **parts},
        "nvme_bytes": average["bytes"],
        "memory": memory,
        "needs": dataclasses.asdict(needs(config, derived, ds_config)),
        "fits": _largest(config, ds_config, device_memory),
    }


def _largest(config: TrainingConfig, ds_config: Json, device_memory: float | None) -> str:
    """The largest of the known shapes that one device and this host have room for, and what ends there."""
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    host, nvme = available_memory(), 0.0
    if config.nvme_path and Path(config.nvme_path).exists():  # made by the recipes that need it
        nvme = float(shutil.disk_usage(config.nvme_path).free)
    device = float(torch.cuda.mem_get_info()[1]) if on_gpu else host
    device = min(device, device_memory or device)
    fits, ended_by = "none", ""
    for name, (layers, width, heads) in _SHAPES.items():
        shape = {"n_layers": layers, "n_embd": width, "n_heads": heads, "n_kv_heads": None}
        other = config.model_copy(update=shape)
        derived = derive(other, 1, config.vocab_size or 0)
        need = needs(other, derived, deepspeed_config(other, derived, "cuda" if on_gpu else "cpu"))
        if on_gpu:
            short = {"device": need.device > device, "host": need.host > host}
        else:
            short = {"memory": need.device + need.host > min(device, host)}
        short["nvme"] = need.nvme > nvme
        if any(short.values()):
            ended_by = " and ".join(where for where, is_short in short.items() if is_short)
            break
        fits = name
    return f"{fits} ({ended_by})" if ended_by else fits


class _Clock:
    """Seconds of an update by part, from when one was begun."""

    def __init__(self, device: Any) -> None:
        self.device, self.adam_seconds = device, 0.0

    def now(self) -> dict[str, float]:
        """Readings to be told apart from later ones; on a GPU when all that was asked of it is done."""
        import torch

        from dsllama.training.disk import moved

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {
            "seconds": time.perf_counter(), "cpu_adam": self.adam_seconds, "nvme": moved["seconds"],
            "bytes": moved["read"] + moved["written"],
        }  # fmt: skip

    def since(self, began: dict[str, float]) -> dict[str, float]:
        """What has passed since those readings."""
        return {name: value - began[name] for name, value in self.now().items()}

    @contextmanager
    def adam(self) -> Iterator[None]:
        """Count what AdamW on the host takes, meanwhile."""
        from torch.optim import AdamW

        step = AdamW.step

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return step(*arguments, **options)
            finally:
                self.adam_seconds += time.perf_counter() - began

        AdamW.step = timed
        try:
            yield
        finally:
            AdamW.step = step

    def profiled(self, work: Callable[[], Any]) -> tuple[float, int]:
        """The part of the time of `work` that copies between GPU and host take, or on a CPU between tensors; and on a
        CPU the bytes of all tensors at their most.

        On a GPU copies run beside computation, as far as that goes.
        """
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        tensors = 0 if on_gpu else _bytes_of_tensors()
        began = self.now()
        with profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu], profile_memory=not on_gpu
        ) as profiler:
            work()
            took = self.since(began)["seconds"]
        if on_gpu:
            copied = [
                e.self_device_time_total
                for e in profiler.key_averages()
                if e.key.startswith(("Memcpy HtoD", "Memcpy DtoH"))
            ]
        else:
            copied = [e.self_cpu_time_total for e in profiler.key_averages() if e.key == "aten::copy_"]
            # What is taken and given back, in the order of time.
            events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            events.sort(key=lambda e: e.start_ns())
            tensors += max(accumulate((e.nbytes() for e in events), initial=0))
        return float(sum(copied)) / 1e6 / took, tensors


def _bytes_of_tensors() -> int:
    """Of all that Python knows of, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def _in_a_line(error: UserError) -> str:
    return "; ".join(" ".join(str(problem).split()) for problem in error.problems)


def main(argv: list[str]) -> int:
    """`measure` as a process: what was asked in a file, the answer in another."""
    from dsllama.training.run import exit_process

    settings, updates, device_memory = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        answer = measure(TrainingConfig(**settings), updates, device_memory)
    except UserError as error:
        answer = {"error": _in_a_line(error)}
    Path(argv[1]).write_text(json.dumps(answer), encoding="utf-8")
    exit_process(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

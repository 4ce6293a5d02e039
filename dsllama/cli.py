"""`dsllama <verb>`: each verb is a thin layer over a function that a program can call as well."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dsllama import arguments, console
from dsllama.arguments import Parser, read_with
from dsllama.errors import EXIT_USER_ERROR, Problem, UserError, is_explained, of_system
from dsllama.machine import versions
from dsllama.paths import parse_path, parse_text
from dsllama.sizes import parse_count, parse_number, readable, readable_bytes, readable_duration

if TYPE_CHECKING:
    from dsllama.cluster.launch import Place
    from dsllama.config import TrainingConfig

Verb = Callable[..., int | None]  # the exit code, None for 0
_CHECKPOINT = "a checkpoint, or a folder of them (the newest)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code (2 for a mistake of the user's, said on one screen)."""
    console.settle()
    try:
        options = vars(_parser().parse_args(sys.argv[1:] if argv is None else argv))
        code = options.pop("verb")(**options)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not is_explained(error):
            raise
        print(UserError(of_system(error)) if isinstance(error, OSError) else error, file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if lost := console.lost():
        print(f"standard output could not be written ({lost})", file=sys.stderr)
    return code or int(bool(lost))


def _parser() -> Parser:
    """Every verb with its options, each called like the parameter that it becomes."""
    parser = Parser(prog="dsllama", description="Pretraining of Llama-style models with DeepSpeed.")
    parser.add_argument(
        "--version", action=_Versions, nargs=0, default=argparse.SUPPRESS, help="show what is installed, and exit"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def add(name: str, verb: Verb | None, text: str, verbs: Any = verbs, **more: Any) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, **more)
        sub.set_defaults(verb=verb)
        return sub

    def add_texts(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "inputs", type=_path, nargs="+", help="files or folders: .txt .jsonl .ndjson(.gz .zst) .parquet"
        )
        sub.add_argument("--text_field", default="text", help="field or column that holds the text")
        sub.add_argument("--on_error", choices=("stop", "skip"), default="stop", help="what to do with bad input")
        sub.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote")

    sub = add("quickstart", _quickstart, "from the standard library's text to a trained small Llama, in minutes")
    sub.add_argument("--dir", dest="folder", type=_path, default=Path("runs/quickstart"), help="where everything goes")
    sub.add_argument("--fresh", action="store_true", help="start the training anew; the earlier run is moved aside")
    sub.add_argument("--ranks", type=_count, default=None, help="processes (default: GPUs, or 2 on a CPU with 2 cores)")
    sub.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="settings of the run, such as n_layers=6")

    sub = add("corpus", _corpus, "gather the text that every CPython has into one JSONL file")
    sub.add_argument("--out", type=_path, required=True, help="folder to write")

    sub = add("tokenizer", _tokenizer, "train a byte-level BPE tokenizer on raw text")
    add_texts(sub)
    sub.add_argument("--out", type=_path, required=True, help="JSON file to write")
    sub.add_argument("--vocab_size", type=_count, default=8192, help="tokens, special ones included")

    sub = add("encode", _encode, "turn raw text into .npy token shards")
    add_texts(sub)
    sub.add_argument("--tokenizer", dest="tokenizer_path", type=_path, required=True, help="the tokenizer's JSON file")
    sub.add_argument("--out", dest="out_dir", type=_path, required=True, help="folder for the shards")
    sub.add_argument("--workers", type=_count, default=None, help="processes (default: one per core)")
    sub.add_argument("--shard_tokens", type=_count, default=100_000_000, help="tokens per shard")

    sub = add("config", _config, "check a configuration; print it, what follows from it, and the DeepSpeed JSON")
    sub.add_argument("--world_size", type=_count, default=1, help="ranks over all hosts")
    sub.add_argument("--only", choices=("all", "config", "deepspeed"), default="all", help="what to print")
    arguments.add_config_options(sub)

    sub = add("selftest", _selftest, "prove that a reduced model trains under these settings as plain PyTorch does")
    arguments.add_config_options(sub)

    sub = add("offload", _offload, "measure each recipe of ds_configs/ here: memory, time by part, the largest model")
    sub.add_argument("--recipes", type=_path, default=None, help="folder of overlays (default: ds_configs/)")
    sub.add_argument("--updates", type=_count, default=2, help="updates to measure of each")
    sub.add_argument("--device_memory", type=_count, default=None, help="bytes the GPU may take, such as 8G")
    sub.add_argument("--out", type=_path, default=Path("offload"), help="folder for the chart and the JSON file")
    arguments.add_config_options(sub)

    places = argparse.ArgumentParser(add_help=False)
    places.add_argument(
        "--hostfile", type=_path, default=None, help="NAME slots=N for each host (default: this machine)"
    )
    places.add_argument(
        "--include", default="", metavar="NAME:SLOT,...@NAME", help="only these hosts, or slots of them"
    )
    places.add_argument("--exclude", default="", metavar="NAME:SLOT,...@NAME", help="all but these")
    places.add_argument("--master_addr", default="", help="address of the first host (default: its first)")
    places.add_argument("--master_port", type=_count, default=None, help="port of the first host (default: 29500)")
    places.add_argument("--ssh_port", type=_count, default=None, help="of all hosts")

    sub = add("launch", _launch, "train: on this machine, or on the hosts of a hostfile", parents=[places])
    sub.add_argument("--processes", type=_count, default=None, help="on this machine (default: one for each GPU)")
    sub.add_argument("--dry_run", action="store_true", help="check, and print the command only")
    sub.add_argument("--no_check", action="store_true", help="do not ask the hosts before")
    sub.add_argument(
        "--max_restarts", type=_count, default=0, help="start it again so often, from the newest checkpoint"
    )
    sub.add_argument("--elastic", type=_count, metavar="MIN", help="go on with the hosts that answer, at least so many")
    arguments.add_config_options(sub)

    sub = add("doctor", _doctor, "what keeps these hosts from training together", parents=[places])
    sub.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    arguments.add_config_options(sub)

    sub = add("plot-schedule", _plot_schedule, "draw the three learning-rate schedules")
    sub.add_argument("--out", dest="path", type=_path, default=Path("schedules.png"), help="PNG file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    sub.add_argument("--training_steps", type=_count, default=100_000, help="updates")
    sub.add_argument("--warmup_steps", type=_count, default=1_000, help="updates of warmup")
    sub.add_argument("--max_lr", type=_number, default=1e-3, help="rate after warmup")
    sub.add_argument("--min_lr", type=_number, default=1e-4, help="rate at the end")

    sub = add("generate", _generate, "continue a prompt with any checkpoint")
    sub.add_argument("--checkpoint", type=_path, required=True, help=_CHECKPOINT)
    sub.add_argument("--prompt", dest="text", type=_text, required=True, help="text to continue")
    sub.add_argument("--max_new_tokens", type=_count, default=128, help="longest continuation")
    sub.add_argument("--temperature", type=_number, default=0.8, help="0 for greedy")
    sub.add_argument("--top_p", type=_number, default=0.95, help="nucleus")
    sub.add_argument("--seed", type=_count, help="for the same text again (default: another one each time)")

    sub = add("checkpoints", None, "what checkpoints there are, and whether they are whole")
    those = sub.add_subparsers(metavar="WHAT", required=True)
    for name, text in (
        ("list", "a line for each checkpoint, by its manifest and the sizes of its files"),
        ("verify", "read everything; exit code 1 if anything is not as it was saved"),
    ):
        sub = add(name, partial(_show_checkpoints, read=name == "verify"), text, those)
        sub.add_argument("path", type=_path, help="a folder of checkpoints, or one checkpoint")
        sub.add_argument("--json", dest="as_json", action="store_true", help="for programs")

    sub = add("account", _account, "where the wall clock of a run went, over all its starts")
    sub.add_argument("path", type=_path, help="the run's folder of checkpoints")
    sub.add_argument("--json", dest="as_json", action="store_true", help="for programs")

    sub = add("status", _status, "how a run goes, or has ended, and where each of its ranks is")
    sub.add_argument("path", type=_path, help="the run's folder of checkpoints, or the one that holds it")
    sub.add_argument("--watch", action="store_true", help="show it anew every two seconds, until the run has ended")
    sub.add_argument("--json", dest="as_json", action="store_true", help="for programs")

    sub = add("prune", _prune_checkpoints, "remove old checkpoints; never the only whole one", those)
    sub.add_argument("path", type=_path, help="a folder of checkpoints that no run is using")
    sub.add_argument("--keep_last", type=_count, required=True, help="keep so many of the newest")
    sub.add_argument("--keep_every", type=_count, default=None, help="of the older ones, one in so many tokens")
    sub.add_argument("--keep_best", type=_count, default=0, help="of the older ones, those of lowest validation loss")
    sub.add_argument("--keep_weights", action="store_true", help="of the others, remove the optimizer's state only")
    sub.add_argument("--damaged", action="store_true", help="read them all, and remove damaged ones too")
    sub.add_argument("--dry_run", action="store_true", help="only say what would be removed")
    sub.add_argument("--json", dest="as_json", action="store_true", help="for programs")

    sub = add("export", _export, "write a checkpoint in the Hugging Face layout")
    sub.add_argument("--checkpoint", type=_path, required=True, help=_CHECKPOINT)
    sub.add_argument("--out", type=_path, required=True, help="folder to write")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    sub.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")
    return parser


class _Versions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        parser.exit()


def _as_path(text: str) -> Path:
    return Path(parse_path(text, any_bytes=True))


def _as_finite(text: str) -> float:
    number = parse_number(text)
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


_count, _number, _path, _text = map(read_with, (parse_count, _as_finite, _as_path, parse_text))


# Each verb imports what it needs: torch takes seconds, which a mistake, or `--help`, should not cost.


def _quickstart(**options: Any) -> int:
    from dsllama.quickstart import quickstart

    return quickstart(**options)


def _corpus(out: Path) -> None:
    from dsllama.data.corpus import gather_stdlib_corpus

    print(gather_stdlib_corpus(out))


def _tokenizer(out: Path, vocab_size: int, **options: Any) -> None:
    from dsllama.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(out=out, vocab_size=vocab_size, **options)
    print(f"{out}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < vocab_size:
        print(f"the text gave no more merges than that ({vocab_size:,} were asked for)")


def _encode(out_dir: Path, **options: Any) -> None:
    from dsllama.data.encode import encode

    manifest = encode(out_dir=out_dir, **options)
    skipped = "".join(f", {count:,} skipped ({kind})" for kind, count in manifest.skipped.items() if count)
    print(f"{out_dir}: {manifest.summary()} of {manifest.dtype}{skipped}")


def _config(world_size: int, only: str, **fields: Any) -> None:
    import yaml

    from dsllama.deepspeed_config import deepspeed_config, engine_lines
    from dsllama.derived import derive
    from dsllama.training.engine import accelerator
    from dsllama.training.run import vocabulary_so_far

    config = arguments.config_from(argparse.Namespace(**fields))
    vocab_size, assumed = vocabulary_so_far(config)
    note = [f"             the vocabulary is assumed: there is no {config.tokenizer_path} yet"] if assumed else []
    derived = derive(config, world_size, vocab_size)
    ds_json = deepspeed_config(config, derived, accelerator())
    if only == "all":
        model, *rest = derived.lines(config)
        print("\n".join([model, *note, *rest, *engine_lines(config, ds_json)]) + "\n")
    if only != "deepspeed":
        print(yaml.safe_dump(config.to_dict(), sort_keys=False))
    if only != "config":
        print(json.dumps(ds_json, indent=1))


def _selftest(**fields: Any) -> int:
    from dsllama import selftest
    from dsllama.training.run import exit_process

    exit_process(selftest.test(arguments.config_from(argparse.Namespace(**fields))))


def _offload(recipes: Path | None, updates: int, device_memory: int | None, out: Path, **fields: Any) -> int:
    from dsllama import offload

    config = arguments.config_from(argparse.Namespace(**fields))
    return offload.sweep(config, recipes or offload.RECIPES, updates, device_memory, out)


def _launch(
    dry_run: bool, no_check: bool, processes: int | None, max_restarts: int, elastic: int | None, **options: Any
) -> int:
    from dsllama.cluster.supervisor import Restarts, Supervisor
    from dsllama.training.run import vocabulary_so_far

    place, words, config = _place(options, processes)
    assert config is not None
    if elastic is not None and place.hostfile is None:
        raise UserError(Problem("--elastic", "needs several hosts", "give --hostfile", elastic))
    restarts = Restarts(max_restarts, elastic, asks=not no_check)
    supervisor = Supervisor(place, words, config, vocabulary_so_far(config)[0], restarts)
    if dry_run:
        print("starting     " + shlex.join(supervisor.command(supervisor.first_hosts())))
        return 0
    return supervisor.run()


def _doctor(as_json: bool, **options: Any) -> int:
    from dsllama.cluster import doctor

    given = any(options[name] is not None for name in ("config",)) or any(
        name in options for name in arguments.TrainingConfig.model_fields
    )
    place, words, config = _place(options, wanted=given)
    found = doctor.examine(place, place.hosts(), words, config)
    print(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(found.lines()))
    return int(bool(found.problems))


def _place(
    options: dict[str, Any], processes: int | None = None, wanted: bool = True
) -> tuple[Place, list[str], TrainingConfig | None]:
    """(where to train, the training's words, its configuration) of a command line; without the last two if no
    configuration is wanted. Raises UserError with what is wrong with any of it."""
    from dsllama.cluster.launch import Place, training_words

    names = ("hostfile", "include", "exclude", "master_addr", "master_port", "ssh_port")
    place = Place(processes=processes, **{name: options.pop(name) for name in names})
    if not wanted:
        return place, [], None
    words = training_words(options["config"], options)
    problems: list[Problem] = []
    for check in (place.hosts, partial(arguments.config_from, argparse.Namespace(**options))):
        try:
            found = check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return place, words, cast("TrainingConfig", found)


def _plot_schedule(**options: Any) -> None:
    from dsllama.training.reporting import plot_schedules

    print(plot_schedules(**options))


def _generate(checkpoint: Path, **options: Any) -> None:
    from dsllama.inference import load_model

    print(load_model(checkpoint).generate(**options))


def _show_checkpoints(path: Path, as_json: bool, read: bool) -> int:
    from dsllama.checkpoint.catalog import checkpoints_at, summary

    told = [summary(each, read) for each in checkpoints_at(path)]
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(console.table([_words_for(each, read) for each in told])) or f"no checkpoints in {path}")
    return int(read and any(each["problems"] for each in told))


def _account(path: Path, as_json: bool) -> None:
    from dsllama.training import account

    starts = account.read(path)
    seconds = account.total(starts)
    told = {"goodput": account.goodput(seconds), "seconds": seconds, "starts": [vars(start) for start in starts]}
    print(json.dumps(told, indent=1) if as_json else "\n".join(account.tables(starts)))


def _status(path: Path, as_json: bool, watch: bool) -> None:
    from dsllama.cluster import status

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            status.watch(path)
        return
    told = status.of(path)
    print(json.dumps(told, indent=1) if as_json else "\n".join(status.lines(told)))


def _prune_checkpoints(path: Path, as_json: bool, dry_run: bool, damaged: bool, **kept: Any) -> None:
    from dsllama.checkpoint.retention import Policy, prune

    problems = [
        Problem(f"--{name}", f"must be at least {low}", "the newest whole one always stays", kept[name])
        for name, low in {"keep_last": 1, "keep_every": 1, "keep_best": 0}.items()
        if kept[name] is not None and kept[name] < low
    ]
    if problems:
        raise UserError(problems)
    policy = Policy(**{name.removeprefix("keep_"): value for name, value in kept.items()})
    told = prune(path, policy, damaged, dry_run, warn=partial(print, file=sys.stderr))
    if as_json:
        print(json.dumps(told, indent=1))
        return
    would = "would be " if dry_run else ""
    said = {"removed": f"{would}removed", "weights": f"{would}left with weights only", "kept": "kept"}
    said["damaged"] = f"damaged, {would}removed" if damaged else "damaged, and left (see --damaged)"
    print("\n".join(f"{said[what]:12} {', '.join(names)}" for what, names in told.items() if names))


def _words_for(told: dict[str, Any], read: bool) -> list[str]:
    """A checkpoint as a row of words."""
    from dsllama.checkpoint.catalog import topology

    name = Path(told["path"]).name
    if "tokens" not in told:
        return [name, "", "", "", "", "", "", "damaged: " + "; ".join(told["problems"])]
    losses = [f"loss {told['loss']:.4f}"] if told["loss"] is not None else []
    losses += [f"val {told['validation_loss']:.4f}"] if told["validation_loss"] is not None else []
    whole = {"weights": "weights only", "deepspeed": "whole, DeepSpeed's own files"}.get(told["state"], "whole")
    return [
        name,
        f"{readable(told['tokens'])} tokens",
        ", ".join(losses),
        f"{readable_duration(told['age_seconds'])} ago" if told["age_seconds"] is not None else "",
        topology(told["topology"]),
        readable_bytes(told["bytes"]),
        ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in told["health"].items() if count),
        "damaged: " + "; ".join(told["problems"]) if told["problems"] else whole + (", all of it read" if read else ""),
    ]


def _export(**options: Any) -> None:
    from dsllama.inference import export_checkpoint

    print(f"{export_checkpoint(**options)}: load it with transformers' AutoModelForCausalLM and AutoTokenizer")


if __name__ == "__main__":
    sys.exit(main())

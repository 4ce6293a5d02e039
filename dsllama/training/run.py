"""What `deepspeed launch/train.py` runs on every rank: check everything, then train.

    command line -> TrainingConfig -> data, tokenizer, checkpoint, DeepSpeed JSON -> Job -> Trainer -> summary

Nothing distributed happens before all of it has been checked, so a mistake costs seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsllama import arguments, console
from dsllama.checkpoint.retention import LOCK, tidy
from dsllama.cluster import environment
from dsllama.cluster.liveness import EXIT_STOPPED, OWN_END_SECONDS, Hub, Link, say
from dsllama.config import TrainingConfig
from dsllama.data.loader import DatasetLoader
from dsllama.data.manifest import Manifest
from dsllama.data.stream import TokenStream
from dsllama.data.tokenizer import Tokenizer
from dsllama.errors import EXIT_USER_ERROR, Problem, UserError, of_system, remedy_for
from dsllama.locks import Hold, hold
from dsllama.machine import versions
from dsllama.sizes import readable
from dsllama.training import account as accounts
from dsllama.training.account import Account
from dsllama.training.reporting import log_problem
from dsllama.training.stopping import EXIT_FAILED, StopRequest, command

if TYPE_CHECKING:  # importing it for real takes seconds, which a mistake should not cost
    from dsllama.training.engine import World
    from dsllama.training.trainer import Job

logger = logging.getLogger("dsllama")
# The launcher kills the other ranks as soon as one has left; the main rank needs this long to say why.
_LET_MAIN_SPEAK_SECONDS = 6.0
_SIZES = "Sizes may be written 524288, 2**19, 512K (x 1024) or 45e9."


def main(argv: Sequence[str], stop: StopRequest | None = None) -> int:
    """Train as the command line says; returns the exit code (0, 1 failed, 2 a mistake, 75 stopped and saved).

    stop: what has listened for signals since the process began.
    """
    from dsllama.cluster import join
    from dsllama.training import engine

    account = Account(stop.first_process() if stop is not None else None)
    console.settle()
    try:
        environment.adopt(os.environ)
    except UserError as error:  # the same of all
        return complain("" if environment.number(os.environ) else str(error), 0, EXIT_USER_ERROR)
    rank, world_size = engine.world_from_environment()
    # Other packages' own words only from warnings upward: distutils, for one, prints its compiler commands.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dsllama").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    holds: dict[str, Hold] = {}
    with StopRequest() if stop is None else stop as stop:  # one without a wish is false
        stop.at_the_end = account.close
        try:
            config = parse(argv, "deepspeed launch/train.py", "Pretrain a Llama-style model.", _SIZES)
            job = prepare(config, rank, world_size, holds)
            return _train(job, rank, world_size, holds.get("ckpt_dir"), stop, account)
        except UserError as error:
            # The same on every rank, or, where data turn out bad on the way, of the one that reads them.
            told = str(error)
            if world_size > 1 and stop.liveness is None and join.leave(rank, world_size, told):
                told = ""
            return complain(told, rank, EXIT_USER_ERROR, stop.liveness)
        except Exception:
            stop.mourn()  # most errors amid a collective are the death of another rank
            text = f"{traceback.format_exc()}training stopped by this error of rank {rank} on {socket.gethostname()}"
            return complain(f"{text}. {stop.last_words()}", rank, EXIT_FAILED, stop.liveness)
        finally:
            account.close("failed")
            if stop.liveness is not None:
                stop.liveness.leave()
            for each in reversed(holds.values()):
                each.release()


def _take(config: TrainingConfig, holds: dict[str, Hold], problems: list[Problem]) -> None:
    """Hold what a run has for itself alone, on the first rank: its log, and its checkpoints' folder."""
    log_file = Path(config.log_file)
    with _collecting(problems):
        other, lock = "give this run another --log_file", log_file.with_name(f".{log_file.name}.lock")
        holds["log_file"] = hold(lock, "log_file", config.log_file, other)
    with _collecting(problems):
        other = "wait for that run, or give this one another --ckpt_dir"
        holds["ckpt_dir"] = hold(Path(config.ckpt_dir) / LOCK, "ckpt_dir", config.ckpt_dir, other)


def _train(job: Job, rank: int, world_size: int, ckpt_dir: Hold | None, stop: StopRequest, account: Account) -> int:
    # Only now: torch's distributed and DeepSpeed's engine take seconds to import.
    from dsllama import selftest
    from dsllama.training import engine, swap
    from dsllama.training.trainer import Trainer, TrainingFailed

    hub = Hub(world_size, account.progress, job.config.stuck_after, job.config.stuck_timeout) if rank == 0 else None
    if hub is not None:
        hub.interrupt = stop.ask
        hub.own_time = 3.0 if job.parallel_layout["zero_stage"] < 3 else 0.0

    def met(offer: str) -> None:
        tie = hub or Link(rank, world_size, offer, account.progress, job.config.stuck_after)
        tie.on_end, tie.last_words = stop.end, lambda: stop.last_words()
        stop.liveness = tie

    world = engine.start(rank, world_size, hub.offer if hub is not None else "", met)
    stop.siblings = world.siblings()
    job = _as_the_first_rank(job, world)
    finished = job.resume_from
    if finished is not None and finished.update >= job.derived.updates:
        world.say(
            f"nothing is left to train: {finished.path} has {finished.update} of {job.derived.updates} updates; "
            "more --training_tokens go on from it"
        )
        return 0
    if world.is_main:
        print("\n".join(_head(job)), flush=True)
    world.ask_main(_make_notes, job, account, hub)
    stop.phase("during the self-test")
    earlier = job.resume_from.manifest.get("self_test") if job.resume_from else None
    with account.part("self-test"):
        verdict, told = selftest.of_run(job.config, job.derived, job.ds_config, world, earlier)
    world.say(told)
    if verdict["result"] == "failed":
        return complain("", rank, EXIT_FAILED, stop.liveness)
    job = dataclasses.replace(job, self_test=verdict)
    stop.phase("while the engine was built")
    with swap.own_folder(swap.place_of(job.ds_config), world) as folder:
        try:
            if folder and world.local_rank == 0:
                share = engine.local_size() / world_size
                print(swap.pace(folder, swap.traffic(job.ds_config, job.derived.parameters, share)), flush=True)
            trainer = Trainer(job, world, stop, ckpt_dir, swap.placed(job.ds_config, folder), account)
            if hub is not None:
                hub.describe = trainer.status
            stopped_by = trainer.run()
        except TrainingFailed as error:
            # Every rank has come to the same, so one says it.
            return complain(f"training stopped: {error}" if world.is_main else "", rank, EXIT_FAILED, stop.liveness)
    # The launcher ends the others as soon as one has left; the first one still has to say how it went.
    stop.siblings = {}
    account.close(f"stopped by {stopped_by}" if stopped_by else "finished")
    if world.is_main:
        print("\n".join(accounts.summary(Path(job.config.ckpt_dir))), flush=True)
    world.tell(None)
    return EXIT_STOPPED if stopped_by else 0


def _as_the_first_rank(job: Job, world: World) -> Job:
    """The job with the checkpoints that the first rank has chosen. Collective. Raises UserError on every rank."""
    from dsllama.checkpoint.catalog import Checkpoint, with_first_whole
    from dsllama.training import checkpoint as checkpoints

    def finished(source: Checkpoint) -> Checkpoint:
        if source.update >= job.derived.updates:  # nobody is going to load it
            checkpoints.insist_on_whole_files(source, world)
        return source

    chosen, init_from = world.tell((job.resume_from, job.init_from))
    instead = functools.partial(world.ask_main, checkpoints.next_whole, job)
    chosen = chosen and with_first_whole(chosen, finished, instead)
    position = chosen.manifest["data"] if chosen else {**job.loader.state_dict(), "consumed_samples": 0}
    job.loader.load_state_dict(position)
    return dataclasses.replace(job, resume_from=chosen, init_from=init_from)


def _make_notes(job: Job, account: Account, hub: Hub) -> None:
    """Clear up in ckpt_dir, note what is started, and keep account of it from now on. Raises UserError."""
    from dsllama.training.health import SKIPPED_SAMPLES
    from dsllama.training.trainer import run_files

    ckpt_dir = Path(job.config.ckpt_dir)
    for left in tidy(ckpt_dir, logger.warning):
        print(f"removed      {left}, which a save or a removal that was cut short had left", flush=True)
    try:
        if job.resume_from is None:
            (ckpt_dir / SKIPPED_SAMPLES).unlink(missing_ok=True)  # of a run whose checkpoints are gone
        folder = note_start(ckpt_dir, run_files(job))
    except OSError as error:
        raise UserError(of_system(error)) from None
    account.keep(folder)
    hub.keep(folder)


def note_start(ckpt_dir: Path, files: dict[str, str]) -> Path:
    """Keep what a run was started with in ckpt_dir/starts, in a folder that is new each time; returns it."""
    starts = ckpt_dir / "starts"
    starts.mkdir(exist_ok=True)
    number = max((int(p.name) for p in starts.iterdir() if p.name.isdecimal()), default=0) + 1
    folder = starts / f"{number:04d}"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def exit_process(code: int) -> NoReturn:
    """End the process with everything flushed and nothing torn down: DeepSpeed's threads now and then abort an
    interpreter that shuts down in order (SIGABRT after clean work)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(config: TrainingConfig, rank: int, world_size: int, holds: dict[str, Hold]) -> Job:
    """Check everything that a run needs and open it. Raises one UserError with all that is wrong.

    holds: where the first rank keeps what it takes for the run alone, by the names of fields.
    """
    from dsllama import offload
    from dsllama.checkpoint.catalog import open_checkpoint
    from dsllama.deepspeed_config import deepspeed_config
    from dsllama.derived import DEFAULT_VOCABULARY, derive
    from dsllama.model import vocabulary
    from dsllama.training import checkpoint as checkpoints
    from dsllama.training import engine, saving, swap
    from dsllama.training.trainer import Job, parallel_layout

    problems: list[Problem] = []
    tokenizer = data = derived = ds_json = resume_from = init_from = None
    vocab_size = config.vocab_size or DEFAULT_VOCABULARY
    with _collecting(problems):
        tokenizer = Tokenizer.load(config.tokenizer_path)
        problems += _encoded_otherwise(config, tokenizer.fingerprint)
        vocab_size = vocabulary(config, tokenizer.vocab_size)
    with _collecting(problems):
        data = _open_data(config, rank, world_size, tokenizer.vocab_size if tokenizer else None)
    with _collecting(problems):
        problems += filter(None, [log_problem(Path(config.log_file))])
        folders = {"ckpt_dir": Path(config.ckpt_dir), "log_file": Path(config.log_file).parent}
        folders |= {"tensorboard_dir": Path(config.tensorboard_dir)} if config.tensorboard_dir else {}
        unwritable = _unwritable(folders)
        problems += unwritable
        if rank == 0 and not unwritable:
            _take(config, holds, problems)
    with _collecting(problems):
        resume_from = checkpoints.choose(config)
    with _collecting(problems):
        derived = derive(config, world_size, vocab_size)
        ds_json = deepspeed_config(config, derived, engine.accelerator())
        problems += engine.unsupported_here(config, ds_json)
        if engine.local_rank() == 0:
            problems += swap.problems(ds_json, derived.parameters, engine.local_size() / world_size)
            problems += offload.lacking(config, derived, ds_json, engine.local_size())
        needed = saving.expected_bytes(derived.parameters, config.checkpoint_format)
        if lacking := saving.space_problem(Path(config.ckpt_dir), needed):
            problems.append(Problem("ckpt_dir", lacking, "free some space, or give another place", config.ckpt_dir))
    if resume_from is not None and data is not None:
        with _collecting(problems):
            data[0].load_state_dict(resume_from.manifest["data"])
    if resume_from is not None and ds_json is not None:
        problems += checkpoints.incompatibilities(
            resume_from, config, parallel_layout(config, ds_json, world_size), vocab_size
        )
    if resume_from is None and config.init_from is not None:
        with _collecting(problems):
            init_from = open_checkpoint(config.init_from, logger.warning)
            problems += checkpoints.misfits(init_from, config, vocab_size, tokenizer)
    if problems:
        raise UserError(problems)
    assert derived is not None and ds_json is not None and tokenizer is not None and data is not None
    return Job(config, derived, ds_json, tokenizer, *data, resume_from, init_from)


def _open_data(
    config: TrainingConfig, rank: int, world_size: int, vocab_size: int | None
) -> tuple[DatasetLoader, DatasetLoader | None]:
    """The loader of the training part, and of the held-out part where there is one."""
    from dsllama.training.engine import accelerator, local_rank

    stream, held_out = TokenStream(config.dataset_dir, vocab_size), config.validation_tokens
    device = f"cuda:{local_rank()}" if accelerator() == "cuda" else "cpu"
    shape = config.batch_size, config.max_seq_len, rank, world_size, stream, device
    opened = functools.partial(DatasetLoader, *shape, seed=config.seed, validation_tokens=held_out)
    train = opened(shuffle=config.shuffle, tokens_per_update=config.tokens_per_update)
    return train, opened(split="validation") if held_out else None


def _unwritable(folders: dict[str, Path]) -> list[Problem]:
    """The folders, made where they are missing, that nothing can be written to: better known now than at the end."""
    problems = []
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            problems.append(Problem(name, "needs a folder where a file is", "give another place", str(folder)))
        except OSError as error:
            rule = f"is in a folder that cannot be made ({error.strerror})"
            problems.append(Problem(name, rule, remedy_for(error, "give another place"), str(folder)))
        else:
            if not os.access(folder, os.W_OK):
                rule = "is in a folder that cannot be written to"
                problems.append(Problem(name, rule, "give another place, or change its permissions", str(folder)))
    return problems


def _encoded_otherwise(config: TrainingConfig, fingerprint: str) -> list[Problem]:
    """Whether the data set's manifest names another tokenizer: its ids would mean other words."""
    manifest = Manifest.load(Path(config.dataset_dir))
    if manifest is None or manifest.tokenizer == fingerprint:
        return []
    rule = f"is not the tokenizer that encoded {config.dataset_dir}"
    remedy = "use that one, or run `dsllama encode` again with this one"
    return [Problem("tokenizer_path", rule, remedy, config.tokenizer_path)]


def vocabulary_so_far(config: TrainingConfig) -> tuple[int, bool]:
    """(`vocabulary`, and whether it is only assumed) where the tokenizer need not be there yet."""
    from dsllama.derived import DEFAULT_VOCABULARY
    from dsllama.model import vocabulary

    if Path(config.tokenizer_path).exists():
        return vocabulary(config, Tokenizer.load(config.tokenizer_path).vocab_size), False
    return config.vocab_size or DEFAULT_VOCABULARY, config.vocab_size is None


@contextlib.contextmanager
def _collecting(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems += error.problems
    except OSError as error:
        problems.append(of_system(error))


def parse(argv: Sequence[str], prog: str, description: str, epilog: str = "") -> TrainingConfig:
    """The configuration of a command line that DeepSpeed's launcher starts; the rest is for its help."""
    parser = arguments.Parser(prog=prog, description=description, epilog=epilog)
    arguments.add_config_options(parser)
    # DeepSpeed's launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return arguments.config_from(parser.parse_args(argv))


def complain(text: str, rank: int, code: int, liveness: Hub | Link | None = None) -> int:
    """Say what has ended this rank; returns the exit code."""
    text = f"rank {rank}: {text}" if text and rank else text
    if liveness is not None:  # the first rank says it for all, and all end
        liveness.end(text, code, OWN_END_SECONDS)
        return code
    if rank != 0:
        # Where the main rank has the same to say, the launcher ends this one meanwhile; else this one says it.
        time.sleep(_LET_MAIN_SPEAK_SECONDS)
    say(text, code)
    return code


def _head(job: Job) -> list[str]:
    """What a run says before it begins."""
    from dsllama.deepspeed_config import engine_lines
    from dsllama.training.checkpoint import resumption_lines

    lines = [
        *job.derived.lines(job.config),
        *engine_lines(job.config, job.ds_config),
        "versions     " + ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"data         {job.config.dataset_dir}: {readable(job.loader.stream.tokens)} tokens",
    ]
    if job.resume_from is not None:
        lines += resumption_lines(job.resume_from, job.config, job.parallel_layout)
    elif (source := job.init_from) is not None:
        taken = f"{source.path}: update {source.update}, {readable(source.tokens)} tokens"
        lines.append(f"weights      {taken}; optimizer, schedule and data begin anew")
    return lines


if __name__ == "__main__":
    command()

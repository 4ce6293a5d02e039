"""The training loop: batch, forward, backward, step, report.

    schedule the rate -> accumulate over micro-steps -> one all-reduce of the loss -> report
                      -> evaluate, sample, save where it is time -> stop where it is asked

Everything that decides when something happens is a function of the update, so a resumed run does the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml

from dsllama.checkpoint.catalog import Checkpoint, list_checkpoints, older_whole, timestamp, update_of, with_first_whole
from dsllama.checkpoint.retention import Policy, Retention
from dsllama.config import TrainingConfig
from dsllama.data.loader import DatasetLoader
from dsllama.data.tokenizer import Tokenizer
from dsllama.derived import Derived
from dsllama.errors import UserError
from dsllama.locks import Hold
from dsllama.machine import peak_memory_gib, peak_tflops, versions
from dsllama.model import IGNORE_INDEX, LLaMaTransformer
from dsllama.sizes import readable, readable_duration
from dsllama.training import checkpoint as checkpoints
from dsllama.training import engine as deepspeed_engine
from dsllama.training.account import Account
from dsllama.training.engine import World
from dsllama.training.health import SKIPPED_SAMPLES, Health, Trouble, differing_replicas, note_skipped, read_skipped
from dsllama.training.reporting import Report, Row, perplexity
from dsllama.training.saving import Saved, Saver, expected_bytes
from dsllama.training.stopping import StopRequest

logger = logging.getLogger("dsllama")
_LONG_UPDATE_SECONDS = 10.0
_ADVICE = "A lower --max_lr, more --warmup_iterations or --gradient_clipping 1.0 usually helps."


class TrainingFailed(Exception):
    """The run cannot go on through no mistake in its configuration (a loss that is not finite, a full disk)."""


@dataclass(frozen=True)
class Job:
    """Everything that was checked before the process group was joined."""

    config: TrainingConfig
    derived: Derived
    ds_config: dict[str, Any]
    tokenizer: Tokenizer
    loader: DatasetLoader
    validation: DatasetLoader | None
    resume_from: Checkpoint | None
    init_from: Checkpoint | None = None
    self_test: dict[str, Any] | None = None

    @property
    def parallel_layout(self) -> dict[str, Any]:
        return parallel_layout(self.config, self.ds_config, self.derived.world_size)


def parallel_layout(config: TrainingConfig, ds_config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What decides the form of DeepSpeed's files."""
    zero = ds_config["zero_optimization"]
    return {
        "ranks": ranks,
        "zero_stage": zero["stage"],
        "precision": config.precision,
        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
        "offload_params": zero.get("offload_param", {}).get("device", "none"),
    }


@dataclass(frozen=True)
class Made:
    """An update as it came out. loss: mean over all ranks and micro-steps. first_sample: of those that it took."""

    loss: float
    grad_norm: float | None
    somebody_stops: bool
    first_sample: int
    trouble: Trouble | None = None
    wrong_ranks: tuple[int, ...] = ()  # whose own losses are not finite
    left_out: bool = False


@dataclass
class Streak:
    """Updates in a row that were skipped; in_vain: those of them that brought no smaller loss scale. It is saved, so
    that a run that is restarted again and again does not count anew each time."""

    skipped: int = 0
    in_vain: int = 0


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        job: Job,
        world: World,
        stop: StopRequest,
        hold: Hold | None = None,
        ds_config: dict[str, Any] | None = None,
        account: Account | None = None,
    ) -> None:
        """hold: the first rank's, on ckpt_dir. ds_config: what the engine is built from, if not the job's."""
        self.job, self.world, self.stop, self.hold = job, world, stop, hold
        self.account = account or Account()
        self.account.enter("engine")
        self.config, self.derived, self.loader = job.config, job.derived, job.loader
        torch.manual_seed(self.config.seed)
        layout = job.parallel_layout
        # DeepSpeed casts a model before it moves it. Where memory of the GPU is short, all of it in fp32 need not fit.
        in_host = layout["zero_stage"] < 3 and layout["offload_optimizer"] != "none"
        self.engine, self.scheduler = deepspeed_engine.build(
            lambda: LLaMaTransformer(self.config, job.tokenizer, device="cpu" if in_host else world.device),
            ds_config or job.ds_config,
        )
        if self.config.enable_compilation:
            self.engine.compile()
        # The draws of dropout differ between ranks, the weights did not.
        torch.manual_seed(self.config.seed + 1 + world.rank)
        self.update = 0
        self.last_checkpoint = job.resume_from
        self.streak, self.health = Streak(), Health(self.config)
        if job.resume_from is not None:
            self._resume(job.resume_from)
        elif job.init_from is not None:
            self._begin_with(job.init_from)
        self.account.enter("engine")
        self.first_update = self.update + 1
        self.saver = Saver(Path(self.config.ckpt_dir), world, self.engine, self.config.checkpoint_format)
        self.saved: list[Saved] = []  # not yet in a row
        if self.saver.foreground:
            world.say(f"saves        while training stands still: {self.saver.foreground}")
        self.retention: Retention | None = None
        self.housekeeping: threading.Thread | None = None
        if world.is_main and (c := self.config).keep_last is not None:
            policy = Policy(c.keep_last, c.keep_every, c.keep_best, c.keep_weights)
            self.retention = Retention(policy, Path(c.ckpt_dir), logger.warning, self.update)
        self.skips = self.skips_before = deepspeed_engine.skips(self.engine)
        peak = self.config.peak_tflops or peak_tflops(world.device)
        self.peak_flops = peak * 1e12 * world.size if peak else None
        self.report: Report | None = None
        self.last_row: Row | None = None
        self._began = time.perf_counter()
        self.learning_rate = 0.0
        self._lap = 0, 0.0  # tokens and seconds of training as of the last row
        self.all_have_written = False
        self.longest_update = self.longest_save = 0.0
        self.updates_lost = 0  # to rollbacks
        self.stops_in_time: bool | None = None

    # ------------------------------------------------------------ the loop

    def run(self) -> str:
        """Train until training_tokens are reached or somebody asks to stop; returns who did, "" for nobody."""
        config, updates = self.config, self.derived.updates
        loss, stopped_by, save_is_due = math.nan, "", False
        with contextlib.ExitStack() as at_the_end:
            if self.world.is_main:
                self.report = Report(Path(config.log_file), tensorboard_dir(config), self.update, self.tokens)
                at_the_end.callback(self._close_report)  # a rollback opens another one
            at_the_end.callback(self._wait_for_housekeeping)
            self.account.enter("rest")
            self._began = time.perf_counter()
            self.stop.last_words = self._last_good
            self.stop.phase("before its first update had been made")
            while self.update < updates and not stopped_by:
                began = time.perf_counter()
                self._mind_the_time()
                self.update += 1
                self.account.progress.update = self.update
                self.scheduler.step(self.update)
                # The rate of this update: at its end DeepSpeed sets the next one.
                self.learning_rate = self.scheduler.get_current_lr()
                with self.account.one_update():
                    made = self.train_one_update()
                self.account.made(self.update)
                loss, grad_norm = made.loss, made.grad_norm
                self.stop.phase("")
                if self.saver.busy and self.all_have_written:
                    self._settle(last=False)
                if self._goes_back(made):
                    continue
                stopped_by = self.stop.whose() if made.somebody_stops else ""
                # It is the first at or beyond a multiple of token_ckpt.
                save_is_due |= self.tokens % config.token_ckpt < config.tokens_per_update
                last = bool(stopped_by) or self.update == updates
                # A checkpoint amid skipped updates could only be worth less than the next one.
                saves = last or (save_is_due and not self.streak.skipped)
                self._compare_replicas(saves)
                logs = self.update % config.log_interval == 0 or self.update in (self.first_update, updates)
                evaluates = self.update % config.eval_interval == 0 or (saves and config.keep_best and not stopped_by)
                validation = self._evaluate() if evaluates and self.job.validation else None
                if self.update == updates and self._skipped == self.update - self.first_update + 1:
                    self._give_up(f"{self._place(self.first_update)}: each was skipped, so nothing has been trained")
                try:
                    if saves:
                        save_is_due = False
                        self._save(loss, validation, last)
                finally:
                    if logs or validation:
                        self._log(loss, grad_norm, validation)
                if config.sample_prompts and is_sample_update(self.update, config):
                    self._sample()
                if self.update > self.first_update:  # that one compiles
                    self.longest_update = max(self.longest_update, time.perf_counter() - began)
        stopped_by = stopped_by if self.update < updates else ""
        if self.world.is_main:
            self._summarize(loss, stopped_by)
        return stopped_by

    def train_one_update(self) -> Made:
        """One optimizer update; where it goes wrong, a second time from the same state: then it is known whether the
        data are to blame."""
        state = deepspeed_engine.bookmark(self.engine)
        random = checkpoints.random_state(self.world) if self.config.dropout else {}
        made = self._attempt()
        if made.trouble is None or (made.trouble.kind == "nonfinite_gradients" and self.skips.is_searching):
            return made
        deepspeed_engine.go_back(self.engine, state)
        self.loader.consumed_samples = made.first_sample
        if random:
            checkpoints.restore_random_state(random, self.world)
        again = self._attempt(applies_spikes=self.config.on_loss_spike == "warn")
        if again.left_out:  # which fp16 takes for a loss scale that is too large
            deepspeed_engine.go_back(self.engine, {"scaler": state["scaler"]})
        if again.trouble is None:
            self.health.suspicions += 1
            self.world.say(
                f"suspicion    update {self.update}: {made.trouble.told}; made again from the same state with the same "
                f"samples it is not (loss {again.loss:.4f}), and counts. Suspect the hardware of {self._whose(made)}"
            )
        return again

    def _attempt(self, applies_spikes: bool = False) -> Made:
        steps, first = self.derived.gradient_accumulation_steps, self.update == self.first_update
        after_the_first = (lambda: self._say_when(self._seconds, steps)) if first else lambda: None
        self._pass_skipped_samples()
        position, before, left_out = self.loader.consumed_samples, deepspeed_engine.skips(self.engine), False

        def leave_out(sums: torch.Tensor) -> bool:
            nonlocal left_out
            left_out = self.health.spike(self._over_all_ranks(sums)) is not None
            return left_out

        get_batch = self.account.timing("data", self.loader.get_batch)
        spikes = leave_out if self.health.watches and not applies_spikes else None
        progress = self.account.progress
        own, grad_norm = deepspeed_engine.update(self.engine, get_batch, steps, after_the_first, spikes, progress)
        progress.at("loss")
        own[0] *= self.config.batch_size * self.config.max_seq_len  # the model divides by all positions
        # One all-reduce for these, stop requests, ranks whose part of a save is written, and ranks that could not.
        sums = torch.cat([own, own.new_tensor([bool(self.stop), *self.saver.progress()])])
        dist.all_reduce(sums)
        total, counted, requests, written, failed = sums.tolist()
        self.all_have_written = written + failed == self.world.size
        loss, trouble = total / counted, None
        wrong: tuple[int, ...] = ()
        skipped = deepspeed_engine.skips(self.engine).count > before.count
        if not math.isfinite(loss):
            trouble, wrong = Trouble("nonfinite_loss", f"its loss is {loss}"), self._wrong_ranks(own)
        elif not left_out and (skipped or not math.isfinite(grad_norm or 0.0)):
            trouble = Trouble("nonfinite_gradients", "its gradients are not finite")
        else:
            trouble = self.health.spike(loss)
        return Made(loss, grad_norm, requests > 0, position, trouble, wrong, left_out)

    def _over_all_ranks(self, own: torch.Tensor) -> float:
        """The mean loss, of all ranks' sums."""
        sums = own.clone()
        dist.all_reduce(sums)
        return float(sums[0] * self.config.batch_size * self.config.max_seq_len / sums[1])

    def _wrong_ranks(self, own: torch.Tensor) -> tuple[int, ...]:
        """Those whose own loss is not finite; none where it is none's, or all ranks'."""
        everywhere = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(everywhere, own)
        wrong = [rank for rank, sums in enumerate(everywhere) if not math.isfinite(float(sums[0]))]
        return tuple(wrong) if len(wrong) < self.world.size else ()

    def _mind_the_time(self) -> None:
        """Ask to stop where another update would leave no time for the save."""
        limit, elapsed = self.config.max_run_time, time.monotonic() - self.stop.began
        ends = elapsed + 2 * self.longest_update + self.longest_save
        if limit and ends > limit and self.world.is_main and not self.stop:
            self.stop.cause = f"max_run_time ({readable_duration(limit)})"

    def _say_how_it_stops(self, save_seconds: float) -> None:
        """Whether a run that is asked to stop has saved within the grace period: better known beforehand."""
        self.longest_save = max(self.longest_save, save_seconds)
        takes, given = self.longest_update + self.longest_save, self.config.grace_period
        if self.stops_in_time is (in_time := takes <= given):
            return
        self.stops_in_time, took = in_time, f"stopping     takes up to {takes:.1f} s, for an update and a save: "
        if in_time:
            print(f"{took}within the grace_period of {given:g} s", flush=True)
        else:
            longer = f"LONGER than the grace_period of {given:g} s, after which all may be killed"
            print(f"{took}{longer}; give notice earlier (SIGUSR1 to the ranks), and set grace_period", flush=True)

    def _say_when(self, seconds: float, steps: int) -> None:
        """After the first micro-step: when the first row is to be expected, if that is not soon."""
        rest = seconds * (steps - 1)
        if rest > _LONG_UPDATE_SECONDS and self.world.is_main:
            print(
                f"first row    in about {readable_duration(rest)}: an update is {steps} micro-steps, the first took "
                f"{readable_duration(seconds)}",
                flush=True,
            )

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks and runs."""
        return self.update * self.config.tokens_per_update

    @property
    def _tokens_here(self) -> int:
        """Those of this process and its ranks."""
        return (self.update - self.first_update + 1 + self.updates_lost) * self.config.tokens_per_update

    @property
    def _seconds(self) -> float:
        """Since the loop began."""
        return time.perf_counter() - self._began

    @property
    def _training_seconds(self) -> float:
        """Of those, what is training, and neither evaluations, samples nor checkpoints."""
        return self.account.spent("first update", "steps", "data", "rest")

    @property
    def _skipped(self) -> int:
        """Updates of this process that have not changed the weights."""
        return self.skips.count - self.skips_before.count

    # ------------------------------------------------------------ what

    def status(self) -> dict[str, Any]:
        """What `dsllama status` shows of the run beside its ranks. Asked by another thread."""
        rows, last = self.last_row, self.last_checkpoint
        return {
            "updates": self.derived.updates, "update": self.update, "tokens": self.tokens,
            "tokens_per_update": self.config.tokens_per_update, "resumed_at": self.first_update - 1,
            "began": time.time() - self._seconds, "loss": rows and rows.loss,
            "tokens_per_second": rows and rows.tokens_per_second, "eta": rows and self._eta(rows),
            "last_checkpoint": last and {"path": str(last.path), "update": last.update},
        }  # fmt: skip

    def _eta(self, row: Row) -> float:
        """Seconds from a row to the end of the run."""
        return row.time / max(self.account.updates, 1) * (self.derived.updates - row.update)

    def _log(self, loss: float, grad_norm: float | None, validation: float | None) -> None:
        if self.report is None:
            return
        rate, elapsed = self._rate(), self._seconds
        saving = sum(save.seconds for save in self.saved)
        flops = rate * self.derived.flops_per_token
        row = Row(
            update=self.update,
            progress=self.update / self.derived.updates,
            loss=loss,
            perplexity=perplexity(loss),
            learning_rate=self.learning_rate,
            grad_norm=grad_norm,
            tokens_run=self._tokens_here,
            tokens_total=self.tokens,
            tokens_per_second=rate,
            time=elapsed,
            mfu=flops / self.peak_flops if self.peak_flops else None,
            memory_gib=peak_memory_gib(self.world.device),
            validation_loss=validation,
            skipped_updates=self.engine.skipped_steps,
            save_stall=sum(save.stall for save in self.saved) if self.saved else None,
            save_seconds=saving or None,
            rollbacks=self.health.rollbacks,
            suspicions=self.health.suspicions,
            save_mb_per_second=sum(save.checkpoint.bytes for save in self.saved) / 1e6 / saving if saving else None,
        )
        self.saved.clear()
        self.last_row = row
        self.report.row(row, self.derived.updates, self._eta(row))

    def _rate(self) -> float:
        """Tokens per second of training since the last call."""
        tokens, seconds = self._lap
        self._lap = self._tokens_here, self._training_seconds
        return (self._lap[0] - tokens) / max(self._lap[1] - seconds, 1e-9)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss over the whole held-out part, over all ranks."""
        assert self.job.validation is not None
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with self.account.part("evaluation"):
            self.engine.eval()
            for x, y in self.job.validation.validation_batches():
                self.account.progress.at("evaluation")
                sums[0] += self.engine(x, y) * y.numel()
                sums[1] += (y != IGNORE_INDEX).sum()
            self.engine.train()
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _sample(self) -> None:
        """Generate from each prompt. On every rank, since under ZeRO-3 each holds a part of the weights."""
        partitioned = self.world.size > 1 and self.job.parallel_layout["zero_stage"] == 3
        with self.account.part("evaluation"):
            texts = [
                self.engine.module.generate(
                    prompt,
                    max_new_tokens=self.config.sample_tokens,
                    temperature=self.config.sample_temperature,
                    top_p=self.config.sample_top_p,
                    # Of its own for each prompt, or two that end alike would go on alike. torch takes 32 bits.
                    seed=self.config.seed + self.update + number * 1_000_003,
                    agree=self.world.tell if partitioned else None,
                )
                for number, prompt in enumerate(self.config.sample_prompts)
            ]
        if self.report is not None:
            self.report.sample(self.update, self.tokens, texts)

    def _save(self, loss: float, validation: float | None, last: bool) -> None:
        """Begin to save; wait until it is published where it is the `last` one, for which no other makes up."""
        config, since = self.config, time.perf_counter()
        if not deepspeed_engine.weights_are_finite(self.engine):
            self._give_up(f"the weights are not finite after {self._place(self.update)}. They were not saved")
        gone = self._why_the_folder_is_gone()
        if gone:
            self._notice_failed_save(self.update, gone, last)
            return
        manifest = {
            "tokens": self.tokens,
            "loss": loss,
            "validation_loss": validation,
            "saved_at": timestamp(),
            "data": self.loader.state_dict(),
            "parallel_layout": self.job.parallel_layout,
            "vocab_size": self.derived.vocab_size,
            "schedule": self.scheduler.state_dict(),
            "skipping": asdict(self.streak),
            "health": self.health.state_dict(),
            "seed": config.seed,
            "versions": versions(),
            "self_test": self.job.self_test,
            "account": self.account.snapshot(),
        }
        # The tokenizer that the run began with: the file may have been moved, or trained anew, since.
        attachments = {**run_files(self.job), "tokenizer.json": self.job.tokenizer.content}
        needed = expected_bytes(self.derived.parameters, config.checkpoint_format)
        if self.saver.busy:  # the disk is slower than the saves are frequent
            self._settle(last=False)
        with self.account.part("saves"):
            try:
                self.saver.begin(self.update, manifest, attachments, self.loader.first_sequence(), needed, since)
            except OSError as error:
                self._notice_failed_save(self.update, str(error), last)
                return
        if last or self.saver.foreground:
            self._settle(last)

    def _settle(self, last: bool) -> None:
        """Publish the save under way, when all ranks have written; wait for them if they have not."""
        update = self.saver.update
        self._why_the_folder_is_gone()  # then what is half written is gone too, and the saver says so
        with self.account.part("saves"):
            try:
                saved = self.saver.settle()
            except OSError as error:
                self._notice_failed_save(update, str(error), last)
                return
        self.last_checkpoint = saved.checkpoint
        self.saved.append(saved)
        if self.report is None:
            return
        cost = f"{saved.checkpoint.bytes / 2**20:.0f} MiB in {saved.seconds:.1f} s"
        if not self.saver.foreground:
            cost += f", of which training stood still for {saved.stall:.2f} s"
        print(f"saved {saved.checkpoint.path} ({cost}; {saved.megabytes_per_second:.0f} MB/s)", flush=True)
        if not last:
            self._say_how_it_stops(saved.seconds)
        with self.account.part("saves"):
            self._wait_for_housekeeping()
        self.housekeeping = threading.Thread(target=self._keep_house, args=(saved.checkpoint,), daemon=True)
        self.housekeeping.start()

    def _wait_for_housekeeping(self) -> None:
        if self.housekeeping is not None:
            self.housekeeping.join()

    def _keep_house(self, newest: Checkpoint) -> None:
        """Draw the plot anew and remove old checkpoints; in a thread, since each may take seconds."""
        assert self.report is not None
        published = list_checkpoints(self.config.ckpt_dir)
        self.report.plot([update_of(path) * self.config.tokens_per_update for path in published])
        if gone := self.retention.apply(newest) if self.retention else []:
            what = "only weights left of" if self.config.keep_weights else "removed"
            names = ", ".join(checkpoint.path.name for checkpoint in gone)
            print(f"{what} {names} (keep_last {self.config.keep_last})", flush=True)

    def _why_the_folder_is_gone(self) -> str:
        """Empty where ckpt_dir is as it was. Collective. Raises TrainingFailed where another run has taken it."""
        told = "", ""
        if self.hold is not None:
            try:
                told = self.hold.lost_to(), ""
            except OSError as error:
                told = "", str(error)
        taken_by, gone = self.world.tell(told)
        if taken_by:
            rule = "was taken by another run, which thought that this one was dead"
            raise TrainingFailed(f"ckpt_dir = {self.config.ckpt_dir!r} {rule}: {taken_by}. Nothing of it was touched.")
        return gone

    def _notice_failed_save(self, update: int, why: str, last: bool) -> None:
        told = f"the checkpoint of update {update} could not be written: {why}. {self._last_good()}"
        if last or self.config.on_failed_save == "stop":
            raise TrainingFailed(told)
        self.world.say(f"not saved    {told} The run goes on to the next one.")

    def _begin_with(self, source: Checkpoint) -> None:
        """Take up its weights; where they are damaged, those of the newest before it in the folder that was given."""
        older = partial(older_whole, self.config.init_from or "", logger.warning, where="init_from")
        take_up = partial(checkpoints.begin_with, world=self.world, engine=self.engine)
        with self.account.part("restore"):
            with_first_whole(source, take_up, partial(self.world.ask_main, older))

    def _resume(self, source: Checkpoint) -> None:
        fresh = self.scheduler.state_dict()
        try:
            with self.account.part("restore"):
                source = with_first_whole(source, self._load, self._next_whole)
        except RuntimeError as error:
            raise TrainingFailed(f"the checkpoint could not be loaded: {error}") from None
        self.last_checkpoint = source
        self.update = source.update
        self.account.resumed(source.update, source.manifest.get("account"))
        self.streak = Streak(**source.manifest.get("skipping", {}))
        places = Path(self.config.ckpt_dir), source.path.parent
        noted = self.world.ask_main(read_skipped, *places, self.loader.identity)
        self.health.load_state_dict(source.manifest.get("health", {}), noted)
        theirs, goes_on = source.manifest["schedule"], self.config.use_prev_scheduler
        self.scheduler.load_state_dict(theirs if goes_on else fresh)
        same = {**fresh, "current_step": theirs["current_step"]}
        changed = {name: f"{theirs[name]} (not {value})" for name, value in same.items() if theirs[name] != value}
        if goes_on and changed:
            remedy = "--use_prev_scheduler false takes the new one"
            self.world.say(f"the checkpoint's schedule goes on: {changed}; {remedy}")

    def _load(self, source: Checkpoint) -> Checkpoint:
        checkpoints.load(source, self.world, self.engine, self.loader.first_sequence(), self.config.precision)
        return source

    def _next_whole(self, damaged: Checkpoint, reason: str) -> Checkpoint:
        source: Checkpoint = self.world.ask_main(checkpoints.next_whole, self.job, damaged, reason)
        self.loader.load_state_dict(source.manifest["data"])
        self.world.say("\n".join(checkpoints.resumption_lines(source, self.config, self.job.parallel_layout)))
        return source

    def _pass_skipped_samples(self) -> None:
        """Where the next samples are left out, go on with those behind them."""
        while (behind := self.health.skipped_samples.get(self.loader.consumed_samples)) is not None:
            self.loader.consumed_samples = behind

    def _goes_back(self, made: Made) -> bool:
        """Act on what is wrong with an update, if anything is; whether the run has gone back to a checkpoint."""
        before, self.skips = self.skips, deepspeed_engine.skips(self.engine)
        if (trouble := made.trouble) is None:
            self.streak = Streak()
            self.health.losses.append(made.loss)
            return False
        policy, searches = self.health.policy(trouble), before.is_searching
        if trouble.kind == "nonfinite_gradients" and (searches or policy == "skip"):
            self._notice_skip(before, trouble.told, searches)
        elif policy == "skip":
            self._notice_skip(before, trouble.told)
        elif policy == "warn":
            self.world.say(f"warning      update {self.update}: {trouble.told}; it counts (on_loss_spike)")
            self.health.losses.append(made.loss)
        elif policy == "roll_back":
            self._roll_back(made, trouble)
            return True
        else:
            told = f"the loss is {made.loss}" if trouble.kind == "nonfinite_loss" else trouble.told
            self._give_up(f"{told} at {self._place(self.update)}. Nothing of it was saved")
        return False

    def _notice_skip(self, before: deepspeed_engine.Skips, told: str, searches: bool = False) -> None:
        """Say that this update was left out, on all ranks alike; too many in a row end the run."""
        now, streak, limit = self.skips, self.streak, self.config.max_skipped_updates
        streak.skipped += 1
        scale = f" at loss scale {before.loss_scale:g}" if before.loss_scale else ""
        scale += f", which is now {now.loss_scale:g}" if now.loss_scale != before.loss_scale else ""
        self.world.say(
            f"skipped      update {self.update}: {told}{scale}; the weights are as before ({streak.skipped} in a row)"
        )
        if searches:
            streak.in_vain = 0
            return
        streak.in_vain += 1
        if streak.in_vain >= limit:
            why = f"{streak.in_vain} in a row (max_skipped_updates)"
            if before.at_its_end:
                why += f" at {before.loss_scale:g}, the smallest loss scale"
            elif before.loss_scale:
                why += f" at the loss scale {before.loss_scale:g} that fp16.loss_scale gives (0 there lets it be found)"
            place = self._place(self.update - streak.skipped + 1)
            self._give_up(f"{place}: {told.replace('its', 'the', 1)}, so the weights stay as they are, {why}")

    def _roll_back(self, made: Made, trouble: Trouble) -> None:
        """Go back to the last good checkpoint, and leave the samples of this update out from now on. Collective."""
        if self.saver.busy:
            self._settle(last=False)
        first, size, source = made.first_sample, self.derived.sequences_per_update, self.last_checkpoint
        place = self._place(self.update)
        if source is None or not self.health.goes_back_again(source.update):
            times = f", after {self.config.max_skipped_updates} rollbacks to the same checkpoint" if source else ""
            self._give_up(f"{trouble.told.replace('its', 'the', 1)} at {place}{times}. Nothing of it was saved")
        note = {
            "first": first, "last": first + size - 1, "update": self.update, "from": source.update,
            "why": trouble.told, "loss": repr(made.loss), "data": self.loader.identity, "at": timestamp(),
        }  # fmt: skip
        self._wait_for_housekeeping()
        lost = self.update
        try:
            self.world.ask_main(note_skipped, Path(self.config.ckpt_dir), note)
            self.health.skip_samples(first, first + size)
            self.loader.load_state_dict(source.manifest["data"])
            self._resume(source)
        except UserError as error:
            why = "; ".join(map(str, error.problems))
            raise TrainingFailed(f"{trouble.told} at {place}, and there is no way back: {why}") from None
        self.world.say(
            f"rolled back  update {lost}: {trouble.told}. Its samples {first} to {first + size - 1} are left out from "
            f"now on ({SKIPPED_SAMPLES}); going on from {self.last_checkpoint and self.last_checkpoint.path}"
        )
        self.updates_lost += lost - self.update
        self.skips, self.saved = deepspeed_engine.skips(self.engine), []
        if self.report is not None:
            self._close_report()
            self.report = Report(Path(self.config.log_file), tensorboard_dir(self.config), self.update, self.tokens)

    def _close_report(self) -> None:
        if self.report is not None:
            self.report.close()

    def _compare_replicas(self, saves: bool) -> None:
        """Stop where the ranks no longer hold the same weights; before each save too, or the last good checkpoint
        might not be one. Collective."""
        interval = self.config.check_replicas_interval
        if not interval or (self.update % interval and not saves) or self.world.size == 1:
            return
        if not (differing := differing_replicas(self.engine.module)):
            return
        hosts = self._hosts()
        told = "; ".join(
            f"rank {rank} on {hosts[rank]}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
            for rank, names in differing.items()
        )
        which = "differ from those of the other ranks" if len(differing) * 2 < self.world.size else (
            "differ between these, and which is right cannot be told"
        )  # fmt: skip
        self._give_up(f"after {self._place(self.update)} weights {which}: {told}", "Suspect that hardware.")

    def _hosts(self) -> list[str]:
        found: list[str] = [""] * self.world.size
        dist.all_gather_object(found, socket.gethostname())
        return found

    def _whose(self, made: Made) -> str:
        """Where the numbers went wrong, as far as is known."""
        hosts = self._hosts()
        wrong = [f"rank {rank} on {hosts[rank]}" for rank in made.wrong_ranks]
        return " and ".join(wrong) or "the ranks (" + ", ".join(sorted(set(hosts))) + ")"

    def _give_up(self, why: str, advice: str = _ADVICE) -> NoReturn:
        if self.saver.busy:
            self._settle(last=False)
        raise TrainingFailed(f"{why}. {self._last_good()} {advice}")

    def _place(self, first: int) -> str:
        """Updates `first` to the present one, with their samples, for a message."""
        updates = f"update {self.update}" if first == self.update else f"updates {first} to {self.update}"
        size = self.derived.sequences_per_update
        end = self.loader.consumed_samples
        samples = f"samples {end - (self.update - first + 1) * size} to {end - 1}"
        return f"{updates} ({samples}, learning rate {self.learning_rate:.3e})"

    def _last_good(self) -> str:
        if self.last_checkpoint is None:
            return "There is no earlier checkpoint."
        return f"The last good checkpoint is {self.last_checkpoint.path}; --load_ckpt true goes on from it."

    # ------------------------------------------------------------ round the loop

    def _summarize(self, loss: float, stopped_by: str) -> None:
        rate = readable(self._tokens_here / max(self._training_seconds, 1e-9))
        print(
            f"stopped by {stopped_by} after" if stopped_by else "finished:",
            f"update {self.update} of {self.derived.updates}, {readable(self.tokens)} tokens, loss {loss:.4f},",
            f"{rate} tok/s, {readable_duration(self._seconds)}"
            + (f"; {self._skipped} updates skipped" if self._skipped else ""),
        )
        if self.last_checkpoint is not None:
            print(f"checkpoint   {self.last_checkpoint.path}\nlog          {self.config.log_file}")
        if stopped_by:
            print("go on with   the same command and --load_ckpt true")


def is_sample_update(update: int, config: TrainingConfig) -> bool:
    """Whether samples are due: at eval_interval, then each time the update has grown by model_gen_multiplier."""
    due = config.eval_interval
    while due < update:
        due = max(due + 1, math.ceil(due * config.model_gen_multiplier))
    return due == update


def tensorboard_dir(config: TrainingConfig) -> Path:
    """Where TensorBoard events go, each run's in a folder of its own below it."""
    return Path(config.tensorboard_dir) if config.tensorboard_dir else Path(config.log_file).parent / "tensorboard"


def run_files(job: Job) -> dict[str, str]:
    """The resolved configuration, as it is saved with the run and with each checkpoint."""
    return {
        "config.yaml": yaml.safe_dump(job.config.to_dict(), sort_keys=False),
        "deepspeed.json": json.dumps(job.ds_config, indent=1),
    }

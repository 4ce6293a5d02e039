"""TrainingConfig: every knob of a run, each with its meaning, its default and its check.

    YAML or JSON file + command line -> values -> fields checked one by one -> rules between fields -> config

Numbers that follow from these (accumulation, updates, parameters) are computed in `derived.py` and nowhere else.
The fields that the textbook names keep its names and defaults.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dsllama import rules
from dsllama.errors import Problem, UserError, did_you_mean, remedy_for
from dsllama.paths import parse_path, parse_text
from dsllama.sizes import parse_count, parse_duration, parse_number

Count = Annotated[int, BeforeValidator(parse_count)]
Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[Count, Field(gt=0)]
NotNegative = Annotated[Count, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
PathText = Annotated[str, BeforeValidator(parse_path)]
Text = Annotated[str, BeforeValidator(parse_text)]


def _in_small_letters(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _parse_stage(value: Any) -> Any:
    if isinstance(value, bool):  # to Python, true is among 0, 1, 2, 3
        raise ValueError("must be a number")
    return parse_count(value)


def _parse_switch(value: Any) -> Any:
    word = _in_small_letters(str(value) if isinstance(value, bool) else value)  # YAML's on and off
    return {"true": "auto", "on": "auto", "false": "off"}.get(word, word) if isinstance(word, str) else word


def _parse_off(value: Any) -> Any:
    return "off" if value is False else _in_small_letters(value)  # YAML's off


_Word = BeforeValidator(_in_small_letters)
Device = Annotated[Literal["none", "cpu", "nvme"], _Word]


def _parse_load(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("must be true, false, auto or a path")
    return {"auto": "auto", "true": True, "false": False}.get(value.strip().lower(), parse_path(value))


class TrainingConfig(BaseModel):
    """All settings of one pretraining run. Raises UserError with every problem at once."""

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)

    # --- Paths ---
    dataset_dir: PathText = "dataset"
    """Folder of `.npy` token shards, as `dsllama encode` writes them."""
    tokenizer_path: PathText = "bpe_8k.json"
    """The tokenizer's JSON file, as `dsllama tokenizer` writes it."""
    ckpt_dir: PathText = "checkpoints"
    """Folder for checkpoints; what each start was configured with lies in `starts` below it. Shared between hosts."""
    log_file: PathText = "training_progress.csv"
    """CSV file, one row per logged update; the loss plot (.png) and the samples (.samples.txt) lie beside it."""
    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard events. null: `tensorboard` beside log_file."""

    # --- Batch ---
    batch_size: Positive = 4
    """Sequences per rank and micro-step (the micro-batch)."""
    max_seq_len: Positive = 2048
    """Tokens per sequence."""
    tokens_per_update: Positive = 2**19
    """Tokens per optimizer update, over all ranks and micro-steps; accumulation follows from it."""

    # --- Model ---
    n_embd: Positive = 2048
    """Width of the model."""
    n_heads: Positive = 32
    """Attention heads."""
    n_kv_heads: Positive | None = None
    """Key-value heads (grouped-query attention). null: as many as n_heads."""
    n_layers: Positive = 24
    """Decoder blocks."""
    multiple_of: Positive = 256
    """The SwiGLU hidden size, int(8 n_embd / 3), is rounded up to a multiple of this."""
    eps: Annotated[Number, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    theta: Annotated[Number, Field(gt=1)] = 10_000
    """Base of the rotary position embedding."""
    dropout: Fraction = 0.0
    """Probability of dropout, in attention and after each branch."""
    tie_embeddings: bool = False
    """Use one matrix for the token embedding and the output head."""
    vocab_size: Positive | None = None
    """Rows of the embedding. null: the tokenizer's vocabulary; a larger number pads it."""

    # --- Optimizer and schedule ---
    warmup_iterations: NotNegative = 500
    """Updates of linear warmup."""
    max_lr: Annotated[Number, Field(gt=0)] = 3e-4
    """Learning rate after warmup."""
    min_lr: Annotated[Number, Field(ge=0)] = 3e-5
    """Learning rate at the end (not for `constant`)."""
    schedule: Annotated[Literal["cosine", "linear", "constant"], _Word] = "cosine"
    """How the learning rate falls from max_lr to min_lr."""
    beta1: Fraction = 0.9
    """AdamW: decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW: decay of the second moment."""
    adam_eps: Annotated[Number, Field(gt=0)] = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """AdamW: decoupled weight decay, on all parameters."""
    gradient_clipping: Annotated[Number, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 for no clipping."""

    max_skipped_updates: Positive = 3
    """Updates in a row that are skipped, or rollbacks to the same checkpoint, until the run stops. Not counted while
    fp16 searches for its loss scale."""

    # --- Health: an update that goes wrong is made again first; where it is right then, the hardware is suspected ---
    on_nonfinite_gradients: Literal["skip", "stop", "roll_back"] = "skip"
    """What becomes of an update whose gradients are not finite. roll_back: go back to the last checkpoint, and leave
    out its samples from then on."""
    on_nonfinite_loss: Literal["skip", "stop", "roll_back"] = "stop"
    """What becomes of an update whose loss is not finite."""
    on_loss_spike: Annotated[Literal["off", "warn", "skip", "stop", "roll_back"], BeforeValidator(_parse_off)] = "off"
    """What becomes of an update whose loss is far above those before it; off: they are not looked at."""
    loss_spike_score: Annotated[Number, Field(gt=0)] = 8.0
    """How far: robust standard deviations (1.4826 x the median distance) above the median of the window."""
    loss_spike_window: Annotated[Positive, Field(ge=4)] = 128
    """Updates before it whose losses it is compared with (16 are needed)."""
    check_replicas_interval: Positive | None = None
    """Updates between two comparisons of the weights' bits over the ranks (zero_stage 0 to 2); a difference stops the
    run and names the rank. null: none."""

    # --- Length of the run, evaluation, checkpoints ---
    training_tokens: Positive = 45_000_000_000
    """Tokens to train on; the run ends with the first update that reaches them."""
    log_interval: Positive = 1
    """Updates between two rows of console, CSV and TensorBoard."""
    eval_interval: Positive = 32
    """Updates between two evaluations on the held-out part; also the update of the first sample."""
    validation_tokens: NotNegative = 0
    """Tokens at the end of the data set that are held out for validation; 0 for none."""
    model_gen_multiplier: Annotated[Number, Field(gt=1)] = 1.5
    """Samples are generated at update eval_interval, then each time the update has grown by this factor."""
    sample_prompts: list[Text] = ["The"]
    """Prompts for the samples; an empty list for no samples."""
    sample_tokens: Positive = 64
    """New tokens per sample."""
    sample_temperature: Annotated[Number, Field(ge=0)] = 0.8
    """Temperature of the samples; 0 for greedy."""
    sample_top_p: Annotated[Number, Field(gt=0, le=1)] = 0.95
    """Nucleus of the samples."""
    token_ckpt: Positive = 1_000_000_000
    """Tokens between two checkpoints."""
    checkpoint_format: Literal["portable", "deepspeed"] = "portable"
    """portable: state by name, for any topology; deepspeed: the engine's own files, which load on the same topology."""
    keep_last: Positive | None = None
    """Checkpoints to keep, the newest ones; older ones are removed after each save. null: all."""
    keep_every: Positive | None = None
    """Of the older ones, keep the first in every so many tokens (needs keep_last)."""
    keep_best: NotNegative = 0
    """Of the older ones, keep so many with the lowest validation loss (needs keep_last); saves then follow an
    evaluation."""
    keep_weights: bool = False
    """Of the others, keep the weights: only the optimizer's state is removed, two thirds (needs keep_last)."""
    on_failed_save: Literal["go_on", "stop"] = "go_on"
    """What a run does when a checkpoint cannot be written (a full disk): go on to the next one, or stop."""
    max_run_time: Seconds | None = None
    """Time in which a start must have saved and ended (exit code 75), such as 12h; null: as long as it takes."""
    grace_period: Seconds = 30.0
    """Time from a signal to the end of all: a batch system's, or the 30 s of DeepSpeed's launcher. A run says
    beforehand whether it saves within."""
    stuck_after: Seconds = 60.0
    """Time without progress, or without a word, after which a rank is named and its stack shown; without a word, the
    run ends then."""
    stuck_timeout: Seconds | None = 600.0
    """Time after which a run ends in which no update goes on; null: 30 minutes later, by torch's own."""
    load_ckpt: Annotated[bool | str, BeforeValidator(_parse_load)] = False
    """Resume: false starts anew; true takes ckpt_dir's newest whole checkpoint; auto does if any; or a path."""
    init_from: PathText | None = None
    """Begin with the weights of this checkpoint, with a fresh optimizer, schedule and data; nothing where a run goes
    on."""
    use_prev_scheduler: bool = True
    """At resume, go on with the checkpoint's schedule; false takes this configuration's."""

    # --- Data order ---
    shuffle: bool = False
    """Visit the sequences in a seeded random order, another one each epoch."""
    seed: NotNegative = 1337
    """Seed of the weights, of dropout and of the data order."""

    # --- Speed ---
    enable_compilation: bool = False
    """Compile the model with torch.compile (needs a C++ compiler on CPU)."""
    use_flash_attention: bool = True
    """Fused attention (flash on CUDA); false takes the plain one with the same result."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in backward: less memory, about a third slower."""
    peak_tflops: Annotated[Number, Field(gt=0)] | None = None
    """Peak TFLOP/s of one accelerator, for MFU. null: from the table of known ones."""

    # --- DeepSpeed ---
    self_test: Annotated[Literal["auto", "off"], BeforeValidator(_parse_switch)] = "auto"
    """auto: before the first update, a reduced model must train under these settings as plain PyTorch does (in seconds,
    once for the same settings and versions); off: not."""
    precision: Annotated[Literal["bf16", "fp16", "fp32"], _Word] = "bf16"
    """Type of weights and activations in forward and backward; the optimizer's copy is fp32."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_parse_stage)] | None = None
    """What ZeRO partitions: 1 optimizer states, 2 also gradients, 3 also parameters. null: the overlay's, else 1."""
    offload_optimizer: Device | None = None
    """Where the optimizer states live. null: the overlay's, else on the accelerator ("none")."""
    offload_params: Device | None = None
    """Where the parameters live (ZeRO-3). null: the overlay's, else on the accelerator ("none")."""
    nvme_path: PathText | None = None
    """Folder on a local NVMe disk, for offload to nvme. null: the overlay's."""
    deepspeed_overlay: PathText | None = None
    """DeepSpeed JSON that is laid over the derived one, such as ds_configs/zero2.json."""

    def __init__(self, /, **values: Any) -> None:
        problems = [_unknown(name) for name in values if name not in type(self).model_fields]
        known = {name: value for name, value in values.items() if name in type(self).model_fields}
        wrong: dict[str, str] = {}
        try:
            super().__init__(**known)
        except ValidationError as error:
            wrong = {str(detail["loc"][0]): detail["msg"] for detail in error.errors()}
            problems += [_wrong_value(name, known[name], message) for name, message in wrong.items()]
            # The sound fields are still held against each other, so that the user sees everything at once.
            super().__init__(**{name: value for name, value in known.items() if name not in wrong})
        problems += rules.check(self, skip=set(wrong))
        if problems:
            raise UserError(problems, "the configuration is wrong")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that YAML and JSON hold without loss."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write all fields to a YAML (or, by suffix, JSON) file that `load_config` reads back equal."""
        values = self.to_dict()
        text = json.dumps(values, indent=1) if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
        path.write_text(text, encoding="utf-8")

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, checked like a new one."""
        return TrainingConfig(**{**self.model_dump(), **changes})


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """The configuration from a YAML or JSON file (or the defaults), with overrides laid over it. Raises UserError."""
    values = read_settings(Path(path)) if path is not None else {}
    try:
        return TrainingConfig(**{**values, **(overrides or {})})
    except UserError as error:
        given = {name: f"{path}: {name}" for name in values} | {name: f"--{name}" for name in overrides or {}}
        located = [Problem(given.get(p.where, p.where), p.rule, p.remedy, p.value) for p in error.problems]
        raise UserError(located, error.title) from None


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; UserError with file and line if it is not one."""
    no_repeats = partial(_no_repeats, path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=no_repeats) if path.suffix == ".json" else yaml.load(text, _Loader)
    except FileNotFoundError:
        ready = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        remedy = f"ready ones: {', '.join(ready)}" if ready else "give the path of a YAML or JSON file"
        raise UserError(Problem(str(path), "there is no such configuration file", remedy)) from None
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", remedy_for(error))) from None
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"
        raise UserError(Problem(str(path), rule, "convert it to UTF-8")) from None
    except json.JSONDecodeError as error:
        raise UserError(Problem(f"{path}:{error.lineno}", f"is not JSON ({error.msg})", "mend that line")) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        remedy = "mend that line" if mark else "mend the file"
        raise UserError(Problem(where, f"cannot be read as YAML ({reason})", remedy)) from None
    except RecursionError:
        raise UserError(Problem(str(path), "is nested too deeply", "it needs `field: value` lines only")) from None
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:  # of a value such as `!!int x`
        rule = f"holds a value that is none ({error})"
        raise UserError(Problem(str(path), rule, "leave its tag out, or write a shorter number")) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        rule = "must hold an object { ... }" if path.suffix == ".json" else "must hold `field: value` lines"
        raise UserError(Problem(str(path), rule, "configs/ and ds_configs/ have examples", values))
    return {str(name): value for name, value in values.items()}


class _Loader(yaml.SafeLoader):
    """YAML without its worst surprises: a key given twice is an error, a date is text, 010 is ten, 1:30 no number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, rule) for tag, rule in resolvers if tag.split(":")[-1] not in ("timestamp", "int", "float")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            problem = ""
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word; a value in braces needs quotes"
            elif key_node.value in seen:
                problem = f"{key_node.value!r} is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# No more than what YAML's own writer takes for numbers: what it leaves without quotes stays text.
_INTEGER = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)"
_FLOAT = r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.add_implicit_resolver("dsllama", re.compile(f"^({_INTEGER}|{_FLOAT})$"), list("-+.0123456789"))


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value.replace("_", "").lower()
    is_integer = re.fullmatch(_INTEGER, text)
    return int(text, 0) if is_integer else float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("dsllama", _construct_number)


def _no_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if repeated:
        raise UserError(Problem(str(path), f"gives {', '.join(map(repr, repeated))} twice", "keep one of them"))
    return dict(pairs)


def _unknown(name: str) -> Problem:
    remedy = did_you_mean(name, TrainingConfig.model_fields, "`dsllama config` shows all fields")
    return Problem(name, "there is no such field", remedy)


def _wrong_value(name: str, value: Any, message: str) -> Problem:
    """pydantic's message in our form: it names the type or the bound, we add the choices and the meaning."""
    field = TrainingConfig.model_fields[name]
    choices = list(dict.fromkeys(choices_of(field.annotation)))
    rule = "must be one of " + ", ".join(map(str, choices)) if choices else plain(message)
    rule += ", and not null" if value is None else ""
    return Problem(name, rule, f"{name}: {field.description}", value)


def choices_of(annotation: Any) -> list[Any]:
    """The values of the Literals in an annotation, at any depth."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def plain(message: str) -> str:
    """A message of pydantic's as the rule of a Problem."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return message if message.startswith(("is ", "must ")) else f"must be {message}"

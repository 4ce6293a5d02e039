"""Who trains in benchmarks.step: `python -m benchmarks.contenders NAME PRECISION STAGE ACCUMULATION FOLDER`.

    READY and the number of parameters -> for each line on standard input, a number of updates: SECONDS wall processor

FOLDER holds one shard of tokens that all of them read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

SHAPE = {"n_embd": 256, "n_heads": 4, "n_layers": 4, "multiple_of": 64, "max_seq_len": 256, "vocab_size": 8192}
MICRO_BATCH = 4
TOKENS_PER_MICRO_STEP = MICRO_BATCH * SHAPE["max_seq_len"]
_MANY = 10**6


class Case(NamedTuple):
    """Who trains, and how. The bare loop knows no ZeRO and stands at stage 0 for every stage."""

    name: str
    precision: str
    stage: int
    accumulation: int


def _await_windows(train: Callable[[], None], parameters: int) -> NoReturn:
    """Warm up with one update, then train as many as each line on standard input says."""
    train()
    print(f"READY {parameters}", flush=True)
    while True:
        updates = _next_window()
        clock = _Clock()
        for _ in range(updates):
            train()
        clock.tell()


def _next_window() -> int:
    line = sys.stdin.readline()
    if not line:  # whoever measures has gone
        os._exit(0)
    return int(line)


class _Clock:
    """Runs from its construction until `tell`."""

    def __init__(self) -> None:
        self._begun = (time.perf_counter(), time.process_time())

    def tell(self) -> None:
        now = (time.perf_counter(), time.process_time())
        print("SECONDS", *(end - start for start, end in zip(self._begun, now, strict=True)), flush=True)


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _config(case: Case, folder: Path) -> Any:
    from dsllama.config import TrainingConfig

    tokens = case.accumulation * TOKENS_PER_MICRO_STEP
    return TrainingConfig(
        **SHAPE,
        dataset_dir=str(folder),
        batch_size=MICRO_BATCH,
        tokens_per_update=tokens,
        training_tokens=_MANY * tokens,
        precision=case.precision,
        zero_stage=case.stage,
        warmup_iterations=10,
    )


def _loader(config: Any) -> Any:
    from dsllama.data.loader import DatasetLoader

    return DatasetLoader(MICRO_BATCH, config.max_seq_len, 0, 1, config.dataset_dir, "cpu")


def _bare(case: Case, folder: Path) -> NoReturn:
    """In bf16 with fp32 weights for the optimizer, and gradients that accumulate in bf16."""
    import torch

    from dsllama.model import LLaMaTransformer

    config = _config(case, folder)
    loader = _loader(config)
    model = LLaMaTransformer(config, None)
    if case.precision == "bf16":
        model.bfloat16()
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights] if case.precision == "bf16" else weights
    optimizer = torch.optim.AdamW(
        masters, lr=config.max_lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )

    def train() -> None:
        total = 0.0
        for _ in range(case.accumulation):
            loss = model(*loader.get_batch()) / case.accumulation
            loss.backward()
            total += loss.item()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, config.gradient_clipping)
        optimizer.step()
        if masters is not weights:
            torch._foreach_copy_([weight.detach() for weight in weights], masters)
        model.zero_grad()

    _await_windows(train, sum(weight.numel() for weight in weights))


def _ours(case: Case, folder: Path) -> NoReturn:
    from dsllama.deepspeed_config import deepspeed_config
    from dsllama.derived import derive
    from dsllama.training import engine
    from dsllama.training.stopping import StopRequest
    from dsllama.training.trainer import Job, Trainer

    config = _config(case, folder)
    derived = derive(config, 1, SHAPE["vocab_size"])
    ds_json = deepspeed_config(config, derived, "cpu")
    job = Job(config, derived, ds_json, None, _loader(config), None, None)  # type: ignore[arg-type]
    trainer = Trainer(job, engine.start(0, 1), StopRequest())

    def train() -> None:
        trainer.update += 1
        trainer.scheduler.step(trainer.update)
        trainer.train_one_update()

    _await_windows(train, sum(weight.numel() for weight in trainer.engine.module.parameters()))


def _huggingface(case: Case, folder: Path) -> None:
    import torch
    import transformers

    from dsllama.training.engine import start

    config = _config(case, folder)
    start(0, 1)  # joins the process group without compiling DeepSpeed's shared-memory all-reduce
    model = transformers.LlamaForCausalLM(_llama(config))
    parameters = sum(weight.numel() for weight in model.parameters())
    tokens = torch.from_numpy(np.load(folder / "shard.npy").astype(np.int64))
    rows = tokens[: len(tokens) // config.max_seq_len * config.max_seq_len].view(-1, config.max_seq_len)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=case.accumulation,
        max_steps=_MANY,
        learning_rate=config.max_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.gradient_clipping,
        bf16=case.precision == "bf16",
        deepspeed={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": case.accumulation,
            "train_batch_size": MICRO_BATCH * case.accumulation,
            "gradient_clipping": config.gradient_clipping,
            "bf16": {"enabled": case.precision == "bf16"},
            "zero_optimization": {"stage": case.stage},
            "steps_per_print": _MANY,
        },
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        optim="adamw_torch_fused",
    )

    class Windows(transformers.TrainerCallback):
        """Counts updates from the end of one to the end of another, so that the reading of data is among them."""

        left = 1
        clock: _Clock | None = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left:
                return
            if self.clock is None:
                print(f"READY {parameters}", flush=True)
            else:
                self.clock.tell()
            self.left = _next_window()
            self.clock = _Clock()

    data = [{"input_ids": row, "labels": row} for row in rows]
    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Windows()]).train()


def _llama(config: Any) -> Any:
    """The same shape in transformers' words."""
    import transformers

    from dsllama.model import ffn_hidden_size

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=ffn_hidden_size(config.n_embd, config.multiple_of),
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.eps,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
    )


CONTENDERS: dict[str, Callable[[Case, Path], None]] = {"bare": _bare, "ours": _ours, "huggingface": _huggingface}


def main() -> None:
    name, precision, stage, accumulation, folder = sys.argv[1:]
    _one_core()
    CONTENDERS[name](Case(name, precision, int(stage), int(accumulation)), Path(folder))


if __name__ == "__main__":
    main()

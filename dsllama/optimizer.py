"""The optimizer: its JSON, its parameter groups and the configuration's fields behind it, in this one place.

Another optimizer is another one of these functions' branches, and its fields in config.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dsllama.config import TrainingConfig

if TYPE_CHECKING:
    from torch import nn

Json = dict[str, Any]

# The fields that decide it, for messages.
FIELDS = "max_lr, beta1, beta2, adam_eps, weight_decay"
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# The keys of its section that an overlay may repeat, with their types.
KEYS: Json = {
    "type": str,
    "params": {
        **dict.fromkeys(("lr", "eps", "weight_decay"), _NotNegative),
        "betas": list[float],
        **dict.fromkeys(("torch_adam", "fused"), bool),
    },
}


def optimizer_json(config: TrainingConfig) -> Json:
    """DeepSpeed's section "optimizer": torch's fused AdamW, wherever its states lie."""
    parameters: Json = {
        "lr": config.max_lr,
        "betas": [config.beta1, config.beta2],
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
        # On a CPU as fast as DeepSpeedCPUAdam, which each installation would compile for a minute or two.
        "torch_adam": True,
        "fused": True,
    }
    return {"type": "AdamW", "params": parameters}


def parameter_groups(model: nn.Module) -> list[Any]:
    """What `deepspeed.initialize` is given to optimize: all parameters alike."""
    return list(model.parameters())


def settings_of(group: Json) -> Json:
    """What a parameter group is set to, which a resume takes from this run's configuration and not from the checkpoint;
    the rate is the scheduler's."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}

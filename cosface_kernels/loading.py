"""What a state must be to load into a head."""

from typing import Any

from torch.distributed.tensor import DTensor

SHARDED_OR_WHOLE = (
    "{weight} is {there} in the state and {here} in the head, and neither loads into the other. "
    "cosface_kernels.checkpoint.save and checkpoint.load take a head from any number of ranks to any other; "
    "cosface_kernels.convert.load_weight_(head.weight, path) fills either from a file of convert.save_weight."
)


def fit_(state_dict: dict[str, Any], head: Any, prefix: str, assigns: bool, errors: list[str]) -> bool:
    """Makes the state one that torch loads into the head, and adds what is wrong with it to torch's errors.

    Returns:
        Whether the head's weight will be the state's.
    """
    draws, weight, theirs = (f"{prefix}{name}" for name in ("sampler.draws", "weight", "W"))
    if weight not in state_dict and theirs in state_dict:  # (D, C), of pytorch-metric-learning 2.x
        state_dict[weight] = state_dict.pop(theirs).T.contiguous()
    if head.sampler is None:  # the number of draws is nothing to a head that draws none
        state_dict.pop(draws, None)
    else:
        state_dict.setdefault(draws, head.sampler.draws)
    sharded = [isinstance(tensor, DTensor) for tensor in (state_dict.get(weight, head.weight), head.weight)]
    restored = weight in state_dict and sharded[0] == sharded[1]
    if sharded[0] != sharded[1] and not assigns:
        there, here = ("sharded over ranks" if each else "whole" for each in sharded)
        errors.append(SHARDED_OR_WHOLE.format(weight=weight, there=there, here=here))
        state_dict[weight] = head.weight
    elif restored and len(state_dict[weight]) != head.num_classes * head.subcenters:
        count, restored = len(state_dict[weight]), False
        errors.append(f"{weight} is of {count} {_other_size(count, head)}")
        state_dict[weight] = head.weight
    return restored


def _other_size(count: int, head: Any) -> str:
    if head.subcenters == 1:
        return (
            f"classes in the state and of {head.num_classes} in the head: load it into a head of {count}, then "
            "call its resize_classes_(keep=..., new=..., optimizer=...), or, if classes have several sub-centres "
            "there, into one with them, then its drop_subcenters_()."
        )
    return (
        f"rows in the state and of {head.num_classes * head.subcenters} in the head, {head.subcenters} of each of "
        f"{head.num_classes} classes: load it into a head of as many."
    )

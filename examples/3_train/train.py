"""Train an embedding network with a fused head, CosFace or another, verify it on other identities, export it.

    python examples/3_train/train.py --train faces/train.rec --test lfw.bin --epochs 20
    python examples/3_train/train.py --config examples/3_train/configs/casia.yaml
    torchrun --nproc-per-node 8 examples/3_train/train.py --config examples/3_train/configs/ms1m.yaml --amp bf16
    python examples/3_train/train.py --config ... --resume      # after a SIGTERM, or any other end
    python examples/3_train/train.py --train mine --init build/runs/casia/model.safetensors    # fine-tune

--config FILE.yaml has settings under the names below, of which the command line's count last.

The output folder receives checkpoints/, tensorboard/, and at the end model.onnx, model.safetensors, model.json,
head.safetensors and identities.json.

The order of the images and their augmentation depend on the seed and the step alone, so a resumed training is the
uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from cosface_recipes.config import parse
from cosface_recipes.outputs import print_any_name
from cosface_recipes.training import Training, process_group


def main(argv: Sequence[str] | None = None) -> None:
    print_any_name()
    try:
        config = parse(argv, __doc__)
        if config.threads:
            torch.set_num_threads(config.threads)
        with process_group(config):
            Training(config).run()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

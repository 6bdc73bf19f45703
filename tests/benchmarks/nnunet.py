"""nnU-Net's own training step with the 2-d network that it plans for one channel: what its users would wait for.

Another network than ours (plain convolutions, instance norm, outputs at every scale), so images a second compare the
choice of a system, not of a loop. Its trainer is built without plans, folders and loggers, which a step does not use.
"""

from __future__ import annotations

import contextlib
import io
import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.benchmarks.contestants import Case, Run, films, timed


def network(size: int) -> tuple[nn.Module, list[list[int]]]:
    """Return the planned network and its strides: halved down to 4 px, 32 channels doubled up to 512."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = (size // 4).bit_length()
    strides = [[1, 1], *([2, 2] for _ in range(stages - 1))]
    net = PlainConvUNet(
        1, stages, [min(32 * 2**i, 512) for i in range(stages)], nn.Conv2d, 3, strides, 2, 2, 2, conv_bias=True,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    return net, strides


def nnunet_loop(case: Case) -> Run:
    """nnU-Net's train_step on batches as its dataset gives them: float32, one channel, masks at every scale."""
    with contextlib.redirect_stdout(io.StringIO()):  # it names the folders that are not set
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = nnUNetTrainer.__new__(nnUNetTrainer)
    net, strides = network(case.size)
    trainer.device, trainer.is_ddp, trainer.enable_deep_supervision = torch.device(case.device), False, True
    trainer.initial_lr, trainer.weight_decay, trainer.num_epochs = 1e-2, 3e-5, 1000  # its defaults
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    trainer.configuration_manager = SimpleNamespace(batch_dice=True, pool_op_kernel_sizes=strides)
    trainer.print_to_log_file = lambda *words, **_: print(*words, file=sys.stderr)
    trainer.network = net.to(case.device).train()
    if trainer._do_i_compile():
        trainer.network = torch.compile(trainer.network)
    trainer.optimizer, _ = trainer.configure_optimizers()
    trainer.loss = trainer._build_loss()
    trainer.grad_scaler = torch.amp.GradScaler("cuda") if case.device == "cuda" else None
    images, masks = films(case)
    scales = [2**i for i in range(len(strides) - 1)]
    targets: list[Tensor] = [masks[..., ::scale, ::scale].contiguous().float() for scale in scales]
    batch = {"data": images.float() / 128 - 1, "target": targets}
    return timed(lambda: trainer.train_step(batch), case.device)

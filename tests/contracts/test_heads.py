"""What every exit head of the paper's space, and with context, keeps, for both kinds of blocks."""

import pytest
import torch

from messnet.network.exit_head import BlockKind, build_head
from messnet.network.head_space import HeadConfig, HeadSpace

CHANNELS, CLASSES = 64, 5
CONFIGS = (
    *HeadSpace().configs(CHANNELS),
    *HeadSpace(channel_reduction=(1, 4), extra_blocks=(0, 1), rapid_dilation=(False,), context=(1, 3)).configs(
        CHANNELS
    ),
)


@pytest.mark.parametrize("block", ["bottleneck", "inverted_residual"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_head_gives_logits_and_learns(config: HeadConfig, block: BlockKind) -> None:
    head = build_head(config, channels=CHANNELS, num_classes=CLASSES, dilation=2, output_stride=8, block=block, seed=0)
    x = torch.randn(2, CHANNELS, 6, 9, generator=torch.Generator().manual_seed(0))
    logits = head.train()(x)
    assert logits.shape == (2, CLASSES, 6, 9)
    assert logits.isfinite().all()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert head.eval()(x[:1]).shape == (1, CLASSES, 6, 9)  # one image, at run time

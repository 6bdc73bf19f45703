"""What a GPU is asked to do, on a fake one: devices that match, no wait of the host, few operators, small types."""

import copy

import pytest
import torch
from torch.nn.functional import interpolate

from pneumo_dist import config as configuration
from pneumo_dist.model.precision import amp_dtype
from pneumo_dist.model.unet import DecoderBlock, ResNet34UNet
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.training.agreement import DelayedRead
from pneumo_dist.training.step import Stepper, TrainBatch
from pneumo_dist.training.swa import update_batch_norm
from tests.fake_cuda import fake_cuda

FILMS, SIZE = 6, 64
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def built():
    return ResNet34UNet(1, film_head=True)


@pytest.fixture
def network(built):
    return copy.deepcopy(built)


@pytest.fixture
def cuda(network):
    with fake_cuda() as record:
        yield record


def _stepper(network, *settings):
    settings = (f"stage1.size={SIZE}", f"stage1.batch_size={FILMS}", "model.pretrained=none", *settings)
    config = configuration.load(None, settings)
    return Stepper(network, config, config.stage1, Ranks())


def _films():
    images = torch.zeros((FILMS, 1, SIZE, SIZE), dtype=torch.uint8)
    return TrainBatch(images, images, torch.ones(FILMS), FILMS, FILMS)


def _maps(record):
    """Return the feature maps that operators wrote."""
    outputs = [shape for call in record.calls for shape in call.outputs]
    return [shape for shape in outputs if len(shape.size) == 4 and shape.size[0] == FILMS and shape.size[1] > 3]


# The limits are what the step took when the test was written; counting and keeping statistics layer by layer takes 46
# and 276 more.
@pytest.mark.parametrize(("amp", "limit"), [("bf16", 551), ("fp16", 566), ("off", 435)])
def test_a_step_waits_for_nothing_and_starts_few_operators(network, cuda, amp, limit):
    stepper = _stepper(network, f"train.amp={amp}", "train.clip_norm=1")
    late = DelayedRead()
    stepper.step(_films())
    cuda.clear()
    result = stepper.step(_films())
    late.exchange(~result.finite, None)
    assert result.loss.device == stepper.device == CUDA
    assert cuda.waits == []
    assert len(cuda.calls) <= limit


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_every_map_of_a_step_has_the_small_type_and_channels_last(network, cuda, amp):
    stepper = _stepper(network, f"train.amp={amp}")
    cuda.clear()
    stepper.step(_films())
    maps = _maps(cuda)
    assert len(maps) > 200
    assert {shape.dtype for shape in maps} == {stepper.dtype, torch.int64}  # int64: the positions of max pooling
    # The image-level head sends the encoder's last map a gradient that is not channels_last.
    assert {shape for shape in maps if shape.stride[1] != 1 and shape.size[1] < 512} == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upsampling_in_the_small_type_has_the_bits_of_float32(dtype):
    """Values are copied, and a gradient is a sum of four, rounded once, in either type."""
    torch.manual_seed(0)
    block, wide = DecoderBlock(16, 0, 8).to(memory_format=torch.channels_last), {}
    x, upstream = torch.randn(2, 16, 12, 12, dtype=dtype), torch.randn(2, 16, 24, 24, dtype=dtype)
    found = []
    block.conv1.register_forward_pre_hook(lambda _, inputs: wide.update(map=inputs[0]))
    for small in (True, False):
        leaf = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            if small:
                block(leaf, None)
            else:
                wide["map"] = interpolate(leaf.float(), scale_factor=2.0, mode="nearest").to(dtype)
        assert wide["map"].dtype == dtype
        wide["map"].backward(upstream)
        found.append((wide["map"].detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_network_is_compiled_for_one_size_and_rehearses_with_it(network, cuda, monkeypatch):
    """A second size would compile a second graph, for sizes that change: slower ones."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    _stepper(network, "train.compile=true", "stage1.accumulate=2")
    sizes = {call.inputs[0].size[0] for call in cuda.calls if call.name == "aten.convolution"}
    assert asked == [{"dynamic": False}] and sizes == {FILMS // 2}


def test_batch_norm_update_and_inference_wait_for_no_batch(network, cuda):
    model, batch = network.to(CUDA), torch.zeros((FILMS, 1, SIZE, SIZE), dtype=torch.uint8)
    model.lay_out()
    waits = []
    for batches in (1, 2, 4):
        cuda.clear()
        update_batch_norm(model, [batch] * batches, CUDA, torch.bfloat16, Ranks(), StopSignal())
        waits.append(len(cuda.waits))
    assert waits[1] == waits[2]  # the first run also sends the constants of `normalise`
    cuda.clear()
    Predictor([model.eval()], SIZE, CUDA, "none", "bf16").launch(batch)
    assert cuda.waits == []
    assert {shape.dtype for shape in _maps(cuda)} == {torch.bfloat16}


def test_off_is_float32_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert amp_dtype("off", torch.device("cpu")) is None and torch.backends.cudnn.allow_tf32
    assert amp_dtype("off", CUDA) is None and not torch.backends.cudnn.allow_tf32

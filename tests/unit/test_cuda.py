"""What a GPU is asked to do, on a fake one: devices that match, no wait of the host, few operators, small types."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import interpolate
from torch.optim.swa_utils import AveragedModel

from pneumo_dist import config as configuration
from pneumo_dist.config import ConfigError, Train
from pneumo_dist.model.precision import amp_dtype
from pneumo_dist.model.resnet import ResNet34Encoder
from pneumo_dist.model.unet import DecoderBlock, ResNet34UNet
from pneumo_dist.prediction.predictor import Predictor
from pneumo_dist.runtime.processor import set_precision
from pneumo_dist.runtime.ranks import Ranks
from pneumo_dist.runtime.stopping import StopSignal
from pneumo_dist.training.agreement import DelayedRead
from pneumo_dist.training.graph import StepGraph
from pneumo_dist.training.step import Stepper, TrainBatch
from pneumo_dist.training.swa import update_batch_norm
from tests.fake_cuda import cuda_on_cpu, fake_cuda

FILMS, SIZE = 6, 64
CUDA = torch.device("cuda", 0)
REAL = torch.cuda.is_available()


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


def test_averaging_takes_one_operator_and_batch_norm_update_and_inference_wait_for_no_batch(network, cuda):
    model, batch = network.to(CUDA), torch.zeros((FILMS, 1, SIZE, SIZE), dtype=torch.uint8)
    model.lay_out()
    average = AveragedModel(model)
    for _ in range(2):  # the first time copies
        average.update_parameters(model)
    assert cuda.names()["aten._foreach_lerp_"] == 1
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


@pytest.mark.parametrize(
    "device", [cuda_on_cpu, pytest.param(nullcontext, marks=pytest.mark.skipif(not REAL, reason="needs a GPU"))]
)
def test_a_graph_of_a_step_has_the_bits_of_the_steps(monkeypatch, device):
    """In real numbers: numbers of positives, learning rates and a skipped step are no part of the graph.

    Every operation of a step has a deterministic form.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(ResNet34Encoder, "channels", (8, 8, 8, 16, 16))
    monkeypatch.setattr(ResNet34UNet, "widths", (16, 8, 8, 8, 8))
    torch.set_num_threads(1)

    def train(graph):
        stepper = _stepper(
            ResNet34UNet(1, film_head=True), "train.amp=fp16", "stage1.size=32", f"train.cuda_graph={graph}",
            "train.clip_norm=1",
        )  # fmt: skip
        step, generator, results = stepper.step, torch.Generator().manual_seed(0), []
        stepper.set_rates([0.01 * rate for rate in range(1, 9)])
        if graph:
            step = StepGraph(stepper.step, Ranks())
        for number in range(8):
            images = torch.randint(0, 256, (FILMS, 1, 32, 32), dtype=torch.uint8, generator=generator)
            labels = (torch.arange(FILMS) <= number % 4).float()
            masks = (images > 200).to(torch.uint8) * labels.to(torch.uint8)[:, None, None, None]
            if number == 6:
                stepper.set_rates([0.001 * rate for rate in range(1, 9)])
            stepper.scaler._scale.fill_(2.0**60 if number == 5 else 2.0**4)
            result = step(TrainBatch(images, masks, labels, FILMS, int(labels.sum())))
            results.append(torch.cat([torch.as_tensor(value).flatten().float() for value in vars(result).values()]))
        assert [bool(one[5]) for one in results] == [True] * 5 + [False] + [True] * 2
        return torch.stack(results), torch.cat(
            [value.flatten().float() for value in stepper.model.state_dict().values()]
        )

    torch.use_deterministic_algorithms(True)  # raises where there is none
    try:
        with device():
            (eager, weights), (graphed, same) = train(False), train(True)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    assert torch.equal(eager.nan_to_num(), graphed.nan_to_num()) and torch.equal(weights, same)


def test_a_graphed_step_starts_four_copies_and_the_graph(network, cuda):
    step = StepGraph(_stepper(network, "train.cuda_graph=true").step, Ranks())
    for _ in range(4):
        step(_films())
    cuda.clear()
    step(_films())
    assert cuda.waits == [] and len(cuda.calls) == 4


def test_a_graph_refuses_several_ranks_and_a_step_that_waits():
    with pytest.raises(ConfigError, match="needs one rank with a GPU: set train.cuda_graph=false"):
        StepGraph(lambda batch: None, Ranks())
    with cuda_on_cpu():
        with pytest.raises(ConfigError, match="needs one rank"):
            StepGraph(lambda batch: None, Ranks(world_size=2))
        step = StepGraph(lambda batch: float(batch.labels.sum()), Ranks())
        for _ in range(3):
            step(_films())
        with pytest.raises(ConfigError, match="not permitted when stream is capturing: set train.cuda_graph=false"):
            step(_films())


def test_off_is_float32_without_tf32_in_a_stage_and_a_library_call_sets_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert amp_dtype("off", CUDA) is None and torch.backends.cudnn.allow_tf32
    for amp in ("off", "auto"):
        set_precision(Train(amp=amp))
        assert torch.backends.cudnn.allow_tf32 == (amp == "auto")

"""The networks."""

from functools import partial

import pytest
import torch
import torchvision

from models import MobileNetV2, ResNet18, SixViews, TutorialCNN, WhitenedCNN
from models.cpu_layers import Conv3x3, StridedDepthwise


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_tutorial_cnn():
    model = TutorialCNN(num_classes=10)
    assert count(model) == 62_006  # conv 456 + 2416, linear 48120 + 10164 + 850
    assert model(torch.randn(5, 3, 32, 32)).shape == (5, 10)
    assert TutorialCNN(num_classes=7)(torch.randn(5, 3, 32, 32)).shape == (5, 7)


def test_tutorial_cnn_is_the_tutorials():
    """The tutorial's network has each ReLU before its pool. Its logits and gradients are the same as ours."""
    model, images = TutorialCNN(), torch.randn(5, 3, 32, 32)
    conv1, pool, relu, conv2, *_ = model.features
    fc1, _, fc2, _, fc3 = model.classifier
    theirs = [conv1, relu, pool, conv2, relu, pool, torch.nn.Flatten(), fc1, relu, fc2, relu, fc3]
    results = []
    for network in (model, torch.nn.Sequential(*theirs)):
        logits = network(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), model.parameters())])
    torch.testing.assert_close(*results)


def of_one_seed(*networks):
    """Return torchvision's network and ours, made from the same seed, for evaluation. Fail if their weights differ."""
    made = []
    for network in networks:
        torch.manual_seed(0)
        made.append(network(num_classes=10).eval())
    theirs, ours = (network.state_dict() for network in made)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    return made


def test_resnet18_is_torchvisions():
    theirs, ours = of_one_seed(torchvision.models.resnet18, ResNet18)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [ResNet18, WhitenedCNN, partial(WhitenedCNN, mirrored=True)])
def test_a_network_can_be_compiled(network):
    """In bf16, where layers have gradients of their own, torch.compile traces the network as one graph."""
    model, images = network(num_classes=3), torch.randn(4, 3, 32, 32).bfloat16()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("network", [ResNet18, WhitenedCNN])
def test_no_images_have_no_logits(network):
    assert network().eval()(torch.empty(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3x3_is_torchs(side, stride):
    """Output and gradients agree, on the small maps where it is computed in another way and on one where it is not."""
    theirs = torch.nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=False).double()
    ours = Conv3x3(5, 7, stride).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(6, 5, side, side, dtype=torch.double, requires_grad=True)
    outputs = [conv(images) for conv in (theirs, ours)]
    torch.testing.assert_close(*outputs)
    seed = torch.randn_like(outputs[0])
    for one, other in zip(
        *(
            torch.autograd.grad(out, (images, conv.weight), seed)
            for out, conv in zip(outputs, (theirs, ours), strict=True)
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [(3, 3), (8, 5), (4, 7), (9, 9)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 1)])
@pytest.mark.parametrize("count", [1, 10, 13])
def test_conv3x3_in_bf16_is_torchs(size, stride, padding, count):
    """Output and gradients agree, for whole numbers, whose sums are the same in whatever order they are added."""
    images, weights = (torch.randint(-2, 3, shape).float() for shape in ((count, 5, *size), (7, 5, 3, 3)))
    ours = Conv3x3(5, 7, stride, padding)
    ours.weight.data.copy_(weights)
    pairs = [(images.clone().requires_grad_(), weights.requires_grad_()), (images.requires_grad_(), ours.weight)]
    expected = torch.nn.functional.conv2d(*pairs[0], stride=stride, padding=padding)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(images.bfloat16())
    assert ("SideBySide" in type(output.grad_fn).__name__) == (max(size) <= 8)
    assert torch.equal(output, expected.bfloat16())
    seed = torch.randint_like(output, -2, 3)
    theirs = torch.autograd.grad(expected, pairs[0], seed.float())
    for one, other in zip(theirs, torch.autograd.grad(output, pairs[1], seed), strict=True):
        assert torch.equal(one.bfloat16().float(), other)


def test_mobilenetv2_is_torchvisions_without_two_strides():
    theirs, ours = of_one_seed(torchvision.models.mobilenet_v2, MobileNetV2)
    theirs.features[0][0].stride = theirs.features[2].conv[1][0].stride = (1, 1)
    images = torch.randn(2, 3, 32, 32)
    seen = []
    ours.features[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert seen == [(2, 1280, 4, 4)]


def test_strided_depthwise_is_torchs():
    """Output and gradients agree. Under autocast they are computed in the weights' precision."""
    theirs = torch.nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False)
    ours = StridedDepthwise(6)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 6, 8, 8).bfloat16()
    expected = theirs(images.float())
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(images)
    assert torch.equal(output, expected.bfloat16())
    seed = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, ours.weight, seed)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, theirs.weight, seed.float()))


@pytest.mark.parametrize("stem, size", [("imagenet", 8), ("cifar", 16), ("cifar-nopool", 32)])
def test_stems(stem, size):
    model = ResNet18(num_classes=4, stem=stem)
    assert model.arguments == {"num_classes": 4, "stem": stem}
    seen = []
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert seen == [(2, 64, size, size)]
    if stem != "imagenet":
        assert count(model) == count(ResNet18(num_classes=4)) - 64 * 3 * 40  # 3x3 for 7x7


@pytest.mark.parametrize("mirrored", [False, True])
def test_whitened_cnn(mirrored):
    model = WhitenedCNN(num_classes=7, mirrored=mirrored)
    kernels, biases = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256), 2 * (64 + 256 + 256)
    of_pairs = (2 * biases + 7 * 256) // (2 if mirrored else 1)  # batch-norms have weights, which are not learnt
    assert count(model) == 24 * 12 + kernels + of_pairs
    images = torch.randn(200, 3, 32, 32) + 3 * torch.randn(200, 3, 1, 1)  # neighbouring pixels alike, as in photos
    assert model(images).shape == (200, 7) and model(images[:, :, :16, :16]).shape == (200, 7)
    model.whiten(images)
    filters = model.whitening.weight.split(6 if mirrored else 12)
    torch.testing.assert_close(torch.cat(filters[1::2]), -torch.cat(filters[::2]))
    if mirrored:  # the first ones are their own mirror images
        torch.testing.assert_close(filters[0].flip(3), filters[0])
        torch.testing.assert_close(filters[2].flip(3), -filters[2])
        images = torch.cat([images, images.flip(3)])
    outputs = torch.nn.functional.conv2d(images, torch.cat(filters[::2])).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.01, rtol=0)
    assert not model.whitening.weight.requires_grad


@pytest.mark.parametrize("mirrored", [False, True])
def test_white_images_are_whitened(mirrored):
    """Their moments are large and have eigenvalues of 0, some of which rounding makes negative."""
    model, images = WhitenedCNN(mirrored=mirrored), torch.ones(500, 3, 32, 32)
    model.whiten(images * torch.tensor([2.51, 2.6, 2.76])[:, None, None])
    assert model.whitening.weight.abs().max() <= 1.001 * 5e-4**-0.5  # False for NaN


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("colours", [1, 3])
def test_mirror_images_have_the_same_logits(training, colours):
    """If the network is mirrored, in training too, whatever its weights are, and even if the images are grey."""
    model, images = WhitenedCNN(mirrored=True), torch.randn(8, colours, 32, 32).expand(-1, 3, -1, -1)
    model.whiten(images)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if not name.startswith("whitening"):
                values += values.std() * torch.randn_like(values)
        for norm in (norm for block in model.blocks for norm in (block.norm1, block.norm2)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    model.train(training)
    with torch.no_grad():
        logits, mirrored, others = model(images), model(images.flip(3)), model(images.flip(2))
    torch.testing.assert_close(mirrored, logits, rtol=1e-3, atol=1e-4 * logits.std().item())
    assert (others - logits).abs().mean() > 100 * (mirrored - logits).abs().mean()


def test_a_block_begins_as_the_identity():
    """As far as a convolution has as many outputs as inputs, it is the identity. The other outputs are random."""
    for block in WhitenedCNN().blocks:
        for conv in (block.conv1, block.conv2):
            images = torch.randn(2, conv.in_channels, 8, 8)
            padded = torch.nn.functional.pad(images, [1 - conv.padding[0]] * 4)
            torch.testing.assert_close(conv(padded)[:, : conv.in_channels], images)
    for block in WhitenedCNN(mirrored=True).blocks:  # in each half, for its half of the inputs
        for conv in (block.conv1, block.conv2):
            images = torch.randn(2, conv.in_channels, 8, 8)
            rows, columns = conv.padding
            padded = torch.nn.functional.pad(images, (1 - columns, 1 - columns, 1 - rows, 1 - rows))
            symmetric, first, second = images.split(conv.parts, dim=1)
            for half, outputs in zip((first, second), conv(padded).chunk(2, dim=1), strict=True):
                expected = torch.cat([symmetric, half], dim=1)
                torch.testing.assert_close(outputs[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (9, 9), (8, 8)])
@pytest.mark.parametrize("mirrored, pool", [(False, (2, 2)), (True, (2, 3))])
def test_a_block_computes_only_what_its_pool_uses(mirrored, pool, size):
    """The output is that of whole maps."""
    block, images = WhitenedCNN(mirrored=mirrored).blocks[0].eval(), torch.randn(2, 24, *size)
    seen = []
    block.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    x = torch.nn.functional.conv2d(images, block.conv1.kernels(), padding=1)
    x = torch.nn.functional.silu(block.norm1(torch.nn.functional.max_pool2d(x, pool, 2)))
    expected = torch.nn.functional.silu(block.norm2(block.conv2(x)))
    torch.testing.assert_close(block(images), expected)
    assert seen == [(8, size[1] if mirrored else 8)]


def test_six_views():
    model, images = TutorialCNN().eval(), torch.randn(4, 3, 32, 32)
    rows = torch.arange(32)
    up, down = (
        images[:, :, shifted][:, :, :, shifted] for shifted in ((rows + 1).where(rows < 31, 30), (rows - 1).abs())
    )
    expected = sum(w * (model(v) + model(v.flip(3))) for v, w in ((images, 0.25), (up, 0.125), (down, 0.125)))
    torch.testing.assert_close(SixViews(model)(images), expected)

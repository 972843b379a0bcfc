"""Networks of PyTorch's own layers: they compute the same, and tools that know layers by their type count them
rightly."""

import io
from importlib.util import find_spec

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import models  # noqa: F401  (registers the variants with timm)
from models.plain import plain

# At 224 x 224 (tools/complexity.py); normalisations, which the counters add, are under 1 % of it.
MACS = {"strip_mlp_tiny": 3_648_236_800, "sparse_mlp_tiny": 4_989_451_520}


@pytest.mark.parametrize("name", MACS)
@pytest.mark.parametrize("reparameterized", [False, True])
def test_same_outputs(name, reparameterized):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=16, depths=(1, 1, 2, 1), img_size=(64, 96), num_classes=5).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if reparameterized:
        model = reparameterize_model(model)
    copy, x = plain(model), torch.randn(2, 3, 64, 96).double()
    assert copy.training == model.training
    products = [m for m in copy.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    assert [type(m) for m in products if type(m) is not nn.Conv2d] == [nn.Linear]  # the classifier
    modes = [False] if reparameterized else [True, False]
    for training in modes:
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(copy.train(training)(x), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["cycle_mlp_b1", "vip_s7", "hire_mlp_tiny", "wave_mlp_t_dw"])
def test_same_outputs_of_peers(name):
    torch.manual_seed(0)
    sizes = {"widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "num_classes": 5}
    if name == "vip_s7":
        sizes |= {"img_size": (56, 28), "segments": (4, 4, 4, 4)}
    model = timm.create_model(name, **sizes).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    copy, x = plain(model), torch.randn(2, 3, 56, 28).double()
    products = [m for m in copy.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    assert [type(m) for m in products if type(m) is not nn.Conv2d] == [nn.Linear]  # the classifier
    expected = model(x)
    torch.testing.assert_close(copy(x), expected)
    assert expected.std() > 0.1


@pytest.fixture(scope="module", params=[(name, folded) for name in MACS for folded in (False, True)])
def counted(request):
    """A model of the paper's, and its multiply-adds."""
    if not any(map(find_spec, ("fvcore", "torchinfo", "ptflops"))):
        pytest.skip("none of fvcore, torchinfo and ptflops is installed")
    name, folded = request.param
    model = timm.create_model(name).eval()
    return (reparameterize_model(model) if folded else model), MACS[name]


@pytest.mark.slow
def test_fvcore(counted):
    model, macs = counted
    fvcore = pytest.importorskip("fvcore.nn")
    count = fvcore.FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
    assert count.by_operator()["conv"] + count.by_operator()["linear"] == macs
    assert count.total() == pytest.approx(macs, rel=0.01)


@pytest.mark.slow
def test_torchinfo(counted):
    model, macs = counted
    torchinfo = pytest.importorskip("torchinfo")
    summary = torchinfo.summary(plain(model), (1, 3, 224, 224), verbose=0)
    assert summary.total_mult_adds == pytest.approx(macs, rel=0.01)
    assert summary.total_params == sum(p.numel() for p in plain(model).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(counted, backend):
    """Its default knows modules by their type. The other one watches operations and needs no `plain`."""
    model, macs = counted
    ptflops = pytest.importorskip("ptflops")
    count, _ = ptflops.get_model_complexity_info(
        plain(model) if backend == "pytorch" else model,
        (3, 224, 224),
        as_strings=False,
        print_per_layer_stat=False,
        backend=backend,
        ost=io.StringIO(),
    )
    assert count == pytest.approx(macs, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_int8_by_pt2e():
    """PyTorch's quantiser: its rounding alone changes the logits, not its folding of BatchNorms."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    model = timm.create_model("strip_mlp_pico", embed_dim=8, depths=(1, 1, 1, 1), img_size=64)
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        for _ in range(20):  # statistics of BatchNorms that are worth folding
            model(3 * torch.randn(8, 3, 64, 64) + 1)
        copy = plain(reparameterize_model(model.eval()))
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(copy, (images,)).module(), quantizer)
        prepared(images)
        expected, found = model(images), convert_pt2e(prepared)(images)
    error = (found - expected).std() / expected.std()
    assert 1e-4 < error < 0.1

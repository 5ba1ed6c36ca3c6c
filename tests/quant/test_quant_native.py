"""The native kernel against torch's operators bit by bit, against float64 loops, and how it is built and kept."""

from __future__ import annotations

import ctypes
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_networks import small_images, small_quantized
from test_quant_rounding import GRIDS, LAYOUTS, loop
from torch import Tensor

from core.errors import KernelError
from core.grid import Grid
from quant.native import building
from quant.native import kernel as native
from quant.native.kernel import Kernel, choose_kernel, describe_kernel, kernel_for
from quant.rounding import (
    affine,
    affine_gradients,
    channel_gradients,
    codes_of,
    gradients,
    round_to_grid,
    scaled,
)

SHAPES = [(2, 6, 20, 20), (1, 3, 7, 5), (1, 1, 1, 1), (3, 5, 130, 33)]  # the last one has two blocks
SCALES = [0.0173, 0.5, 1.0, 1e-40, 3e-39, 1e-10, 1e30, 3.4e38]


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    yield
    choose_kernel("auto")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no kernel in this process; gives the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "FLAGS", ("-std=gnu11", "-O0", "-fPIC", "-shared"))  # compiles faster
    for function in (native._loaded, native._available):
        function.cache_clear()
    yield tmp_path / "octet"
    for function in (native._loaded, native._available):
        function.cache_clear()


def both(function: Callable[..., Any], *arguments: object) -> tuple[Any, Any]:
    """What the two forms give."""
    choose_kernel("torch")
    expected = function(*arguments)
    choose_kernel("native")
    return function(*arguments), expected


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal, zeros with their signs, and NaN where the other is."""
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(found.dtype, found.dtype)
    found, expected = found.contiguous(), expected.contiguous()
    ours, theirs = found.isnan(), expected.isnan()
    equal = found.view(whole) == expected.view(whole)
    return found.dtype == expected.dtype and bool(((ours & theirs) | (equal & ~ours & ~theirs)).all())


def values(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    """Random values around a grid, among them ties, borders, zeros with signs, infinities and NaN."""
    x = torch.randn(shape) * 60 * scale
    flat = x.view(-1)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    special += [code * scale for code in (-128.5, -127.5, -0.5, 0.5, 1.5, 2.5, 7.5, 127.5, 255.5)]
    places = torch.randperm(len(flat))[: len(special)]
    flat[places] = torch.tensor(special)[: len(places)]
    return x.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_codes_and_gradients_are_those_of_torch_bit_by_bit(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for grid in GRIDS:
        for size in SCALES:
            scale = torch.tensor(size)
            x = LAYOUTS[layout](values(shape, size, dtype))
            g = torch.empty_like(x, dtype=torch.float32).copy_(torch.randn(x.shape))
            assert (kernel_for(scale, x, torch.empty_like(x)) is None) == (
                layout == "every second column" and x.numel() > 1
            )
            found, expected = both(round_to_grid, x, scale, grid)
            assert found.stride() == expected.stride()
            assert same_bits(found, expected), (grid, size)
            for learned in (True, False):
                (found, _), (expected, _) = both(gradients, g, x, scale, grid, learned)
                assert found.stride() == expected.stride()
                # where x / scale is not a number torch gives 0, or g at the end of a tensor
                known = ~(x * scale.reciprocal()).isnan()
                assert same_bits(found[known], expected[known]), (grid, size)
            on_grid = round_to_grid(x, scale, grid).nan_to_num(0.0, 0.0, 0.0)
            kinds = (torch.float32, torch.bfloat16, torch.int8 if grid.signed else torch.uint8)
            for kind in kinds if 1e-38 < size < 1e36 else ():
                unit = 1.0 if kind is kinds[2] else 1 / (grid.high + 1)
                codes, expected = both(codes_of, on_grid, scale, unit, kind)
                assert same_bits(codes, expected), (grid, size, kind)
                found, expected = both(scaled, codes, scale)
                assert same_bits(found, expected), (grid, size, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_gradient_is_that_of_a_float64_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    choose_kernel("native")
    x, scale = (torch.randn(4, 16, 40, 40) + 1).to(dtype), torch.tensor(0.0173)
    g = 1 + 0.1 * torch.randn(x.shape)
    _, found = gradients(g, x, scale, Grid(), learned=True)
    _, expected = loop(x.float(), g, float(scale), -128, 127)
    assert found is not None
    # y is rounded to float32, which is all that is lost: 1e-6 of the sum here; torch's float32 sums lose 1e-4
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_those_of_torch_bit_by_bit(layout: str, axis: int) -> None:
    torch.manual_seed(0)
    grid = Grid(symmetric=True)
    weight = LAYOUTS[layout](values((6, 7, 5, 5), 0.02, torch.float32).nan_to_num(0.0))
    g = torch.empty_like(weight).copy_(torch.randn(weight.shape))
    shape = [-1 if d == axis else 1 for d in range(4)]
    scale = (torch.rand(weight.shape[axis]) * 0.02 + 0.01).view(shape)
    is_native = axis == 0 and layout != "every second column"
    choose_kernel("native")
    assert (kernel_for(scale, weight, torch.empty_like(weight)) is not None) == is_native
    found, expected = both(round_to_grid, weight, scale, grid)
    assert same_bits(found, expected)
    codes, expected = both(codes_of, found, scale, 1 / 128, torch.bfloat16)
    assert same_bits(codes, expected)
    back, expected = both(scaled, codes, 1 / scale)
    assert same_bits(back, expected)
    (found, sums), (expected, wanted) = both(channel_gradients, g, weight, scale, grid, True)
    assert same_bits(found, expected)
    assert found.stride() == expected.stride()
    assert sums.shape == wanted.shape == scale.shape
    for channel in range(weight.shape[axis]):
        x, along = weight.select(axis, channel), g.select(axis, channel)
        exact = loop(x, along, float(scale.flatten()[channel]), grid.low, grid.high)[1]
        assert float(sums.flatten()[channel]) == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 7, 5, 5), (3, 300, 4, 4), (1, 700, 3, 3), (2, 3, 200, 90), (2, 1, 6, 6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_and_bias_are_applied_as_by_torch(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    sums = LAYOUTS[layout](torch.randn(shape).to(dtype))
    steps, bias = torch.rand(shape[1]) + 0.1, torch.randn(shape[1])
    g = torch.empty_like(sums, dtype=torch.float32).copy_(torch.randn(sums.shape))
    found, expected = both(affine, sums, steps, bias, 1)
    assert same_bits(found, expected)
    assert same_bits(found, sums.float() * steps.view(-1, 1, 1) + bias.view(-1, 1, 1))
    assert found.stride() == expected.stride()
    if dtype == torch.float32:
        in_place = sums.clone(memory_format=torch.preserve_format)
        assert affine(in_place, steps, bias, 1, in_place) is in_place
        assert same_bits(in_place, found)
    (found, grad_bias), (expected, _) = both(affine_gradients, g, steps, 1, dtype)
    assert same_bits(found, expected)
    assert torch.allclose(grad_bias, g.double().sum((0, 2, 3)).float(), rtol=1e-6)


def test_no_result_depends_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    choose_kernel("native")
    x, g, scale = torch.randn(21, 32768), torch.randn(21, 32768), torch.tensor(0.0173)  # a block in each row
    x[10], g[0] = x[0], g[0] * 1e20
    g[10] = -g[0]  # so that another order of the blocks' sums would be another sum
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            grad_x, grad_scale = gradients(g, x, scale, Grid(), learned=True)
            y = round_to_grid(x, scale, Grid())
            results = [y, grad_x, grad_scale, codes_of(y, scale), scaled(y, scale)]
            for axis in (0, 1):  # channels that are the outermost and the innermost in memory
                results += affine_gradients(g, g[0, : g.shape[axis]].contiguous(), axis, torch.bfloat16)
                results.append(affine(x, g[0, : x.shape[axis]], x[0, : x.shape[axis]], axis))
            found.append(results)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_trains_as_with_torch_operators(autocast: bool) -> None:
    model, images = small_quantized().train(), small_images(2, size=32)
    parameters = dict(model.named_parameters())

    def step() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(images)
        output.float().square().mean().backward()
        return output.detach()

    grads = []
    for choice in ("torch", "native"):
        choose_kernel(choice)
        output = step()
        grads.append((output, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
    assert torch.equal(grads[0][0], grads[1][0])
    assert len(grads[0][1]) == 20
    for name, expected in grads[0][1].items():
        found = grads[1][1][name]
        if "log_scale" in name or (autocast and "bias" in name):  # float32 sums of another order
            assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()), name
        else:
            assert torch.equal(found, expected), name


def test_what_the_kernel_does_not_read_is_left_to_torch() -> None:
    scale, x = torch.tensor(0.1), torch.randn(4, 6)
    choose_kernel("native")
    assert kernel_for(scale, x, torch.empty_like(x)) is not None
    assert kernel_for(torch.ones(4, 1), x, torch.empty_like(x)) is not None
    others = [x.double(), x.half(), x[:, ::2], x[:1].expand(4, 6), x.to("meta"), x.as_subclass(Marked)]
    for other in others:
        assert kernel_for(scale, other, torch.empty_like(other)) is None
    for many in (torch.ones(1, 6), torch.ones(6), torch.ones(5, 1), torch.ones(2, 4, 1)[:1]):
        assert kernel_for(many, x, torch.empty_like(x)) is None
    assert kernel_for(torch.ones(8, 1)[::2], x, torch.empty_like(x)) is None
    assert kernel_for(scale.double(), x, torch.empty_like(x)) is None
    choose_kernel("torch")
    assert kernel_for(scale, x, torch.empty_like(x)) is None


class Marked(Tensor):
    """A tensor of another type."""


# ------------------------------------------------------------------------------------------------------- building
def test_without_a_compiler_native_fails_early_and_auto_takes_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh / "nothing"))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelError, match=r"no C compiler.*apt-get install gcc.*quant\.kernel=auto"):
        choose_kernel("native")
    x = torch.randn(50)
    with caplog.at_level(logging.INFO, "quant"):
        for _ in range(3):
            y = round_to_grid(x, torch.tensor(0.1), Grid())
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "torch operators (the native kernel cannot be built: no C compiler" in lines[0]
    monkeypatch.setenv("CC", "no-such-program -O2")
    assert "$CC is 'no-such-program'" in describe_kernel()


def test_what_the_compiler_says_is_in_the_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -no-such-option")
    with pytest.raises(
        KernelError, match=r"-no-such-option.*unrecognized command-line option.*Set CC to another"
    ):
        choose_kernel("native")
    assert list(fresh.iterdir()) == []


def test_the_library_is_kept_and_used_by_the_next_process(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building.load_library()
    (kept,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(building, "_compile", lambda *_: pytest.fail("compiled again"))
    assert Path(building.load_library()._name) == kept


@pytest.mark.parametrize("fault", ["truncated", "one bit", "empty", "writable by others"])
def test_a_damaged_or_foreign_library_is_not_loaded(
    fresh: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    building.load_library()
    (kept,) = fresh.iterdir()
    whole = kept.read_bytes()
    if fault == "writable by others":
        kept.chmod(0o666)
    else:
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        kept.write_bytes({"truncated": whole[:-5000], "one bit": changed, "empty": b""}[fault])
    library = building.load_library()
    assert Path(library._name) != kept
    assert "built again" in caplog.text
    assert kept.read_bytes()[-32:] != whole[-5032:-5000]
    assert kept.stat().st_mode & 0o022 == 0
    assert Path(building.load_library()._name) == kept


@pytest.mark.parametrize("fault", ["writable by all", "of another user", "a link", "a file"])
def test_a_folder_of_others_keeps_nothing(
    fresh: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "a file":
        fresh.write_text("")
    elif fault == "a link":
        (fresh.parent / "elsewhere").mkdir()
        fresh.symlink_to("elsewhere")
    else:
        fresh.mkdir(mode=0o700)
        if fault == "writable by all":
            fresh.chmod(0o777)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with caplog.at_level(logging.INFO, "quant"):
        library = building.load_library()
    assert library.octet_round
    assert "the kernel is not kept" in caplog.text
    assert fault == "a file" or list(fresh.iterdir()) == []


def build(folder: str, barrier: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    barrier.wait()
    results.put(bool(building.load_library().octet_round))


def test_processes_may_build_at_once(fresh: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    children = [context.Process(target=build, args=(str(fresh.parent), barrier, results)) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=120) for _ in children] == [True] * 3
    for child in children:
        child.join()
    (kept,) = fresh.iterdir()
    assert Path(building.load_library()._name) == kept


def test_a_library_with_other_results_is_refused(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = building.SOURCE.read_text().replace("rintf(x[i] * inverse)", "roundf(x[i] * inverse)")
    (tmp_path / "other.c").write_text(source)
    monkeypatch.setattr(building, "SOURCE", tmp_path / "other.c")
    with pytest.raises(KernelError, match="does not give the results"):
        Kernel(building.load_library())


def test_another_source_is_another_library(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building.load_library()
    (tmp_path / "other.c").write_text(building.SOURCE.read_text() + "\nint octet_other = 7;\n")
    monkeypatch.setattr(building, "SOURCE", tmp_path / "other.c")
    assert ctypes.c_int.in_dll(building.load_library(), "octet_other").value == 7
    assert len(list(fresh.iterdir())) == 2

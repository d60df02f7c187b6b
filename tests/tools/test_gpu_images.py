"""The committed images of the device kernels: of this text, whole and exact. Nothing is compiled here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgemoe import kernel_images
from tools import gpu_images

TEXT = gpu_images.kernel_text()


def test_the_committed_ptx_is_of_this_text() -> None:
    _, made_of = gpu_images.read_image()
    assert made_of == gpu_images.digest(TEXT), "run python -m tools.gpu_images"


def test_it_has_every_kernel_with_its_threads() -> None:
    ptx, _ = gpu_images.read_image()
    found = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+), 1, 1", ptx)
    listed = re.findall(r"^EDGEMOE_KERNEL\((\w+), (\d+)\)", TEXT["kernel_list.h"], re.MULTILINE)
    assert len(listed) > 30
    assert sorted(found) == sorted(listed)


def test_it_is_exact_and_for_old_drivers() -> None:
    ptx, _ = gpu_images.read_image()
    assert len(list(gpu_images._instructions(ptx))) > 1000
    assert not gpu_images.refused(ptx)
    assert re.findall(r"^\.(?:version|target) .*$", ptx, re.MULTILINE) == [".version 8.0", ".target sm_75"]


def test_the_package_reads_the_same() -> None:
    ptx, _ = gpu_images.read_image()
    assert kernel_images.ptx().decode() == ptx


@pytest.mark.parametrize(
    "line",
    [
        "mul.f32 \t%f14, %f13, 0f33800000;",
        "@%p1 add.f32 \t%f1, %f2, %f3;",
        "{ mad.f32 %f1, %f2, %f3, %f4;",
        "fma.rn.ftz.f32 \t%f22, %f20, %f21, %f63;",
        "add.rz.f32 %f1, %f2, %f3;",
        "div.full.f32 \t%f53, %f51, %f135;",
        "div.approx.f32 %f1, %f2, %f3;",
        "sqrt.approx.f32 %f1, %f2;",
        "rsqrt.approx.f32 %f1, %f2;",
        "ex2.approx.f32 %f1, %f2;",
        "cvt.rn.ftz.f32.f64 %f1, %fd1;",
        "add.rn.sat.f32 %f1, %f2, %f3;",
        "mul.f64 %fd1, %fd2, %fd3;",
        "fma.f16x2 %r1, %r2, %r3, %r4;",
        "atom.global.add.f32 %f1, [%rd1], %f2;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f2};",
    ],
)
def test_what_may_be_fused_flushed_or_approximated_is_refused(line: str) -> None:
    assert gpu_images.refused(f".version 8.0\n\t{line}\n\tret;\n") == [f"2: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "fma.rn.f32 \t%f22, %f20, %f21, %f63;",
        "@%p1 add.rn.f32 \t%f1, %f2, %f3;",
        "div.rn.f32 %f1, %f2, %f3;",
        "rcp.rn.f32 %f1, %f2;",
        "sqrt.rn.f32 %f1, %f2;",
        "cvt.rn.f32.s32 %f1, %r1;",
        "cvt.rni.s32.f32 %r1, %f1;",
        "ld.global.nc.f32 %f1, [%rd1];",
        "setp.gt.f32 %p1, %f1, %f2;",
        "max.f32 %f1, %f2, %f3;",
        "add.s32 %r1, %r2, %r3;",
        "mad.lo.s32 %r1, %r2, %r3, %r4;",
        ".reg .f32 \t%f<64>;",
        ".shared .align 4 .f32 add[4];",
    ],
)
def test_what_is_exact_is_not(line: str) -> None:
    assert gpu_images.refused(f"\t{line}\n") == []


def test_another_text_or_another_name_has_another_digest() -> None:
    digests = {gpu_images.digest(TEXT)}
    digests.add(gpu_images.digest({**TEXT, "kernels.inl": TEXT["kernels.inl"] + "\n"}))
    digests.add(gpu_images.digest({**TEXT, "more.inl": ""}))
    assert len(digests) == 3


def test_an_image_of_another_text_fails_the_check(tmp_path: Path) -> None:
    ptx, _ = gpu_images.read_image()
    gpu_images.write_image(ptx, {**TEXT, "kernels.inl": ""}, tmp_path)
    with pytest.raises(gpu_images.ImageError, match="made of another text"):
        gpu_images.check(tmp_path)
    gpu_images.write_image(ptx, TEXT, tmp_path)
    assert gpu_images.read_image(tmp_path) == (ptx, gpu_images.digest(TEXT))
